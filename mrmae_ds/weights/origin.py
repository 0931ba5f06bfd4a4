"""Origin of a weights file: what its tensors do not say (heads, statistics, classes), by its metadata or known origin.

Evidence is taken in this order: this project's metadata, configurations beside the file, the stored command line, and
tensors that only one project writes. Nothing is inferred from the file's own name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_MEAN, IMAGENET_STD, Rgb
from mrmae_ds.models.sizes import ARCHITECTURES, FAMILIES, CViTSpec, ViTSpec
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.names import VITDET, detector_title

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Entries of OpenAI's archives, and of state dicts taken from them, besides the weights.
OPENAI_SCALARS = {"input_resolution", "context_length", "vocab_size"}
# Options that only these scripts have; all of them train with ImageNet's statistics.
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
    file: TensorFile, metadata: Mapping[str, Any], family: str, sizes: Mapping[str, Any], num_classes: int = 0
) -> Origin:
    """Find the origin of a file.

    Args:
        file: the file, with canonical names.
        metadata: this project's metadata of it.
        family: ``cvit``, ``vit`` or "" (a CLIP's image tower, or an unknown file).
        sizes: fields of the family's spec.
        num_classes: outputs of its head.
    """
    config = _config_beside(file, "config.json")
    config |= _part(config, "vision_config")  # of a whole CLIP
    width = config.get("hidden_size", config.get("num_features"))
    if width is not None and "dim" in sizes and width != sizes["dim"]:
        config = {}  # of another file in the same folder
    statistics, statistics_by = _statistics(file, metadata, family, config)
    heads, heads_by = _heads(file.tensors, metadata, family, sizes, config)
    if heads is None and not family:
        heads, heads_by = _heads_of_tower(file, sizes)
    return Origin(statistics, statistics_by, heads, heads_by, _classes(metadata, config, num_classes))


def _statistics(
    file: TensorFile, metadata: Mapping[str, Any], family: str, config: Mapping[str, Any]
) -> tuple[tuple[Rgb, Rgb] | None, str]:
    if "mean" in metadata and "std" in metadata:
        return (tuple(metadata["mean"]), tuple(metadata["std"])), "its metadata"
    timm, hugging_face = _part(config, "pretrained_cfg"), _config_beside(file, "preprocessor_config.json")
    open_clip = _part(_config_beside(file, "open_clip_config.json"), "preprocess_cfg")
    for values, mean, std, where in (
        (timm, "mean", "std", "config.json beside it"),
        (hugging_face, "image_mean", "image_std", "preprocessor_config.json beside it"),
        (open_clip, "mean", "std", "open_clip_config.json beside it"),
    ):
        if mean in values and std in values:
            return _checked(values[mean], values[std], f"{file.path}: the {mean} and {std} of {where}"), where
    imagenet = (IMAGENET_MEAN, IMAGENET_STD)
    if script := next((script for option, script in SCRIPTS.items() if option in file.args), ""):
        return imagenet, f"the options of {script} in it"
    if file.tensors.keys() >= OPENAI_SCALARS:
        return CLIP_STATISTICS, "OpenAI's scalars in the file"
    marks = {
        "MCMAE's architecture": family == "cvit",
        "MAE's decoder": "decoder_pred.weight" in file.tensors,
        "ViTDet's proposals in Detectron2's names": detector_title(file.left) == VITDET,
        "DINO's projection head": any("head.last_layer" in name for name in file.left),
        "DINOv2's mask token and layer scale": {"mask_token", "blocks.0.ls1.gamma"} <= file.tensors.keys(),
    }
    mark = next((mark for mark, found in marks.items() if found), "")
    return (imagenet, mark) if mark else (None, "")


def _heads(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    family: str,
    sizes: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[int | None, str]:
    if metadata.get("spec"):
        return metadata["spec"]["num_heads"], "its metadata"
    widths = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(".attn.rel_pos_h")]
    dim = sizes["dims"][-1] if "dims" in sizes else sizes.get("dim", 0)
    if widths and widths[0] and dim % widths[0] == 0:
        return dim // widths[0], "the width of its relative positions"
    recorded = config.get("num_attention_heads", _part(config, "model_args").get("num_heads"))
    if recorded is not None:
        return int(recorded), "config.json beside it"
    kind = FAMILIES.get(family)
    for arch, spec in ARCHITECTURES.items():
        if kind is not None and isinstance(spec, kind) and _same_widths(spec, sizes):
            return spec.num_heads, f"its width and depth, those of {arch}"
    return None, ""


def _heads_of_tower(file: TensorFile, sizes: Mapping[str, Any]) -> tuple[int | None, str]:
    """Read open_clip's configuration of an image tower, which has the width of a head."""
    vision = _part(_part(_config_beside(file, "open_clip_config.json"), "model_cfg"), "vision_cfg")
    if "dim" not in sizes or vision.get("width") != sizes["dim"]:
        return None, ""
    return sizes["dim"] // vision.get("head_width", 64), "open_clip_config.json beside it"


def _same_widths(spec: CViTSpec | ViTSpec, sizes: Mapping[str, Any]) -> bool:
    if isinstance(spec, CViTSpec):
        return (spec.dims, spec.depths) == (tuple(sizes["dims"]), tuple(sizes["depths"]))
    return (spec.dim, spec.depth) == (sizes["dim"], sizes["depth"])


def _classes(metadata: Mapping[str, Any], config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    if metadata.get("class_names"):
        return tuple(metadata["class_names"])
    labels = _part(config, "id2label")
    if num_classes and len(labels) == num_classes:
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
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
