"""Model sizes as data. Widths, depths and patches of the named models are defined here only.

CViT: Base from the authors' public code, Large and Huge from an author's statement, Small from the same family.
Plain ViT: MAE's B/16, L/16, H/14, and the common S/16. BEiT: its authors' Base. ``tiny`` is this project's, for images
of 32 or 64 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mrmae_ds.errors import ConfigError

Count = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(gt=0)]
# Size in pixels: one side of a square, or height and width.
ImageSize = int | tuple[int, int]


@dataclass(frozen=True)
class CViTSpec:
    """Size of a CViT: two convolutional stages and one transformer stage.

    Attributes:
        dims: width of each stage.
        depths: number of blocks of each stage.
        num_heads: attention heads of the transformer stage.
        mlp_ratios: hidden width of the MLPs of each stage, as a multiple of its width.
        patches: stride of each stage's patch embedding in cells of the previous stage (pixels for the first). The
            transformer's grid is the image divided by their product.
    """

    dims: tuple[Count, Count, Count]
    depths: tuple[Count, Count, Count]
    num_heads: Count
    mlp_ratios: tuple[Ratio, Ratio, Ratio] = (4, 4, 4)
    patches: tuple[Count, Count, Count] = (4, 2, 2)

    @property
    def stride(self) -> int:
        """Return the side of a transformer token in pixels."""
        return math.prod(self.patches)

    @property
    def embed_dim(self) -> int:
        """Return the width of the transformer stage."""
        return self.dims[-1]

    @property
    def num_blocks(self) -> int:
        """Return the number of transformer blocks."""
        return self.depths[-1]


@dataclass(frozen=True)
class _PlainSpec:
    """Size of a vision transformer whose blocks all have one width and one grid of tokens.

    Attributes:
        dim: width.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLPs, as a multiple of ``dim``.
        patch: side of a patch in pixels.
    """

    dim: Count
    depth: Count
    num_heads: Count
    mlp_ratio: Ratio = 4
    patch: Count = 16

    @property
    def stride(self) -> int:
        """Return the side of a token in pixels."""
        return self.patch

    @property
    def embed_dim(self) -> int:
        """Return the width of the blocks."""
        return self.dim

    @property
    def num_blocks(self) -> int:
        """Return the number of transformer blocks."""
        return self.depth


@dataclass(frozen=True)
class ViTSpec(_PlainSpec):
    """Size of MAE's plain vision transformer with a class token.

    Attributes:
        positions: ``sincos``, fixed in pre-training, or ``learned`` from random values (MaskFeat).
    """

    positions: Literal["sincos", "learned"] = "sincos"


@dataclass(frozen=True)
class BeitSpec(_PlainSpec):
    """Size of BEiT's vision transformer, with a class token, relative positions and layer scale.

    Attributes:
        layer_scale: initial scale of each block's branches.
        relative_positions: one table ``shared`` by all blocks (pre-training), or a table in each of the ``blocks``
            (classifiers, whatever the spec).
    """

    layer_scale: Ratio = 0.1
    relative_positions: Literal["shared", "blocks"] = "shared"


EncoderSpec = CViTSpec | ViTSpec | BeitSpec

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
    "beit_tiny": BeitSpec(96, 4, 4, patch=4),
    "beit_base": BeitSpec(768, 12, 12),
}


FAMILIES: dict[str, type[EncoderSpec]] = {"cvit": CViTSpec, "vit": ViTSpec, "beit": BeitSpec}


def family_of(spec: EncoderSpec) -> str:
    """Return the name of a spec's family in :data:`FAMILIES`."""
    return next(name for name, kind in FAMILIES.items() if isinstance(spec, kind))


def encoder_spec(arch: str, overrides: dict[str, Any] | None = None, key: str = "overrides") -> EncoderSpec:
    """Return the spec of a named architecture with some fields replaced.

    Args:
        arch: name in :data:`ARCHITECTURES`.
        overrides: new values by field name.
        key: recipe key of the overrides, for errors.

    Raises:
        ConfigError: for an unknown name or field, or an invalid value.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError("arch", f"{arch!r} is unknown; known are {', '.join(ARCHITECTURES)}")
    spec = ARCHITECTURES[arch]
    values = asdict(spec)
    for name in overrides or {}:
        if name not in values:
            raise ConfigError(f"{key}.{name}", f"{arch} has no such field; it has {', '.join(values)}")
    return make_spec(type(spec), values | (overrides or {}), key)


def make_spec(kind: type[EncoderSpec], values: dict[str, Any], key: str) -> EncoderSpec:
    """Validate plain values (lists for tuples) and return them as a spec.

    Args:
        kind: class of the spec.
        values: values by field name.
        key: recipe key of the values, for errors.

    Raises:
        ConfigError: naming ``key`` and the field with an invalid value.
    """
    try:
        spec: EncoderSpec = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{key}.{where}", f"{first['msg']} (got {first.get('input')!r})") from None
    if spec.embed_dim % spec.num_heads or spec.embed_dim % 4:
        raise ConfigError(
            key,
            f"the transformer's width {spec.embed_dim} must be a multiple of num_heads {spec.num_heads} and of 4 (for "
            "the position embedding)",
        )
    return spec


def height_width(image_size: ImageSize) -> tuple[int, int]:
    """Return height and width in pixels of either form of an image size."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def token_grid(spec: EncoderSpec, image_size: ImageSize) -> tuple[int, int]:
    """Return rows and columns of the transformer's token grid.

    Args:
        spec: size of the model.
        image_size: pixels, one side of a square or (height, width).

    Raises:
        ConfigError: if the patches do not tile the image; it names the nearest sizes that fit.
    """
    rows, columns = (_tokens_of_side(side, spec.stride) for side in height_width(image_size))
    return rows, columns


# Sides of a detector's input are multiples of this: its pyramid halves the grid of patches of 16 pixels.
PYRAMID_MULTIPLE = 32


def nearest_for_pyramid(pixels: int) -> int:
    """Return the side nearest to ``pixels`` that suits a detector's pyramid."""
    return max(1, round(pixels / PYRAMID_MULTIPLE)) * PYRAMID_MULTIPLE


def check_global_blocks(blocks: Iterable[int], depth: int, key: str) -> None:
    """Check that the transformer blocks with global attention exist.

    Args:
        blocks: their numbers, from 0.
        depth: number of the encoder's transformer blocks.
        key: that named them, for the error.

    Raises:
        ConfigError: naming the first that does not exist.
    """
    beyond = sorted(set(blocks) - set(range(depth)))
    if beyond:
        raise ConfigError(key, f"there is no block {beyond[0]}; the encoder's blocks are numbered 0 to {depth - 1}")


def _tokens_of_side(pixels: int, stride: int) -> int:
    count, rest = divmod(pixels, stride)
    if rest or count < 1:
        below = count * stride
        fits = [str(size) for size in (below, below + stride) if size > 0] or [str(stride)]
        raise ConfigError(
            "image_size",
            f"{pixels} is not a multiple of the patch stride {stride}; the nearest sizes that fit are "
            f"{' and '.join(fits)}",
        )
    return count
