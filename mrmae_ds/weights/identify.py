"""Identify a checkpoint's architecture from its tensor names and shapes, and map them to this project's names.

Sizes are never inferred from a file's name: the published CViT-Large and CViT-Huge files share theirs and differ in
depth and MLP ratio. No shape but that of BEiT's tables depends on the number of heads, which origin.py finds elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from math import isqrt, prod
from typing import Any, Literal

import torch

from mrmae_ds.errors import UserError
from mrmae_ds.models.sizes import ARCHITECTURES, FAMILIES, EncoderSpec, height_width, make_spec
from mrmae_ds.units import first_few
from mrmae_ds.weights.beside import model_config, recorded_pool
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.names import detector_title
from mrmae_ds.weights.origin import Origin

Kind = Literal["pretrain", "classifier", "detector", "encoder", "clip", "unknown"]
Shapes = Mapping[str, tuple[int, ...]]

METADATA_KEY = "mrmae"
FAMILY_TITLES = {"cvit": "CViT", "vit": "plain ViT", "beit": "BEiT"}
POOL_TITLES = {"avg": ", mean-pooled", "token": ", on the class token"}
PIXEL_HEAD = "heads.pixels."
OUR_PARTS = ("encoder.", "fusion.", "decoder.", "heads.")
OURS = {"encoder.pos_embed", "encoder.patch_embed.proj.weight"}  # names of a pre-training, of which others have none
# Names in MAE's layout that other methods alone have, and the names of their heads in ds_configs/methods/.
PROMPTING, DMAE_HEAD = "decoder_blocks.0.attn.q.weight", "aligned_feature_projection_heads.0."
MILAN_HEAD = "heads.clip."
# Names of BEiT's tables of relative positions, shared by all blocks or in each, and marks of the methods that train it.
TABLE, SHARED_TABLE, BLOCK_TABLE = (
    "relative_position_bias_table",
    "rel_pos_bias.relative_position_bias_table",
    "blocks.0.attn.relative_position_bias_table",
)
AGGREGATION = "cls_pt_layers.0.gamma_1"
BEIT_NAMES = ((re.compile(r"norm\."), "fusion.norm."), (re.compile(r"lm_head\."), "heads.lm."))
# Map from the start of MCMAE's and MAE's names to those of models/pretrain.py; all other names are the encoder's.
RELEASED_NAMES = (
    (re.compile(r"stage(\d)_output_decode\."), r"fusion.stage_convs.\1."),
    (re.compile(r"norm\."), "fusion.norm."),
    (re.compile(r"mask_token$"), "decoder.mask_token"),
    (re.compile(r"decoder_pred\."), PIXEL_HEAD),
    (re.compile(re.escape(DMAE_HEAD)), "heads.mimic."),
    (re.compile(r"decoder_"), "decoder."),
)
PLAIN_VIT = re.compile(
    r"cls_token|mask_token|pos_embed|patch_embed\.proj\.(weight|bias)"
    r"|(blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)|norm|fc_norm|head)\.(weight|bias)"
)
RELATIVE_POSITIONS = re.compile(r"\.attn\.rel_pos_[hw]$")  # of ViTDet-style detectors
CLIP_PATCHES = (
    "visual.conv1.weight",
    "visual.trunk.patch_embed.proj.weight",
    "vision_model.embeddings.patch_embedding.weight",
)
CLIP_BLOCKS = "visual.transformer.resblocks."


@dataclass(frozen=True)
class WeightIdentity:
    """Identity of a weights file.

    Attributes:
        kind: ``pretrain`` with a decoder, ``classifier`` with a head, ``detector`` if this project
            wrote it, ``encoder`` with neither, ``clip``, ``unknown``.
        family: ``cvit``, ``vit``, ``beit``, or "" if there is no such encoder.
        title: the kind in words.
        ours: True if written by this project.
        sizes: fields of the family's spec, for ``clip`` those of a plain ViT's; ``num_heads`` only if ``ours`` or of a
            BEiT, see ``origin``.
        grid: rows and columns of the position embedding, or of BEiT's tables: as recorded in this project's files,
            otherwise a square; None if its rows do not form one.
        prefix_rows: rows of the position embedding before the grid's (of a class token).
        num_classes: outputs of the head.
        pool: input of the head: ``avg`` the mean of the patches, ``token`` the class token; "" without a head or for
            any other input.
        names: names in this project's pre-training model, by the file's names, for tensors that have one.
        extras: names of tensors that a plain ViT lacks; with them the results differ.
        relative: True for the encoder of a detector, which has relative positions.
        metadata: metadata of this project's files.
        origin: heads, statistics and classes, with the evidence for them; empty unless the file was resolved.
        problem: reason why no loader takes the file; "" if it is complete.
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
    relative: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    problem: str = ""


