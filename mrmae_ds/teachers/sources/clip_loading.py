"""Load open_clip image towers: weights from a tag, a hub repository or folder, or a local file of any format."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.files import split_choice
from mrmae_ds.imagenet import Rgb
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.gelu import Gelu, gelu_of_file, resolve_gelu
from mrmae_ds.teachers.sources.timm_origin import check_heads
from mrmae_ds.units import counted, printable
from mrmae_ds.weights.beside import OPEN_CLIP
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.resolve import Weights, resolve

# The text tower is never used; open_clip requires one, so it is as small as possible.
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
# Source of a tower whose sizes are those of its weights file, for towers that open_clip has no name for.
FROM_FILE = "file"
_QUICK_NAME = "-quickgelu"
_BESIDE = f"put its {OPEN_CLIP} beside it"


@dataclass(frozen=True)
class ClipTower:
    """An image tower with its weights.

    Attributes:
        visual: the tower.
        statistics: mean and std of its input, of pixels in [0, 1].
        statistics_origin: source of the statistics, in words.
        gelu_origin: its GELU and the evidence for it, in words.
        heads: comparison of its number of heads with the file's, for the record.
    """

    visual: VisionTransformer | TimmModel
    statistics: tuple[Rgb, Rgb]
    statistics_origin: str
    gelu_origin: str
    heads: dict[str, str] = field(default_factory=dict)


def load_clip_tower(options: TeacherOptions) -> ClipTower:
    """Load the image tower that a recipe names, on the CPU in float32.

    Raises:
        UserError: naming the recipe key, for an unknown name or tag, a file of another model, or a GELU that is
            undetermined or contradicts the recipe.
    """
    key, source, weights = options.key, options.source, options.weights
    named_files = source.startswith(("hf-hub:", "local-dir:"))
    if named_files and weights is not None:
        raise UserError(f"{key}.weights: {source} names its files itself; remove the key, or name a model as source")
    if not named_files and weights is None:
        raise UserError(f"{key}.weights: a CLIP teacher needs a tag (openai) or a local file")
    try:
        config = recipe_config(options)
        if _is_timm(config) and options.quickgelu is not None:
            raise UserError(f"{key}.quickgelu: {source} is a timm tower, whose name decides its GELU; remove the key")
        if named_files:
            return _from_named_files(options, config)
        assert weights is not None
        name = _name(source)
        tag = open_clip.get_pretrained_cfg(name, weights) or open_clip.get_pretrained_cfg(source, weights)
        return _from_tag(options, name, tag, config) if tag else _from_file(options, config)
    except UserError:
        raise
    except Exception as error:  # open_clip, the hub client and torch raise exceptions of their own
        raise UserError(
            f"{key}: open_clip model {source!r} with weights {weights!r} could not be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())}); check both names, or give a local file as "
            f"{key}.weights"
        ) from None


def recipe_config(options: TeacherOptions) -> dict[str, Any]:
    """Return open_clip's configuration of the model that a recipe names, or of its weights file.

    Raises:
        UserError: naming the recipe key, if there is none.
    """
    if options.source == FROM_FILE:
        return file_config(_weights_of(options))
    config: dict[str, Any] | None = open_clip.get_model_config(options.source)
    if config is None:
        raise UserError(
            f"{options.key}.source: open_clip has no model {options.source!r}; see open_clip.list_models(), or set "
            f"{FROM_FILE}, which takes the sizes of the weights file"
        )
    return config


def file_config(weights: Weights) -> dict[str, Any]:
    """Return open_clip's configuration of the image tower in a file, by its tensors and its recorded number of heads.

    Raises:
        UserError: if it is not a plain tower of open_clip's, or its number of heads is not recorded.
    """
    sizes, heads = weights.identity.sizes, weights.identity.origin.num_heads
    if weights.identity.kind != "clip" or not sizes:
        raise UserError(
            f"{weights.where}: contains {weights.identity.title}, which source: {FROM_FILE} does not take (only "
            "transformers of OpenAI's form); name the model that it was saved from"
        )
    if heads is None or sizes["dim"] % heads:
        found = "does not record its number of attention heads" if heads is None else f"cannot have {heads} heads"
        raise UserError(
            f"{weights.where}: {found}; name its open_clip model as source if there is one, else put a config.json "
            'with {"num_attention_heads": N} beside it'
        )
    tensors = weights.file.tensors
    vision = {"width": sizes["dim"], "layers": sizes["depth"], "mlp_ratio": sizes["mlp_ratio"]}
    vision |= {"patch_size": sizes["patch"], "head_width": sizes["dim"] // heads}
    config = {"embed_dim": tensors["visual.proj"].shape[1] if "visual.proj" in tensors else 1, "vision_cfg": vision}
    with torch.device("meta"):
        fit_tower(_own_size(config, weights), weights.file, FROM_FILE, weights.where)
    return config


def source_of(weights: Weights) -> str:
    """Return the source with which a teacher takes a file's image tower: open_clip's name or ``file``.

    Raises:
        UserError: if there is none.
    """
    sizes, heads = weights.identity.sizes, weights.identity.origin.num_heads
    wanted = (sizes["dim"], sizes["depth"], sizes["patch"])
    for name in sorted(open_clip.list_models(), key=len):
        config = open_clip.get_model_config(name)
        vision = {"width": 768, "layers": 12, "patch_size": 16, "head_width": 64} | config["vision_cfg"]
        same = wanted == (vision["width"], vision["layers"], vision["patch_size"])
        if not same or _is_timm(config) or heads not in (None, vision["width"] // vision["head_width"]):
            continue
        try:
            with torch.device("meta"):
                fit_tower(_own_size(config, weights), weights.file, name, weights.where)
        except UserError:
            continue
        return name
    file_config(weights)
    return FROM_FILE


def _own_size(config: dict[str, Any], weights: Weights) -> open_clip.CLIP:
    """Build a model for images of the size that a file's positions have."""
    grid = isqrt(len(weights.file.tensors["visual.positional_embedding"]) - 1)
    vision = {**config["vision_cfg"], "image_size": grid * weights.identity.sizes["patch"]}
    return open_clip.CLIP(config["embed_dim"], vision, NO_TEXT)


