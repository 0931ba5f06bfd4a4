"""Box and mask heads: torchvision's modules with Detectron2's norms, sampling, losses and mask targets, in float32.

Every module runs in every step, on no boxes if need be: under ZeRO a rank that leaves one out hangs, or applies an old
gradient again.

Shape legend: B images, n objects of an image, R boxes of all images, K classes besides the background (label 0), M side
of the mask head's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align

from mrmae_ds.config.detection import DetectorConfig
from mrmae_ds.detection.boxes import RoIPool, Size, float32_island, sample_labels
from mrmae_ds.models.pyramid import STRIDES, LayerNorm2d

BOX_CELLS, MASK_CELLS = 7, 14  # sides of the pooled maps
OBJECT_SHARE = 0.25  # at most, of the boxes drawn for the losses
FOUND_IOU = 0.5  # of an object with a proposal, to count as found


class DrawnBoxes(NamedTuple):
    """Boxes of an image for the losses; the first have an object, the rest are background.

    Attributes:
        boxes: float32 [r, 4].
        labels: class of the object, 0 for background, int64 [r].
        objects: index of the object, int64 [number of boxes with one].
        found: share of the objects with a proposal, before they were added to them; 1 without objects.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    found: Tensor


class RegionHeads(RoIHeads):
    """Heads that classify, refine and segment proposals.

    Args:
        config: sizes.
        num_classes: K.
    """

    def __init__(self, config: DetectorConfig, num_classes: int) -> None:
        channels, outputs = config.channels, num_classes + 1
        shape, convs = (channels, BOX_CELLS, BOX_CELLS), [channels] * config.box_convs
        super().__init__(
            RoIPool(BOX_CELLS, STRIDES[:4]),
            FastRCNNConvFCHead(shape, convs, [config.fc], norm_layer=LayerNorm2d),
            FastRCNNPredictor(config.fc, outputs),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=config.boxes_per_image,
            positive_fraction=OBJECT_SHARE,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=RoIPool(MASK_CELLS, STRIDES[:4]),
            mask_head=MaskRCNNHeads(channels, [channels] * config.mask_convs, 1, norm_layer=LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(channels, channels, outputs),
        )
        self.boxes_per_image = config.boxes_per_image
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as Detectron2 does where torchvision differs."""
        for module in self.box_head.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.mask_predictor.conv5_mask.bias)
        last = (
            (self.box_predictor.cls_score, 0.01),
            (self.box_predictor.bbox_pred, 0.001),
            (self.mask_predictor.mask_fcn_logits, 0.001),
        )
        for layer, std in last:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[Size],
        targets: Sequence[dict[str, Tensor]] | None = None,
        generators: Sequence[Generator | None] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Compute losses in training, detections in evaluation.

        Args:
            levels: pyramid p2 to p5, [B, C, h, w] each.
            proposals: of each image, [r, 4].
            sizes: height and width of each image in the padded input, to which detections are clipped.
            targets: of each image; only in training, see :class:`~mrmae_ds.detection.detector.Detector`.
            generators: of each image, for the boxes that are drawn.

        Returns:
            Detections of each image and no losses, or no detections and the losses ``loss_classifier``,
            ``loss_box_reg`` and ``loss_mask`` with the statistics ``positives`` and ``recall``.
        """
        if not self.training:
            return self._detect(levels, list(proposals), list(sizes)), {}
        assert targets is not None
        with float32_island(levels[0]):
            drawn = [
                self._draw(*of_image)
                for of_image in zip(proposals, targets, generators or [None] * len(targets), strict=True)
            ]
        logits, deltas = self._boxes(levels, [image.boxes for image in drawn])
        masks = self._masks(levels, [image.boxes[: len(image.objects)] for image in drawn])
        with float32_island(levels[0]):
            losses = self._box_losses(logits, deltas, drawn, targets) | {"loss_mask": mask_loss(masks, drawn, targets)}
            recall = torch.stack([image.found for image in drawn]).mean()
            positives = recall.new_full((), sum(len(image.objects) for image in drawn))
        return [], losses | {"positives": positives, "recall": recall}

    def _draw(self, proposals: Tensor, target: dict[str, Tensor], generator: Generator | None) -> DrawnBoxes:
        """Draw boxes of an image from its proposals and objects."""
        objects = target["boxes"]
        boxes = torch.cat([proposals, objects])
        (matched,), (labels,) = self.assign_targets_to_proposals([boxes], [objects], [target["labels"]])
        positive, background = sample_labels(labels, self.boxes_per_image, OBJECT_SHARE, generator)
        drawn = torch.cat([positive, background])
        found = torch.ones((), device=boxes.device)
        if len(objects):
            # A column of zeros, for an image without proposals.
            best = F.pad(box_iou(objects, proposals), (0, 1)).amax(dim=1)
            found = (best >= FOUND_IOU).float().mean()
        return DrawnBoxes(boxes[drawn], labels[drawn], matched[positive], found)

    def _boxes(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute logits [R, 1 + K] and offsets [R, 1 + K, 4] of boxes, float32."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(levels, boxes)))
        return logits.float(), deltas.float().unflatten(1, (-1, 4))

    def _masks(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Compute logits of the masks in boxes, float32 [R, 1 + K, M, M]."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(levels, boxes))).float()

    def _box_losses(
        self, logits: Tensor, deltas: Tensor, drawn: Sequence[DrawnBoxes], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Compute the mean cross-entropy, and L1 of the objects' offsets divided by the number of all boxes."""
        labels, divisor = torch.cat([image.labels for image in drawn]), max(1, len(logits))
        wanted = [
            self.box_coder.encode_single(target["boxes"][image.objects], image.boxes[: len(image.objects)])
            for image, target in zip(drawn, targets, strict=True)
        ]
        # Boxes with an object come first in each image; counted here, because looking for them waits for the device.
        starts = accumulate((len(image.boxes) for image in drawn), initial=0)
        rows = torch.cat(
            [
                torch.arange(start, start + len(image.objects), device=labels.device)
                for start, image in zip(starts, drawn, strict=False)
            ]
        )
        return {
            "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / divisor,
            "loss_box_reg": F.l1_loss(deltas[rows, labels[rows]], torch.cat(wanted), reduction="sum") / divisor,
        }

    def _detect(self, levels: Sequence[Tensor], proposals: list[Tensor], sizes: list[Size]) -> list[dict[str, Tensor]]:
        """Detect the objects of images: select boxes of classes, and segment them."""
        logits, deltas = self._boxes(levels, proposals)
        with float32_island(levels[0]):
            refined = self.box_coder.decode(deltas.flatten(1), proposals).reshape(deltas.shape)
            counts = [len(of_image) for of_image in proposals]
            images = zip(refined.split(counts), logits.softmax(dim=1).split(counts), sizes, strict=True)
            boxes, scores, labels = zip(*(self._select(*image) for image in images), strict=True)
        chosen = torch.cat(labels)
        masks = self._masks(levels, boxes)[torch.arange(len(chosen), device=chosen.device), chosen, None].sigmoid()
        found = zip(boxes, labels, scores, masks.split([len(b) for b in boxes]), strict=True)
        return [dict(zip(("boxes", "labels", "scores", "masks"), image, strict=True)) for image in found]

    def _select(self, boxes: Tensor, scores: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Select the detections of an image: a proposal may be one of several classes.

        Args:
            boxes: refined for each class, [r, 1 + K, 4].
            scores: probabilities [r, 1 + K].
            size: height and width of the image.

        Returns:
            Boxes [n, 4], scores [n] and labels [n], best first; n is at most 100.
        """
        finite = boxes[:, 1:].flatten(1).isfinite().all(dim=1) & scores.isfinite().all(dim=1)
        rows, labels = torch.where(finite[:, None] & (scores[:, 1:] > self.score_thresh))
        labels = labels + 1
        scores, boxes = scores[rows, labels], clip_boxes_to_image(boxes[rows, labels], size)
        kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return boxes[kept], scores[kept], labels[kept]


def mask_loss(logits: Tensor, drawn: Sequence[DrawnBoxes], targets: Sequence[dict[str, Tensor]]) -> Tensor:
    """Compute the mean binary cross-entropy of the true classes' masks; without an object, an empty sum.

    Args:
        logits: [R, 1 + K, M, M].
        drawn: of each image; those with an object make up R.
        targets: of each image.
    """
    side = logits.shape[-1]
    labels = torch.cat([image.labels[: len(image.objects)] for image in drawn])
    wanted = torch.cat(
        [
            mask_targets(target["masks"], image.boxes[: len(image.objects)], image.objects, side)
            for image, target in zip(drawn, targets, strict=True)
        ]
    )
    of_class = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(of_class, wanted, reduction="sum") / max(1, wanted.numel())


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    """Cut the masks of objects out at boxes.

    Args:
        masks: of an image's objects, 0 or 1, [n, h, w].
        boxes: [r, 4].
        objects: index of each box's object, [r].
        side: M.

    Returns:
        0 or 1, float32 [r, M, M].
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, side, side)
    rois = torch.cat([objects[:, None].float(), boxes], dim=1)
    return (roi_align(masks[:, None].float(), rois, side, 1.0, 0, aligned=True)[:, 0] >= 0.5).float()