def identify(file: TensorFile, beside: bool = True) -> WeightIdentity:
    """Identify a weights file with canonical names.

    Args:
        file: the file.
        beside: also by the configuration beside it; False for tensors that are not those of ``file.path``.

    Raises:
        UserError: if this project wrote the file, but its metadata cannot be read.
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
            title = f"CLIP model, image tower {shapes[patch][0]} wide, patch {shapes[patch][-1]}"
            problem = _missing_of_tower(shapes)
            return WeightIdentity("clip", "", title, sizes={} if problem else _tower_sizes(shapes), problem=problem)
        return WeightIdentity("unknown", "", "no encoder supported by this project")
    flat = [name for name, shape in encoder.items() if name.endswith(".weight") and not shape]
    if flat:
        return WeightIdentity("unknown", "", f"no encoder supported by this project ({flat[0]} is a single number)")
    has_decoder = "decoder.embed.weight" in names.values()  # DINOv2's encoders have a mask token too
    inferred: Kind = "pretrain" if has_decoder else "classifier" if "head.weight" in encoder else "encoder"
    kind = metadata.get("kind", inferred)
    pos_embed = encoder.get("pos_embed", ())
    grid, prefix_rows = _grid(pos_embed[1] if len(pos_embed) == 3 else 0, _recorded_grid(metadata, sizes))
    if family == "beit":
        grid = _recorded_grid(metadata, sizes) or _grid_of_table(encoder)
    recorded = recorded_pool(model_config(file, sizes)) if beside else ""
    pool = metadata.get("pool", _pool(family, encoder, recorded) if inferred == "classifier" else "")
    detector = detector_title(file.left)
    relative = any(RELATIVE_POSITIONS.search(name) for name in encoder)
    return WeightIdentity(
        kind=kind,
        family=family,
        title=_title(kind, family, shapes, bool(metadata), pool, file.left) + (f" of {detector}" if detector else ""),
        ours=bool(metadata),
        sizes=sizes | heads,
        grid=grid,
        prefix_rows=prefix_rows,
        num_classes=encoder["head.weight"][0] if inferred == "classifier" else 0,
        pool=pool,
        names=names,
        extras=(extras := _extras(encoder) if family == "vit" else ()),
        relative=relative,
        metadata=metadata,
        problem=_uneven_blocks(encoder, "blocks.")
        if extras
        else _incomplete(family, sizes, shapes, names, grid, relative) or _missing_of_norms(names, pool),
    )


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
        if tables := _is_beit(shapes):
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


def _our_names(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if OURS & set(names):
        return {name: name for name in names if name.startswith(OUR_PARTS)}
    if _is_beit(names):
        ours = {name: _renamed(name, BEIT_NAMES) for name in names if not name.endswith(".relative_position_index")}
        ours = {name: own for name, own in ours.items() if not own.startswith("encoder.cls_pt_layers.")}
    else:
        ours = {name: _renamed(name) for name in names}
    if PROMPTING in ours:
        ours = {name: own.replace(PIXEL_HEAD, MILAN_HEAD) for name, own in ours.items()}
    if "head.weight" in ours and not any(name.startswith("fc_norm.") for name in ours):
        # This norm is the classifier's own, before its head; `fc_norm` would follow the mean of the patches.
        ours |= {name: f"encoder.{name}" for name in ours if name.startswith("norm.")}
    return ours


def _is_beit(names: Iterable[str]) -> str:
    """Return where BEiT's tables of relative positions lie: ``shared``, ``blocks``, or "" if it is no such BEiT."""
    names = set(names)
    if not {"blocks.0.attn.q_bias", "blocks.0.gamma_1", "cls_token"} <= names or "pos_embed" in names:
        return ""
    return "shared" if SHARED_TABLE in names else "blocks" if BLOCK_TABLE in names else ""