def _from_named_files(options: TeacherOptions, config: dict[str, Any]) -> ClipTower:
    where = f"{OPEN_CLIP} of {options.source}"
    gelu = None
    if not _is_timm(config):
        gelu = resolve_gelu(Gelu(bool(config.get("quick_gelu", False)), where), options, _BESIDE)
    model = open_clip.create_model(options.source, force_image_size=options.image_size, require_pretrained=True)
    return _tower(model.visual, gelu, config, (*_preprocessing(model.visual), where))


def _from_tag(options: TeacherOptions, name: str, tag: dict[str, Any], config: dict[str, Any]) -> ClipTower:
    where = f"open_clip's entry for {options.weights}"
    gelu, extra = None, {}
    if not _is_timm(config):
        gelu = resolve_gelu(Gelu(bool(tag.get("quick_gelu", False)), where), options, _BESIDE)
        extra = {"force_quick_gelu": True} if gelu.quick else {"quick_gelu": False}
    model = open_clip.create_model(
        name, pretrained=options.weights, force_image_size=options.image_size, require_pretrained=True, **extra
    )
    return _tower(model.visual, gelu, config, (*_preprocessing(model.visual), where))


def _weights_of(options: TeacherOptions) -> Weights:
    """Read the weights file that a recipe names.

    Raises:
        UserError: naming the recipe key, if it does not exist or is not usable.
    """
    path, name = Path(options.weights or ""), _name(options.source)
    if not split_choice(path)[0].is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"{options.key}.weights: {options.weights} is neither a file nor a tag of {options.source} (its tags: "
            f"{tags})"
        )
    found = resolve(path, f"{options.key}.weights")
    found.check_usable()
    return found


def _name(source: str) -> str:
    """Return open_clip's name without the ending that chooses the GELU, if it has one."""
    name = source.removesuffix(_QUICK_NAME)
    return name if open_clip.get_model_config(name) else source


