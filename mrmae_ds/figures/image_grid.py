"""Draw rows of images with labels on one page; small images are enlarged so that each pixel is a whole, equal square.

Shapes: N images, 3 colors, H x W pixels, h x w patches. Lengths are in pixels of the PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mrmae_ds.figures import style

FloatArray = npt.NDArray[np.float32]

HEAT_MAP, HEAT_ALPHA = "inferno", 0.65
SMOOTH_FROM = 12  # smallest grid that is interpolated; the patches of coarser ones are drawn as squares
_CELL, _LARGEST = 200, 256  # side of an image: about the first, at most the second
_GAP, _EDGE, _NARROWEST = 8, 16, 900
_TITLE, _LABEL, _SMALL = 12, 10, 8  # points
_SCALE_WIDTH, _SCALE_HEIGHT = 200, 14


@dataclass(frozen=True)
class GridRow:
    """A row of images.

    Attributes:
        label: text to the left; lines after the first are small.
        images: [N, 3, H, W] in [0, 1].
        heat: maps [N, h, w] in [0, 1] to overlay, if any.
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
    """Draw `rows` to a PNG, one column per image.

    Images below 200 pixels are enlarged by a whole factor (nearest pixel); those above 256 are reduced.

    Args:
        rows: from the top.
        path: of the PNG file.
        captions: texts above the columns.
        title: text at the top.
        legend: paragraphs at the bottom, below the color scale of the maps.
    """
    count, _, height, width = rows[0].images.shape
    cell_height, cell_width = _cell_size(height, width)
    left = 2 * _EDGE + round(max(_label_width(row.label) for row in rows))
    page_width = max(left + count * (cell_width + _GAP) - _GAP + _EDGE, _NARROWEST)
    title_lines = _wrap(title or "", page_width - 2 * _EDGE, _TITLE, "bold")
    legend_lines = [line for text in legend for line in _wrap(text, page_width - 2 * _EDGE, _SMALL)]
    top = _EDGE + len(title_lines) * _line(_TITLE) + (_line(_SMALL) if captions else 0) + _GAP
    bottom = top + len(rows) * (cell_height + _GAP) - _GAP
    legend_top = bottom + _GAP + (_line(_SMALL) + _GAP if any(row.heat is not None for row in rows) else 0)
    page_height = legend_top + len(legend_lines) * _line(_SMALL) + _EDGE

    # A hundredth of a pixel more, so that the size in inches is not rounded down to one pixel less.
    inches = ((side + 0.01) / style.DPI for side in (page_width, page_height))
    figure = style.new_figure(*inches, constrained=False)
    cells = {
        "left": left / page_width,
        "right": (left + count * (cell_width + _GAP) - _GAP) / page_width,
        "top": 1 - top / page_height,
        "bottom": 1 - bottom / page_height,
        "wspace": _GAP / cell_width,
        "hspace": _GAP / cell_height,
    }
    all_axes = figure.subplots(len(rows), count, squeeze=False, gridspec_kw=cells)
    for row, line in zip(rows, all_axes, strict=True):
        _label(line[0], row.label)
        for index, axes in enumerate(line):
            _draw_cell(axes, row.images[index], None if row.heat is None else row.heat[index])
    for axes, caption in zip(all_axes[0], captions or (), strict=False):
        axes.set_title(_shorten(caption, cell_width), fontsize=_SMALL, pad=4, color=style.INK)
    _write(figure, _EDGE, title_lines, _TITLE, style.INK, "bold")
    if any(row.heat is not None for row in rows):
        _draw_scale(figure, bottom + _GAP)
    _write(figure, legend_top, legend_lines, _SMALL, style.MUTED)
    style.save(figure, path)


def _draw_cell(axes: Axes, image: FloatArray, heat: FloatArray | None) -> None:
    """Draw an image [3, H, W], and over it a map [h, w] if there is one."""
    _, height, width = image.shape
    axes.set_axis_off()
    axes.imshow(image.transpose(1, 2, 0), aspect="auto")
    if heat is not None:
        overlay = axes.imshow(heat, HEAT_MAP, aspect="auto", vmin=0, vmax=1, alpha=HEAT_ALPHA)
        overlay.set_extent((-0.5, width - 0.5, height - 0.5, -0.5))
        overlay.set_interpolation("catrom" if min(heat.shape) >= SMOOTH_FROM else "nearest")


def _label(axes: Axes, label: str) -> None:
    """Write a row's label to the left of its first image."""
    first, *others = label.split("\n")
    _write_beside(axes, first, _LABEL, (-_EDGE, 2 if others else 0), "bottom" if others else "center")
    _write_beside(axes, "\n".join(others), _SMALL, (-_EDGE, -2), "top", style.MUTED)


def _write_beside(
    axes: Axes, text: str, size: float, offset: tuple[float, float], va: str = "center", color: str = style.INK
) -> None:
    """Write to the left or right of `axes`, by the sign of the offset in pixels from the middle of its edge."""
    x, ha = (0, "right") if offset[0] < 0 else (1, "left")
    label = axes.annotate(text, (x, 0.5), offset, "axes fraction", "offset pixels", annotation_clip=False)
    label.set(fontsize=size, ha=ha, va=va, color=color)


def _write(figure: Figure, y: int, lines: Sequence[str], size: float, color: str, weight: str = "normal") -> None:
    """Write lines of text at the left edge, `y` pixels from the top; dollar signs are plain text."""
    width, height = figure.get_size_inches() * style.DPI
    for number, line in enumerate(lines):
        text = figure.text(_EDGE / width, 1 - (y + number * _line(size)) / height, line, va="top")
        text.set(fontsize=size, fontweight=weight, color=color)


def _draw_scale(figure: Figure, y: int) -> None:
    """Draw the color scale of the maps, `y` pixels from the top."""
    width, height = figure.get_size_inches() * style.DPI
    x = 2 * _EDGE + style.text_width("least", _SMALL)
    bottom = y + 4 + _SCALE_HEIGHT
    axes = figure.add_axes((x / width, 1 - bottom / height, _SCALE_WIDTH / width, _SCALE_HEIGHT / height))
    axes.set_axis_off()
    axes.imshow(np.linspace(0, 1, _SCALE_WIDTH)[None], HEAT_MAP, aspect="auto")
    _write_beside(axes, "least", _SMALL, (-_GAP, 0))
    _write_beside(axes, "most (each map has its own scale)", _SMALL, (_GAP, 0))


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """Return an image's height and width on the page."""
    longer = max(height, width)
    if longer > _LARGEST:
        return round(height * _LARGEST / longer), round(width * _LARGEST / longer)
    factor = max(1, round(_CELL / longer))
    return height * factor, width * factor


def _line(size: float) -> int:
    """Return the height of a line of text."""
    return round(size * 1.35 * style.DPI / 72)


def _label_width(label: str) -> float:
    first, *others = label.split("\n")
    return max(style.text_width(first, _LABEL), *(style.text_width(line, _SMALL) for line in others), 0)


def _wrap(text: str, width: int, size: float, weight: str = "normal") -> list[str]:
    """Break `text` between words into lines no wider than `width`."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and style.text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _shorten(text: str, width: int) -> str:
    """Shorten a caption to `width`."""
    shown = text
    while text and style.text_width(shown, _SMALL) > width:
        text = text[:-1]
        shown = text + "\N{HORIZONTAL ELLIPSIS}"
    return shown
