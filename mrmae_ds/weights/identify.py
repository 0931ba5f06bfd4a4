"""Identify a checkpoint's architecture from its tensor names and shapes, and map them to this project's names.

Sizes are never inferred from a file's name: the published CViT-Large and CViT-Huge files share theirs and differ in
depth and MLP ratio. ``shapes.py`` infers them from the shapes, and ``missing.py`` finds what the file lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt, prod
from typing import Any, Literal

from mrmae_ds.errors import UserError
from mrmae_ds.models.sizes import height_width
from mrmae_ds.weights.beside import model_config, recorded_pool
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.missing import missing_of_encoder, missing_of_norms, missing_of_tower, uneven_blocks
from mrmae_ds.weights.names import detector_title
from mrmae_ds.weights.origin import Origin
from mrmae_ds.weights.shapes import (
    BLOCK_TABLE,
    SHARED_TABLE,
    Shapes,
    beit_tables,
    doubled_tables,
    encoder_sizes,
    tower_sizes,
)

Kind = Literal["pretrain", "classifier", "detector", "encoder", "clip", "unknown"]

METADATA_KEY = "mrmae"
FAMILY_TITLES = {"cvit": "CViT", "vit": "plain ViT", "beit": "BEiT"}
POOL_TITLES = {"avg": ", mean-pooled", "token": ", on the class token"}
PIXEL_HEAD = "heads.pixels."
OUR_PARTS = ("encoder.", "fusion.", "decoder.", "heads.")
OURS = {"encoder.pos_embed", "encoder.patch_embed.proj.weight"}  # names of a pre-training, of which others have none
# Names in MAE's layout that other methods alone have, and the names of their heads in ds_configs/methods/.
PROMPTING, DMAE_HEAD = "decoder_blocks.0.attn.q.weight", "aligned_feature_projection_heads.0."
MILAN_HEAD = "heads.clip."
AGGREGATION = "cls_pt_layers.0.gamma_1"  # of BEiT v2
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
            problem = missing_of_tower(shapes)
            return WeightIdentity("clip", "", title, sizes={} if problem else tower_sizes(shapes), problem=problem)
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
        problem=uneven_blocks(encoder, "blocks.")
        if extras
        else doubled_tables(encoder)
        or missing_of_encoder(family, sizes, shapes, names, grid, relative)
        or missing_of_norms(names, pool),
    )


def _our_names(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if OURS & set(names):
        return {name: name for name in names if name.startswith(OUR_PARTS)}
    if beit_tables(names):
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


def _pool(family: str, names: Iterable[str], recorded: str) -> str:
    """Return the pooling that the names show; "" if they show none, or another than the recorded one."""
    pool = "token" if family != "cvit" or "cls_token" in names else ""
    pool = "avg" if any(name.startswith("fc_norm.") for name in names) else pool
    return pool if recorded in ("", pool) else ""


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
