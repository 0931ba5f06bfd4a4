"""Python API: a recipe's student and teachers as one torch module.

Shape legend: B images, S x S pixels, h x w grid of patches, L = h * w patch tokens, C encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import PretrainConfig
from mrmae_ds.errors import UserError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.imagenet import Rgb
from mrmae_ds.models.encoders import Encoder, mean_features
from mrmae_ds.models.masking import TokenMask, VisibleSet
from mrmae_ds.models.pretrain import PretrainModel, masked_pixels
from mrmae_ds.models.reconstruction import reconstruct
from mrmae_ds.teachers import Teacher, build_teacher
from mrmae_ds.teachers.base import TeacherOutput, draw_visible, targets_of
from mrmae_ds.teachers.sources.checkpoint import encoder_attention
from mrmae_ds.weights.finished_run import FinishedRun, SavedEncoder, open_saved
from mrmae_ds.weights.load import load_pretrained
from mrmae_ds.weights.paths import find_weights

# Interpolation may overshoot 0 to 1; pixels of 0 to 255 and normalized ones lie outside.
_FLOAT_RANGE = (-0.5, 1.5)


class Features(NamedTuple):
    """Features of the encoder with all patches visible.

    Attributes:
        tokens: patch tokens after the last block, [B, L, C].
        pooled: layer-normalized mean of the patch tokens, float32 [B, C]; the k-NN evaluation uses it.
    """

    tokens: Tensor
    pooled: Tensor


class ReconstructedImages(NamedTuple):
    """Images in 0 to 1, float32 [B, 3, S, S].

    Attributes:
        masked: the input with removed patches set to gray.
        reconstruction: the input with removed patches replaced by predictions.
        prediction: predictions of all patches.
    """

    masked: Tensor
    reconstruction: Tensor
    prediction: Tensor


class Attention(NamedTuple):
    """Attention maps, not negative, float32 [B, h, w].

    Attributes:
        student: attention of the student's last block: the class token's to the patches if there is one, otherwise the
            mean attention that each patch receives.
        teachers: importance that each teacher gives the patches, by the teacher's name.
    """

    student: Tensor
    teachers: dict[str, Tensor]


def check_pixels(images: Tensor, size: int) -> Tensor:
    """Check images and return their pixels in 0 to 1, float32 [B, 3, S, S].

    Args:
        images: [B, 3, S, S], uint8 or float in 0 to 1.
        size: S.

    Raises:
        UserError: if images have a wrong shape, type or range.
    """
    if not isinstance(images, Tensor):
        raise UserError(f"images are a {type(images).__name__}, expected a tensor [B, 3, {size}, {size}]")
    if images.dim() != 4 or images.shape[1:] != (3, size, size):
        raise UserError(f"images have shape {list(images.shape)}, expected [B, 3, {size}, {size}]")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise UserError(f"images are {images.dtype}, expected torch.uint8, or a float type with values in 0 to 1")
    pixels = images.float()
    low, high = torch.aminmax(pixels.detach()) if len(pixels) else (0.0, 1.0)
    if low < _FLOAT_RANGE[0] or high > _FLOAT_RANGE[1]:
        raise UserError(
            f"images have values of {low:.4g} to {high:.4g}, expected floats in 0 to 1; divide pixels of 0 to 255 "
            "by 255 or pass them as torch.uint8, and do not normalize them"
        )
    return pixels


class ImageEncoder(nn.Module):
    """Encoder of a weights file that ``mrmae check`` calls usable, of this project or another, with its normalization.

    Example::

        features = ImageEncoder.from_file("mae_pretrain_vit_base.pth").features(images)

    Args:
        saved: the file, whose heads and statistics are known.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, saved: SavedEncoder) -> None:
        super().__init__()
        model = saved.load()
        self.encoder: Encoder = model.encoder if isinstance(model, PretrainModel) else model
        self.image_size = saved.image_size
        self.register_buffer("mean", torch.tensor(saved.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(saved.std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_file(cls, path: str | Path) -> ImageEncoder:
        """Load an encoder, in eval mode on the CPU.

        Args:
            path: weights file (``FILE#KEY`` for one of several sets of weights) or stage folder.

        Raises:
            UserError: if the file is not usable, or its heads or statistics are not known.
        """
        return cls(open_saved(Path(path)))

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Compute the encoder's features.

        Args:
            images: [B, 3, S, S], uint8 or float in 0 to 1.
        """
        inputs = (check_pixels(images, self.image_size) - self.mean) / self.std
        tokens = self.encoder.forward_features(inputs.to(self.encoder.token_projection.weight.dtype))
        tokens = tokens[:, self.encoder.num_prefix_tokens :]
        return Features(tokens, mean_features(tokens))


class MRMAE(nn.Module):
    """Pre-training model and frozen teachers of a recipe. It computes what the training loop computes.

    All methods take images [B, 3, S, S], uint8 or float in 0 to 1, on the module's device. Normalization is internal:
    the recipe's statistics for the student, each teacher's own for the teacher.

    ``parameters()`` and ``state_dict()`` are those of the student. The teachers are frozen, stay in eval mode, and are
    moved by ``to``, in their own precision.

    Example::

        model = MRMAE.from_recipe("ds_configs/tiny.yaml", ["data.mean=[0.5, 0.5, 0.5]"])
        losses = model(images)
        losses["loss"].backward()

    Args:
        student: encoder, fusion, decoder and heads.
        teachers: by the recipe's names; empty for a model that computes no losses of teachers.
        config: the recipe's pre-training stage.
        mean: mean of the student's input, per channel, of pixels in 0 to 1.
        std: standard deviation, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, student: PretrainModel, teachers: Mapping[str, Teacher], config: PretrainConfig, mean: Rgb, std: Rgb
    ) -> None:
        super().__init__()
        self.student = student
        # Not a submodule: parameters() and state_dict() are those of the student.
        self.teachers = dict(teachers)
        self.config = config
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_recipe(cls, recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> MRMAE:
        """Build student and teachers on the CPU.

        The student is initialized randomly, by torch's global generator, unless ``stages.pretrain.init`` names weights.

        Args:
            recipe: recipe file, ``ds_configs/NAME.yaml``, or a loaded recipe.
            overrides: ``key.path=value`` strings, which replace values of a recipe file.

        Raises:
            UserError: for an invalid recipe, one without a pre-training stage, or a teacher that cannot be loaded.
        """
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(Path(recipe), list(overrides))
        elif overrides:
            raise UserError("overrides apply to a recipe file; pass them to load_recipe")
        stage = recipe.stages.pretrain
        if stage is None:
            raise UserError(f"recipe {recipe.name} has no stage pretrain")
        student, teachers = build_pretraining(recipe, stage)
        if stage.init is not None:
            key = "stages.pretrain.init"
            load_pretrained(student, find_weights(Path(stage.init), key), key)
        return cls(student, teachers, stage, recipe.data.mean, recipe.data.std)

    @classmethod
    def from_run(cls, path: str | Path, teachers: bool = True) -> MRMAE:
        """Load a finished pre-training, in eval mode on the CPU.

        Args:
            path: stage folder, ``runs/NAME/pretrain``, or its ``model.safetensors``.
            teachers: also load the teachers, except moving averages, which runs do not keep. Without them there are no
                losses of teachers, no attention maps of teachers, and no masks drawn by their importance.

        Raises:
            UserError: if the path is not a finished pre-training, or a teacher cannot be loaded.
        """
        run = FinishedRun.open(Path(path))
        student = run.load()
        if not isinstance(student, PretrainModel):
            raise UserError(f"{run.path}: a classifier, not a pre-training; mrmae export prints how to load it")
        stage, recipe = run.pretraining, run.recipe
        built = {
            name: build_teacher(name, recipe.teachers[name], recipe.data, run.image_size, student.encoder.grid)
            for name in (stage.teachers if teachers else ())
            if recipe.teachers[name].kind != "ema"
        }
        return cls(student, built, stage, run.mean, run.std).eval()

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels: S."""
        return self.student.encoder.grid[0] * self.student.encoder.stride

    def forward(
        self, images: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            images: [B, 3, S, S].
            noise: uniform in [0, 1), [B, L]; it determines the mask. Default: drawn on the CPU.
            generator: generator of the default noise; default: torch's global one.

        Returns:
            ``loss``, the weighted total, and each objective's own loss by name; scalars.

        Raises:
            UserError: if images have a wrong shape or type, or a teacher is missing.
        """
        pixels = check_pixels(images, self.image_size)
        for name in self.config.teachers:
            if name not in self.student.averages:
                self._require_teacher(name)
        of_visible = [name for name, teacher in self.teachers.items() if teacher.sees_visible]
        outputs = {name: teacher(pixels) for name, teacher in self.teachers.items() if name not in of_visible}
        visible = self._draw_mask(pixels, outputs, noise, generator)
        if isinstance(visible, VisibleSet):
            outputs |= {name: self.teachers[name](pixels, visible) for name in of_visible}
        targets = targets_of(self.config.objectives, self.teachers, outputs, pixels, self.student.encoder.stride)
        return self.student(self._normalize(pixels), visible, targets)

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Compute the encoder's features with all patches visible.

        Args:
            images: [B, 3, S, S].
        """
        encoder = self.student.encoder
        tokens = encoder(self._inputs(check_pixels(images, self.image_size)))[:, encoder.num_prefix_tokens :]
        return Features(tokens, mean_features(tokens))

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> ReconstructedImages:
        """Remove patches as training does and reconstruct them.

        A model that predicts standardized patches gets back the mean and standard deviation of the true patch.

        Args:
            images: [B, 3, S, S].
            noise: as for :meth:`forward`.
            generator: as for :meth:`forward`.

        Raises:
            UserError: if the model predicts no pixels.
        """
        pixels = check_pixels(images, self.image_size)
        masking = self.config.masking
        teacher = None if masking is None else masking.teacher
        outputs = {} if teacher is None else self._teach(pixels, teacher)
        visible = self._draw_mask(pixels, outputs, noise, generator)
        result = reconstruct(self.student, self._normalize(pixels), visible)
        if result is None:
            raise UserError("the model has no objective that predicts the pixels of all patches")
        pasted, alone = ((part * self.std + self.mean).clamp(0, 1) for part in (result.pasted, result.alone))
        masked = masked_pixels(pixels, visible, self.student.encoder.stride, fill=0.5)
        return ReconstructedImages(masked, pasted, alone)

    @torch.no_grad()
    def attention(self, images: Tensor) -> Attention:
        """Compute attention maps of the student and of all teachers that see the whole image.

        Args:
            images: [B, 3, S, S].
        """
        pixels = check_pixels(images, self.image_size)
        encoder = self.student.encoder
        student = encoder_attention(encoder, self._inputs(pixels)).importance
        teachers = {
            name: teacher(pixels).importance for name, teacher in self.teachers.items() if not teacher.sees_visible
        }
        grid = encoder.grid
        return Attention(
            student.float().unflatten(1, grid), {name: values.unflatten(1, grid) for name, values in teachers.items()}
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MRMAE:
        """Apply a function to all tensors, as ``to`` does.

        The teachers and the input statistics change device, but keep their precision.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        mean, std = move(self.mean), move(self.std)
        super()._apply(fn, recurse)
        self.mean, self.std = mean, std
        for teacher in self.teachers.values():
            teacher._apply(move, recurse)
        return self

    def _normalize(self, pixels: Tensor) -> Tensor:
        """Return the student's input in full precision: pixel targets are computed from it."""
        return (pixels - self.mean) / self.std

    def _inputs(self, pixels: Tensor) -> Tensor:
        """Return the encoder's input in the precision of its weights."""
        return self._normalize(pixels).to(self.student.fusion.norm.weight.dtype)

    def _require_teacher(self, name: str) -> Teacher:
        if name not in self.teachers:
            raise UserError(
                f"teacher {name} is not loaded; use from_run(..., teachers=True), or from_recipe for a moving average, "
                "which runs do not keep"
            )
        return self.teachers[name]

    def _teach(self, pixels: Tensor, only: str | None = None) -> dict[str, TeacherOutput]:
        """Call the teachers, or one of them."""
        return {name: self._require_teacher(name)(pixels) for name in ([only] if only else self.teachers)}

    def _draw_mask(
        self,
        pixels: Tensor,
        outputs: Mapping[str, TeacherOutput],
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> VisibleSet | TokenMask:
        if not len(pixels):
            raise UserError("no images: a batch to mask needs at least one")
        encoder, masking = self.student.encoder, self.config.masking
        if noise is None:
            rows, columns = encoder.grid if masking is None else masking.grid(encoder.grid, encoder.stride)
            noise = torch.rand(len(pixels), rows * columns, generator=generator)
        return draw_visible(self.config, outputs, noise.to(pixels.device), encoder.grid, encoder.stride)
