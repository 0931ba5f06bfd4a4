"""Drawings: the objects' colors are where the objects are, and the figure holds the same images each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor
from pycocotools import mask as mask_api

from mrmae_ds.detection.coco import CocoSplit, open_split
from mrmae_ds.detection.draw import (
    DrawnObject,
    annotated_objects,
    detected_objects,
    draw_objects,
    draw_predictions,
    fixed_rows,
    legible_name,
)
from tests.detection.test_evaluate import perfect
from tests.support.coco import write_coco


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    return open_split(*write_coco(tmp_path), training=False)


def test_an_object_is_drawn_where_it_is() -> None:
    mask = np.zeros((120, 200), dtype=np.uint8, order="F")
    mask[60:80, 50:90] = 1
    item = DrawnObject((40, 50, 100, 90), "zebra", "#0072B2", mask_api.encode(mask), 0.87)
    gray = Image.new("RGB", (200, 120), (128, 128, 128))
    drawn = np.asarray(draw_objects(gray, [item])).astype(int)
    color = np.array(ImageColor.getrgb(item.color))
    assert (drawn[50, 40:101] == color).all() and (drawn[50:91, 100] == color).all()
    assert (drawn[60:80, 50:90] == (128 * 0.55 + color * 0.45).astype(int)).all()
    assert (drawn[82:88, 45:95] == 128).all() and (drawn[95:] == 128).all()
    assert (drawn[30:49, 40:80] != 128).any()  # the name, above the box
    assert np.asarray(gray).min() == 128


def test_names_stay_inside_the_image() -> None:
    gray = Image.new("RGB", (100, 60), (128, 128, 128))
    items = [DrawnObject((95, 0, 99, 50), "hair drier", "#D55E00")]
    assert (np.asarray(draw_objects(gray, items))[:10] != 128).any(axis=2).sum() > 100


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 3000), (3000, 100)])
def test_names_leave_most_of_a_narrow_image_visible(size: tuple[int, int]) -> None:
    gray = Image.new("RGB", size, (128, 128, 128))
    drawn = draw_objects(gray, [DrawnObject((0, 0, *size), "zebra", "#0072B2", None, 0.5)])
    assert drawn.size == size
    if min(size) == 100:
        assert (np.asarray(drawn) == 128).all(axis=2).mean() > 0.8


def test_names_in_other_alphabets_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters are drawn by a font that has them; where none has, they are escaped."""
    default, other = (font_manager.findfont(family) for family in ("DejaVu Sans", "STIXGeneral"))
    missing = FT2Font(other).get_charmap().keys() - FT2Font(default).get_charmap().keys()
    letter, choose = chr(max(missing)), legible_name.__wrapped__
    for name in ("zebra", "\u0447\u0435\u043b\u043e\u0432\u0435\u043a", "\u03b6\u03ad\u03b2\u03c1\u03b1"):
        assert choose(name) == (name, default)
    removed = font_manager.FontEntry(fname="removed.ttf", name="Removed")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [removed, font_manager.FontEntry(other, "STIXGeneral")])
    assert choose(letter) == (letter, other)
    assert choose(f"\u81ea {letter}\n") == (f"\\u81ea {ascii(letter)[1:-1]}\\n", default)
    gray = Image.new("RGB", (200, 100), (128, 128, 128))
    drawn = [draw_objects(gray, [DrawnObject((0, 50, 90, 90), name, "#0072B2")]) for name in ("\u0416", "\u0429")]
    assert drawn[0].tobytes() != drawn[1].tobytes()  # not the same box for both


def test_results_below_the_score_are_left_out(split: CocoSplit) -> None:
    results = [result for result in perfect(split.index) if result["image_id"] == 7]
    for number, result in enumerate(results):
        result["score"] = number / 4
    drawn = detected_objects(results[::-1], split.index.category_ids, split.class_names, 0.5)
    assert [item.score for item in drawn] == [0.5, 0.75]
    annotated = annotated_objects(split.index, 0)
    assert [(item.box, item.name, item.mask, item.color) for item in drawn] == [
        (item.box, item.name, item.mask, item.color) for item in annotated[2:]
    ]


def test_the_figure(split: CocoSplit, tmp_path: Path) -> None:
    rows = fixed_rows(split)
    assert rows == [0, 1, 2, 3]  # images without objects are not in it
    path = tmp_path / "predictions.png"
    draw_predictions(split, rows, perfect(split.index), path)
    perfect_page = np.asarray(Image.open(path)).astype(int)
    draw_predictions(split, rows, [], path)
    empty_page = np.asarray(Image.open(path)).astype(int)
    assert perfect_page.shape == empty_page.shape == (96 + 80 + 3 * 8, 4 * 408 + 8, 3)
    differs = (perfect_page != empty_page).any(axis=(0, 2))
    left, right = slice(8, 8 + 400), slice(8 + 408, 8 + 808)
    assert not differs[left].any() and differs[right].any()
