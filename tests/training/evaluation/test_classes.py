"""Classes of a data set among those of a classifier, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.errors import UserError
from mrmae_ds.training.evaluation.classes import match_classes

WNIDS = tuple(ImageNetInfo().label_names())


def data_of(*names: str) -> BetonInfo:
    return BetonInfo(Path("val.beton"), 1, len(names), names, 32, 90, 1, "", None, "x", "x")


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (("n01443537", "n01440764"), (1, 0)),
        (("goldfish", "tench"), (1, 0)),
        (("tench, Tinca tinca", "great white shark"), (0, 2)),
        (("crane (n02012849)", "crane (n03126707)"), (134, 517)),
        ((*WNIDS[1:], WNIDS[0]), (*range(1, 1000), 0)),
    ],
)
def test_imagenets_classes_by_id_or_name(names: tuple[str, ...], outputs: tuple[int, ...]) -> None:
    assert match_classes(WNIDS, 1000, data_of(*names), "x.pth") == outputs


def test_all_classes_in_their_order_need_no_selection() -> None:
    assert match_classes(WNIDS, 1000, data_of(*WNIDS), "x.pth") is None
    assert match_classes(["a", "b"], 2, data_of("a", "b"), "x.pth") is None


@pytest.mark.parametrize("name", ["crane", "n00000000", "shark"])
def test_an_unknown_or_ambiguous_class_is_named(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"x.pth was trained on other classes \(1000\) than .* \(2; .*\), and not on '{name}'"
    ):
        match_classes(WNIDS, 1000, data_of("tench", name), "x.pth")


def test_classes_that_are_numbers_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"not on '0' \(its classes have numbers only: convert it with --class-"):
        match_classes(WNIDS, 1000, data_of("0", "1"), "x.pth")
    with pytest.raises(UserError, match=r"not on '2'; evaluate"):
        match_classes(["0", "1"], 2, data_of("1", "2"), "x.pth")
