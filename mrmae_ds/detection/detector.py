"""Mask R-CNN on a simple feature pyramid (ViTDet), with the arithmetic of Detectron2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mrmae_ds.config.detection import DetectConfig, DetectorConfig
from mrmae_ds.config.sections import ModelConfig
from mrmae_ds.detection.boxes import ExactAnchors, Size
from mrmae_ds.detection.roi_heads import RegionHeads
from mrmae_ds.detection.rpn import ProposalNetwork
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.pyramid import STRIDES, SimplePyramid
from mrmae_ds.models.sizes import EncoderSpec, ImageSize
from mrmae_ds.models.windowed import WindowedCViT, WindowedViT, build_windowed

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")


class Detector(nn.Module):
    """Encoder, pyramid, region proposals, and box and mask heads.

    Names of the heads' parameters are those of torchvision's Mask R-CNN, those of the backbone Detectron2's.

    Args:
        backbone: encoder and pyramid.
        config: sizes of the heads.
        num_classes: K, without the background.
    """

    def __init__(self, backbone: SimplePyramid, config: DetectorConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.num_classes = backbone, num_classes
        self.rpn = ProposalNetwork(config.channels, ExactAnchors(config.anchors, STRIDES))
        self.roi_heads = RegionHeads(config, num_classes)

    @property
    def encoder(self) -> WindowedCViT | WindowedViT:
        """Return the encoder without the pyramid."""
        return self.backbone.net

    @property
    def checkpointing(self) -> CheckpointPlan:
        """Activation checkpointing: the encoder's, because recomputed heads would draw other boxes."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, plan: CheckpointPlan) -> None:
        self.encoder.checkpointing = plan

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[Size],
        targets: Sequence[dict[str, Tensor]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, detections in evaluation.

        Args:
            images: normalized, and zero outside the images [B, 3, S, S]; S is a multiple of 32.
            sizes: height h and width w of each image in the square.
            targets: in training, of each image ``boxes`` (float32 [n, 4]: left, top, right, bottom in pixels),
                ``labels`` (int64 [n], 1 to K) and ``masks`` (0 or 1, [n, h, w]); n may be 0.
            seeds: of each image, for the anchors and boxes that are drawn for the losses; None draws from torch's
                global generator.

        Returns:
            In training float32 scalars: ``loss``, its five terms (:data:`LOSSES`), and the statistics ``positives``
            (drawn boxes with an object) and ``recall`` (share of the objects with a proposal of IoU 0.5).
            In evaluation of each image at most 100 detections, best first: ``boxes`` [n, 4], ``labels`` [n],
            ``scores`` [n], and ``masks`` [n, 1, M, M], probabilities in the boxes.

        Raises:
            UserError: if S is not a multiple of 32.
        """
        generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        levels = self.backbone(images)
        proposals, proposal_losses = self.rpn(levels, sizes, targets, generators)
        detections, head_losses = self.roi_heads(levels[:-1], proposals, sizes, targets, generators)
        if not self.training:
            return detections
        losses = proposal_losses | head_losses
        return {"loss": torch.stack([losses[name] for name in LOSSES]).sum(), **losses}


def build_detector(model: ModelConfig, stage: DetectConfig, num_classes: int) -> Detector:
    """Build the detector of a recipe with random weights.

    Args:
        model: the encoder; its image size is that of the stored position embedding.
        stage: image size, drop path, and sizes of the detector.
        num_classes: K, without the background.

    Raises:
        ConfigError: if the encoder's stride is not 16, or a global block does not exist.
    """
    return assemble_detector(
        model.spec(), stage.detector, stage.image_size, model.image_size, num_classes, stage.drop_path
    )


def assemble_detector(
    spec: EncoderSpec,
    config: DetectorConfig,
    image_size: int,
    position_size: ImageSize,
    num_classes: int,
    drop_path: float = 0.0,
) -> Detector:
    """Build a detector of given sizes with random weights, as :func:`build_detector` does.

    Args:
        spec: of the encoder.
        config: of the detector.
        image_size: side of the square input, pixels.
        position_size: input size of the stored position embedding, pixels.
        num_classes: K, without the background.
        drop_path: rate of stochastic depth in the last block.
    """
    encoder = build_windowed(spec, image_size, config.window, config.global_blocks, position_size, drop_path)
    return Detector(SimplePyramid(encoder, config.channels), config, num_classes)
