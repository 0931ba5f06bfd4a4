"""timm models with patch tokens or feature maps as teachers: DINO, DINOv2, DINOv3, a convolutional network, ..."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import Rgb
from mrmae_ds.teachers.base import LibraryTeacher, MetaTeacher, tensors_sha256
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.timm_origin import check_activation, check_gelu, check_heads, check_kind, statistics_of
from mrmae_ds.teachers.sources.timm_readers import BlockReader, TimmNetwork, timm_reader
from mrmae_ds.weights.names import PREFIX_WORDS, describe_names
from mrmae_ds.weights.paths import weights_sha256
from mrmae_ds.weights.resolve import Weights, resolve

# Tensors that no feature needs: heads, the norm and the pooling before one, and masks of pre-training.
UNUSED = re.compile(r"(head\w*|fc_norm|attn_pool|pre_logits)\.|mask_token$|.*num_batches_tracked$")
TOKEN = re.compile(r"(cls|dist|reg)_token")  # with rows in the position embedding
REGISTERS = re.compile(r"^(register|storage)_tokens$")  # DINOv2's and DINOv3's own names
# DINO's guard against rounding when a position embedding is resized.
DINO_OFFSET = 0.1


class TimmTeacher(LibraryTeacher):
    """A timm model: patch tokens of a ViT's last block with its attention, or a stage's feature map with its norm.

    The source is timm's model name, including the tag of the weights if they come from the hub. Weights are a local
    file (.safetensors, .pt, .pth, .bin) of any precision.

    Raises:
        UserError: for an unknown name, unreadable weights, or a model that does not fit the student's grid.
    """

    def __init__(self, options: TeacherOptions) -> None:
        if options.features == "proj":
            raise UserError(f"{options.key}.features: timm models have no projection; use raw or ln_post")
        loaded = load_timm(options)
        network = loaded.network
        sha256 = weights_sha256(Path(options.weights)) if options.weights else tensors_sha256(network)
        reader = timm_reader(network, options)
        if loaded.is_mean_pooled and isinstance(reader, BlockReader):
            reader.ignore_class_token()
        # The file may lack tensors that pruning removed, because they are not needed.
        missing = [name for name in loaded.missing if name in network.state_dict()]
        if missing:
            raise UserError(
                f"{options.key}.weights: {options.weights} is not a file of {options.source}: it lacks {len(missing)} "
                f"of its tensors, first {missing[0]}"
            )
        super().__init__(network, reader, options, loaded.statistics, sha256, loaded.details)


def build_meta(options: TeacherOptions) -> MetaTeacher:
    """Build the model without weights; see :class:`~mrmae_ds.teachers.build.TeacherSource`."""
    try:
        network = create_network(options.source, options.image_size, pretrained=False)
    except Exception as error:  # timm raises many types
        raise UserError(
            f"{options.key}.source: timm model {options.source!r} could not be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())})"
        ) from None
    return MetaTeacher(network, timm_reader(network, options), options)


build = TimmTeacher


@dataclass(frozen=True)
class LoadedNetwork:
    """A timm model with its weights.

    Attributes:
        network: the model, without head.
        statistics: mean and std of its input, of pixels in [0, 1].
        missing: names of tensors that the file lacks, which timm would silently leave at random values.
        details: decisions made while loading, by topic.
        is_mean_pooled: a plain ViT whose head takes the mean of the patches.
    """

    network: TimmNetwork
    statistics: tuple[Rgb, Rgb]
    missing: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    is_mean_pooled: bool = False


def load_timm(options: TeacherOptions) -> LoadedNetwork:
    """Build a timm model without head, with weights from the hub or from a local file.

    Raises:
        UserError: naming the recipe key.
    """
    key, source = options.key, options.source
    weights = resolve(Path(options.weights), f"{key}.weights") if options.weights else None
    if weights is not None:
        weights.check_usable()
        check_kind(weights, options)
    try:
        if _use_dino_resize(options):
            return _load(options, weights, dino=True)
        if weights is not None:
            return _load(options, weights, dino=False)
        network = create_network(source, options.image_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # timm, the hub client and torch raise exceptions of their own
        reason = f"timm model {source!r} could not be loaded ({type(error).__name__}: {' '.join(str(error).split())})"
        if weights is not None:
            raise UserError(f"{key}: {reason}; set source to the model that {options.weights} was saved from") from None
        raise UserError(
            f"{key}: {reason}; check the name, or give a local file as {key}.weights if the hub cannot be reached"
        ) from None
    statistics, details = _decide(network, None, options)
    return LoadedNetwork(network, statistics, details=details)


def _decide(
    network: TimmNetwork, weights: Weights | None, options: TeacherOptions
) -> tuple[tuple[Rgb, Rgb], dict[str, str]]:
    """Decide what no tensor shows (GELU, heads, statistics, pooling), and describe the decisions.

    Raises:
        UserError: naming the recipe key, for what is undecided or contradicts the weights.
    """
    details = check_gelu(network, weights, options)
    statistics, by = statistics_of(network, weights, options)
    if weights is not None:
        blocks = getattr(network, "blocks", None)
        heads = getattr(getattr(blocks[-1], "attn", None), "num_heads", None) if blocks else None
        details |= check_activation(network, weights, options)
        details |= check_heads(heads, weights, options) | {"statistics": by}
        if chosen := describe_names(weights.file):
            details["weights"] = "; ".join(chosen)
    return statistics, details


def _load(options: TeacherOptions, weights: Weights | None, *, dino: bool) -> LoadedNetwork:
    """Load the tensors of a file (of the hub if None) into a network of the required input size."""
    network = create_network(options.source, options.image_size, pretrained=False)
    statistics, details = _decide(network, weights, options)
    if weights is None:
        tensors: Mapping[str, Tensor] = create_network(options.source, None, pretrained=True).state_dict()
    else:
        tensors = _without_prefix(weights.file.tensors, network)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    if weights is not None:  # before resizing, which takes the model's tokens for those of the file
        tokens = [REGISTERS.sub("reg_token", name) for name in state]
        _check_names(list(filter(TOKEN.fullmatch, tokens)), network, weights, options)
    details |= _resize_pos_embed(state, network, options, dino)
    filter_fn = _checkpoint_filter(network)
    state = filter_fn(state, network) if filter_fn else state
    if weights is not None:
        _check_names(list(state), network, weights, options)
    result = network.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
    identity = weights.identity if weights is not None else None
    is_mean_pooled = identity is not None and not identity.extras and identity.pool == "avg"
    return LoadedNetwork(network, statistics, missing, details, is_mean_pooled)


def _check_names(names: Collection[str], network: TimmNetwork, weights: Weights, options: TeacherOptions) -> None:
    """Check that a model has all tensors of a file but those that no feature needs, and that the file has its tokens.

    Args:
        names: of the file's tensors, by timm's names.
        network: the model.
        weights: the file.
        options: options from the recipe.

    Raises:
        UserError: naming the recipe key and the first tensor.
    """
    expected, ours = network.state_dict().keys(), weights.identity.names
    heads = network.pretrained_cfg.get("classifier") or ()
    unused = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    # Decoders and heads of a pre-training that this project knows.
    unused += tuple(name for name in names if not ours.get(name, "encoder.").startswith("encoder."))
    foreign = [n for n in names if n not in expected and not UNUSED.match(n) and not n.startswith(unused)]
    lacking = [n for n in expected - set(names) if TOKEN.fullmatch(n)] if "cls_token" in names else []
    what = f"the model lacks {len(foreign)} of its tensors, first {foreign[0]}" if foreign else ""
    if what or lacking:
        raise UserError(
            f"{options.key}.weights: {options.weights} is not a file of {options.source}: "
            f"{what or f'it lacks {lacking[0]}'}; set source to the model that it was saved from"
        )


def _without_prefix(tensors: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """Remove a known prefix from the names of a network that is not a ViT, found by its first tensor."""
    first = next(iter(network.state_dict()), "")
    prefixes = {name.removesuffix(first) for name in tensors if name.endswith(f".{first}") or name == first}
    prefix = next(iter(prefixes)) if len(prefixes) == 1 else ""
    if not prefix or not set(prefix.removesuffix(".").split(".")) <= PREFIX_WORDS:
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _resize_pos_embed(
    state: dict[str, Tensor], network: TimmNetwork, options: TeacherOptions, dino: bool
) -> dict[str, str]:
    """Resize the position embedding in ``state`` if DINO's method is used, and describe the resizing.

    With timm's method its checkpoint filter does the resizing.
    """
    pos_embed, target = state.get("pos_embed"), getattr(network, "pos_embed", None)
    if pos_embed is None or target is None:
        if options.position_resize == "dino":
            raise UserError(f"{options.key}.position_resize: {options.source} has no position embedding to resize")
        return {}
    if pos_embed.shape == target.shape:
        return {}
    prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
    if dino:
        state["pos_embed"] = resize_pos_embed_dino(pos_embed, prefix, network.patch_embed.grid_size)
    how = "as in DINO's own code (bicubic, offset 0.1)" if dino else "as timm does (bicubic, antialias)"
    return {"position embedding": f"{pos_embed.shape[1] - prefix} resized to {target.shape[1] - prefix}, {how}"}


def resize_pos_embed_dino(pos_embed: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Resize a ViT's position embedding as DINO and DINOv2 do, in float32.

    Bicubic without antialias, with coordinates scaled by (new + 0.1) / old instead of new / old; the published results
    of the weights include this guard against rounding. (DINOv2's models with registers use no offset and antialias,
    which is what timm does.)

    Args:
        pos_embed: position embedding [1, prefix + n*n, C].
        prefix: number of rows before the patches' (class token, registers).
        grid: rows and columns of the new grid.

    Returns:
        Position embedding [1, prefix + rows*columns, C], of the dtype of ``pos_embed``.

    Raises:
        ValueError: if the patches' rows do not form a square grid.
    """
    side = math.isqrt(pos_embed.shape[1] - prefix)
    if side * side != pos_embed.shape[1] - prefix:
        raise ValueError(f"{pos_embed.shape[1] - prefix} position embeddings do not form a square grid")
    if (side, side) == grid:
        return pos_embed
    patches = pos_embed[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + DINO_OFFSET) / side, (grid[1] + DINO_OFFSET) / side)
    resized = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=False)
    assert resized.shape[2:] == grid
    resized = resized.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :prefix], resized], dim=1)


def create_network(source: str, image_size: int | None, *, pretrained: bool) -> TimmNetwork:
    """Create a timm model without head; exceptions of timm are not caught.

    Args:
        source: timm's model name.
        image_size: side of the input in pixels; None uses the model's default.
        pretrained: load the weights from the hub.
    """
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    if image_size is None:
        return timm.create_model(source, **options)
    try:
        return timm.create_model(source, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(source, **options)  # a convolutional network accepts any size


def _checkpoint_filter(network: TimmNetwork) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """Return timm's function that converts original checkpoints of this family to its names and sizes, if any."""
    name = network.pretrained_cfg.get("architecture", "")
    modules = [type(network).__module__]
    if is_model(name):
        modules.insert(0, model_entrypoint(name).__module__)
    filters = (getattr(sys.modules[module], "checkpoint_filter_fn", None) for module in modules)
    return next((function for function in filters if function is not None), None)


def _use_dino_resize(options: TeacherOptions) -> bool:
    if options.position_resize is not None:
        return options.position_resize == "dino"
    name, _, tag = options.source.partition(".")
    return tag == "dino" or ("dinov2" in name and "_reg" not in name)
