"""Visualize finished runs: attention maps of students and teachers (Fig. 3 of the paper), and reconstructions.

Shapes: N images, S x S pixels, h x w grid of patches, L = h * w.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.figures.plots import HIDDEN, attention_grid, denormalize, reconstruction_grid
from mrmae_ds.figures.select_images import NUM_IMAGES, select_images
from mrmae_ds.figures.teachers import CHUNK, importance_of, sample_mask, short_source
from mrmae_ds.files import make_folder
from mrmae_ds.models.masking import TokenMask, VisibleSet
from mrmae_ds.models.objectives import PIXELS
from mrmae_ds.models.pretrain import PretrainModel, masked_pixels
from mrmae_ds.models.reconstruction import Reconstruction, reconstruct
from mrmae_ds.teachers import build_teacher
from mrmae_ds.teachers.base import describe_importance
from mrmae_ds.teachers.sources.checkpoint import encoder_attention
from mrmae_ds.weights.finished_run import FinishedRun, SavedEncoder, open_saved

logger = logging.getLogger(__name__)

IMAGES = "images"
COMPARED = "compared"
_TEACHER = "Teacher "
_PASTED = "Reconstructed: visible patches unchanged, removed ones as predicted."
_MODES = {
    "random": "at random",
    "sample": "in proportion to the importance that {} gives them",
    "topk": "as those to which {} gives most importance",
    "block": "outside blocks that are drawn at random",
    "none": "all",
}


def show_run(stage_dir: Path) -> list[Path]:
    """Visualize a pre-training that has just ended, on ``logging.num_images`` of its recipe's images.

    Returns:
        The PNG files, in ``stage_dir/images``; none for other stages, or if ``logging.num_images`` is 0.

    Raises:
        UserError: as for :func:`show_runs`.
    """
    run = FinishedRun.open(stage_dir)
    return show_runs([stage_dir]) if run.kind == "pretrain" and run.recipe.logging.num_images else []


def show_runs(
    sources: Sequence[Path],
    images: Sequence[str] = (),
    *,
    count: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> list[Path]:
    """Draw attention maps of one or several runs on the same images, and reconstructions where a run predicts pixels.

    The first run determines the crop and the validation set; the first pre-training with teachers, or else the first
    pre-training, the teachers and the mask. A teacher that cannot be loaded is omitted with a warning.

    Args:
        sources: stage folders (runs/NAME/STAGE) or model files, of pre-trainings and fine-tunings, or detectors and
            weights files of other projects, of which only the attention is drawn.
        images: numbers of validation images, files or folders (see
            :func:`~mrmae_ds.figures.select_images.select_images`).
        count: number of images; None is the first run's ``logging.num_images``, or 8 if that is 0.
        seed: of the mask.
        out: folder for the files; None is ``images`` beside the first run's weights, or for several runs
            ``images/compared`` there.

    Returns:
        The PNG files: attention.png and, if a run predicts pixels, reconstructions.png.

    Raises:
        UserError: for a run without weights, images none of which can be read, or a folder that cannot be written; and,
            when the others are drawn, for images that cannot be read.
    """
    runs = [open_saved(source, detectors=True) for source in sources]
    first, labels = runs[0], _labels(runs)
    val = next((run.val_data for run in runs if run.val_data is not None), None)
    selection = select_images(val, images, count, first.num_images or NUM_IMAGES)
    if selection.note:
        logger.warning(selection.note)
    folder = _folder(runs, out)
    view = first.image_size
    pretrained = [run for run in runs if isinstance(run, FinishedRun) and run.kind == "pretrain"]
    lead = next((run for run in pretrained if run.pretraining.teachers), next(iter(pretrained), None))
    masked = [label for run, label in zip(runs, labels, strict=True) if run in pretrained]
    owner = _owner(masked, pretrained.index(lead)) if lead and len(runs) > 1 else ()
    maps = _AttentionMaps({}, {})
    mask = _add_teachers(lead, selection.crop(view, lead.image_size), maps, seed) if lead else None
    reconstructions = {}
    for run, label in zip(runs, labels, strict=True):
        result = _add_student(run, label, selection.crop(view, run.image_size), maps, mask)
        if result is not None:
            reconstructions[label] = result
    written = [folder / "attention.png"]
    attention_grid(
        selection.crop(view, view),
        maps.maps,
        None if mask is None else 1 - mask.visible.mask.unflatten(1, mask.visible.grid),
        written[0],
        mask_of=owner,
        captions=selection.captions,
        title=f"Attention of {_title(runs)}",
        legend=[*maps.legend(), *([_mask_legend(mask, owner)] if mask else [])],
    )
    if lead and mask and reconstructions:
        written.append(folder / "reconstructions.png")
        shown = [run for run, label in zip(runs, labels, strict=True) if label in reconstructions]
        pixels = selection.crop(view, lead.image_size)
        title = _title(shown)
        _draw_reconstructions(lead, pixels, selection.captions, mask, reconstructions, written[-1], title, owner)
    selection.check(written)
    return written


@dataclass
class _AttentionMaps:
    """Maps [N, h, w] with a description, by label, in the order of the rows."""

    maps: dict[str, Tensor]
    descriptions: dict[str, str]

    def add(self, label: str, importance: Tensor, grid: tuple[int, int], description: str) -> None:
        """Add a row of ``importance`` [N, L]."""
        self.maps[label], self.descriptions[label] = importance.unflatten(1, grid), description

    def legend(self) -> list[str]:
        """Return a sentence for each kind of map."""
        kinds: dict[str, list[str]] = {}
        for label, description in self.descriptions.items():
            method, name, *_ = label.split("\n")
            kinds.setdefault(description, []).append(method if method.startswith(_TEACHER) else f"{method} {name}")
        return [f"{', '.join(dict.fromkeys(labels))}: {description}." for description, labels in kinds.items()]


class _Mask(NamedTuple):
    """The visible set, and a description of its sampling."""

    visible: VisibleSet | TokenMask
    mode: str


@torch.no_grad()
def _add_teachers(run: FinishedRun, pixels: Tensor, maps: _AttentionMaps, seed: int) -> _Mask:
    """Add the rows of a pre-training's teachers for pixels [N, 3, S, S] in [0, 1], and sample its mask."""
    stage, grid = run.pretraining, run.grid
    importance: dict[str, Tensor] = {}
    for name in stage.teachers:
        config = run.recipe.teachers[name]
        if config.sees == "visible" or config.kind == "ema":
            continue  # it has no importance, or is not saved with the run
        try:
            teacher = build_teacher(name, config, run.recipe.data, run.image_size, grid)
        except UserError as error:
            logger.warning("drawn without teacher %s, which can no longer be loaded: %s", name, error)
            continue
        scores = importance_of(teacher, pixels)
        maps.add(f"{_TEACHER}{name}\n{short_source(config.source)}", scores, grid, teacher.details["importance"])
        importance[name] = scores
    masking = stage.masking
    if masking is not None and masking.teacher is not None and masking.teacher not in importance:
        logger.warning("the mask is sampled at random, not by teacher %s", masking.teacher)
        masking = masking.model_copy(update={"mode": "random", "teacher": None})
        stage = stage.model_copy(update={"masking": masking})
    mode = "none" if masking is None else masking.mode
    visible = sample_mask(stage, importance, grid, run.stride, len(pixels), seed)
    return _Mask(visible, _MODES[mode].format(f"teacher {masking and masking.teacher}"))


