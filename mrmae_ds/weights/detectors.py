"""Weights of whole detectors: this project's, and those released for the authors' ViTDet-style code (Detectron2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

from mrmae_ds.config.detection import DetectorConfig
from mrmae_ds.config.renamed import rename_keys
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, first_few
from mrmae_ds.weights.load import LoadReport
from mrmae_ds.weights.model_file import is_ours, read_metadata
from mrmae_ds.weights.names import TORCHVISION, VITDET, detector_title
from mrmae_ds.weights.origin import find_origin
from mrmae_ds.weights.paths import find_weights
from mrmae_ds.weights.resolve import Weights, model_metadata, resolve, unusable_tensors

# Detectron2's names, and this project's, whose heads are torchvision's; a function of a number counts from zero.
RENAMED = (
    (r"proposal_generator\.rpn_head\.conv\.conv(\d+)\.", lambda m: f"rpn.head.conv.{m[1]}.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", lambda m: "rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", lambda m: "rpn.head.bbox_pred."),
    (r"roi_heads\.box_head\.conv(\d+)\.norm\.", lambda m: f"roi_heads.box_head.{int(m[1]) - 1}.1."),
    (r"roi_heads\.box_head\.conv(\d+)\.", lambda m: f"roi_heads.box_head.{int(m[1]) - 1}.0."),
    (r"roi_heads\.mask_head\.mask_fcn(\d+)\.norm\.", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.1."),
    (r"roi_heads\.mask_head\.mask_fcn(\d+)\.", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0."),
    (r"roi_heads\.mask_head\.deconv\.", lambda m: "roi_heads.mask_predictor.conv5_mask."),
    (r"roi_heads\.mask_head\.predictor\.", lambda m: "roi_heads.mask_predictor.mask_fcn_logits."),
)
PARTS = ("backbone.", "rpn.", "roi_heads.")  # of a detector's names
SCORES = "roi_heads.box_predictor.cls_score.weight"
STRIDE = 16  # of the encoders


def from_detectron2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a ViTDet-style Mask R-CNN of Detectron2 to this project's names and order of classes.

    The background moves from the last score to the first. The offsets of boxes and the masks get a first class for it,
    of zeros, which no loss or detection uses.

    Args:
        tensors: by Detectron2's names.
    """
    # The linear layer of the box head follows its convolutions and a flattening.
    convs = len({match[1] for name in tensors if (match := re.match(r"roi_heads\.box_head\.conv(\d+)\.", name))})
    converted = {}
    for name, tensor in tensors.items():
        ours = re.sub(r"^roi_heads\.box_head\.fc1\.", f"roi_heads.box_head.{convs + 1}.", name)
        for pattern, new in RENAMED:
            ours = re.sub(f"^{pattern}", new, ours)
        if "box_predictor.cls_score." in ours:
            tensor = tensor.roll(1, 0)
        elif "box_predictor.bbox_pred." in ours:
            tensor = torch.cat([torch.zeros_like(tensor[:4]), tensor])
        elif "mask_fcn_logits." in ours:
            tensor = torch.cat([torch.zeros_like(tensor[:1]), tensor])
        converted[ours] = tensor
    return converted


