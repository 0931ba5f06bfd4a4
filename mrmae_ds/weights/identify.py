"""What a file of weights is, told from its tensors' names and shapes, and our name for each tensor.

Sizes are never taken from a file's name: published CViT-Large and -Huge share theirs and differ in depth and MLP ratio.
The number of heads leaves no trace in any shape; our own files keep it in their metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isqrt, prod
from typing import Any, Literal

from mrmae_ds.errors import UserError
from mrmae_ds.models.sizes import ARCHITECTURES, FAMILIES, EncoderSpec, height_width
from mrmae_ds.weights.formats import TensorFile

Kind = Literal["pretrain", "classifier", "encoder", "clip", "unknown"]
Shapes = Mapping[str, tuple[int, ...]]

METADATA_KEY = "mrmae"
FAMILY_TITLES = {"cvit": "CViT", "vit": "plain ViT"}
POOL_TITLES = {"avg": ", mean-pooled", "token": ", on the class token"}
PIXEL_HEAD = "heads.pixels."
OUR_PARTS = ("encoder.", "fusion.", "decoder.", "heads.")
# MCMAE's and MAE's names, by their start, to those of models/pretrain.py; all others are the encoder's.
RELEASED_NAMES = (
    (re.compile(r"stage(\d)_output_decode\."), r"fusion.stage_convs.\1."),
    (re.compile(r"norm\."), "fusion.norm."),
    (re.compile(r"mask_token$"), "decoder.mask_token"),
    (re.compile(r"decoder_pred\."), PIXEL_HEAD),
    (re.compile(r"decoder_"), "decoder."),
)
PLAIN_VIT = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)"
    r"|(blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)|norm|fc_norm|head)\.(weight|bias)"
)
CLIP_PATCHES = (
    "visual.conv1.weight",
    "visual.trunk.patch_embed.proj.weight",
    "vision_model.embeddings.patch_embedding.weight",
)


@dataclass(frozen=True)
class WeightIdentity:
    """What a file of weights is.

    Attributes:
        kind: ``pretrain`` with a decoder, ``classifier`` with a head, ``encoder`` neither.
        family: ``cvit``, ``vit``, or "" where there is no such encoder.
        title: the kind in words.
        ours: written by this project.
        sizes: fields of the family's spec; ``num_heads`` only where ``ours``.
        grid: of the position embedding: what our own files say, else a square; None where its rows are none.
        prefix_rows: rows of the position embedding before the grid's (a class token's).
        num_classes: outputs of the head.
        pool: what the head sees: ``avg`` the mean of the patches, ``token`` the class token; "" without a head, or with
            one on something else.
        names: our name in a pre-training model of each tensor that has one, by the file's name.
        extras: what a ViT has beyond the plain one, so that it computes something else.
        metadata: what our own files say about themselves.
    """

    kind: Kind
    family: str
    title: str
    ours: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    prefix_rows: int = 0
    num_classes: int = 0
    pool: str = ""
    names: dict[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


def identify(file: TensorFile) -> WeightIdentity:
    """What ``file`` is.

    Raises:
        UserError: if it says that this project wrote it, and what it says cannot be read.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    try:
        metadata = json.loads(file.metadata.get(METADATA_KEY, "{}"))
        heads = {"num_heads": metadata["spec"]["num_heads"]} if metadata else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file.path}: its metadata entry {METADATA_KEY} is damaged ({error!r})") from None
    names = _our_names(shapes)
    encoder = {ours[8:]: shapes[name] for name, ours in names.items() if ours.startswith("encoder.")}
    family, sizes = encoder_sizes(encoder)
    if not family:
        patch = next((name for name in CLIP_PATCHES if name in shapes), "")
        if patch:
            return WeightIdentity(
                "clip", "", f"CLIP model, image tower {shapes[patch][0]} wide, patch {shapes[patch][-1]}"
            )
        return WeightIdentity("unknown", "", "no encoder that this project knows")
    has_decoder = "decoder.embed.weight" in names.values()  # DINOv2's encoders have a mask token too
    told: Kind = "pretrain" if has_decoder else "classifier" if "head.weight" in shapes else "encoder"
    kind = metadata.get("kind", told)
    positions = encoder.get("pos_embed", ())
    grid, prefix_rows = _grid(positions[1] if len(positions) == 3 else 0, _told_grid(metadata, sizes))
    pool = metadata.get("pool", _pool(family, shapes) if told == "classifier" else "")
    return WeightIdentity(
        kind=kind,
        family=family,
        title=_title(kind, family, shapes, bool(metadata), pool),
        ours=bool(metadata),
        sizes=sizes | heads,
        grid=grid,
        prefix_rows=prefix_rows,
        num_classes=shapes["head.weight"][0] if told == "classifier" else 0,
        pool=pool,
        names=names,
        extras=_extras(encoder) if family == "vit" else (),
        metadata=metadata,
    )


