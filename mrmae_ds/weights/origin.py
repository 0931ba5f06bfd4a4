"""Origin of a weights file: what its tensors do not say (heads, statistics, classes), by its metadata or known origin.

Evidence is taken in this order: this project's metadata, configurations beside the file, the stored command line, and
tensors that only one project writes. Nothing is inferred from the file's own name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_MEAN, IMAGENET_STD, Rgb
from mrmae_ds.models.sizes import ARCHITECTURES, FAMILIES, CViTSpec, EncoderSpec
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.names import HF_VIT, VITDET, detector_title

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MOCO_HEADS = 12  # of MoCo v3's ViT-S; 6 of all others
# Hugging Face's names of the exact GELU, and the largest epsilon of a layer norm that changes no result: models here
# have 1e-6, Google's ViT 1e-12.
EXACT_GELU, MAX_EPSILON = ("gelu", "gelu_python"), 1e-5
# Entries of OpenAI's archives, and of state dicts taken from them, besides the weights.
OPENAI_SCALARS = {"input_resolution", "context_length", "vocab_size"}
# Option of BEiT's scripts and those made from them: ImageNet's statistics, or these.
BEIT_OPTION, BEIT_STATISTICS = "imagenet_default_mean_and_std", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Options of these scripts; all of them train with ImageNet's statistics. BEiT's have MAE's layer_decay too.
SCRIPTS = {
    "norm_pix_loss": "MAE's pre-training script",
    "layer_decay": "MAE's fine-tuning script",
    "local_crops_number": "DINO's script",
}


@dataclass(frozen=True)
class Origin:
    """Properties of weights that no tensor shows, each with its evidence in words; "" where there is none.

    Attributes:
        statistics: mean and std of the input, of pixels in [0, 1].
        statistics_by: evidence for them.
        num_heads: attention heads of the transformer blocks.
        heads_by: evidence for them.
        class_names: names of the head's outputs.
    """

    statistics: tuple[Rgb, Rgb] | None = None
    statistics_by: str = ""
    num_heads: int | None = None
    heads_by: str = ""
    class_names: tuple[str, ...] = ()

    def unverified(self) -> list[str]:
        """List what could not be verified."""
        unknown = [] if self.num_heads else ["the number of heads cannot be checked: the file does not record it"]
        return unknown + ([] if self.statistics else ["the statistics of its input are not recorded"])


def find_origin(
    file: TensorFile,
    metadata: Mapping[str, Any],
    family: str,
    sizes: Mapping[str, Any],
    num_classes: int = 0,
    plain: bool = True,
) -> Origin:
    """Find the origin of a file.

    Args:
        file: the file, with canonical names.
        metadata: this project's metadata of it.
        family: ``cvit``, ``vit`` or "" (a CLIP's image tower, or an unknown file).
        sizes: fields of the family's spec.
        num_classes: outputs of its head.
        plain: it has only tensors that this project's encoder has.

    Raises:
        UserError: if a configuration beside the file is damaged, or of an encoder that this project does not compute.
    """
    config = model_config(file, sizes)
    if file.layout == HF_VIT:
        _check_layers(file, config)
    statistics, statistics_by = _statistics(file, metadata, config)
    if statistics is None and (mark := _mark(file, family, plain)):
        statistics, statistics_by = (IMAGENET_MEAN, IMAGENET_STD), mark
    heads, heads_by = _heads(file, metadata, family, sizes, config)
    if heads is None and not family:
        heads, heads_by = _heads_of_tower(file, sizes)
    return Origin(statistics, statistics_by, heads, heads_by, _classes(file.path, metadata, config, num_classes))


def model_config(file: TensorFile, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's or Hugging Face's configuration beside a file, of a CLIP that of its image tower.

    Args:
        file: the file.
        sizes: fields of a spec; a configuration of another width is of another file in the same folder.
    """
    config = _config_beside(file, "config.json")
    config |= _part(config, "vision_config")  # of a whole CLIP
    width = config.get("hidden_size", config.get("num_features"))
    return {} if width is not None and "dim" in sizes and width != sizes["dim"] else config


def recorded_pool(config: Mapping[str, Any]) -> str:
    """Return timm's pooling in a configuration of :func:`model_config`; "" if it has none."""
    return str(_part(config, "model_args").get("global_pool", config.get("global_pool")) or "")


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


def _statistics(
    file: TensorFile, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[tuple[Rgb, Rgb] | None, str]:
    """Return recorded statistics and where they are recorded."""
    if "mean" in metadata and "std" in metadata:
        return (tuple(metadata["mean"]), tuple(metadata["std"])), "its metadata"
    timm, hugging_face = _part(config, "pretrained_cfg"), _config_beside(file, "preprocessor_config.json")
    for values, mean, std, where in (
        (timm, "mean", "std", "config.json beside it"),
        (hugging_face, "image_mean", "image_std", "preprocessor_config.json beside it"),
        (_part(_open_clip(file), "preprocess_cfg"), "mean", "std", "open_clip_config.json beside it"),
    ):
        if mean in values and std in values:
            return _checked(values[mean], values[std], f"{file.path}: the {mean} and {std} of {where}"), where
    if BEIT_OPTION in file.args:
        statistics = (IMAGENET_MEAN, IMAGENET_STD) if file.args[BEIT_OPTION] else BEIT_STATISTICS
        return statistics, f"the option {BEIT_OPTION} in it"
    return (CLIP_STATISTICS, "OpenAI's scalars in the file") if file.tensors.keys() >= OPENAI_SCALARS else (None, "")


def _mark(file: TensorFile, family: str, plain: bool = True) -> str:
    """Return what shows that a file is of a project which trains with ImageNet's statistics; "" for nothing."""
    options = [option for option in SCRIPTS if option in file.args and (plain or option != "layer_decay")]
    if options and BEIT_OPTION not in file.args:
        return f"the options of {SCRIPTS[options[0]]} in it"
    marks = {
        "MCMAE's architecture": family == "cvit",
        "MAE's decoder": "decoder_pred.weight" in file.tensors,
        "ViTDet's proposals in Detectron2's names": detector_title(file.left) == VITDET,
        "DINO's projection head": any("head.last_layer" in name for name in file.left),
        "DINOv2's mask token and layer scale": {"mask_token", "blocks.0.ls1.gamma"} <= file.tensors.keys(),
    }
    return next((mark for mark, found in marks.items() if found), "")


def _heads(
    file: TensorFile,
    metadata: Mapping[str, Any],
    family: str,
    sizes: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[int | None, str]:
    if metadata.get("spec"):
        return metadata["spec"]["num_heads"], "its metadata"
    if "num_heads" in sizes:
        return sizes["num_heads"], "the width of its tables of relative positions"
    widths = [tensor.shape[-1] for name, tensor in file.tensors.items() if name.endswith(".attn.rel_pos_h")]
    dim = sizes["dims"][-1] if "dims" in sizes else sizes.get("dim", 0)
    if widths and widths[0] and dim % widths[0] == 0:
        return dim // widths[0], "the width of its relative positions"
    recorded = config.get("num_attention_heads", _part(config, "model_args").get("num_heads"))
    if recorded is not None:
        if not isinstance(recorded, int) or recorded < 1 or dim % recorded:
            raise UserError(
                f"{file.path}: config.json beside it gives {recorded} attention heads, which do not divide its width, "
                f"{dim}; correct that file"
            )
        return recorded, "config.json beside it"
    if _is_small(family, sizes):
        if {"base_encoder", "momentum_encoder"} & set(file.prefix.split(".")):
            return MOCO_HEADS, "MoCo v3's names"
        if "pretrained_cfg" not in config and not _mark(file, family):
            return None, ""
    kind = FAMILIES.get(family)
    for arch, spec in ARCHITECTURES.items():
        if kind is not None and isinstance(spec, kind) and _same_widths(spec, sizes):
            return spec.num_heads, f"its width and depth, those of {arch}"
    return None, ""


def _heads_of_tower(file: TensorFile, sizes: Mapping[str, Any]) -> tuple[int | None, str]:
    """Read open_clip's configuration of an image tower, which has the width of a head."""
    vision = _part(_part(_open_clip(file), "model_cfg"), "vision_cfg")
    if "dim" not in sizes or not vision:
        return None, ""
    return sizes["dim"] // vision.get("head_width", 64), "open_clip_config.json beside it"


def _is_small(family: str, sizes: Mapping[str, Any]) -> bool:
    """Return True for the one size of which public weights differ in their number of heads."""
    return family == "vit" and _same_widths(ARCHITECTURES["vit_small"], sizes)


def _same_widths(spec: EncoderSpec, sizes: Mapping[str, Any]) -> bool:
    if isinstance(spec, CViTSpec):
        return (spec.dims, spec.depths) == (tuple(sizes["dims"]), tuple(sizes["depths"]))
    return (spec.dim, spec.depth) == (sizes["dim"], sizes["depth"])


def _classes(path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    if metadata.get("class_names"):
        return tuple(metadata["class_names"])
    labels = _part(config, "id2label")
    if num_classes and len(labels) == num_classes:
        if labels.keys() != set(map(str, range(num_classes))):
            raise UserError(
                f"{path}: the keys of id2label in config.json beside it are not 0 to {num_classes - 1}; correct that "
                "file"
            )
        return tuple(str(labels[str(number)]) for number in range(num_classes))
    if num_classes == IMAGENET_CLASSES:
        from timm.data import ImageNetInfo

        return tuple(ImageNetInfo().label_names())  # in the order of the WordNet ids
    return ()


def _checked(mean: Any, std: Any, where: str) -> tuple[Rgb, Rgb]:
    """Return statistics of pixels in 0 to 1, of which no standard deviation (1) is left to the model; refuse others."""
    try:
        red, green, blue = map(float, mean)
        statistics = (red, green, blue), tuple(map(float, std))
    except (TypeError, ValueError):
        raise UserError(f"{where} are not three numbers each: {mean}, {std}") from None
    if len(statistics[1]) != 3 or not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(*statistics, strict=True)):
        raise UserError(f"{where} are not those of pixels in 0 to 1: {mean}, {std}; correct the file")
    return statistics  # type: ignore[return-value]


def _check_layers(file: TensorFile, config: Mapping[str, Any]) -> None:
    """Check that Hugging Face's configuration is of an encoder with the layers of this project's.

    Raises:
        UserError: for another activation or epsilon.
    """
    activation, epsilon = config.get("hidden_act", EXACT_GELU[0]), config.get("layer_norm_eps", 0)
    if activation not in EXACT_GELU:
        raise UserError(f"{file.path}: has the activation {activation} (hidden_act in config.json), not the exact GELU")
    if not isinstance(epsilon, (int, float)) or not 0 <= epsilon <= MAX_EPSILON:
        raise UserError(
            f"{file.path}: has layer norms of epsilon {epsilon} (layer_norm_eps in config.json), more than the models "
            f"here have ({MAX_EPSILON:g} at most)"
        )


def _open_clip(file: TensorFile) -> dict[str, Any]:
    """Return open_clip's configuration beside a file; empty if it is another model's."""
    config = _config_beside(file, "open_clip_config.json")
    vision = _part(_part(config, "model_cfg") or config, "vision_cfg")
    return config if describes_tower(vision, file.tensors) else {}


def _part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = config.get(key)
    return part if isinstance(part, dict) else {}


def _config_beside(file: TensorFile, name: str) -> dict[str, Any]:
    """Return a JSON object beside the file; empty if there is none."""
    try:
        content = json.loads((file.path.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
