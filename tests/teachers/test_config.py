"""The recipe's teacher sections: keys without effect are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mrmae_ds.config.recipe import TeacherConfig


def config(**keys: Any) -> TeacherConfig:
    return TeacherConfig(**{"source": "name", **keys})


@pytest.mark.parametrize("value", [True, False, None])
def test_quickgelu_is_the_one_key_that_may_be_true_or_false(value: bool | None) -> None:
    assert config(kind="clip", weights="file.pt", quickgelu=value).quickgelu is value
    with pytest.raises(ValidationError, match=r"image_size: expected a value, got true"):
        config(kind="clip", image_size=True)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("checkpoint", {"weights": "file.pt"}),
        ("checkpoint", {"stage": 2}),
        ("checkpoint", {"quickgelu": True}),
        ("clip", {"position_resize": "dino"}),
        ("checkpoint", {"position_resize": "library"}),
    ],
)
def test_a_key_without_effect_is_refused(kind: str, keys: dict[str, Any]) -> None:
    (key,) = keys
    with pytest.raises(ValidationError, match=rf"{key}: has no effect on kind {kind}"):
        config(kind=kind, **keys)


@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_keys_of_the_libraries_kinds(kind: str) -> None:
    assert config(kind=kind, weights="file.pt", stage=0).stage == 0
    assert config(kind="timm", position_resize="dino").position_resize == "dino"


def test_statistics_need_mean_and_std_and_one_source() -> None:
    half = (0.5, 0.5, 0.5)
    assert config(kind="timm", mean=half, std=half).std == half
    with pytest.raises(ValidationError, match="give both mean and std"):
        config(kind="timm", mean=half)
    with pytest.raises(ValidationError, match=r"mean: statistics: student"):
        config(kind="timm", mean=half, std=half, statistics="student")
    with pytest.raises(ValidationError, match="greater than 0"):
        config(kind="timm", mean=half, std=(0.5, 0.0, 0.5))
