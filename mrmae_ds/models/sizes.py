"""The model sizes, as data. Nothing else in the project knows a model's width, depth or patch.

CViT: Base from the authors' public code, Large and Huge from an author's statement, Small from the same family.
Plain ViT: MAE's B/16, L/16, H/14, and the common S/16. ``tiny`` is ours, for pictures of 32 or 64 pixels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mrmae_ds.errors import UserError


@dataclass(frozen=True)
class CViTSpec:
    """Two convolutional stages and one transformer stage.

    ``patches`` is the stride of each stage's patch embedding in cells of the stage before it (pixels for the
    first), so the transformer's grid is the picture divided by their product.
    """

    dims: tuple[int, int, int]
    depths: tuple[int, int, int]
    num_heads: int
    mlp_ratios: tuple[float, float, float] = (4, 4, 4)
    patches: tuple[int, int, int] = (4, 2, 2)

    @property
    def stride(self) -> int:
        """Pixels of one transformer token's side."""
        return math.prod(self.patches)

    @property
    def embed_dim(self) -> int:
        """Width of the transformer stage."""
        return self.dims[-1]


@dataclass(frozen=True)
class ViTSpec:
    """MAE's plain vision transformer with a class token."""

    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4
    patch: int = 16

    @property
    def stride(self) -> int:
        """Pixels of one token's side."""
        return self.patch

    @property
    def embed_dim(self) -> int:
        """Width of every block."""
        return self.dim


EncoderSpec = CViTSpec | ViTSpec

ARCHITECTURES: dict[str, EncoderSpec] = {
    "cvit_tiny": CViTSpec((32, 64, 96), (1, 1, 3), 4, patches=(2, 2, 1)),
    "cvit_small": CViTSpec((128, 256, 384), (2, 2, 11), 6),
    "cvit_base": CViTSpec((256, 384, 768), (2, 2, 11), 12),
    "cvit_large": CViTSpec((384, 768, 1024), (2, 2, 23), 16),
    "cvit_huge": CViTSpec((768, 1024, 1280), (2, 2, 31), 16, patches=(7, 1, 2)),
    "vit_tiny": ViTSpec(96, 4, 4, patch=4),
    "vit_small": ViTSpec(384, 12, 6),
    "vit_base": ViTSpec(768, 12, 12),
    "vit_large": ViTSpec(1024, 24, 16),
    "vit_huge": ViTSpec(1280, 32, 16, patch=14),
}


FAMILIES: dict[str, type[CViTSpec] | type[ViTSpec]] = {"cvit": CViTSpec, "vit": ViTSpec}


def encoder_spec(arch: str, overrides: dict[str, Any] | None = None) -> EncoderSpec:
    """The spec of a named architecture, with single fields replaced.

    Raises:
        UserError: for an unknown name or field, or a value of the wrong type.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"model.arch: {arch!r} is unknown; known are {', '.join(ARCHITECTURES)}")
    spec = ARCHITECTURES[arch]
    values = asdict(spec)
    for key in overrides or {}:
        if key not in values:
            raise UserError(f"model.overrides.{key}: {arch} has no such field; it has {', '.join(values)}")
    return make_spec(type(spec), values | (overrides or {}), "model.overrides")


def make_spec(kind: type[CViTSpec] | type[ViTSpec], values: dict[str, Any], key: str) -> EncoderSpec:
    """A spec from plain values (lists for tuples), checked.

    Raises:
        UserError: naming ``key`` and the field whose value has the wrong type.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{key}.{where}: {first['msg']} (got {first.get('input')!r})") from None


def token_grid(spec: EncoderSpec, image_size: int) -> tuple[int, int]:
    """Rows and columns of the transformer's token grid for a square picture.

    Raises:
        UserError: if the patches do not tile the picture; it names the nearest sizes that fit.
    """
    side, rest = divmod(image_size, spec.stride)
    if rest or side == 0:
        below = side * spec.stride
        fits = [str(size) for size in (below, below + spec.stride) if size > 0]
        raise UserError(
            f"image_size: {image_size} is not a multiple of the patch stride {spec.stride}; "
            f"the nearest sizes that fit are {' and '.join(fits)}"
        )
    return side, side
