"""Names of a file's tensors: wrappers' prefixes are removed, other projects' names become timm's or open_clip's.

Only prefixes of known words are removed unasked. Where a file holds two networks (a student and its teacher), the user
chooses one: ``FILE#teacher``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, first_few, printable
from mrmae_ds.weights.formats import TensorFile

# Words of prefixes that wrappers, training scripts and detectors put before the names of an encoder.
PREFIX_WORDS = {
    *("module", "_orig_mod", "model", "backbone", "encoder", "net", "student", "teacher"),  # training scripts
    *("bottom_up", "vit", "dinov2", "dinov2_with_registers"),  # detectors, Hugging Face
}
HF_VIT, HF_CLIP = "Hugging Face's ViT or DINOv2", "Hugging Face's CLIP"
CHUNKS = "DINOv2's chunks of blocks"  # blocks.CHUNK.NUMBER, as its training script saves them
CHUNKED = re.compile(r"blocks\.\d+\.(\d+\.)")
# Last names of the first convolution, by which an encoder is found, with the names' layout.
ANCHORS = (
    (re.compile(r"(.*?)visual\.(?:conv1|trunk\.patch_embed\.proj)\.weight"), "clip"),
    (re.compile(r"(.*?)(?:vision_model\.)?embeddings\.patch_embedding\.weight"), HF_CLIP),
    (re.compile(r"(.*?)embeddings\.patch_embeddings\.projection\.weight"), HF_VIT),
    (re.compile(r"(.*?)patch_embed1?\.proj\.weight"), ""),
    (re.compile(r"(.*?)conv1\.weight"), "tower"),  # only beside a class_embedding
)
BLOCK = r"encoder\.layers?\.(\d+)\."
CLIP_BLOCK = r"visual.transformer.resblocks.\1."
RENAMED = {
    HF_VIT: (
        (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
        (r"embeddings\.position_embeddings$", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (BLOCK + r"(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
        (BLOCK + r"(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
        (BLOCK + r"attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
        (BLOCK + r"attention\.output\.dense\.", r"blocks.\1.attn.proj."),
        (BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
        (BLOCK + r"(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
        (BLOCK + r"mlp\.weights_in\.", r"blocks.\1.mlp.w12."),
        (BLOCK + r"mlp\.weights_out\.", r"blocks.\1.mlp.w3."),
        (BLOCK + r"layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
        (r"layernorm\.", "norm."),
        (r"head\.", "head."),
    ),
    HF_CLIP: (
        (r"embeddings\.class_embedding$", "visual.class_embedding"),
        (r"embeddings\.patch_embedding\.", "visual.conv1."),
        (r"embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
        (r"pre_layrnorm\.", "visual.ln_pre."),
        (BLOCK + r"self_attn\.(q|k|v)_proj\.", CLIP_BLOCK + r"attn.\2."),
        (BLOCK + r"self_attn\.out_proj\.", CLIP_BLOCK + "attn.out_proj."),
        (BLOCK + r"layer_norm([12])\.", CLIP_BLOCK + r"ln_\2."),
        (BLOCK + r"mlp\.fc1\.", CLIP_BLOCK + "mlp.c_fc."),
        (BLOCK + r"mlp\.fc2\.", CLIP_BLOCK + "mlp.c_proj."),
        (r"post_layernorm\.", "visual.ln_post."),
    ),
}
# Names of queries, keys and values that are joined, and their joint name.
JOINED = {
    HF_VIT: (("query", "key", "value"), "qkv."),
    HF_CLIP: (("q", "k", "v"), "in_proj_"),
}
# Hugging Face's names of an encoder's own tensors; one of them without another name here makes it another model.
WITHIN = re.compile(r"embeddings\.(?!position_ids$)|encoder\.layers?\.")
# A linear probe's head: BatchNorm without parameters, then a linear layer (MAE's script), and the BatchNorm's epsilon.
PROBE = ("head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias")
PROBE_EPS = 1e-6
HEAD = re.compile(r"(?:head|classifier)\.(weight|bias)")

# Parts of a detector by their names, from those of one code base to those of every Mask R-CNN.
FPN, VITDET = "an FPN detector in Detectron2's names", "a ViTDet-style detector in Detectron2's names"
TORCHVISION = "a detector in torchvision's names"  # and this project's
DETECTORS = (
    (re.compile(r"(?:.*\.)?fpn_(?:lateral|output)\d\."), FPN),
    (re.compile(r"(?:.*\.)?proposal_generator\."), VITDET),
    (re.compile(r"(?:.*\.)?rpn\.head\."), TORCHVISION),
    (re.compile(r"(?:.*\.)?roi_heads?\."), "a detector"),
)


def canonical(file: TensorFile) -> TensorFile:
    """Return a file with the names of its encoder as timm, open_clip, MCMAE or this project has them.

    Files without a known encoder are returned unchanged.

    Raises:
        UserError: if a prefix is unknown, or there are several encoders and no choice; it names them.
    """
    prefix, layout = _find_encoder(file)
    if layout is None:
        if file.choice:
            raise UserError(f"{file.path}: has no weights under {file.choice!r}; remove #{file.choice}")
        return file
    if f"{prefix.removesuffix('encoder.')}fusion.norm.weight" in file.tensors:
        prefix = prefix.removesuffix("encoder.")  # a pre-training of this project
    inside = {name.removeprefix(prefix): t for name, t in file.tensors.items() if name.startswith(prefix)}
    left = [name for name in file.tensors if not name.startswith(prefix)]
    if layout == "tower":
        inside = {f"visual.{name}": tensor for name, tensor in inside.items()}
    elif layout in ("", HF_VIT):
        left = _take_head(file.tensors, prefix, layout, inside, left)
    if layout in RENAMED:
        projection = file.tensors.get(f"{prefix.removesuffix('vision_model.')}visual_projection.weight")
        inside, unknown = _convert({n.removeprefix("vision_model."): t for n, t in inside.items()}, layout)
        if projection is not None:
            inside["visual.proj"] = projection.T
            left, unknown = ([name for name in names if "visual_projection" not in name] for names in (left, unknown))
        left += unknown
    if not layout and (flat := _without_chunks(inside)):
        inside, layout = flat, CHUNKS
    head = {name for name in inside if name.startswith("head.")} - {"head.0.num_batches_tracked"}
    if head == set(PROBE):  # a BatchNorm with weights of its own is another's, of unknown epsilon
        inside = _fold_probe(inside)
    named = layout if layout in (*RENAMED, CHUNKS) else ""
    return replace(file, tensors=inside, prefix=prefix, left=tuple(left), layout=named)


def _find_encoder(file: TensorFile) -> tuple[str, str | None]:
    """Return the prefix of the encoder's names and their layout; None if there is no known encoder."""
    found: dict[str, str] = {}
    for pattern, layout in ANCHORS:
        for match in filter(None, map(pattern.fullmatch, file.tensors)):
            if layout != "tower" or f"{match[1]}class_embedding" in file.tensors:
                found.setdefault(match[1], layout)
    # open_clip's towers are converted as a whole: "visual." and "visual.trunk." belong to their names.
    found = {prefix: layout for prefix, layout in found.items() if "visual." not in prefix}
    if file.choice:
        found = {prefix: layout for prefix, layout in found.items() if prefix.startswith(f"{file.choice}.")}
    if not found:
        return "", None
    if len(found) > 1:
        names = [prefix.removesuffix(".") or "(no prefix)" for prefix in found]
        raise UserError(
            f"{file.path}: contains {len(found)} networks: {first_few(names, len(names))}; choose: "
            f"{file.path}#{printable(names[-1])}"
        )
    ((prefix, layout),) = found.items()
    unknown = [word for word in prefix.split(".") if word and word not in PREFIX_WORDS]
    if unknown and not file.choice:
        raise UserError(
            f"{file.path}: its encoder's names begin with {prefix!r}, which is unknown ({printable(unknown[0])}); if "
            f"these are the weights to load, name {file.path}#{printable(prefix.removesuffix('.'))}"
        )
    return prefix, layout


