"""Drawing of detections: boxes, masks, class names and scores over images.

Shapes: n objects, H x W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor, ImageDraw, ImageFont

from mrmae_ds.data.convert.images import read_rgb
from mrmae_ds.data.types import BoolArray, ImageArray, IntArray
from mrmae_ds.detection.coco import CocoIndex, CocoSplit
from mrmae_ds.detection.rle import Rle, mask_api
from mrmae_ds.figures.select_images import evenly_spaced
from mrmae_ds.figures.style import INK, PALETTE
from mrmae_ds.files import replacing
from mrmae_ds.units import printable

NUM_IMAGES = 8  # of the figure
_ALPHA = 0.45  # of masks
_LAST_RESORT = "Last Resort High-Efficiency"  # a font of boxes that name the script of a letter
_CELL, _GAP, _PAIRS = 400, 8, 2  # longer side of an image, pixels between images, pairs of images in a row


@dataclass(frozen=True)
class DrawnObject:
    """An object to draw.

    Attributes:
        box: left, top, right, bottom, in pixels of the image.
        name: of the class.
        color: as Pillow names colors.
        mask: at the image's size.
        score: 0 to 1; None is an annotation.
    """

    box: tuple[float, float, float, float]
    name: str
    color: str
    mask: Rle | None = None
    score: float | None = None


def annotated_objects(index: CocoIndex, row: int) -> list[DrawnObject]:
    """Return the annotations of an image, without crowds."""
    own = index.annotations(row)
    return [
        DrawnObject(_corners(box), printable(index.class_names[kind]), _color(kind), mask)
        for kind, crowd, box, mask in zip(own.classes, own.crowd, own.boxes.tolist(), own.masks, strict=True)
        if not crowd
    ]


def detected_objects(
    results: Sequence[dict[str, Any]], category_ids: IntArray, class_names: Sequence[str], score: float
) -> list[DrawnObject]:
    """Return the results of one image with at least this score, the best last and so on top.

    Args:
        results: COCO's results of one image.
        category_ids: of the classes, ascending.
        class_names: in the same order.
        score: least score.
    """
    objects = []
    for result in sorted(results, key=lambda entry: entry["score"]):
        if result["score"] >= score:
            kind = int(np.searchsorted(category_ids, result["category_id"]))
            encoded = result["segmentation"]
            mask: Rle = {"size": encoded["size"], "counts": encoded["counts"].encode()}
            name, color = printable(class_names[kind]), _color(kind)
            objects.append(DrawnObject(_corners(result["bbox"]), name, color, mask, result["score"]))
    return objects


def draw_objects(image: Image.Image, objects: Sequence[DrawnObject]) -> Image.Image:
    """Draw objects over an image; later ones on top.

    Args:
        image: RGB.
        objects: in its pixels.

    Returns:
        A new image of the same size.
    """
    pixels = np.array(image, dtype=np.uint8)
    for item in objects:
        if item.mask is not None:
            _blend(pixels, mask_api.decode(item.mask).astype(bool), item.color)
    drawn = Image.fromarray(pixels)
    pen, side = ImageDraw.Draw(drawn), min(max(image.size), 4 * min(image.size))  # of a panorama less than the longer
    size, line = max(10, side / 32), max(1, round(side / 250))
    for item in objects:
        pen.rectangle(item.box, outline=item.color, width=line)
        name, file = legible_name(item.name)
        font, text = ImageFont.truetype(file, size), name if item.score is None else f"{name} {item.score:.2f}"
        _, _, width, height = pen.textbbox((0, 0), text, font=font)
        left = max(0, min(item.box[0], image.width - width - 4))
        top = max(0, item.box[1] - height - 2)
        pen.rectangle((left, top, left + width + 4, top + height + 2), fill=item.color)
        pen.text((left + 2, top), text, fill=_ink_on(item.color), font=font)
    return drawn


def draw_predictions(
    split: CocoSplit, rows: Sequence[int], results: Sequence[dict[str, Any]], path: Path, *, score: float = 0.5
) -> None:
    """Draw the annotations (left) and predictions (right) of some images to a PNG.

    Args:
        split: the images.
        rows: of the images in the index, :func:`fixed_rows`.
        results: COCO's results of these images and possibly others.
        path: of the PNG file.
        score: least score that is drawn.
    """
    pairs = []
    for row in rows:
        entry = split.index.image(row)
        own = [result for result in results if result["image_id"] == entry.id]
        image = read_rgb(split.folder / entry.name)
        found = detected_objects(own, split.index.category_ids, split.class_names, score)
        both = annotated_objects(split.index, row), found
        pairs.append([_reduced(draw_objects(image, objects)) for objects in both])
    step = _CELL + _GAP
    across = min(_PAIRS, len(pairs))
    lines = [pairs[first : first + across] for first in range(0, len(pairs), across)]
    heights = [max(pair[0].height for pair in line) + _GAP for line in lines]
    page = Image.new("RGB", (2 * across * step + _GAP, sum(heights) + _GAP), "white")
    for number, line in enumerate(lines):
        for place, image in enumerate(image for pair in line for image in pair):
            page.paste(image, (_GAP + place * step, _GAP + sum(heights[:number])))
    with replacing(path) as temporary:
        page.save(temporary, format="PNG")


def fixed_rows(split: CocoSplit) -> list[int]:
    """Return the rows of the figure's images: evenly spaced among those with objects, the same at every evaluation."""
    rows = split.annotated_rows()
    return rows[evenly_spaced(len(rows), min(NUM_IMAGES, len(rows)))].tolist()


@cache
def legible_name(name: str) -> tuple[str, str]:
    """Return a name as it can be drawn, and the font's file. Letters that no installed font has are escaped."""
    default = str(font_manager.findfont("DejaVu Sans"))  # matplotlib's own
    installed = [str(font.fname) for font in font_manager.fontManager.ttflist if font.name != _LAST_RESORT]
    for file in (default, *installed):
        with contextlib.suppress(OSError, RuntimeError):  # a font that was removed, or is damaged
            if {*map(ord, f"{name} 0.")} <= FT2Font(file).get_charmap().keys():
                return name, file
    known = FT2Font(default).get_charmap()
    return "".join(letter if ord(letter) in known else ascii(letter)[1:-1] for letter in name), default


def _reduced(image: Image.Image) -> Image.Image:
    ratio = min(1.0, _CELL / max(image.size))
    size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    return image.resize(size, Image.Resampling.LANCZOS)


def _blend(pixels: ImageArray, mask: BoolArray, color: str) -> None:
    """Color the pixels [H, W, 3] of a mask, in place."""
    pixels[mask] = (pixels[mask] * (1 - _ALPHA) + np.array(ImageColor.getrgb(color)) * _ALPHA).astype(np.uint8)


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, width, height = box
    return left, top, left + width, top + height


def _color(kind: int) -> str:
    return PALETTE[kind % (len(PALETTE) - 1)]  # without black


def _ink_on(color: str) -> str:
    red, green, blue = ImageColor.getrgb(color)[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK
