"""Rows of images with labels on one page, each image's pixels drawn as whole, equal squares when it is small.

Shapes: N images, 3 colors, H x W pixels, h x w grid of patches. Lengths on the page are in pixels of the PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from mrmae_ds.figures import style

FloatArray = npt.NDArray[np.float32]

HEAT_MAP = "inferno"
HEAT_SHARE = 0.65  # of a map's color in what is drawn; the rest is the image
# Grids from this side on are drawn smoothly; the cells of smaller ones are few enough to be seen one by one.
SMOOTH_FROM = 12
_CELL, _LARGEST = 200, 256  # about what an image's side is to be; larger ones are reduced
_GAP, _EDGE, _NARROWEST = 8, 16, 900
_TITLE, _LABEL, _SMALL = 12, 10, 8  # points
_LEADING = 1.35
_SCALE_WIDTH, _SCALE_HEIGHT = 200, 14


@dataclass(frozen=True)
class GridRow:
    """A row: images [N, 3, H, W] in [0, 1], and maps [N, h, w] in [0, 1] to lay over them, if any.

    Lines of `label` after the first are written smaller.
    """

    label: str
    images: FloatArray
    heat: FloatArray | None = None


def draw_grid(
    rows: Sequence[GridRow],
    path: Path,
    *,
    captions: Sequence[str] | None = None,
    title: str | None = None,
    legend: Sequence[str] = (),
) -> None:
    """Draw `rows` to a PNG, one column an image.

    Images below 200 pixels are enlarged by a whole factor, nearest pixel; those above 256 are reduced. `captions`
    stand above the columns, `legend`'s paragraphs below, after the color scale if a row has maps.
    """
    count, _, height, width = rows[0].images.shape
    cell = _cell_size(height, width)
    left = 2 * _EDGE + max(_label_width(row.label) for row in rows)
    full_w = max(left + count * (cell[1] + _GAP) - _GAP + _EDGE, _NARROWEST)
    title_lines = _wrap(title or "", full_w - 2 * _EDGE, _TITLE, "bold")
    legend_lines = [line for text in legend for line in _wrap(text, full_w - 2 * _EDGE, _SMALL)]
    top = _EDGE + len(title_lines) * _line(_TITLE) + (_line(_SMALL) if captions else 0) + _GAP
    below = top + len(rows) * (cell[0] + _GAP)
    scale = _line(_SMALL) + _GAP if any(row.heat is not None for row in rows) else 0
    full_h = below + scale + len(legend_lines) * _line(_SMALL) + _EDGE
    page = np.ones((full_h, full_w, 3), np.float32)
    text = _Text(full_w, full_h)
    for number, line in enumerate(title_lines):
        text.write(_EDGE, _EDGE + number * _line(_TITLE), line, _TITLE, weight="bold")
    for column, caption in enumerate(captions or ()):
        x = left + column * (cell[1] + _GAP) + cell[1] / 2
        text.write(x, top - _line(_SMALL) - 2, _shorten(caption, cell[1], _SMALL), _SMALL, align="center")
    for number, row in enumerate(rows):
        y = top + number * (cell[0] + _GAP)
        text.label(left - _EDGE, y + cell[0] / 2, row.label)
        for column in range(count):
            x = left + column * (cell[1] + _GAP)
            page[y : y + cell[0], x : x + cell[1]] = _draw_cell(row, column, cell)
    if scale:
        _draw_scale(page, text, _EDGE, below)
    for number, line in enumerate(legend_lines):
        text.write(_EDGE, below + scale + number * _line(_SMALL), line, _SMALL, color=style.MUTED)
    text.figure.figimage(page)
    style.save(text.figure, path)


class _Text:
    """A page's figure, and text on it at pixels from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        # A hundredth of a pixel more: the figure's size in inches must not be rounded to one pixel less.
        size = ((side + 0.01) / style.DPI for side in (width, height))
        self.figure: Figure = style.new_figure(*size, constrained=False)

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        *,
        align: str = "left",
        weight: str = "normal",
        color: str = style.INK,
    ) -> None:
        """One line whose top is at `y`; dollar signs mean themselves."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            ha=align,
            va="top",
            fontsize=size,
            fontweight=weight,
            color=color,
            parse_math=False,
        )

    def label(self, right: float, middle: float, label: str) -> None:
        """A row's label, centerd on `middle`, the first line large."""
        lines = label.split("\n")
        y = middle - (_line(_LABEL) + (len(lines) - 1) * _line(_SMALL)) / 2
        self.write(right, y, lines[0], _LABEL, align="right")
        for number, line in enumerate(lines[1:]):
            y_line = y + _line(_LABEL) + number * _line(_SMALL)
            self.write(right, y_line, line, _SMALL, align="right", color=style.MUTED)


