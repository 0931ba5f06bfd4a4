"""Sizes of a checkpoint's encoder, decoder or image tower, inferred from the shapes of its tensors.

No shape but that of BEiT's tables depends on the number of heads, which origin.py finds elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from mrmae_ds.models.sizes import ARCHITECTURES, FAMILIES, EncoderSpec
from mrmae_ds.units import first_few

Shapes = Mapping[str, tuple[int, ...]]

# Names of BEiT's tables of relative positions, shared by all blocks or in each.
TABLE, SHARED_TABLE, BLOCK_TABLE = (
    "relative_position_bias_table",
    "rel_pos_bias.relative_position_bias_table",
    "blocks.0.attn.relative_position_bias_table",
)
CLIP_BLOCKS = "visual.transformer.resblocks."


def encoder_sizes(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """Infer an encoder's family and the fields of its spec from shapes.

    Args:
        shapes: shapes by the encoder's own parameter names.

    Returns:
        Family and sizes; "" and no sizes for an unsupported encoder.
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
        sizes = {"dim": dim, "depth": depth, "mlp_ratio": ratio, "patch": patch}
        if tables := beit_tables(shapes):
            heads = shapes[SHARED_TABLE if tables == "shared" else BLOCK_TABLE][1]
            return "beit", sizes | {"num_heads": heads, "relative_positions": tables}
        return "vit", sizes
    except (KeyError, ValueError, IndexError):
        return "", {}


def decoder_sizes(shapes: Shapes) -> dict[str, Any]:
    """Infer width, depth and MLP ratio of a decoder; empty without a decoder.

    Args:
        shapes: shapes by the names in this project's pre-training model.
    """
    if "decoder.embed.weight" not in shapes or not _depth(shapes, "decoder.blocks."):
        return {}
    dim = shapes["decoder.embed.weight"][0]
    ratio = _mlp_ratio(shapes, "decoder.blocks.", dim)
    return {"dim": dim, "depth": _depth(shapes, "decoder.blocks."), "mlp_ratio": ratio}


def size_differences(sizes: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """List the sizes of a file that differ from the model's: ``depths (2, 2, 23) instead of (2, 2, 11)``.

    Args:
        sizes: sizes of the file.
        expected: sizes of the model.
    """
    return [
        f"{key} {_format(value)} instead of {_format(expected[key])}"
        for key, value in sizes.items()
        if _format(value) != _format(expected[key])
    ]


def spec_sizes(spec: EncoderSpec) -> dict[str, Any]:
    """Return a spec's fields as :func:`encoder_sizes` infers them: MLP ratios of whole hidden units."""
    values = asdict(spec)
    if "dims" in values:
        pairs = zip(values["dims"], values["mlp_ratios"], strict=True)
        return values | {"mlp_ratios": tuple(int(dim * ratio) / dim for dim, ratio in pairs)}
    return values | {"mlp_ratio": int(values["dim"] * values["mlp_ratio"]) / values["dim"]}


def nearest_architecture(
    family: str, sizes: Mapping[str, Any], among: Iterable[str] = tuple(ARCHITECTURES)
) -> tuple[str, dict[str, Any]]:
    """Find the named architecture that shares most of the given sizes.

    Args:
        family: ``cvit``, ``vit`` or ``beit``; where BEiT's tables lie is not compared.
        sizes: fields of the family's spec.
        among: names of the candidates.

    Returns:
        Name of the architecture, and overrides for the sizes that differ.
    """
    candidates = []
    for arch in among:
        spec = ARCHITECTURES[arch]
        if isinstance(spec, FAMILIES[family]):
            known = spec_sizes(spec) | {"relative_positions": sizes.get("relative_positions")}
            candidates.append(
                (arch, {key: value for key, value in sizes.items() if _format(value) != _format(known[key])})
            )
    return min(candidates, key=lambda candidate: len(candidate[1]))


def beit_tables(names: Iterable[str]) -> str:
    """Return where BEiT's tables of relative positions lie: ``shared``, ``blocks``, or "" if it is no such BEiT."""
    names = set(names)
    if not {"blocks.0.attn.q_bias", "blocks.0.gamma_1", "cls_token"} <= names or "pos_embed" in names:
        return ""
    return "shared" if SHARED_TABLE in names else "blocks" if BLOCK_TABLE in names else ""


def doubled_tables(names: Iterable[str]) -> str:
    """Report BEiT's tables of relative positions that are both shared and in blocks; "" if they are not.

    Args:
        names: of the tensors.
    """
    names = list(names)
    own = [name for name in names if name.startswith("blocks.") and name.endswith(f".attn.{TABLE}")]
    if SHARED_TABLE not in names or not own:
        return ""
    return (
        f"has a table of relative positions that its blocks share ({SHARED_TABLE}) and tables in {len(own)} of them "
        f"({first_few(own, 1)}); BEiT's attention adds both, this project's has one; if the weights were trained with "
        "both, add the shared table to each block's and remove it, else remove the one that was not used"
    )


def tower_sizes(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of a plain ViT's spec of a CLIP image tower; empty for towers of timm."""
    hidden = shapes.get(f"{CLIP_BLOCKS}0.mlp.c_fc.weight")
    if "visual.conv1.weight" not in shapes or hidden is None:
        return {}
    dim, _, _, patch = shapes["visual.conv1.weight"]
    return {"dim": dim, "depth": _depth(shapes, CLIP_BLOCKS), "mlp_ratio": hidden[0] / dim, "patch": patch}


def _depth(shapes: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _mlp_ratio(shapes: Shapes, prefix: str, dim: int) -> float:
    return shapes[f"{prefix}0.mlp.fc1.weight"][0] / dim


def _format(value: Any) -> str:
    """Format a size: 4 for 4.0, and tuples for lists."""
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_format, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
