"""Images of what runs learned: where students and teachers look (Fig. 3 of the paper), and reconstructions.

Shapes: N images, S x S pixels, h x w grid of patches, L = h * w.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.figures.finished_run import ShownRun
from mrmae_ds.figures.plots import HIDDEN, attention_grid, denormalize, reconstruction_grid
from mrmae_ds.figures.select_images import Chosen, choose_images
from mrmae_ds.figures.teachers import short_source
from mrmae_ds.models.masking import VisibleSet, choose_visible
from mrmae_ds.models.objectives import PIXELS, patchify, unpatchify
from mrmae_ds.models.pretrain import PretrainModel, masked_pixels
from mrmae_ds.teachers import build_teacher
from mrmae_ds.teachers.base import describe_importance
from mrmae_ds.teachers.sources.checkpoint import encoder_attention

IMAGES = "images"
COMPARED = "compared"
_TEACHER = "Teacher "
_USUAL = 8
_AT_ONCE = 8  # images whose attention is computed together: it takes memory
_MODES = {
    "random": "at random",
    "sample": "in proportion to the importance that {} gives them",
    "topk": "as those to which {} gives most importance",
}


def show_run(stage_dir: Path) -> list[Path]:
    """Draw what a pre-training that has just ended learned, as its recipe's ``logging.num_images`` says.

    Returns:
        The PNG files, in ``stage_dir/images``; none for other stages, or if no images are wanted.

    Raises:
        UserError: see :func:`show_runs`.
    """
    run = ShownRun.open(stage_dir)
    return show_runs([stage_dir]) if run.kind == "pretrain" and run.recipe.logging.num_images else []


def show_runs(
    sources: Sequence[Path],
    images: Sequence[str] = (),
    *,
    count: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> list[Path]:
    """Draw attention maps of one or several runs on the same images, and reconstructions of those that make any.

    The first run says which part of an image is seen and has the validation set. The first pre-training with teachers,
    or else the first, has the teachers and the mask. A teacher that cannot be loaded is left out, which is told on
    stderr.

    Args:
        sources: stage folders (runs/NAME/STAGE) or model files, of pre-trainings and fine-tunings.
        images, count: see :func:`~mrmae_ds.figures.select_images.choose_images`; without a count there are as many
            as the first run's recipe says (``logging.num_images``), or 8 if it says none.
        seed: of the mask.
        out: folder for the files; None is ``images`` beside the first run's weights, for several runs
            ``images/compared`` there.

    Returns:
        The PNG files: attention.png and, if a run predicts pixels, reconstructions.png.

    Raises:
        UserError: for a run without weights, images that cannot be read, or a folder that cannot be written.
    """
    runs = [ShownRun.open(source) for source in sources]
    first, labels = runs[0], _labels(runs)
    chosen, told = choose_images(first.recipe.data.val, images, count, first.recipe.logging.num_images or _USUAL)
    if told:
        _tell(told)
    folder = _folder(runs, out)
    view = first.image_size
    pretrained = [run for run in runs if run.kind == "pretrain"]
    lead = next((run for run in pretrained if run.pretraining.teachers), next(iter(pretrained), None))
    looks = _Looks({}, {})
    mask = _teach(lead, chosen.cut(view, lead.image_size), looks, seed) if lead else None
    rebuilt = {}
    for run, label in zip(runs, labels, strict=True):
        result = _study(run, label, chosen.cut(view, run.image_size), looks, mask)
        if result is not None:
            rebuilt[label] = result
    written = [folder / "attention.png"]
    attention_grid(
        chosen.cut(view, view),
        looks.maps,
        None if mask is None else 1 - mask.visible.mask.unflatten(1, mask.visible.grid),
        written[0],
        captions=chosen.captions,
        title=f"Attention of {_title(runs)}",
        legend=[*looks.legend(), *([f"Patches are kept {mask.how}."] if mask else [])],
    )
    if lead and mask and rebuilt:
        written.append(folder / "reconstructions.png")
        makers = [run for run, label in zip(runs, labels, strict=True) if label in rebuilt]
        _draw_reconstructions(lead, chosen, view, mask, rebuilt, written[-1], _title(makers))
    return written


@dataclass
class _Looks:
    """Maps [N, h, w] by label, in the order of the rows, and what each of them is, in words."""

    maps: dict[str, Tensor]
    words: dict[str, str]

    def add(self, label: str, importance: Tensor, grid: tuple[int, int], words: str) -> None:
        """A row: ``importance`` is [N, L]."""
        self.maps[label], self.words[label] = importance.unflatten(1, grid), words

    def legend(self) -> list[str]:
        """A sentence for each kind of map."""
        kinds: dict[str, list[str]] = {}
        for label, words in self.words.items():
            method, name, *_ = label.split("\n")
            kinds.setdefault(words, []).append(method if method.startswith(_TEACHER) else f"{method} {name}")
        return [f"{', '.join(dict.fromkeys(labels))}: {words}." for words, labels in kinds.items()]


class _Mask(NamedTuple):
    """The visible set, and how it was drawn, in words."""

    visible: VisibleSet
    how: str


class Reconstruction(NamedTuple):
    """Images [N, 3, S, S]: predictions in the places of removed patches, and in all places.

    ``standardized``: the model predicts patches without their mean and deviation, and got both from the true patch.
    """

    pasted: Tensor
    alone: Tensor
    standardized: bool


@torch.no_grad()
def _teach(run: ShownRun, pixels: Tensor, looks: _Looks, seed: int) -> _Mask:
    """Add the rows of a pre-training's teachers and draw its mask, of pixels [N, 3, S, S] in 0 to 1."""
    stage, grid = run.pretraining, run.grid
    importance = None
    for name in stage.teachers:
        config = run.recipe.teachers[name]
        try:
            teacher = build_teacher(name, config, run.recipe.data, run.image_size, grid)
        except UserError as error:
            _tell(f"drawn without teacher {name}, which cannot be loaded any more: {error}")
            continue
        given = torch.cat([teacher(part).importance for part in pixels.split(_AT_ONCE)])
        looks.add(f"{_TEACHER}{name}\n{short_source(config.source)}", given, grid, teacher.details["importance"])
        if name == stage.masking.teacher:
            importance = given
    mode = stage.masking.mode
    if mode != "random" and importance is None:
        _tell(f"the mask is drawn at random, not by teacher {stage.masking.teacher}")
        mode = "random"
    noise = torch.rand(len(pixels), grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    visible = choose_visible(noise, grid, stage.masking.keep_ratio, mode, importance)
    return _Mask(visible, _MODES[mode].format(f"teacher {stage.masking.teacher}"))


@torch.no_grad()
def _study(run: ShownRun, label: str, pixels: Tensor, looks: _Looks, mask: _Mask | None) -> Reconstruction | None:
    """Add a student's row of pixels [N, 3, S, S] in 0 to 1, under ``label``.

    Returns:
        What it reconstructs, where it predicts pixels and the mask is one of its grid.
    """
    model = run.load()
    encoder = model.encoder if isinstance(model, PretrainModel) else model
    images = (pixels - torch.tensor(run.mean).view(1, 3, 1, 1)) / torch.tensor(run.std).view(1, 3, 1, 1)
    words = describe_importance(encoder.num_prefix_tokens > 0)
    importance = torch.cat([encoder_attention(encoder, part)[1] for part in images.split(_AT_ONCE)])
    looks.add(label, importance, encoder.grid, words)
    if not isinstance(model, PretrainModel) or mask is None:
        return None
    if encoder.grid != mask.visible.grid:
        _tell(f"{run.path}: no reconstructions, its grid of patches is not the first pre-training's")
        return None
    try:
        result = reconstruct(model, images, mask.visible)
    except UserError as error:
        _tell(f"{run.path}: no reconstructions: {error}")
        return None
    if result is None:
        return None
    pasted, alone = (torch.from_numpy(denormalize(part, run.mean, run.std)) for part in result[:2])
    return Reconstruction(pasted, alone, result.standardized)


def reconstruct(model: PretrainModel, images: Tensor, visible: VisibleSet) -> Reconstruction | None:
    """What a pre-trained model makes of normalized images [N, 3, S, S]; None without a pixel objective.

    Predictions of standardized pixels get back the mean and the deviation of the true patch.

    Raises:
        UserError: if the pixel objective's normalization cannot be undone.
    """
    specs = {name: spec for name, spec in model.objectives.items() if (spec.target, spec.tap) == (PIXELS, "decoder")}
    if not specs:
        return None
    name, spec = next(iter(specs.items()))
    predicted = model.predict(images, visible)[name].float()
    true = patchify(images, model.encoder.stride)
    if spec.normalize == "standardize":
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    elif spec.normalize != "none":
        raise UserError(f"objectives.{name}.normalize: {spec.normalize} cannot be undone to show pixels")
    removed = visible.mask[..., None]
    parts = (predicted * removed + true * (1 - removed), predicted)
    pasted, alone = (unpatchify(part, model.encoder.grid, model.encoder.stride) for part in parts)
    return Reconstruction(pasted, alone, spec.normalize == "standardize")


def _draw_reconstructions(
    lead: ShownRun,
    chosen: Chosen,
    view: int,
    mask: _Mask,
    rebuilt: dict[str, Reconstruction],
    path: Path,
    title: str,
) -> None:
    pixels = chosen.cut(view, lead.image_size)
    if len(rebuilt) == 1:
        only = next(iter(rebuilt.values()))
        rows = {"Reconstructed": only.pasted, "Output alone": only.alone}
    else:
        rows = {f"Reconstructed\n{label}": parts.pasted for label, parts in rebuilt.items()}
    legend = ["Reconstructed: the visible patches as they are, the removed ones as predicted."]
    if len(rebuilt) == 1:
        legend.append("Output alone: what the decoder says everywhere, also of visible patches.")
    if any(parts.standardized for parts in rebuilt.values()):
        legend.append(
            "Patches are predicted without their mean and contrast (normalize: standardize); both are the true patch's."
        )
    reconstruction_grid(
        pixels,
        masked_pixels(pixels, mask.visible, lead.stride, fill=HIDDEN),
        rows,
        path,
        keep_ratio=lead.pretraining.masking.keep_ratio,
        captions=chosen.captions,
        title=f"Reconstructions by {title}",
        legend=legend,
    )


def _labels(runs: Sequence[ShownRun]) -> list[str]:
    """The rows' labels: method, run, training; numbered where runs share all of these."""
    labels: list[str] = []
    for run in runs:
        label, number = run.label(), 2
        while label in labels:
            label, number = f"{run.label()} ({number})", number + 1
        labels.append(label)
    return labels


def _title(runs: Sequence[ShownRun]) -> str:
    return runs[0].describe() if len(runs) == 1 else f"{len(runs)} runs on the same images"


def _folder(runs: Sequence[ShownRun], out: Path | None) -> Path:
    beside = runs[0].path.parent / IMAGES
    folder = out or (beside if len(runs) == 1 else beside / COMPARED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be made a folder ({error.strerror}); name another") from None
    return folder


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