@dataclass(frozen=True)
class DetectorFile:
    """A file of a whole detector.

    Attributes:
        weights: the file, and the encoder in it.
        title: code base that wrote it.
        tensors: of the detector, by this project's names.
        unused: names of the file's other tensors.
        problem: reason why it cannot be taken whole, as far as the file alone shows; "" if it can.
    """

    weights: Weights
    title: str
    tensors: dict[str, Tensor]
    unused: list[str]
    problem: str

    @property
    def encoder_alone(self) -> str:
        """Name of the encoder in the file, wherever a weights file is named."""
        return f"{self.weights.raw.path}#{self.weights.file.prefix.removesuffix('.')}"

    @property
    def num_classes(self) -> int:
        """Number of classes without the background."""
        return len(self.tensors[SCORES]) - 1

    def check_usable(self) -> None:
        """Check that the file is complete and finite.

        Raises:
            UserError: if it is not.
        """
        if self.problem:
            raise UserError(f"{self.weights.where}: {self.problem}")

    def sizes(self) -> tuple[DetectorConfig, int]:
        """Return the sizes, and the side of the square input in pixels: recorded, or inferred from the tensors.

        No tensor shows the anchors: those of another code base are Detectron2's.
        """
        metadata = self.weights.identity.metadata
        if "recipe" in metadata:
            stage = rename_keys(metadata["recipe"])["stages"]["detect"]
            return DetectorConfig.model_validate(stage["detector"]), stage["image_size"]
        if "detector" in metadata:
            return DetectorConfig.model_validate(metadata["detector"]), metadata["input_size"]
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        tables = {
            int(match[1]): (shape[0] + 1) // 2
            for name, shape in shapes.items()
            if (match := re.match(r"backbone\.net\.blocks3?\.(\d+)\.attn\.rel_pos_h$", name))
        }
        if not tables:
            raise KeyError("backbone.net.blocks.0.attn.rel_pos_h")
        window, grid = min(tables.values()), max(tables.values())
        convs = {part: _count(shapes, rf"roi_heads\.{part}\.(\d+)\.0\.weight$") for part in ("box_head", "mask_head")}
        config = DetectorConfig(
            window=window,
            global_blocks=tuple(sorted(block for block, side in tables.items() if side == grid)),
            channels=shapes["rpn.head.conv.0.0.weight"][0],
            box_convs=convs["box_head"],
            mask_convs=convs["mask_head"],
            fc=shapes[f"roi_heads.box_head.{convs['box_head'] + 1}.weight"][0],
        )
        return config, grid * STRIDE

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of a model file: as recorded, or as far as the file's origin is known.

        Raises:
            UserError: if it is not usable, or heads, statistics or classes are not known.
        """
        self.check_usable()
        if self.weights.identity.ours:
            return dict(self.weights.identity.metadata)
        found, (config, side) = model_metadata(self.weights, statistics=False, relative=True), self.sizes()
        mean, std = self._statistics()
        names, ids = self._classes()
        return found | {
            "kind": "detector",
            "input_size": side,
            "detector": config.model_dump(mode="json"),
            "num_classes": self.num_classes,
            "class_names": names,
            "category_ids": ids,
            "mean": mean,
            "std": std,
        }

    def _statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and std of the input: in the file, or known by its origin."""
        raw, origin = self.weights.raw.tensors, self.weights.identity.origin
        if {"pixel_mean", "pixel_std"} <= raw.keys():
            mean, std = ((raw[name].double() / 255).flatten().tolist() for name in ("pixel_mean", "pixel_std"))
            return mean, std
        if origin.statistics is None:
            raise UserError(
                f"{self.weights.where}: does not record the mean and std of its input; put a preprocessor_config.json "
                'with {"image_mean": [...], "image_std": [...]} beside it'
            )
        return list(origin.statistics[0]), list(origin.statistics[1])

    def _classes(self) -> tuple[list[str], list[int]]:
        """Return names and ids of the classes: of a config.json beside the file, or COCO's."""
        file, identity, count = self.weights.file, self.weights.identity, self.num_classes
        names = find_origin(file, {}, identity.family, identity.sizes, count).class_names
        coco = {
            name: i
            for i, name in enumerate(MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"])
            if name not in ("__background__", "N/A")
        }
        if not names and count != len(coco):
            raise UserError(
                f"{self.weights.where}: does not record the names of its {count} classes; put a config.json with "
                '{"id2label": {"0": NAME, ...}} beside it'
            )
        names = names or tuple(coco)
        return list(names), [coco[name] for name in names] if coco.keys() >= set(names) else [*range(1, count + 1)]


def detector_of(weights: Weights) -> DetectorFile | None:
    """Return the whole detector in a file.

    Args:
        weights: the resolved file.

    Returns:
        None if there is none that this project builds, or a part of the file was chosen (``FILE#backbone``).
    """
    raw, title = weights.raw, detector_title(weights.raw.tensors)
    if raw.choice or title not in (VITDET, TORCHVISION) or not weights.identity.family:
        return None
    before = weights.file.prefix.partition("backbone.")[0]
    tensors = {name.removeprefix(before): tensor for name, tensor in raw.tensors.items()}
    tensors = from_detectron2(tensors) if title == VITDET else tensors
    parts = {name: tensor for name, tensor in tensors.items() if name.startswith(PARTS)}
    unused = [name for name in tensors if name not in parts]
    problem = unusable_tensors(parts) or weights.identity.problem
    if not problem and SCORES not in parts:
        problem = f"lacks {SCORES}, so it has no whole detector"
    found = DetectorFile(weights, title, parts, unused, problem)
    if not problem:
        try:
            found.sizes()
        except (KeyError, ValueError, IndexError, UserError) as error:
            found = DetectorFile(weights, title, parts, unused, f"its detector is incomplete: {error}")
    return found


def holds_detector(source: Path) -> bool:
    """Return True for a folder or file of a whole detector, usable or not; False also for one that does not exist."""
    try:
        path = find_weights(source)
        if is_ours(path):
            return read_metadata(path)["kind"] == "detector"
        return detector_of(resolve(path)) is not None
    except UserError:
        return False


def load_detector_file(detector: nn.Module, file: DetectorFile) -> LoadReport:
    """Load a whole detector.

    Args:
        detector: the model, built with the file's sizes.
        file: the file.

    Returns:
        Report by the model's names; every tensor was loaded.

    Raises:
        UserError: if the file is not usable or differs from the model; it names the differences.
    """
    file.check_usable()
    state = detector.state_dict()
    if difference := detector_difference(file, state):
        raise UserError(f"{file.weights.where}: {difference}")
    detector.load_state_dict(file.tensors)
    notes = [f"names and classes converted from {VITDET}"] if file.title == VITDET else []
    return LoadReport(loaded=list(state), unexpected=file.unused, notes=notes)


def detector_difference(file: DetectorFile, state: Mapping[str, Tensor]) -> str:
    """Compare the tensors of a usable file with those of a model; "" if they are equal by name and shape.

    Args:
        file: the file.
        state: of the model; on any device.
    """
    tensors, outputs = file.tensors, len(state[SCORES])
    if len(tensors[SCORES]) != outputs:
        return (
            f"detects {file.num_classes} classes, but the data set has {outputs - 1}; load its encoder alone "
            f"({file.encoder_alone}), or use the data set that it was trained on"
        )
    if differing := sorted(tensors.keys() ^ state.keys()):
        count = counted(len(differing), "tensor")
        return (
            f"its detector differs from the model's in {count} ({first_few(differing, 3)}); "
            f"change model and stages.detect.detector, or load its encoder alone ({file.encoder_alone})"
        )
    for name, tensor in state.items():
        if tensors[name].shape != tensor.shape:
            return (
                f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}; change model.image_size "
                "(pos_embed), stages.detect.image_size (rel_pos) or stages.detect.detector"
            )
    return ""


def _count(names: Mapping[str, Any], pattern: str) -> int:
    return len([name for name in names if re.match(pattern, name)])