@torch.no_grad()
def _add_student(
    run: SavedEncoder, label: str, pixels: Tensor, maps: _AttentionMaps, mask: _Mask | None
) -> Reconstruction | None:
    """Add a student's row for pixels [N, 3, S, S] in [0, 1].

    Returns:
        Its reconstructions, if it predicts pixels and the mask has its grid.
    """
    model = run.load()
    encoder = model.encoder if isinstance(model, PretrainModel) else model
    images = (pixels - torch.tensor(run.mean).view(1, 3, 1, 1)) / torch.tensor(run.std).view(1, 3, 1, 1)
    importance = torch.cat([encoder_attention(encoder, part).importance for part in images.split(CHUNK)])
    has_token = encoder.num_prefix_tokens > 0 and encoder.cls_token is not None
    maps.add(label, importance, run.grid, describe_importance(has_token))
    if not isinstance(model, PretrainModel) or mask is None:
        return None
    if encoder.grid != mask.visible.grid:
        logger.warning("%s: no reconstructions, its grid of patches is not the first pre-training's", run.path)
        return None
    pixels_predicted = any(spec.target == PIXELS for spec in model.objectives.values())
    if pixels_predicted and not _takes(model, mask.visible):
        logger.warning("%s: no reconstructions, its encoder does not take the first pre-training's mask", run.path)
        return None
    try:
        result = reconstruct(model, images, mask.visible)
    except UserError as error:
        logger.warning("%s: no reconstructions: %s", run.path, error)
        return None
    if result is None:
        return None
    pasted, alone = (torch.from_numpy(denormalize(part, run.mean, run.std)) for part in result[:2])
    return Reconstruction(pasted, alone, result.standardized)


