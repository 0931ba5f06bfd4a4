"""Origin of weights by a stored command line: only the options of known scripts decide, and timm's own values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.cli.inspect import describe
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from mrmae_ds.models.sizes import ViTSpec
from mrmae_ds.models.vit import MaskedViT
from mrmae_ds.weights.resolve import model_metadata, resolve
from tests.support.released import tiny_vit

HALF = [0.5, 0.5, 0.5]
# Options of timm's training script that scripts of other projects have too.
TIMM_OPTIONS = {"model": "vit_tiny", "layer_decay": 0.75, "mean": None, "std": None, "num_classes": 5}


def timm_checkpoint(path: Path, state: dict[str, torch.Tensor], **options: Any) -> Path:
    """Write a file as timm's training script does."""
    args = argparse.Namespace(**TIMM_OPTIONS | options)
    content = {"epoch": 3, "arch": "vit_tiny", "state_dict": state, "version": 2, "args": args}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("given", [(HALF, [0.25] * 3), ([0.5], [0.25])], ids=["three", "one"])
def test_statistics_of_timms_training_script(given: tuple[list[float], list[float]], tmp_path: Path) -> None:
    path = timm_checkpoint(tmp_path / "x.pth", tiny_vit().state_dict(), mean=given[0], std=given[1])
    origin = resolve(path).identity.origin
    assert origin.statistics == ((0.5,) * 3, (0.25,) * 3)
    assert origin.statistics_by == "the options mean and std in it"


@pytest.mark.parametrize(
    "options",
    [{}, {"blr": 1e-3}, {"mean": HALF}, {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}, {"mean": "x"}],
    ids=str,
)
def test_statistics_that_timms_training_script_does_not_record_are_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The script then takes those of its model's default weights, whatever they are."""
    path = timm_checkpoint(tmp_path / "x.pth", tiny_vit().state_dict(), **options)
    assert resolve(path).identity.origin.statistics is None
    with pytest.raises(UserError, match=r"x.pth: does not record .* and std of its input.*preprocessor_config.json"):
        model_metadata(resolve(path))
    assert "preprocessor_config.json" in describe(path).split("refused yet")[1]


def test_a_script_of_any_statistics_is_none_of_maes(tmp_path: Path) -> None:
    state, args = tiny_vit().state_dict(), {"layer_decay": 0.75, "blr": 1e-3}
    torch.save({"model": state, "args": args}, tmp_path / "x.pth")
    assert resolve(tmp_path / "x.pth").identity.origin.statistics == (IMAGENET_MEAN, IMAGENET_STD)
    torch.save({"model": state, "args": args | {"mean": None, "std": None}}, tmp_path / "x.pth")
    assert resolve(tmp_path / "x.pth").identity.origin.statistics is None
    torch.save({"arch": "vit", "version": 2, "state_dict": state, "args": args}, tmp_path / "x.pth")
    assert resolve(tmp_path / "x.pth").identity.origin.statistics is None


def test_timms_training_script_does_not_decide_the_heads_of_a_vit_small(tmp_path: Path) -> None:
    path = timm_checkpoint(tmp_path / "x.pth", MaskedViT(ViTSpec(384, 12, 12), 32).state_dict())
    assert resolve(path).identity.origin.num_heads is None
