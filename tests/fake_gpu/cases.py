"""Runs of the tiny recipe on the GPU stand-in, and the rules that each must keep.

    python -m tests.fake_gpu.cases [NAME ...] [--record]

prints what each run issues per step, and waits that ``waits.yaml`` does not list; ``--record`` writes the counts into
``counts.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mrmae_ds.config.recipe import load_recipe
from tests.support import small_detections
from tests.support.fake_gpu import preload
from tests.support.fake_gpu.report import Report, Wait
from tests.support.processes import REPOSITORY, Finished, environment, finish, rank_processes, run
from tests.support.release_worker import save_teacher
from tests.support.sample_data import write_sample_beton

HERE = Path(__file__).parent
COUNTS, WAITS = HERE / "counts.json", HERE / "waits.yaml"
LIMIT_S = 500.0  # of a run that takes 15 s on an idle core
STEPS, STEPS_PER_EPOCH, BATCH = 6, 3, 8
MICRO_BATCH = {"train_micro_batch_size_per_gpu": 4}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
PAIRS = {"train_micro_batch_size_per_gpu": small_detections.BATCH}
# The engine config below ds_configs/, and sections in place of its own.
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("tiny-zero1", {}),
    "zero3": ("tiny", {}),
    "offload": ("tiny-offload", {}),
    "autocast": ("tiny", AUTOCAST),
    "bf16-zero1": ("tiny-zero1", BF16),
    "bf16-zero3": ("tiny", BF16),
    "detect-zero1": ("tiny-zero1", PAIRS),
    "detect-zero3": ("tiny", PAIRS),
    "detect-autocast": ("tiny", AUTOCAST | PAIRS),
    "detect-bf16-zero1": ("tiny-zero1", BF16 | PAIRS),
    "detect-two-ranks": ("tiny", {"train_micro_batch_size_per_gpu": 1}),
}
SETTINGS = (
    *(f"stages.{stage}.epochs={STEPS // STEPS_PER_EPOCH}" for stage in ("pretrain", "finetune", "probe")),
    *(f"stages.{stage}.batch_size={BATCH}" for stage in ("pretrain", "finetune", "probe")),
    *(f"stages.{stage}.optimizer.warmup_epochs=1" for stage in ("pretrain", "finetune", "probe")),
    "loader.num_workers=1",
    "logging.num_images=0",
    "logging.every_steps=1",
)
AUGMENT = tuple(
    f"stages.finetune.{setting}" for setting in ("mixup=0.8", "cutmix=1.0", "random_erasing=0.5", "drop_path=0.1")
)


@dataclass(frozen=True)
class Case:
    """A run of one stage.

    Attributes:
        engine: name in :data:`ENGINES`.
        stage: of the recipe.
        settings: further recipe values.
        ranks: number of ranks.
        fast: in the default lane.
        recipe: below ds_configs/, except in detection.
    """

    engine: str
    stage: str = "pretrain"
    settings: tuple[str, ...] = ()
    ranks: int = 1
    fast: bool = False
    recipe: str = "tiny"


MILESTONES = ("stages.pretrain.optimizer.milestones=[1.5]",)
SCRATCH = ("stages.finetune.init=scratch",)
CASES = {
    "pretrain-zero1": Case("zero1", fast=True),
    "pretrain-zero3": Case("zero3", fast=True),
    "pretrain-offload": Case("offload"),
    "pretrain-autocast": Case("autocast"),
    "pretrain-bf16-zero1": Case("bf16-zero1"),
    "pretrain-bf16-zero3": Case("bf16-zero3"),
    "pretrain-knn": Case(
        "zero1",
        settings=("stages.pretrain.knn={every_epochs: 1, k: 3}", "checkpoint.async_save=true", "data.backend=pillow"),
    ),
    "placement-step": Case("zero1", settings=("stages.pretrain.placement=step",)),
    "placement-stream": Case("zero1", settings=("stages.pretrain.placement=stream",)),
    "placement-sharded": Case("zero3", settings=("stages.pretrain.placement=sharded",)),
    "mask-tokens-zero1": Case("zero1", recipe="methods/mvp_tiny"),
    "mask-tokens-autocast": Case("autocast", recipe="methods/mvp_tiny"),
    "hog-zero1": Case("zero1", recipe="methods/maskfeat_tiny"),
    "squares-autocast": Case("autocast", recipe="methods/simmim_vit_tiny", settings=MILESTONES),
    "whole-image-zero1": Case("zero1", recipe="methods/fd_tiny"),
    "average-zero1": Case("zero1", recipe="methods/data2vec_tiny"),
    "average-zero3": Case("zero3", recipe="methods/data2vec_tiny"),
    "prompting-zero1": Case("zero1", recipe="methods/milan_tiny"),
    "finetune-zero1": Case("zero1", "finetune", (*SCRATCH, *AUGMENT), fast=True),
    "finetune-zero3": Case("zero3", "finetune", (*SCRATCH, "stages.finetune.rand_augment=rand-m9-mstd0.5-inc1")),
    "finetune-bf16": Case("bf16-zero1", "finetune", (*SCRATCH, *AUGMENT)),
    "detect-zero1": Case("detect-zero1", "detect"),
    "detect-zero3": Case("detect-zero3", "detect"),
    "detect-autocast": Case("detect-autocast", "detect"),
    "detect-bf16-zero1": Case("detect-bf16-zero1", "detect"),
    "detect-two-ranks": Case("detect-two-ranks", "detect", ranks=2),
    "two-ranks-zero1": Case("zero1", ranks=2),
    "two-ranks-zero3": Case("zero3", ranks=2, settings=("stages.pretrain.placement=sharded",)),
    "two-ranks-average": Case("zero3", ranks=2, recipe="methods/data2vec_tiny"),
}


class Workspace:
    """Folder with a data set, a teacher, engine configs and runs.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        small_detections.write_detection_data(folder / "coco")
        data = write_sample_beton(folder, train=STEPS_PER_EPOCH * BATCH, val=10)
        self.settings = (f"data.train={data[0]}", f"data.val={data[1]}", *SETTINGS)
        self.teacher = f"teachers.mae.source={save_teacher(folder / 'teacher')}"
        for name, (file, sections) in ENGINES.items():
            config = json.loads((REPOSITORY / "ds_configs" / f"{file}.json").read_text())
            (folder / f"{name}.json").write_text(json.dumps(config | MICRO_BATCH | sections))

    def arguments(self, case: Case, name: str) -> list[str | Path]:
        """Return the command line of train.py for a run in ``FOLDER/NAME``."""
        recipe, settings = Path(f"ds_configs/{case.recipe}.yaml"), list(self.settings)
        if case.stage == "detect":
            recipe, settings = small_detections.RECIPE, small_detections.overrides(self.folder / "coco")
        elif "mae" in load_recipe(REPOSITORY / recipe).teachers:
            settings += [self.teacher]
        where = ["--recipe", recipe, "--stage", case.stage, "--run", self.folder / name]
        return ["--ds_config", self.folder / f"{case.engine}.json", *where, *settings, *case.settings]

    def run(self, case: Case, name: str) -> tuple[list[Finished], list[Report]]:
        """Train on the stand-in; return what each rank printed and reported."""
        if case.ranks == 1:
            done, report = self.program(name, "train.py", *self.arguments(case, name))
            return [done], [report]
        out = self.folder / f"{name}.json"
        program = ["-m", "tests.support.fake_gpu", "--out", str(out), "train.py"]
        done = finish(rank_processes(case.ranks, *self.arguments(case, name), program=program), LIMIT_S)
        return done, [Report.read(out.with_stem(f"{name}-{rank}")) for rank in range(case.ranks)]

    def program(self, name: str, *command: str | Path) -> tuple[Finished, Report]:
        """Run a program on the stand-in; return what it printed and reported."""
        out = self.folder / f"report-{name}.json"
        done = run([sys.executable, "-m", "tests.support.fake_gpu", "--out", out, *command], LIMIT_S, environment())
        return done, Report.read(out) if out.exists() else Report()

    def losses(self, name: str, stage: str = "pretrain") -> list[float]:
        """Return the logged losses of a run."""
        lines = (self.folder / name / stage / "metrics.jsonl").read_text().splitlines()
        return [value["loss"] for value in map(json.loads, lines) if "loss" in value]