def _takes(model: PretrainModel, visible: VisibleSet | TokenMask) -> bool:
    """Return True if a model was trained on such masks: visible tokens alone, mask tokens, or whole images."""
    if isinstance(visible, VisibleSet):
        return model.decoder is not None
    has_token = getattr(model.encoder, "mask_token", None) is not None
    return has_token or (model.decoder is None and not visible.removed.any())


def _draw_reconstructions(
    lead: FinishedRun,
    pixels: Tensor,
    captions: Sequence[str],
    mask: _Mask,
    reconstructions: dict[str, Reconstruction],
    path: Path,
    title: str,
    owner: Sequence[str],
) -> None:
    single = len(reconstructions) == 1
    if not mask.visible.mask.any():
        rows = {"Output" if single else f"Output\n{label}": parts.alone for label, parts in reconstructions.items()}
        legend = ["Output: the prediction of all patches, none of which was removed."]
    elif single:
        only = next(iter(reconstructions.values()))
        rows = {"Reconstructed": only.pasted, "Output alone": only.alone}
        legend = [_PASTED, "Output alone: the prediction of all patches, also the visible ones."]
    else:
        rows = {f"Reconstructed\n{label}": parts.pasted for label, parts in reconstructions.items()}
        legend = [_PASTED]
    if any(parts.standardized for parts in reconstructions.values()):
        legend.append(
            "Patches are predicted without their mean and contrast (normalize: standardize); both are the true patch's."
        )
    if owner:
        legend.append(f"The visible patches are those that {' '.join(owner)} keeps.")
    reconstruction_grid(
        pixels,
        masked_pixels(pixels, mask.visible, lead.stride, fill=HIDDEN),
        rows,
        path,
        keep_ratio=lead.pretraining.visible_share(mask.visible.grid[0] * mask.visible.grid[1]),
        mask_of=owner,
        captions=captions,
        title=f"Reconstructions by {title}",
        legend=legend,
    )


def _owner(labels: Sequence[str], index: int) -> list[str]:
    """Return method and name of a pre-training, and the rest of its label where another one has the same two."""
    parts = [label.split("\n") for label in labels]
    return parts[index][:2] if [part[:2] for part in parts].count(parts[index][:2]) == 1 else parts[index]


def _mask_legend(mask: _Mask, owner: Sequence[str]) -> str:
    """Return the sentence on a mask; among several runs, with method and name of the one whose mask it is."""
    alone = f"The mask is that of {' '.join(owner)} alone. " if owner else ""
    return f"{alone}Patches are kept {mask.mode}."


def _labels(runs: Sequence[SavedEncoder]) -> list[str]:
    """Return the rows' labels (method, run, training), numbered where they are equal."""
    labels: list[str] = []
    for run in runs:
        label, number = run.label(), 2
        while label in labels:
            label, number = f"{run.label()} ({number})", number + 1
        labels.append(label)
    return labels


def _title(runs: Sequence[SavedEncoder]) -> str:
    return runs[0].describe() if len(runs) == 1 else f"{len(runs)} runs on the same images"


def _folder(runs: Sequence[SavedEncoder], out: Path | None) -> Path:
    beside = runs[0].path.parent / IMAGES
    folder = out or (beside if len(runs) == 1 else beside / COMPARED)
    make_folder(folder)
    return folder