def _grid_of_table(shapes: Shapes) -> tuple[int, int] | None:
    """Return the square grid of a table of (2 n - 1)² distances, and three of the class token; None for other sizes."""
    rows = (shapes.get(SHARED_TABLE) or shapes[BLOCK_TABLE])[0] - 3
    side = isqrt(max(rows, 0))
    return ((side + 1) // 2, (side + 1) // 2) if side * side == rows and side % 2 else None


def _renamed(name: str, names: tuple[tuple[re.Pattern[str], str], ...] = RELEASED_NAMES) -> str:
    for pattern, ours in names:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return "encoder." + name


def _depth(shapes: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _mlp_ratio(shapes: Shapes, prefix: str, dim: int) -> float:
    return shapes[f"{prefix}0.mlp.fc1.weight"][0] / dim


def _pool(family: str, names: Iterable[str], recorded: str) -> str:
    """Return the pooling that the names show; "" if they show none, or another than the recorded one."""
    pool = "token" if family != "cvit" or "cls_token" in names else ""
    pool = "avg" if any(name.startswith("fc_norm.") for name in names) else pool
    return pool if recorded in ("", pool) else ""


def _incomplete(
    family: str,
    sizes: Mapping[str, Any],
    shapes: Shapes,
    names: Mapping[str, str],
    grid: tuple[int, int] | None,
    relative: bool,
) -> str:
    """Compare an encoder's tensors with those of the model of its sizes; "" if all are there in the right shape."""
    try:
        # Any number of heads gives the same shapes, but of BEiT's tables.
        spec = make_spec(FAMILIES[family], {"num_heads": 1, **sizes}, "the file")
        expected = _bare_shapes(spec, grid or (1, 1))
    except UserError as error:
        return str(error)
    theirs = {ours.removeprefix("encoder."): name for name, ours in names.items() if ours.startswith("encoder.")}
    missing = [name for name in expected if name not in theirs and not (relative and name == "cls_token")]
    if missing:
        return f"encoder tensors are missing: {len(missing)} ({first_few(missing, 6)})"
    for name, shape in expected.items():
        if name not in theirs:
            continue
        found = shapes[theirs[name]]
        resized = name == "pos_embed" and len(found) == 3 and (found[0], found[2]) == (shape[0], shape[2])
        if found != shape and not resized:
            return f"{theirs[name]} is {shapes[theirs[name]]}, expected {shape}"
    return ""


def _missing_of_norms(names: Mapping[str, str], pool: str) -> str:
    """Report a tensor that the norm before a head lacks, or half of any last norm; "" if there is none.

    Args:
        names: this project's names by those of the file.
        pool: input of the head; "" without a head that is taken.
    """
    held = set(names.values())
    needed = {"": "", "token": "encoder.norm."}.get(pool, "encoder.fc_norm.")
    for norm in ("encoder.norm.", "encoder.fc_norm.", "fusion.norm."):
        both = {f"{norm}weight", f"{norm}bias"}
        if (norm == needed or both & held) and (missing := sorted(both - held)):
            name = " and ".join(name.removeprefix("encoder.").removeprefix("fusion.") for name in missing)
            return f"lacks {name} of the norm after its last block{', before its head' * (norm == needed)}"
    return ""


@cache
def _bare_shapes(spec: EncoderSpec, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    from mrmae_ds.models.encoders import build_encoder  # imports timm, which may be importing timm_registry.py

    with torch.device("meta"):
        encoder = build_encoder(spec, (grid[0] * spec.stride, grid[1] * spec.stride))
    return {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


def _uneven_blocks(names: Iterable[str], prefix: str) -> str:
    """Report a tensor that some of a transformer's equal blocks lack; "" if they are equal."""
    blocks: dict[int, set[str]] = {}
    for name in names:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal():
            blocks.setdefault(int(number), set()).add(rest)
    if not blocks:
        return f"encoder tensors are missing: all of {prefix}*"
    whole = set().union(*blocks.values())
    missing = [f"{prefix}{i}.{rest}" for i in range(max(blocks) + 1) for rest in sorted(whole - blocks.get(i, set()))]
    return f"encoder tensors are missing: {len(missing)} ({first_few(missing, 6)})" if missing else ""


def _missing_of_tower(shapes: Shapes) -> str:
    """Report a tensor that a CLIP image tower lacks; towers of timm are not checked."""
    if "visual.conv1.weight" not in shapes:
        return ""
    if any(name.startswith("visual.layer1.") for name in shapes):
        return "its image tower is a ResNet, which has no patch tokens; choose the weights of a ViT-* model"
    layers = ("ln_post.weight", "class_embedding", "positional_embedding")  # some towers have no ln_pre
    missing = [f"visual.{name}" for name in layers if f"visual.{name}" not in shapes]
    if missing:
        return f"tensors of the image tower are missing: {len(missing)} ({first_few(missing, 6)})"
    return _uneven_blocks(shapes, CLIP_BLOCKS)


def _tower_sizes(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of a plain ViT's spec of a CLIP image tower; empty for towers of timm."""
    hidden = shapes.get(f"{CLIP_BLOCKS}0.mlp.c_fc.weight")
    if "visual.conv1.weight" not in shapes or hidden is None:
        return {}
    dim, _, _, patch = shapes["visual.conv1.weight"]
    return {"dim": dim, "depth": _depth(shapes, CLIP_BLOCKS), "mlp_ratio": hidden[0] / dim, "patch": patch}


def _recorded_grid(metadata: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[int, int] | None:
    if "image_size" not in metadata:
        return None
    stride = prod(sizes["patches"]) if "patches" in sizes else sizes["patch"]
    rows, columns = (side // stride for side in height_width(metadata["image_size"]))
    return rows, columns


def _grid(rows: int, recorded: tuple[int, int] | None) -> tuple[tuple[int, int] | None, int]:
    """Return the grid of a position embedding (recorded, otherwise square) and its number of prefix rows, 0 or 1."""
    if recorded and (prefix := rows - prod(recorded)) in (0, 1):
        return recorded, prefix
    for prefix in (0, 1):
        side = isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return (side, side), prefix
    return None, 0


def _extras(encoder: Iterable[str]) -> tuple[str, ...]:
    unknown = (name for name in encoder if not PLAIN_VIT.fullmatch(name) and not RELATIVE_POSITIONS.search(name))
    return tuple(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in unknown))


def _title(kind: Kind, family: str, shapes: Shapes, ours: bool, pool: str, left: Iterable[str]) -> str:
    title, names = FAMILY_TITLES[family], set(shapes)
    if family == "beit" and "mask_token" in names:
        head = shapes.get("lm_head.weight", (0, 0))
        methods = {"BEiT v2": AGGREGATION in names, "data2vec": head[0] == head[1] != 0, "BEiT": head[0] > 0}
        method = next((method for method, found in methods.items() if found), "")
        method = method or ("SimMIM" if any(name.endswith("decoder.0.weight") for name in left) else "")
        return f"{title} encoder, {method} pre-training as released" if method else f"{title} encoder with a mask token"
    if kind == "pretrain":
        if ours or OURS & names:
            return f"{title}, pre-training of this project"
        marks = {"MCMAE": family == "cvit", "MILAN": PROMPTING in names, "DMAE": f"{DMAE_HEAD}weight" in names}
        method = next((method for method, found in marks.items() if found), "MAE")
        return f"{title} with its decoder, {method} pre-training as released"
    if kind == "classifier":
        return f"{title} classifier{POOL_TITLES.get(pool, f', pooled by {pool}' if pool else '')}"
    return f"{title} encoder"


def _format(value: Any) -> str:
    """Format a size: 4 for 4.0, and tuples for lists."""
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_format, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)