def _without_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an encoder whose blocks are saved in chunks by the blocks' own numbers; else empty."""
    blocks = [name for name in tensors if name.startswith("blocks.")]
    flat = {CHUNKED.sub(r"blocks.\1", name): tensor for name, tensor in tensors.items()}
    # The numbers continue over the chunks; with those of each chunk alone, blocks would replace each other.
    return flat if blocks and all(map(CHUNKED.match, blocks)) and len(flat) == len(tensors) else {}


def _take_head(
    tensors: Mapping[str, Tensor], prefix: str, layout: str, inside: dict[str, Tensor], left: list[str]
) -> list[str]:
    """Add a head beside the encoder's prefix to its tensors, if its input is known; return the names still left.

    Its input is the class token for Hugging Face's ViT, and the mean of the patches where there is an ``fc_norm``.
    """
    parent = re.sub(r"[^.]+\.$", "", prefix)
    beside = {name: match[1] for name in left if (match := HEAD.fullmatch(name.removeprefix(parent)))}
    norms = [name for name in left if re.fullmatch(r"fc_norm\.(weight|bias)", name.removeprefix(parent))]
    known = layout == HF_VIT or "fc_norm.weight" in inside or norms
    if not beside or not known or any(HEAD.fullmatch(name) for name in inside):
        return left
    inside |= {name.removeprefix(parent): tensors[name] for name in norms}
    inside |= {f"head.{part}": tensors[name] for name, part in beside.items()}
    return [name for name in left if name not in beside and name not in norms]


