"""FLOPs of a detector for one image, by parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mrmae_ds.config.detection import DetectConfig
from mrmae_ds.detection.detector import Detector
from mrmae_ds.detection.roi_heads import BOX_CELLS, MASK_CELLS
from mrmae_ds.profiling.flops import flop_counter

T = TypeVar("T")


def detector_flops(detector: Detector, stage: DetectConfig, boxes: int = 1000, masks: int = 100) -> dict[str, int]:
    """Count the forward pass of one image, two FLOPs per multiply-add; detection papers print multiply-adds.

    Modules run on as many boxes as they would get: boxes cannot be selected without values.
    Convolutions, linear layers and attention count. Detectron2's tools also count five operations for each value of a
    LayerNorm: for Base at 1024 pixels 0.9 G multiply-adds of 956 (CViT), 0.4 of 840 (ViT).

    Args:
        detector: on the meta device, in eval mode.
        stage: the recipe's stage.
        boxes: boxes that are classified; 1000 proposals in evaluation, ``boxes_per_image`` in training.
        masks: boxes that are segmented; at most 100 in evaluation, and a quarter of ``boxes_per_image`` in training.
    """
    with torch.device("meta"):
        images = torch.empty(1, 3, stage.image_size, stage.image_size)
        boxes_in = torch.empty(boxes, stage.detector.channels, BOX_CELLS, BOX_CELLS)
        masks_in = torch.empty(masks, stage.detector.channels, MASK_CELLS, MASK_CELLS)
    heads = detector.roi_heads
    _, encoder = _counted(lambda: detector.backbone.net(images))
    levels, backbone = _counted(lambda: detector.backbone(images))
    return {
        "encoder": encoder,
        "pyramid": backbone - encoder,
        "proposals": _counted(lambda: detector.rpn.head(levels))[1],
        "box head": _counted(lambda: heads.box_predictor(heads.box_head(boxes_in)))[1],
        "mask head": _counted(lambda: heads.mask_predictor(heads.mask_head(masks_in)))[1],
    }


def _counted(run: Callable[[], T]) -> tuple[T, int]:
    with flop_counter() as count, torch.no_grad():
        result = run()
    return result, count.get_total_flops()
