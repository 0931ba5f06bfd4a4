"""Configurations beside a weights file, of timm, Hugging Face and open_clip: sizes, statistics, layers, classes.

A configuration of another width is of another file in the same folder. One that contradicts the file is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isclose
from typing import Any

from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import Rgb
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.names import HF_CLIP, HF_VIT

CONFIG, PROCESSOR, OPEN_CLIP = "config.json", "preprocessor_config.json", "open_clip_config.json"
# Hugging Face's names of the exact GELU, and the largest epsilon of a layer norm that changes no result: models here
# have 1e-6, Google's ViT 1e-12.
EXACT_GELU, MAX_EPSILON = ("gelu", "gelu_python"), 1e-5
ACTIVATIONS = {HF_VIT: EXACT_GELU, HF_CLIP: (*EXACT_GELU, "quick_gelu")}
# Names of sizes in Hugging Face's configurations and in timm's model_args, by the fields of a plain ViT's spec.
RECORDED_SIZES = {"depth": ("num_hidden_layers", "depth"), "patch": ("patch_size",)}
OPEN_CLIP_SIZES = {"depth": ("layers",), "patch": ("patch_size",)}
# Values of timm's model_args that change no result; another epsilon cannot be recorded there.
TIMM_LAYERS = {"act_layer": ("gelu",), "norm_layer": ("layernorm", "layernormfp32")}
# Entries of Hugging Face's image processors with which its input is not that of pixels in 0 to 1, in RGB.
OTHER_INPUT = {"do_rescale": False, "offset": True, "rescale_offset": True, "do_flip_channel_order": True}
PLACEHOLDER = re.compile(r"LABEL_\d+")  # Hugging Face's, for classes without a name


def read_config(file: TensorFile, name: str) -> dict[str, Any]:
    """Return a JSON object beside the file; empty if there is none.

    Raises:
        UserError: if the file of that name holds no JSON object.
    """
    path = file.path.parent / name
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); correct or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; correct or remove it")
    return content


def config_part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object in a configuration; empty if it has none of that name."""
    part = config.get(key)
    return part if isinstance(part, dict) else {}


def model_config(file: TensorFile, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's or Hugging Face's configuration beside a file, of a CLIP that of its image tower.

    Args:
        file: the file.
        sizes: fields of a spec; a configuration of another width is of another file in the same folder.

    Raises:
        UserError: if it is damaged, or of an encoder of the same width and another depth or patch.
    """
    config = read_config(file, CONFIG)
    vision = config_part(config, "vision_config")  # of a whole CLIP
    tower = vision or config
    config |= vision
    width = config.get("hidden_size", config.get("num_features"))
    if width is not None and "dim" in sizes and width != sizes["dim"]:
        return {}
    for part in (tower, config_part(config, "model_args")):
        _compare_sizes(file, part, sizes, RECORDED_SIZES, CONFIG)
    return config


def open_clip_config(file: TensorFile, sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return open_clip's configuration beside a file; empty if it is another model's.

    Args:
        file: the file.
        sizes: fields of a plain ViT's spec, which are compared.
    """
    config = read_config(file, OPEN_CLIP)
    vision = config_part(config_part(config, "model_cfg") or config, "vision_cfg")
    if not describes_tower(vision, file.tensors):
        return {}
    _compare_sizes(file, vision, sizes or {}, OPEN_CLIP_SIZES, OPEN_CLIP)
    return config


def _compare_sizes(
    file: TensorFile,
    config: Mapping[str, Any],
    sizes: Mapping[str, Any],
    recorded: Mapping[str, tuple[str, ...]],
    name: str,
) -> None:
    """Compare the sizes that a configuration records with those of the tensors.

    Raises:
        UserError: naming the first that differs.
    """
    for size, key in ((size, key) for size, keys in recorded.items() for key in keys if size in sizes):
        values = config[key] if isinstance(config.get(key), list) else [config.get(key)]
        if any(isinstance(value, int) and value != sizes[size] for value in values):
            raise UserError(
                f"{file.path}: {name} beside it gives {key} {config[key]}, but its tensors have {sizes[size]}; it is "
                f"a part of the model (name the index of its shards), or {name} is another model's (remove it)"
            )


def recorded_pool(config: Mapping[str, Any]) -> str:
    """Return timm's pooling in a configuration of :func:`model_config`; "" if it has none."""
    return str(config_part(config, "model_args").get("global_pool", config.get("global_pool")) or "")


def describes_tower(vision: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Return False if an entry ``vision_cfg`` of open_clip's is not that of the image tower in a file.

    Args:
        vision: the entry.
        tensors: tensors of the file, which may be the tower in timm's names.
    """
    if "patch_embed.proj.weight" in tensors and "norm_pre.weight" not in tensors:
        return False  # no CLIP
    if "timm_model_name" in vision:
        return "visual.conv1.weight" not in tensors
    conv = tensors.get("visual.conv1.weight", tensors.get("patch_embed.proj.weight"))
    return conv is None or not vision or bool(vision.get("width", 768) == conv.shape[0])  # open_clip's default


def recorded_statistics(file: TensorFile, config: Mapping[str, Any]) -> tuple[tuple[Rgb, Rgb] | None, str]:
    """Return mean and std of the configurations beside a file and where they are; None if there are none.

    Args:
        file: the file.
        config: its :func:`model_config`.

    Raises:
        UserError: if they are not those of pixels in 0 to 1.
    """
    for values, mean, std, where in (
        (config_part(config, "pretrained_cfg"), "mean", "std", CONFIG),
        (_processor(file), "image_mean", "image_std", PROCESSOR),
        (config_part(open_clip_config(file), "preprocess_cfg"), "mean", "std", OPEN_CLIP),
    ):
        if mean in values and std in values:
            named = f"{file.path}: the {mean} and {std} of {where} beside it"
            return checked_statistics(values[mean], values[std], named), f"{where} beside it"
    return None, ""


def _processor(file: TensorFile) -> dict[str, Any]:
    """Return the configuration of Hugging Face's image processor, with the statistics that it uses.

    Raises:
        UserError: naming the entry, if its input is not that of pixels in 0 to 1.
    """
    config = read_config(file, PROCESSOR)
    wrong = [key for key, value in OTHER_INPUT.items() if config.get(key) is value]
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or not isclose(factor, 1 / 255, rel_tol=1e-4):
        wrong.append("rescale_factor")
    if wrong:
        raise UserError(
            f"{file.path}: {PROCESSOR} beside it has {wrong[0]} {config[wrong[0]]}, so the input of the model is not "
            f"that of RGB pixels in 0 to 1, which all models here take; correct that file if it is wrong"
        )
    if config.get("do_normalize") is False:
        config |= {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    return config


def checked_statistics(mean: Any, std: Any, where: str) -> tuple[Rgb, Rgb]:
    """Return statistics of pixels in 0 to 1, of which no standard deviation (1) is left to the model.

    Args:
        mean: three numbers.
        std: three numbers.
        where: their description, for errors.

    Raises:
        UserError: for others.
    """
    try:
        red, green, blue = map(float, mean)
        statistics = (red, green, blue), tuple(map(float, std))
    except (TypeError, ValueError):
        raise UserError(f"{where} are not three numbers each: {mean}, {std}") from None
    if len(statistics[1]) != 3 or not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(*statistics, strict=True)):
        raise UserError(f"{where} are not those of pixels in 0 to 1: {mean}, {std}; correct the file")
    return statistics  # type: ignore[return-value]


def recorded_classes(file: TensorFile, config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Return the names of a head's outputs in a configuration of :func:`model_config`; empty if it names none.

    Args:
        file: the file.
        config: the configuration.
        num_classes: outputs of the head.

    Raises:
        UserError: if they are of another number, or are not numbered from 0.
    """
    cfg = config_part(config, "pretrained_cfg")
    named = [(key, part.get(key)) for part in (config, cfg) for key in ("id2label", "label_names", "labels")]
    key, labels = next(
        ((key, labels) for key, labels in named if labels and isinstance(labels, (dict, list))), ("", [])
    )
    numbered = labels if isinstance(labels, dict) else {str(number): name for number, name in enumerate(labels)}
    if not num_classes or all(PLACEHOLDER.fullmatch(str(name)) for name in numbered.values()):
        return ()
    if len(numbered) != num_classes:
        raise UserError(
            f"{file.path}: {key} in config.json beside it names {len(numbered)} classes, but its head has "
            f"{num_classes} outputs; correct that file"
        )
    if numbered.keys() != set(map(str, range(num_classes))):
        raise UserError(
            f"{file.path}: the keys of {key} in config.json beside it are not 0 to {num_classes - 1}; correct that file"
        )
    return tuple(str(numbered[str(number)]) for number in range(num_classes))


def check_layers(file: TensorFile, config: Mapping[str, Any], plain: bool = True) -> None:
    """Check that a configuration of :func:`model_config` is of an encoder with the layers of those here.

    Args:
        file: the file.
        config: the configuration.
        plain: it has only tensors that this project's encoder has; for others timm has layers of any kind.

    Raises:
        UserError: for another activation, norm or epsilon.
    """
    for key, known in TIMM_LAYERS.items():
        layer = config_part(config, "model_args").get(key)
        if plain and layer is not None and layer not in known:
            raise UserError(
                f"{file.path}: has the {key} {layer} (model_args in config.json), and encoders here {known[0]}"
            )
    if file.layout not in ACTIVATIONS:
        return
    activations = ACTIVATIONS[file.layout]
    activation, epsilon = config.get("hidden_act", activations[0]), config.get("layer_norm_eps", 0)
    if activation not in activations:
        usual = "the exact GELU" + " or quick_gelu" * ("quick_gelu" in activations)
        raise UserError(f"{file.path}: has the activation {activation} (hidden_act in config.json), not {usual}")
    if not isinstance(epsilon, (int, float)) or not 0 <= epsilon <= MAX_EPSILON:
        raise UserError(
            f"{file.path}: has layer norms of epsilon {epsilon} (layer_norm_eps in config.json), more than the "
            f"models here have ({MAX_EPSILON:g} at most)"
        )
