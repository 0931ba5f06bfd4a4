"""Origin of a weights file: what its tensors do not say (heads, statistics, classes), by its metadata or known origin.

Evidence is taken in this order: this project's metadata, configurations beside the file, the stored command line, and
tensors that only one project writes. Nothing is inferred from the file's own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_MEAN, IMAGENET_STD, Rgb
from mrmae_ds.models.sizes import ARCHITECTURES, FAMILIES, CViTSpec, EncoderSpec
from mrmae_ds.weights.beside import (
    check_layers,
    checked_statistics,
    config_part,
    model_config,
    open_clip_config,
    recorded_classes,
    recorded_statistics,
)
from mrmae_ds.weights.formats import TensorFile
from mrmae_ds.weights.names import VITDET, detector_title

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MOCO_HEADS = 12  # of MoCo v3's ViT-S; 6 of all others
# Entries of OpenAI's archives, and of state dicts taken from them, besides the weights.
OPENAI_SCALARS = {"input_resolution", "context_length", "vocab_size"}
# Option of BEiT's scripts and those made from them: ImageNet's statistics, or these.
BEIT_OPTION, BEIT_STATISTICS = "imagenet_default_mean_and_std", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Options that only these scripts have together; all of them train with ImageNet's statistics. BEiT's and timm's have
# MAE's layer_decay too.
FINETUNING = "MAE's fine-tuning script"
SCRIPTS = {
    ("norm_pix_loss", "mask_ratio"): "MAE's pre-training script",
    ("layer_decay", "blr"): FINETUNING,
    ("local_crops_number", "momentum_teacher"): "DINO's script",
}
TIMM_KEYS = {"arch", "state_dict", "version"}  # of a checkpoint of timm's training script


@dataclass(frozen=True)
class Origin:
    """Properties of weights that no tensor shows, each with its evidence in words; "" where there is none.

    Attributes:
        statistics: mean and std of the input, of pixels in [0, 1].
        statistics_by: evidence for them.
        num_heads: attention heads of the transformer blocks.
        heads_by: evidence for them.
        class_names: names of the head's outputs.
        classes_assumed: they are ImageNet-1K's by their number alone.
    """

    statistics: tuple[Rgb, Rgb] | None = None
    statistics_by: str = ""
    num_heads: int | None = None
    heads_by: str = ""
    class_names: tuple[str, ...] = ()
    classes_assumed: bool = False

    def unverified(self) -> list[str]:
        """List what could not be verified."""
        unknown = [] if self.num_heads else ["the number of heads cannot be checked: the file does not record it"]
        unknown += [] if self.statistics else ["the statistics of its input are not recorded"]
        assumed = f"its {IMAGENET_CLASSES} classes are assumed to be ImageNet-1K's: no names are recorded"
        return [*unknown, assumed] if self.classes_assumed else unknown


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
    check_layers(file, config, plain and bool(family))
    statistics, statistics_by = _statistics(file, metadata, config)
    if statistics is None and (mark := _mark(file, family, plain)):
        statistics, statistics_by = (IMAGENET_MEAN, IMAGENET_STD), mark
    heads, heads_by = _heads(file, metadata, family, sizes, config)
    if heads is None and not family:
        heads, heads_by = _heads_of_tower(file, sizes)
    names = tuple(metadata.get("class_names") or ()) or recorded_classes(file, config, num_classes)
    if assumed := not names and num_classes == IMAGENET_CLASSES:
        from timm.data import ImageNetInfo

        names = tuple(ImageNetInfo().label_names())  # in the order of the WordNet ids
    return Origin(statistics, statistics_by, heads, heads_by, names, assumed)


def _statistics(
    file: TensorFile, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[tuple[Rgb, Rgb] | None, str]:
    """Return recorded statistics and where they are recorded."""
    if "mean" in metadata and "std" in metadata:
        return (tuple(metadata["mean"]), tuple(metadata["std"])), "its metadata"
    statistics, where = recorded_statistics(file, config)
    if statistics is None:
        statistics, where = _of_command_line(file), "the options mean and std in it"
    if statistics is not None:
        return statistics, where
    if BEIT_OPTION in file.args:
        statistics = (IMAGENET_MEAN, IMAGENET_STD) if file.args[BEIT_OPTION] else BEIT_STATISTICS
        return statistics, f"the option {BEIT_OPTION} in it"
    return (CLIP_STATISTICS, "OpenAI's scalars in the file") if file.tensors.keys() >= OPENAI_SCALARS else (None, "")


def _of_command_line(file: TensorFile) -> tuple[Rgb, Rgb] | None:
    """Return the options ``mean`` and ``std`` of timm's training script; None if they are unset, or of another kind."""
    values = [file.args.get("mean"), file.args.get("std")]
    mean, std = (value * 3 if isinstance(value, (list, tuple)) and len(value) == 1 else value for value in values)
    try:
        return checked_statistics(mean, std, "")
    except UserError:
        return None


def _mark(file: TensorFile, family: str, plain: bool = True) -> str:
    """Return what shows that a file is of a project which trains with ImageNet's statistics; "" for nothing."""
    if file.keys >= TIMM_KEYS or {"mean", "std"} & file.args.keys():
        return ""  # a script that takes any statistics
    scripts = [by for options, by in SCRIPTS.items() if all(file.args.get(option) is not None for option in options)]
    if not plain and FINETUNING in scripts:
        scripts.remove(FINETUNING)
    if scripts and BEIT_OPTION not in file.args:
        return f"the options of {scripts[0]} in it"
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
    recorded = config.get("num_attention_heads", config_part(config, "model_args").get("num_heads"))
    if recorded is not None:
        if not isinstance(recorded, int) or isinstance(recorded, bool):
            raise UserError(
                f"{file.path}: config.json beside it gives {recorded!r} attention heads, which is not a whole number; "
                "correct that file"
            )
        if recorded < 1 or dim % recorded:
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
    vision = config_part(config_part(open_clip_config(file, sizes), "model_cfg"), "vision_cfg")
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
