"""Rows of pictures with labels, each picture's pixels drawn as whole, equal squares when it is small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mrmae_ds.reporting import style

HEAT_MAP = "inferno"
# Pixels, at style.DPI. Text is given room by its number of characters, each about so wide at its size.
_CELL = 168  # a picture's side on the page: about 1.1 inches
_GAP, _EDGE, _LINE, _SCALE = 8, 14, 34, 46
_LABEL_CHARACTER, _TITLE_CHARACTER, _CAPTION_CHARACTER = 12.5, 16, 10
_SCALE_TEXT = "each map from its least to its most attention"


@dataclass(frozen=True)
class GridRow:
    """A labelled row: pictures [N, 3, H, W] in [0, 1], and maps [N, h, w] in [0, 1] to lay over them, if
    any."""

    label: str
    pictures: np.ndarray
    heat: np.ndarray | None = None


def draw_grid(
    rows: Sequence[GridRow], path: Path, *, captions: Sequence[str] | None = None, title: str | None = None
) -> None:
    """Draw `rows` to a PNG, one column a picture. Small pictures are enlarged by a whole factor, nearest
    pixel."""
    count, _, height, width = rows[0].pictures.shape
    factor = max(1, round(_CELL / width)) if width < _CELL else _CELL / width
    cell_w, cell_h = round(width * factor), round(height * factor)
    has_heat = any(row.heat is not None for row in rows)
    left = round(max(len(row.label) for row in rows) * _LABEL_CHARACTER) + 2 * _EDGE
    top = _EDGE + (_LINE if title else 0) + (_LINE if captions else 0)
    text_w = max(len(title or "") * _TITLE_CHARACTER, has_heat * (cell_w + len(_SCALE_TEXT) * _CAPTION_CHARACTER))
    full_w = left + max(count * (cell_w + _GAP), round(text_w)) + _EDGE
    full_h = top + len(rows) * (cell_h + _GAP) + _EDGE + (_SCALE if has_heat else 0)
    figure = style.new_figure(full_w / style.DPI, full_h / style.DPI, constrained=False)

    def place(x: float, y: float, w: float = 0, h: float = 0) -> tuple[float, float, float, float]:
        """Turn pixels from the top left corner into the figure's own units."""
        return x / full_w, 1 - (y + h) / full_h, w / full_w, h / full_h

    for line, row in enumerate(rows):
        y = top + line * (cell_h + _GAP)
        _text(figure, place(left - _EDGE, y + cell_h / 2), row.label, ha="right", va="center")
        for column in range(count):
            box = place(left + column * (cell_w + _GAP), y, cell_w, cell_h)
            _draw_cell(figure, box, row, column, enlarged=factor >= 1)
    for column, caption in enumerate(captions or ()):
        x = left + column * (cell_w + _GAP) + cell_w / 2
        short = _shorten(caption, int(cell_w / _CAPTION_CHARACTER))
        _text(figure, place(x, top - 8), short, ha="center", va="bottom", size=8)
    if title:
        _text(figure, place(left, _EDGE), title, ha="left", va="top", size=11, weight="bold")
    if has_heat:
        y = full_h - _SCALE
        _draw_scale(figure, place(left, y + 4, cell_w, 14))
        _text(figure, place(left + cell_w + _GAP, y + 11), _SCALE_TEXT, ha="left", va="center", size=8)
    style.save(figure, path)


def _shorten(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _draw_cell(
    figure: Figure, box: tuple[float, float, float, float], row: GridRow, column: int, *, enlarged: bool
) -> None:
    axes = figure.add_axes(box)
    axes.set_axis_off()
    picture = row.pictures[column].transpose(1, 2, 0)
    axes.imshow(picture, interpolation="nearest" if enlarged else "antialiased", aspect="auto")
    if row.heat is not None:
        extent = axes.get_images()[0].get_extent()
        axes.imshow(
            row.heat[column],
            cmap=HEAT_MAP,
            vmin=0,
            vmax=1,
            alpha=0.65,
            extent=extent,
            interpolation="nearest",
            aspect="auto",
        )


def _draw_scale(figure: Figure, box: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(box)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=HEAT_MAP, aspect="auto")
    axes.set_axis_off()


def _text(
    figure: Figure,
    box: tuple[float, float, float, float],
    text: str,
    *,
    ha: str,
    va: str,
    size: float = 10,
    weight: str = "normal",
) -> None:
    figure.text(box[0], box[1], text, ha=ha, va=va, fontsize=size, fontweight=weight, color=style.INK)
