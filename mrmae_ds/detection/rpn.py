"""Region proposals: torchvision's network with Detectron2's losses, proposals and anchors, in float32.

Shape legend: B images, A anchors of all levels, n objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import batched_nms, clip_boxes_to_image

from mrmae_ds.detection.boxes import ExactAnchors, Size, float32_island, sample_labels

ANCHORS_PER_IMAGE = 256  # drawn for the losses


class ProposalNetwork(RegionProposalNetwork):
    """Region proposal network with two shared convolutions.

    Args:
        channels: of the pyramid.
        anchors: of the pyramid's five levels.
    """

    def __init__(self, channels: int, anchors: ExactAnchors) -> None:
        super().__init__(
            anchors,
            RPNHead(channels, len(anchors.ratios), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=ANCHORS_PER_IMAGE,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )

    def forward(
        self,
        levels: list[Tensor],
        sizes: Sequence[Size],
        targets: Sequence[dict[str, Tensor]] | None = None,
        generators: Sequence[Generator | None] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes.

        Args:
            levels: pyramid p2 to p6, [B, C, h, w] each.
            sizes: height and width of each image in the padded input, to which proposals are clipped.
            targets: ``boxes`` [n, 4] of each image; only in training.
            generators: of each image, for the anchors that are drawn.

        Returns:
            Proposals of each image [at most 1000, 4], without a gradient, and in training the losses
            ``loss_objectness``, which is NaN if any prediction is not finite, and ``loss_rpn_box_reg``.
        """
        logits, deltas = self.head(levels)
        with float32_island(levels[0]):
            anchors = self.anchor_generator.on(levels)
            counts, every = [len(level) for level in anchors], torch.cat(anchors)
            logits, deltas = concat_box_prediction_layers([x.float() for x in logits], [x.float() for x in deltas])
            logits = logits.reshape(len(sizes), -1)
            boxes = self.box_coder.decode(deltas.detach(), [every] * len(sizes)).reshape(len(sizes), -1, 4)
            proposals = self.filter_proposals(boxes, logits.detach(), sizes, counts)
            if not self.training:
                return proposals, {}
            assert targets is not None
            labels, matched = self.assign_targets_to_anchors([every] * len(sizes), targets)
            deltas = deltas.reshape(len(sizes), -1, 4)
            losses = self.compute_loss(logits, deltas, labels, matched, every, generators or [None] * len(sizes))
            # Such an anchor may not be drawn. Raising here would leave other ranks waiting; the loop checks the losses.
            finite = boxes.isfinite().all() & logits.isfinite().all()
            losses["loss_objectness"] = torch.where(finite, losses["loss_objectness"], torch.nan)
            return proposals, losses

    def filter_proposals(
        self, boxes: Tensor, logits: Tensor, sizes: Sequence[Size], counts: Sequence[int]
    ) -> list[Tensor]:
        """Keep the best boxes of each level, and of them what non-maximum suppression within levels leaves.

        Args:
            boxes: decoded, [B, A, 4].
            logits: scores [B, A]. Their sigmoids would tie.
            sizes: height and width of each image.
            counts: number of anchors of each level.

        Returns:
            Proposals of each image, best first, [at most 1000, 4].
        """
        best = self._get_top_n_idx(logits, counts)  # [B, at most 2000 of each level], level by level
        lengths = [min(count, self.pre_nms_top_n()) for count in counts]
        level_of = torch.cat([torch.full((n,), i, device=boxes.device) for i, n in enumerate(lengths)])
        logits, boxes = logits.gather(1, best), boxes.gather(1, best[..., None].expand(-1, -1, 4))
        proposals = []
        for scores, found, size in zip(logits, boxes, sizes, strict=True):
            finite = scores.isfinite() & found.isfinite().all(dim=1)
            found = clip_boxes_to_image(found, size)
            kept = torch.where(finite & (found[:, 2:] > found[:, :2]).all(dim=1))[0]
            scores, found, level = scores[kept], found[kept], level_of[kept]
            kept = batched_nms(found, scores, level, self.nms_thresh)[: self.post_nms_top_n()]
            proposals.append(found[kept])
        return proposals

    def compute_loss(
        self,
        logits: Tensor,
        deltas: Tensor,
        labels: Sequence[Tensor],
        matched: Sequence[Tensor],
        anchors: Tensor,
        generators: Sequence[Generator | None],
    ) -> dict[str, Tensor]:
        """Compute both losses, sums divided by 256 * B; without an object that of the boxes is an empty sum.

        Args:
            logits: [B, A].
            deltas: predicted offsets of the boxes [B, A, 4].
            labels: of each image's anchors [A]: 1 object, 0 background, -1 neither.
            matched: box of each image's anchors [A, 4].
            anchors: [A, 4].
            generators: of each image.
        """
        box_losses, logit_losses = [], []
        for i, generator in enumerate(generators):
            objects, background = sample_labels(labels[i], ANCHORS_PER_IMAGE, 0.5, generator)
            wanted = self.box_coder.encode_single(matched[i][objects], anchors[objects])
            box_losses.append(F.l1_loss(deltas[i, objects], wanted, reduction="sum"))
            drawn = torch.cat([objects, background])
            logit_losses.append(F.binary_cross_entropy_with_logits(logits[i, drawn], labels[i][drawn], reduction="sum"))
        divisor = ANCHORS_PER_IMAGE * len(generators)
        return {
            "loss_objectness": torch.stack(logit_losses).sum() / divisor,
            "loss_rpn_box_reg": torch.stack(box_losses).sum() / divisor,
        }