def _from_file(options: TeacherOptions, config: dict[str, Any]) -> ClipTower:
    found = _weights_of(options)
    file, is_timm = found.file, _is_timm(config)
    gelu = None if is_timm else resolve_gelu(gelu_of_file(file), options, _BESIDE)
    vision = dict(config["vision_cfg"])
    vision |= {"timm_model_pretrained": False} if is_timm else {"image_size": options.image_size}
    model = open_clip.CLIP(
        embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=NO_TEXT, quick_gelu=bool(gelu and gelu.quick)
    )
    where = f"{options.key}.weights: {file.path}"
    tower = fit_tower(model, file, options.source, where, projects=options.features == "proj")
    model.visual.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in tower.items()})
    heads = {}
    if is_timm:
        model.visual.set_input_size(options.image_size)
    else:
        heads = check_heads(model.visual.transformer.resblocks[-1].attn.num_heads, found, options)
    return _tower(model.visual, gelu, config, _statistics_of_file(found, _name(options.source), options), heads)


def _tower(
    visual: VisionTransformer | TimmModel,
    gelu: Gelu | None,
    config: dict[str, Any],
    statistics: tuple[Rgb, Rgb, str],
    heads: dict[str, str] | None = None,
) -> ClipTower:
    mean, std, where = statistics
    words = str(gelu) if gelu else f"as timm's {config['vision_cfg']['timm_model_name']} has it"
    return ClipTower(visual, (mean, std), where, words, heads or {})


def _preprocessing(visual: VisionTransformer | TimmModel) -> tuple[Rgb, Rgb]:
    """Return the mean and std that open_clip stored in a model that it loaded itself."""
    return tuple(visual.preprocess_cfg["mean"]), tuple(visual.preprocess_cfg["std"])


def _is_timm(config: dict[str, Any]) -> bool:
    return "timm_model_name" in config["vision_cfg"]


def fit_tower(
    model: open_clip.CLIP, file: TensorFile, source: str, where: str, *, projects: bool = False
) -> dict[str, Tensor]:
    """Return a file's image tower, positions resized, if its tensors have the names and shapes of a model's.

    Args:
        model: the model; it loses its projection if the file has none.
        file: the file.
        source: the model's name, for errors.
        where: key and path, for errors.
        projects: the projection is needed.

    Raises:
        UserError: naming what differs.
    """
    exact = {name: tensor.float() for name, tensor in file.tensors.items()}
    state: dict[str, Tensor] = convert_state_dict(model, exact)
    tower = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if not tower and "conv1.weight" in state:
        tower = {f"visual.{name}": tensor for name, tensor in state.items()}
    if not projects and "visual.proj" not in tower and isinstance(model.visual, VisionTransformer):
        model.visual.proj = None
    resize_pos_embed(tower, model)
    expected = {f"visual.{name}": tensor.shape for name, tensor in model.visual.state_dict().items()}
    problems = {
        "it lacks": sorted(expected.keys() - tower.keys()),
        "the model has no": sorted(tower.keys() - expected.keys()),
        "of another shape is": sorted(
            name for name in expected.keys() & tower.keys() if expected[name] != tower[name].shape
        ),
    }
    listed = [
        f"{what} {printable(names[0])} ({counted(len(names), 'such tensor')})"
        for what, names in problems.items()
        if names
    ]
    if listed:
        other = "an image tower of OpenAI's form" if source == FROM_FILE else f"a file of {source}"
        raise UserError(f"{where} is not {other}: {'; '.join(listed)}; set source to the model that it was saved from")
    return tower


def _statistics_of_file(weights: Weights, name: str, options: TeacherOptions) -> tuple[Rgb, Rgb, str]:
    """Return mean, std and their origin for a weights file.

    Raises:
        UserError: naming the recipe key, if neither the file nor the model's name determines them.
    """
    origin = weights.identity.origin
    if origin.statistics is not None:
        return *origin.statistics, origin.statistics_by
    if (named := statistics_of_name(name)) is not None:
        return named
    if options.statistics is not None:
        return *options.statistics, "the recipe"
    raise UserError(
        f"{options.key}.mean: the statistics of the input that {options.weights} was trained with are not known; give "
        f"mean and std, or put its {OPEN_CLIP} beside it"
    )


def statistics_of_name(name: str) -> tuple[Rgb, Rgb, str] | None:
    """Return mean, std and their origin for all weights of an open_clip name; None if they differ, and for ``file``."""
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    known = {(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags if tag.get("mean") and tag.get("std")}
    if len(known) > 1 or name == FROM_FILE:
        return None
    for mean, std in known:
        return mean, std, f"all of open_clip's weights of {name}"
    default = f"open_clip's default, since it has no weights of {name}"
    return open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, default
