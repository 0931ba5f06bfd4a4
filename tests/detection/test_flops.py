"""Multiply-adds of Base detectors against those of the specification's models."""

from __future__ import annotations

import pytest
import torch

from mrmae_ds.config.detection import DetectConfig
from mrmae_ds.config.sections import ModelConfig
from mrmae_ds.detection.detector import Detector, build_detector
from mrmae_ds.detection.flops import detector_flops
from tests.support.detectors import detect_config

# The expected numbers of the encoders are fvcore's, which counts five operations per normalized value.
NORMS = {"cvit_base": 0.94, "vit_base": 0.38}
HEADS = {"proposals": 103.3, "box head": 128.9, "mask head": 53.0}


def meta_detector(arch: str, stage: DetectConfig) -> Detector:
    with torch.device("meta"):
        return build_detector(ModelConfig(arch=arch, image_size=224), stage, 80).eval()


@pytest.mark.parametrize(
    ("arch", "global_blocks", "encoder", "total"),
    [("cvit_base", [1, 4, 7, 10], 88.0 + 55.2 + 455.5, 956), ("vit_base", [2, 5, 8, 11], 483.2, 840)],
)
def test_multiply_adds_of_one_image(arch: str, global_blocks: list[int], encoder: float, total: float) -> None:
    stage = detect_config(detector={"global_blocks": global_blocks})
    flops = detector_flops(meta_detector(arch, stage), stage)
    expected = {"encoder": encoder - NORMS[arch], "pyramid": 71.7, **HEADS}
    assert {name: value / 2e9 for name, value in flops.items()} == pytest.approx(expected, abs=0.1)
    assert sum(flops.values()) / 2e9 == pytest.approx(total - NORMS[arch], abs=0.5)


def test_multiply_adds_of_a_training_image() -> None:
    stage = detect_config()
    flops = detector_flops(meta_detector("cvit_base", stage), stage, boxes=512, masks=128)
    assert sum(flops.values()) / 2e9 == pytest.approx(908 - NORMS["cvit_base"], abs=0.5)
