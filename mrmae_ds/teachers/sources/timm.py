"""Any timm model with tokens or feature maps as a teacher: DINO, DINOv2, DINOv3, a convolutional network, ..."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.layers import QuickGELU
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.teachers.base import LibraryTeacher, tensors_sha256
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.dino_pos_embed import resize_like_dino
from mrmae_ds.teachers.sources.gelu import gelu_of_file
from mrmae_ds.teachers.sources.timm_readers import timm_reader
from mrmae_ds.weights.formats import TensorFile, read_tensor_file


class TimmTeacher(LibraryTeacher):
    """A timm model: patch tokens of a ViT's last block and its attention, or a stage's feature map and its norm.

    The source is timm's model name, with the tag of its weights if they come from the hub; weights are a local file
    (.safetensors, .pt, .pth, .bin) of any precision.

    Raises:
        UserError: for an unknown name, unreadable weights, or a model that does not fit the student's grid.
    """

    def __init__(self, options: TeacherOptions) -> None:
        if options.features == "proj":
            raise UserError(f"{options.key}.features: timm models have no projection; use raw or ln_post")
        network, missing, facts = load_timm(options)
        sha256 = file_sha256(Path(options.weights)) if options.weights else tensors_sha256(network)
        reader = timm_reader(network, options)
        # What pruning took away is not needed, so a file may lack it.
        lacking = [name for name in missing if name in network.state_dict()]
        if lacking:
            raise UserError(
                f"{options.key}.weights: {options.weights} is not a file of {options.source}: it lacks {len(lacking)} "
                f"of its tensors, first {lacking[0]}"
            )
        config = network.pretrained_cfg
        super().__init__(network, reader, options, (tuple(config["mean"]), tuple(config["std"])), sha256, facts)


def load_timm(options: TeacherOptions) -> tuple[nn.Module, list[str], dict[str, str]]:
    """Build a timm model without head, with the hub's weights or a local file's.

    Returns:
        The model; names that the file lacks, which timm would leave random without a word; what was decided.

    Raises:
        UserError: naming the recipe key.
    """
    key, source = options.key, options.source
    file = read_tensor_file(Path(options.weights), f"{key}.weights") if options.weights else None
    try:
        if _resize_like_dino(options):
            return _load(options, file, dino=True)
        if file is not None:
            return _load(options, file, dino=False)
        network = create_network(source, options.image_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # timm, the hub client and torch each raise their own kinds
        raise UserError(
            f"{key}: timm model {source!r} could not be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); check the name, or give a local file as {key}.weights where no hub is "
            "in reach"
        ) from None
    _check_gelu(network, None, options)
    return network, [], {}


def _load(
    options: TeacherOptions, file: TensorFile | None, *, dino: bool
) -> tuple[nn.Module, list[str], dict[str, str]]:
    """The tensors of ``file``, or of the hub for None, in a network of the wanted input size."""
    tensors = create_network(options.source, None, pretrained=True).state_dict() if file is None else file.tensors
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    network = create_network(options.source, options.image_size, pretrained=False)
    if file is not None:
        _check_gelu(network, file, options)
    facts = _resize_positions(state, network, options, dino)
    filter_fn = _checkpoint_filter(network)
    state = filter_fn(state, network) if filter_fn else state
    loaded = network.load_state_dict(state, strict=False)
    # A head that is not asked for may be in the file; a block, or a part of one, that the model lacks may not.
    known = {name.split(".")[0] for name in network.state_dict().keys() & state.keys() if "." in name}
    foreign = [name for name in loaded.unexpected_keys if name.split(".")[0] in known]
    if foreign:
        raise UserError(
            f"{options.key}.weights: {options.weights} is not a file of {options.source}: {len(foreign)} of its "
            f"tensors have no place there, first {foreign[0]}"
        )
    return network, [name for name in loaded.missing_keys if not name.endswith("num_batches_tracked")], facts


def _resize_positions(
    state: dict[str, Tensor], network: nn.Module, options: TeacherOptions, dino: bool
) -> dict[str, str]:
    """Resize ``state``'s positions to the network's grid if DINO's way is wanted; timm's filter does the rest."""
    positions, wanted = state.get("pos_embed"), getattr(network, "pos_embed", None)
    if positions is None or wanted is None:
        if options.position_resize == "dino":
            raise UserError(f"{options.key}.position_resize: {options.source} has no position embedding to resize")
        return {}
    if positions.shape == wanted.shape:
        return {}
    prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
    if dino:
        state["pos_embed"] = resize_like_dino(positions, prefix, network.patch_embed.grid_size)
    how = "as in DINO's own code (bicubic, offset 0.1)" if dino else "as timm does (bicubic, antialias)"
    return {"positions": f"{positions.shape[1] - prefix} resized to {wanted.shape[1] - prefix}, {how}"}


def create_network(source: str, image_size: int | None, *, pretrained: bool) -> nn.Module:
    """A timm model without head; None takes its own input size. What timm raises is not caught."""
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    if image_size is None:
        return timm.create_model(source, **options)
    try:
        return timm.create_model(source, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(source, **options)  # a convolutional network takes any size


def _checkpoint_filter(network: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """The function by which timm turns this family's foreign files into its own names and sizes."""
    name = network.pretrained_cfg.get("architecture", "")
    modules = [type(network).__module__]
    if is_model(name):
        modules.insert(0, model_entrypoint(name).__module__)
    found = (getattr(sys.modules[module], "checkpoint_filter_fn", None) for module in modules)
    return next((function for function in found if function is not None), None)


def _resize_like_dino(options: TeacherOptions) -> bool:
    if options.position_resize is not None:
        return options.position_resize == "dino"
    name, _, tag = options.source.partition(".")
    return tag == "dino" or ("dinov2" in name and "_reg" not in name)


def _check_gelu(network: nn.Module, file: TensorFile | None, options: TeacherOptions) -> None:
    """CLIP's weights under a timm name: timm has a name for each GELU, and only notes when it is the wrong one."""
    notes = " ".join(network.pretrained_cfg.get("notes") or ())
    found = gelu_of_file(file) if file is not None else None
    if file is None and "natively QuickGELU" in notes:
        quick, why = True, "timm's note on them"
    elif found is not None:
        quick, why = found.quick, found.why
    else:
        return
    if any(isinstance(module, QuickGELU) for module in network.modules()) != quick:
        other = "a name with clip_quickgelu" if quick else "the name without quickgelu"
        raise UserError(
            f"{options.key}.source: these weights were trained with {'Quick' if quick else 'plain '}GELU (by {why}), "
            f"which {options.source} does not compute; use {other}"
        )
