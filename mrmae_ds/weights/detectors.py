"""Weights of whole detectors: this project's, and those released for the authors' ViTDet-style code (Detectron2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, first_few
from mrmae_ds.weights.formats import read_tensor_file
from mrmae_ds.weights.load import LoadReport
from mrmae_ds.weights.names import FPN, VITDET, detector_title

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


def load_detector(detector: nn.Module, path: Path, key: str = "") -> LoadReport:
    """Load a file of a whole detector.

    Args:
        detector: the model, built with the file's sizes.
        path: file of this project, or of the authors' ViTDet-style code.
        key: recipe key that named the file, for errors.

    Returns:
        Report by the model's names; every tensor was loaded.

    Raises:
        UserError: if the file cannot be read, is of another code base, or differs from the model; it names the
            differences.
    """
    file = read_tensor_file(path, key)
    where, title = f"{key}: {path}" if key else str(path), detector_title(file.tensors)
    if title == FPN:
        raise UserError(
            f"{where}: {FPN}, which is not built here; load its encoder (stages.detect.init), or a file of the "
            "authors' ViTDet-style code"
        )
    tensors, report = dict(file.tensors), LoadReport()
    if title == VITDET:
        tensors = from_detectron2(tensors)
        report.notes.append(f"names and classes converted from {VITDET}")
    state = detector.state_dict()
    report.unexpected = [name for name in tensors if name not in state]
    report.missing = [name for name in state if name not in tensors]
    if SCORES not in tensors:
        raise UserError(f"{where}: lacks {SCORES}, so it has no whole detector; load its encoder (stages.detect.init)")
    if len(tensors[SCORES]) != len(state[SCORES]):
        raise UserError(
            f"{where}: detects {len(tensors[SCORES]) - 1} classes, but the data set has {len(state[SCORES]) - 1}; load "
            "its encoder alone (stages.detect.init), or use the data set that it was trained on"
        )
    if differing := report.missing + [name for name in report.unexpected if name.startswith(PARTS)]:
        raise UserError(
            f"{where}: its detector differs from the recipe's in {counted(len(differing), 'tensor')} "
            f"({first_few(differing, 3)}); change model and stages.detect.detector"
        )
    for name, tensor in state.items():
        if tensors[name].shape != tensor.shape:
            raise UserError(
                f"{where}: {name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}; change "
                "model.image_size (pos_embed), stages.detect.image_size (rel_pos) or stages.detect.detector"
            )
    detector.load_state_dict({name: tensors[name] for name in state})
    report.loaded = list(state)
    return report
