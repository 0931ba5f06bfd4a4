"""Compare a pre-training step of MCMAE Base with the authors' public code, on the CPU.

    python benchmarks/convmae.py --authors PATH --out FILE.json

PATH is a clone of https://github.com/Alpha-VL/ConvMAE, whose ``models_convmae.py`` is imported. Both models get the
same weights, images and masking noise; first their losses and gradients must be equal within rounding. Then they take
turns, step by step in one process, so that other load on the machine affects both.

A step is forward and backward, and AdamW as either project creates it on a CPU. Seconds are wall-clock time, the median
over the rounds; a ratio is the median of the rounds' ratios, the authors' time over ours. ``CPU ratio`` is that of the
process's CPU time, which other load hardly changes (with ``--threads 1``). No loader and no DeepSpeed engine runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
KEEP_RATIO = 0.25
PARTS, CLOCKS = ("forward, backward", "with AdamW"), ("wall", "CPU")
# Largest relative difference of the losses, and of the whole gradient.
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (2e-3, 1e-1)}


class Step:
    """A model and its optimizer.

    Args:
        model: the module.
        loss: function of images that computes the loss and draws the noise from torch's generator.
        optimizer: over the model's parameters.
    """

    def __init__(self, model: Any, loss: Any, optimizer: Any) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer

    def gradients(self, images: Any, bf16: bool) -> float:
        """Run forward and backward; return the loss."""
        import torch

        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self.loss(images)
        loss.backward()
        return float(loss.detach())

    def seconds(self, images: Any, bf16: bool) -> dict[str, float]:
        """Run a step; return wall-clock and CPU seconds of forward and backward, and of those with the update."""
        marks = [(time.perf_counter(), time.process_time())]
        self.gradients(images, bf16)
        marks.append((time.perf_counter(), time.process_time()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append((time.perf_counter(), time.process_time()))
        ends = zip(PARTS, marks[1:], strict=True)
        return {f"{part} {clock}": end[i] - marks[0][i] for part, end in ends for i, clock in enumerate(CLOCKS)}


def authors_step(folder: Path) -> Step:
    """Build the authors' Base with their AdamW."""
    import torch

    if not (folder / "models_convmae.py").is_file():
        sys.exit(f"--authors {folder}: no models_convmae.py; give a clone of https://github.com/Alpha-VL/ConvMAE")
    sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's old module names
        from models_convmae import convmae_convvit_base_patch16  # type: ignore[import-not-found]
    model = convmae_convvit_base_patch16(norm_pix_loss=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    return Step(model, lambda images: model(images, 1 - KEEP_RATIO)[0], optimizer)


def our_step(authors: Any) -> tuple[Step, dict[str, str]]:
    """Build this project's Base with the authors' weights; return it, and our name of each of the authors' tensors."""
    import torch

    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.factory import build_pretraining
    from mrmae_ds.models.masking import choose_visible
    from mrmae_ds.training.param_groups import adamw, pretrain_groups
    from mrmae_ds.weights.formats import read_tensor_file
    from mrmae_ds.weights.identify import PIXEL_HEAD, identify
    from mrmae_ds.weights.load import load_pretrained

    recipe = load_recipe(REPOSITORY / "ds_configs/baselines/mcmae_base.yaml")
    assert recipe.stages.pretrain is not None
    model, _ = build_pretraining(recipe, recipe.stages.pretrain)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "authors.pth"
        torch.save({"model": authors.state_dict()}, file)
        print(f"weights: {load_pretrained(model, file)}", file=sys.stderr)
        found = identify(read_tensor_file(file)).names
    names = {name: ours.replace(PIXEL_HEAD, "heads.pixels.") for name, ours in found.items()}
    optimizer = adamw((0.9, 0.95))(pretrain_groups(model, 0.05), False)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    grid = model.encoder.grid

    def loss(images: Any) -> Any:
        noise = torch.rand(len(images), grid[0] * grid[1])
        return model(images, choose_visible(noise, grid, KEEP_RATIO), {})["loss"]

    return Step(model, loss, optimizer), names


def compare(authors: Step, ours: Step, names: dict[str, str], images: Any, precision: str) -> dict[str, float]:
    """Return the relative differences of losses and gradients on equal weights; exit if they exceed the tolerance.

    ``names`` maps the authors' names of tensors to ours.
    """
    expected, found = (step.gradients(images, precision == "bfloat16") for step in (authors, ours))
    theirs, own = (dict(step.model.named_parameters()) for step in (authors, ours))
    trained = {name: other for name, other in names.items() if name in theirs and theirs[name].requires_grad}
    if set(trained.values()) != {name for name, parameter in own.items() if parameter.requires_grad}:
        sys.exit("the models do not train the same tensors")
    apart = sum(float((theirs[a].grad - own[b].grad).double().square().sum()) for a, b in trained.items())
    whole = sum(float(theirs[a].grad.double().square().sum()) for a in trained)
    for step in (authors, ours):
        step.optimizer.zero_grad(set_to_none=True)
    result = {
        "loss": expected,
        "loss_difference": abs(found - expected) / expected,
        "gradient_difference": (apart / whole) ** 0.5,
    }
    limits = dict(zip(("loss_difference", "gradient_difference"), TOLERANCE[precision], strict=True))
    if any(result[name] > limit for name, limit in limits.items()):
        sys.exit(f"{precision}: the models differ: {result}, allowed are {limits}")
    return result


def measure(authors: Step, ours: Step, images: Any, precision: str, rounds: int) -> dict[str, Any]:
    """Time both models in turn."""
    times: dict[str, list[dict[str, float]]] = {"authors": [], "ours": []}
    for number in range(rounds + 1):
        for name, step in {"authors": authors, "ours": ours}.items():
            seconds = step.seconds(images, precision == "bfloat16")
            if number:  # the first round warms up
                times[name].append(seconds)
    result: dict[str, Any] = {"rounds_s": times}
    for key in times["ours"][0]:
        pairs = [(a[key], b[key]) for a, b in zip(times["authors"], times["ours"], strict=True)]
        result[key] = {
            "authors_s": statistics.median(a for a, _ in pairs),
            "ours_s": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
        }
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown."""
    lines = ["| precision | batch | part | authors, s | ours, s | ratio | CPU ratio |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for part in PARTS:
            wall, cpu = (row[f"{part} {clock}"] for clock in CLOCKS)
            cells = f"{wall['authors_s']:.2f} | {wall['ours_s']:.2f} | {wall['ratio']:.2f} | {cpu['ratio']:.2f}"
            lines.append(f"| {row['precision']} | {row['batch']} | {part} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True, help="clone of the authors' repository")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each model")
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    authors = authors_step(args.authors)
    ours, names = our_step(authors.model)
    images = torch.randn(args.batch, 3, 224, 224)
    # Before any update, which would let the weights drift apart.
    equal = {precision: compare(authors, ours, names, images, precision) for precision in args.precision}
    rows = []
    for precision in args.precision:
        found = measure(authors, ours, images, precision, args.rounds)
        rows.append({"precision": precision, "batch": args.batch, "equality": equal[precision], **found})
    print(table(rows))
    if args.out:
        write_result(args.out, 1, "cpu", threads=args.threads, rows=rows)


if __name__ == "__main__":
    main()