def _fold_probe(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the BatchNorm of a linear probe, a fixed scale and shift after training, into its linear layer."""
    kept = {n: t for n, t in tensors.items() if n not in PROBE and n != "head.0.num_batches_tracked"}
    mean, var, weight, bias = (tensors[name].float() for name in PROBE)
    weight, bias = fold_batch_norm(mean, var, weight, bias)
    return {**kept, "head.weight": weight, "head.bias": bias}


def fold_batch_norm(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a linear probe's BatchNorm, with running statistics [C], into the linear layer [K, C], [K] after it."""
    scaled = weight * (var + PROBE_EPS).rsqrt()
    return scaled, bias - scaled @ mean


def _convert(tensors: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename tensors by the table and join queries, keys and values; return the tensors and the names left out."""
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        for pattern, new in RENAMED[layout]:
            if re.match(pattern, name):
                renamed[re.sub(pattern, new, name, count=1)] = tensor
                break
        else:
            if WITHIN.match(name):
                renamed[("visual." if layout == HF_CLIP else "") + name] = tensor
            else:
                unknown.append(name)
    parts, joint = JOINED[layout]
    groups: dict[str, dict[str, Tensor]] = {}
    for name in list(renamed):
        block, _, rest = name.partition(".attn.")
        part, _, kind = rest.partition(".")
        if part in parts:
            groups.setdefault(f"{block}.attn.{joint}{kind}", {})[part] = renamed.pop(name)
    for name, group in groups.items():
        if len(group) == len(parts):
            renamed[name] = torch.cat([group[part] for part in parts])
    head = renamed.get("head.weight")
    if head is not None and "pos_embed" in renamed and head.shape[1] != renamed["pos_embed"].shape[-1]:
        # DINOv2's head takes the class token and the mean of the patches together.
        unknown += [name for name in ("head.weight", "head.bias") if renamed.pop(name, None) is not None]
    return renamed, unknown


def describe_names(file: TensorFile) -> list[str]:
    """Describe the choice of a file's weights and the conversion of their names, for reports."""
    said = [f"weights under {file.state_key}"] if file.state_key else []
    said += [f"names without {prefix}"] if (prefix := file.wrapper + file.prefix) else []
    said += [f"names converted from {file.layout}"] if file.layout else []
    if file.ignored:
        said.append(f"{counted(len(file.ignored), 'key')} without tensors left out ({first_few(file.ignored, 4)})")
    if file.left:
        parts = dict.fromkeys(name.removeprefix(file.prefix).split(".")[0] for name in file.left)
        said.append(f"{counted(len(file.left), 'tensor')} outside the encoder left out ({first_few(list(parts), 4)})")
    return said


def detector_title(names: Iterable[str]) -> str:
    """Describe the detector that tensors belong to; "" if they belong to none."""
    names = list(names)
    return next((title for pattern, title in DETECTORS if any(map(pattern.match, names))), "")