def _draw_cell(row: GridRow, column: int, cell: tuple[int, int]) -> FloatArray:
    """An image with its map as it stands on the page, [cell height, cell width, 3]."""
    image = row.images[column].transpose(1, 2, 0)
    if image.shape[0] > cell[0]:
        whole = Image.fromarray(np.rint(image * 255).astype(np.uint8))
        image = np.asarray(whole.resize(cell[::-1], Image.Resampling.LANCZOS), np.float32) / 255
    else:
        image = _nearest(image, cell)
    if row.heat is None:
        return image
    colors = matplotlib.colormaps[HEAT_MAP](_enlarged(row.heat[column], cell))[..., :3]
    return HEAT_SHARE * colors.astype(np.float32) + (1 - HEAT_SHARE) * image


def _enlarged(heat: FloatArray, cell: tuple[int, int]) -> FloatArray:
    """A map [h, w] at the size of its cell: smooth (bicubic) for fine grids, in exact squares for coarse ones."""
    if min(heat.shape) < SMOOTH_FROM:
        return _nearest(heat, cell)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(cell[::-1], Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth), 0, 1)


def _nearest(values: FloatArray, cell: tuple[int, int]) -> FloatArray:
    rows = np.arange(cell[0]) * values.shape[0] // cell[0]
    columns = np.arange(cell[1]) * values.shape[1] // cell[1]
    return values[rows][:, columns]


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """An image's height and width on the page."""
    longer = max(height, width)
    if longer > _LARGEST:
        return round(height * _LARGEST / longer), round(width * _LARGEST / longer)
    factor = max(1, round(_CELL / longer))
    return height * factor, width * factor


def _draw_scale(page: FloatArray, text: _Text, left: int, y: int) -> None:
    colors = matplotlib.colormaps[HEAT_MAP](np.linspace(0, 1, _SCALE_WIDTH))[:, :3]
    least = round(style.text_width("least", _SMALL)) + _GAP
    x = left + least
    page[y + 4 : y + 4 + _SCALE_HEIGHT, x : x + _SCALE_WIDTH] = colors
    text.write(left, y, "least", _SMALL)
    text.write(x + _SCALE_WIDTH + _GAP, y, "most (each map has its own scale)", _SMALL)


def _line(size: float) -> int:
    """The height of a line of text."""
    return round(size * _LEADING * style.DPI / 72)


def _label_width(label: str) -> int:
    first, *others = label.split("\n")
    widths = [style.text_width(first, _LABEL), *(style.text_width(line, _SMALL) for line in others)]
    return round(max(widths))


def _wrap(text: str, width: int, size: float, weight: str = "normal") -> list[str]:
    """Lines no wider than `width`, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and style.text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _shorten(text: str, width: int, size: float) -> str:
    if style.text_width(text, size) <= width:
        return text
    while text and style.text_width(text + "\N{HORIZONTAL ELLIPSIS}", size) > width:
        text = text[:-1]
    return text + "\N{HORIZONTAL ELLIPSIS}"
