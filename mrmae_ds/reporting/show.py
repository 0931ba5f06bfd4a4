"""Pictures of what a pre-trained run does: reconstructions, and where student and teachers look (Fig. 3)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mrmae_ds.build import build_pretraining
from mrmae_ds.data.reader import build_reader
from mrmae_ds.errors import UserError
from mrmae_ds.masking import VisibleSet, choose_visible
from mrmae_ds.models.pretrain import PretrainModel, masked_pixels
from mrmae_ds.models.weights import find_weights, read_metadata, read_tensors
from mrmae_ds.objectives import PIXELS, patchify, unpatchify
from mrmae_ds.recipe import Recipe
from mrmae_ds.reporting.figures import attention_grid, reconstruction_grid
from mrmae_ds.teachers.own import encoder_attention

PICTURES = "pictures"


def show_run(stage_dir: Path, count: int | None = None, seed: int = 0) -> list[Path]:
    """Draw a finished pre-training's reconstructions and attention maps of the first validation pictures.

    Args:
        stage_dir: runs/NAME/pretrain.
        count: pictures; None takes the recipe's ``record.pictures``.
        seed: of the masks.

    Returns:
        The PNG files, in ``stage_dir/pictures``; none for other stages, or if ``count`` is 0.

    Raises:
        UserError: if the run has no weights, or its data or teachers cannot be read.
    """
    path = find_weights(stage_dir, "run")
    metadata = read_metadata(path)
    recipe = Recipe.model_validate(metadata["recipe"])
    stage = recipe.stages.pretrain
    count = recipe.record.pictures if count is None else count
    if metadata["kind"] != "pretrain" or stage is None or count == 0:
        return []
    model, teachers = build_pretraining(recipe, stage)
    model.load_state_dict(read_tensors(path))
    model.eval()
    pixels = _pictures(recipe, count)
    mean, std = (
        torch.tensor(recipe.data.mean).view(1, 3, 1, 1),
        torch.tensor(recipe.data.std).view(1, 3, 1, 1),
    )
    images = (pixels - mean) / std
    with torch.no_grad():
        maps = {f"Teacher {name}": teacher(pixels).importance for name, teacher in teachers.items()}
        maps["Student"] = encoder_attention(model.encoder, images)[1]
        importance = maps.get(f"Teacher {stage.masking.teacher}")
        rows, columns = model.encoder.grid
        noise = torch.rand(count, rows * columns, generator=torch.Generator().manual_seed(seed))
        visible = choose_visible(noise, (rows, columns), stage.masking.keep_ratio, stage.masking.mode, importance)
        out = stage_dir / PICTURES
        out.mkdir(exist_ok=True)
        title = f"{recipe.name}: {recipe.method}, {recipe.model.arch}, {stage.epochs} epochs"
        written = [out / "attention.png"]
        grids = {label: values.reshape(count, rows, columns) for label, values in maps.items()}
        kept = 1 - visible.mask.reshape(count, rows, columns)
        attention_grid(pixels, grids, kept, written[0], title=title)
        rebuilt = reconstruct(model, images, visible)
        if rebuilt is not None:
            written.append(out / "reconstructions.png")
            reconstruction_grid(
                pixels,
                masked_pixels(pixels, visible, model.encoder.stride, fill=0.5),
                (rebuilt * std + mean).clamp(0, 1),
                written[-1],
                keep_ratio=stage.masking.keep_ratio,
                title=title,
            )
    return written


def reconstruct(model: PretrainModel, images: Tensor, visible: VisibleSet) -> Tensor | None:
    """Visible patches as they are, removed ones as predicted: normalised [B, 3, H, W]; None without a pixel objective.

    Predictions of standardised pixels get back the mean and variance of the true patch, as in MAE's figures.

    Raises:
        UserError: if the pixel objective's normalisation cannot be undone.
    """
    found = [name for name, spec in model.objectives.items() if spec.target == PIXELS and spec.tap == "decoder"]
    if not found:
        return None
    spec = model.objectives[found[0]]
    predicted = model.predict(images, visible)[found[0]].float()
    true = patchify(images, model.encoder.stride)
    if spec.normalize == "standardize":
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    elif spec.normalize != "none":
        raise UserError(f"objectives.{found[0]}.normalize: {spec.normalize} cannot be undone to show pixels")
    removed = visible.mask[..., None]
    return unpatchify(predicted * removed + true * (1 - removed), model.encoder.grid, model.encoder.stride)


def _pictures(recipe: Recipe, count: int) -> Tensor:
    reader = build_reader(
        recipe.data.val,
        train=False,
        image_size=recipe.model.image_size,
        micro_batch=count,
        accumulation=1,
        world_size=1,
        rank=0,
        seed=0,
        crop=None,
        num_workers=1,
    )
    batch = next(iter(reader.epoch(0)))
    reader.close()
    return batch.images.float()[: int(batch.valid.sum())] / 255
