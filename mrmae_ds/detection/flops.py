"""FLOPs of a detector for one image, by parts, and its training step on tensors without values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torchvision.models.detection.rpn import concat_box_prediction_layers

from mrmae_ds.config.detection import DetectConfig
from mrmae_ds.config.sections import ModelConfig
from mrmae_ds.detection.boxes import RoIPool, float32_island
from mrmae_ds.detection.detector import Detector, build_detector
from mrmae_ds.detection.roi_heads import BOX_CELLS, MASK_CELLS, OBJECT_SHARE
from mrmae_ds.detection.rpn import ANCHORS_PER_IMAGE
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.pretrain import set_checkpointing
from mrmae_ds.profiling.flops import Flops, StageFlops, count_training, flop_counter

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


def meta_detector(model: ModelConfig, stage: DetectConfig, num_classes: int) -> Detector:
    """Build a recipe's detector on the meta device, in eval mode."""
    with torch.device("meta"):
        return build_detector(model, stage, num_classes).eval()


def detector_cost(detector: Detector, stage: DetectConfig, checkpointing: CheckpointPlan) -> StageFlops:
    """Count the training of a detector for one image; backward takes the operations of two forward passes.

    Args:
        detector: on the meta device; left in training mode.
        stage: the recipe's stage.
        checkpointing: activation checkpointing of the encoder, which repeats operations.
    """
    drawn = stage.detector.boxes_per_image
    forward = detector_flops(detector, stage, drawn, int(drawn * OBJECT_SHARE))
    parts = {name: Flops(count, 2 * count) for name, count in forward.items()}
    encoder, count = detector.train().encoder, forward["encoder"]
    images = torch.empty(1, 3, stage.image_size, stage.image_size, device="meta")
    again = count_training(lambda: encoder(images), partial(set_checkpointing, encoder), checkpointing).recomputed
    return StageFlops("detect", stage.epochs, parts | {"encoder": Flops(count, 2 * count, again)})


def loss_on_fixed_boxes(detector: Detector, images: Tensor) -> Tensor:
    """Run what a training step runs, on the most boxes that it may draw, without selecting and matching them.

    For tensors without values. The operations do not depend on the number of images.

    Args:
        detector: on the device of the images.
        images: normalized, [B, 3, S, S].

    Returns:
        A scalar whose gradient reaches every parameter; its value means nothing.
    """
    levels, heads, count = (
        detector.backbone(images),
        detector.roi_heads,
        len(images) * detector.roi_heads.boxes_per_image,
    )
    logits, deltas = detector.rpn.head(levels)
    boxes = heads.box_head(_pool_evenly(heads.box_roi_pool, levels[:-1], count))
    masks = heads.mask_head(_pool_evenly(heads.mask_roi_pool, levels[:-1], int(count * OBJECT_SHARE)))
    predicted = [*heads.box_predictor(boxes), heads.mask_predictor(masks)[:, 0]]
    with float32_island(images):
        of_anchors = concat_box_prediction_layers([x.float() for x in logits], [x.float() for x in deltas])
        drawn = [x[: len(images) * ANCHORS_PER_IMAGE] for x in of_anchors]
        return torch.stack([x.float().sum() for x in (*drawn, *predicted)]).sum()


def _pool_evenly(pool: RoIPool, levels: list[Tensor], count: int) -> Tensor:
    """Pool boxes of which every level has the same number."""
    rois = torch.zeros(count, 5, device=levels[0].device)
    rows = torch.arange(count, device=rois.device).chunk(len(levels))
    with float32_island(rois):
        return pool.pool(levels, rois, rows)


def _counted(run: Callable[[], T]) -> tuple[T, int]:
    with flop_counter() as count, torch.no_grad():
        result = run()
    return result, count.get_total_flops()