def versions() -> dict[str, str]:
    """Return the versions that decide how many kernels are launched."""
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}


def issued(report: Report, ranks: int) -> dict[str, int]:
    """Return the most that a step issues, by kind; waits are those of all threads, also of libraries in C++.

    Several ranks use gloo, whose copies and waits are not those of NCCL and are left out.
    """
    kinds = [kind for kind in report.counts[-1] if kind in ("launches", "library_calls") or ranks == 1]
    kinds = [kind for kind in kinds if kind != "races"]
    return {kind: max(counts[kind] for counts in report.counts) for kind in kinds}


def violations(name: str, done: Sequence[Finished], reports: Sequence[Report]) -> list[str]:
    """List the broken rules: exit status, overwritten buffers, unlisted waits, more launches than recorded."""
    failed = [f"rank {rank} ended with {d.status}:\n{(d.stdout + d.stderr)[-3000:]}" for rank, d in enumerate(done)]
    broken = [text for text, d in zip(failed, done, strict=True) if d.status]
    recorded = json.loads(COUNTS.read_text())
    for report in [] if broken else reports:
        broken += [f"{report.races} pinned buffers were overwritten while a copy read them"] if report.races else []
        broken += unlisted_waits(report)
        if recorded["versions"] == versions():
            limits = recorded["runs"][name]
            broken += [
                f"{value} {kind} in a step, {limits[kind]} in {COUNTS.name}"
                for kind, value in issued(report, len(reports)).items()
                if value > limits[kind]
            ]
    return broken