def encoder_sizes(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """An encoder's family and the fields of its spec that shapes tell; "" and nothing for none of ours.

    Args:
        shapes: by the encoder's own parameter names.
    """
    try:
        if "patch_embed1.proj.weight" in shapes:
            patches = [shapes[f"patch_embed{i}.proj.weight"] for i in (1, 2, 3)]
            stages = [f"blocks{i}." for i in (1, 2, 3)]
            dims = tuple(patch[0] for patch in patches)
            return "cvit", {
                "dims": dims,
                "depths": tuple(_depth(shapes, stage) for stage in stages),
                "mlp_ratios": tuple(_mlp_ratio(shapes, stage, dim) for stage, dim in zip(stages, dims, strict=True)),
                "patches": tuple(patch[-1] for patch in patches),
            }
        dim, _, _, patch = shapes["patch_embed.proj.weight"]
        depth, ratio = _depth(shapes, "blocks."), _mlp_ratio(shapes, "blocks.", dim)
        return "vit", {"dim": dim, "depth": depth, "mlp_ratio": ratio, "patch": patch}
    except (KeyError, ValueError, IndexError):
        return "", {}


def decoder_sizes(shapes: Shapes) -> dict[str, Any]:
    """Width, depth and MLP ratio of a decoder by our names in a pre-training model; nothing without one."""
    if "decoder.embed.weight" not in shapes or not _depth(shapes, "decoder.blocks."):
        return {}
    dim = shapes["decoder.embed.weight"][0]
    ratio = _mlp_ratio(shapes, "decoder.blocks.", dim)
    return {"dim": dim, "depth": _depth(shapes, "decoder.blocks."), "mlp_ratio": ratio}


def size_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Where a file's sizes are not the model's, ``depths (2, 2, 23) instead of (2, 2, 11)``."""
    return [
        f"{key} {_shown(value)} instead of {_shown(wanted[key])}"
        for key, value in found.items()
        if _shown(value) != _shown(wanted[key])
    ]


def spec_sizes(spec: EncoderSpec) -> dict[str, Any]:
    """A spec's fields as :func:`encoder_sizes` would tell them: MLP ratios of whole hidden units."""
    values = asdict(spec)
    if "dims" in values:
        pairs = zip(values["dims"], values["mlp_ratios"], strict=True)
        return values | {"mlp_ratios": tuple(int(dim * ratio) / dim for dim, ratio in pairs)}
    return values | {"mlp_ratio": int(values["dim"] * values["mlp_ratio"]) / values["dim"]}


def nearest_architecture(
    family: str, sizes: Mapping[str, Any], among: Iterable[str] = tuple(ARCHITECTURES)
) -> tuple[str, dict[str, Any]]:
    """The named architecture of a family that has most of these sizes, and the overrides that make up the rest."""
    candidates = []
    for arch in among:
        spec = ARCHITECTURES[arch]
        if isinstance(spec, FAMILIES[family]):
            own = spec_sizes(spec)
            candidates.append((arch, {key: value for key, value in sizes.items() if _shown(value) != _shown(own[key])}))
    return min(candidates, key=lambda candidate: len(candidate[1]))


def _our_names(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if "encoder.pos_embed" in names:
        return {name: name for name in names if name.startswith(OUR_PARTS)}
    ours = {name: _renamed(name) for name in names}
    if "head.weight" in ours and "fc_norm.weight" not in ours:
        # The norm is the classifier's own, before its head, where `fc_norm` would follow the mean of the patches.
        ours |= {name: f"encoder.{name}" for name in ours if name.startswith("norm.")}
    return ours


def _renamed(name: str) -> str:
    for pattern, ours in RELEASED_NAMES:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return "encoder." + name


def _depth(shapes: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _mlp_ratio(shapes: Shapes, prefix: str, dim: int) -> float:
    return shapes[f"{prefix}0.mlp.fc1.weight"][0] / dim


def _pool(family: str, names: Iterable[str]) -> str:
    if "fc_norm.weight" in names:
        return "avg"
    return "token" if family == "vit" else ""


def _told_grid(metadata: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[int, int] | None:
    if "image_size" not in metadata:
        return None
    stride = prod(sizes["patches"]) if "patches" in sizes else sizes["patch"]
    rows, columns = (side // stride for side in height_width(metadata["image_size"]))
    return rows, columns


def _grid(rows: int, told: tuple[int, int] | None) -> tuple[tuple[int, int] | None, int]:
    """The grid of so many position rows, ``told`` or else square, and whether a class token's comes before it."""
    if told and (prefix := rows - prod(told)) in (0, 1):
        return told, prefix
    for prefix in (0, 1):
        side = isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return (side, side), prefix
    return None, 0


def _extras(encoder: Iterable[str]) -> tuple[str, ...]:
    unknown = (name for name in encoder if not PLAIN_VIT.fullmatch(name))
    return tuple(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in unknown))


def _title(kind: Kind, family: str, names: Iterable[str], ours: bool, pool: str) -> str:
    title = FAMILY_TITLES[family]
    if kind == "pretrain":
        if ours or "encoder.pos_embed" in names:
            return f"{title}, pre-training of this project"
        return f"{title} with its decoder, {'MCMAE' if family == 'cvit' else 'MAE'} pre-training as released"
    if kind == "classifier":
        return f"{title} classifier{POOL_TITLES.get(pool, f', pooled by {pool}' if pool else '')}"
    return f"{title} encoder"


def _shown(value: Any) -> str:
    """4 for 4.0, and tuples for lists."""
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
