"""Layer decay and weight decay against Detectron2's groups of the authors' Base model."""

from __future__ import annotations

import pytest
import torch

from mrmae_ds.config.sections import ModelConfig
from mrmae_ds.detection.detector import build_detector
from mrmae_ds.detection.param_groups import detectron2_rules
from mrmae_ds.weights.detectors import from_detectron2
from tests.fixtures import load_json
from tests.support.detectors import detect_config


def rules_of(arch: str, layer_decay: float) -> dict[str, tuple[float, bool]]:
    with torch.device("meta"):
        detector = build_detector(ModelConfig(arch=arch, image_size=224), detect_config(), 80)
    return detectron2_rules([name for name, _ in detector.named_parameters()], layer_decay)


def test_groups_of_cvit_base_equal_the_authors() -> None:
    expected: dict[str, tuple[float, bool]] = {}
    for key, names in load_json("detector_groups")["groups"].items():
        scale, decay = map(float, key.split("|"))
        for name in from_detectron2({name: torch.zeros(4) for name in names}):
            expected[name] = (scale, decay > 0)
    rules = rules_of("cvit_base", 0.8)
    assert rules.keys() == expected.keys()
    assert sum(not rule.decays for rule in rules.values()) == 67
    for name, (scale, decays) in expected.items():
        assert rules[name] == (pytest.approx(scale, abs=1e-6), decays), name


def test_layers_of_a_plain_vit() -> None:
    rules = rules_of("vit_base", 0.7)
    for name, exponent in {
        "backbone.net.pos_embed": 13,
        "backbone.net.patch_embed.proj.weight": 13,
        "backbone.net.blocks.0.attn.rel_pos_h": 12,
        "backbone.net.blocks.11.mlp.fc1.bias": 1,
        "backbone.simfp_2.1.weight": 0,
        "roi_heads.box_head.0.1.weight": 0,
    }.items():
        assert rules[name].scale == pytest.approx(0.7**exponent), name
    assert {name for name, rule in rules.items() if not rule.decays} == {
        "backbone.net.pos_embed",
        *(f"backbone.net.blocks.{i}.norm{j}.{kind}" for i in range(12) for j in (1, 2) for kind in ("weight", "bias")),
    }