def unlisted_waits(report: Report) -> list[str]:
    """List waits that ``waits.yaml`` does not have, or has less often."""
    listed = yaml.safe_load(WAITS.read_text())
    per = {"step": 1, "micro_batch": report.facts.get("accumulation", 1), "group": report.facts.get("groups", 1)}
    broken, used = [], Counter[int]()
    for wait, times in report.in_step.items():
        entry = next((i for i, entry in enumerate(listed["in_steps"]) if _matches(entry, wait)), None)
        if entry is None:
            broken.append(f"{times / len(report.counts):g} waits a step, not in {WAITS.name}: {wait}")
        else:
            used[entry] += times
    for entry, times in used.items():
        values = listed["in_steps"][entry]
        limit = values["at_most"] * per[values["per"]]
        if times / len(report.counts) > limit:
            broken.append(f"{times / len(report.counts):g} waits a step, {limit} in {WAITS.name}: {values}")
    anywhere = [entry for entry in listed["in_steps"] if "where" not in entry]
    between = {wait.key[0] for wait in report.between if not any(_matches(entry, wait) for entry in anywhere)}
    between -= {entry["where"] for entry in listed["between_steps"]}
    return broken + [f"waits between steps, not in {WAITS.name}: {where}" for where in sorted(between)]


def _matches(entry: dict[str, Any], wait: Wait) -> bool:
    where, via = wait.key
    return entry.get("where", where) == where and entry.get("via", "") == via


def main() -> None:
    """Run cases and print, or record, what they issue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*CASES], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--record", action="store_true", help=f"write {COUNTS.name}")
    args = parser.parse_args()
    if reason := preload.missing_requirement():
        sys.exit(f"the GPU stand-in {reason}")
    runs: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for name in args.names:
            done, reports = workspace.run(CASES[name], name)
            print(f"## {name}\n" + "\n".join(report.text() for report in reports), flush=True)
            if any(d.status for d in done):
                sys.exit("\n".join(d.stderr[-3000:] for d in done))
            print("\n".join(text for report in reports for text in unlisted_waits(report)), flush=True)
            counts = [issued(report, len(reports)) for report in reports]
            runs[name] = {kind: max(count[kind] for count in counts) for kind in counts[0]}
    if args.record:
        runs = json.loads(COUNTS.read_text())["runs"] | runs
        rows = ",\n".join(f'  "{name}": {json.dumps(runs[name])}' for name in CASES if name in runs)
        COUNTS.write_text(f'{{\n "versions": {json.dumps(versions())},\n "runs": {{\n{rows}\n }}\n}}\n')


if __name__ == "__main__":
    main()
