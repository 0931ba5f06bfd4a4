"""The scaling table as a picture: accuracy over model size, one panel a data set."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

from matplotlib import patheffects
from matplotlib.axes import Axes

from mrmae_ds.reporting import paper, style
from mrmae_ds.reporting.table import METHODS, Row, Table

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INCHES_PER_NUMBER = 0.46  # the room that a printed "88.35" needs beside its neighbours
_CHARACTERS_PER_INCH = 12.5
_NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class _Panel:
    """One data set: its rows, the sizes at which any of them has a number, and its width in inches."""

    dataset: str
    rows: tuple[Row, ...]
    sizes: tuple[str, ...]
    width: float

    @property
    def ours(self) -> list[Row]:
        return [row for row in self.rows if row.source == "ours"]


def plot(table: Table, path: Path) -> None:
    """Draw `table` to a PNG. The paper's numbers are hollow and dashed, ours filled and solid.

    Ours stand in the paper's panel only where they were measured on the whole of its data set.
    """
    rows = [row for row in table.rows if row.cells]
    datasets = sorted({row.dataset for row in rows}, key=lambda name: (name != paper.IMAGENET, name))
    panels = [_panel(table, dataset) for dataset in datasets]
    methods = dict.fromkeys((*METHODS, *(row.method for row in rows)))
    colours = {name: style.PALETTE[index % len(style.PALETTE)] for index, name in enumerate(methods)}
    widths = [panel.width for panel in panels]
    tallest = max(len(panel.rows) for panel in panels)
    figure = style.new_figure(sum(widths), 4.4 + 0.17 * tallest)
    title = "Model scaling: accuracy after fine-tuning"
    figure.suptitle(title, fontsize=13, fontweight="bold", color=style.INK)
    all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, colours)
    style.save(figure, path)


def _panel(table: Table, dataset: str) -> _Panel:
    rows = tuple(row for row in table.rows if row.cells and row.dataset == dataset)
    sizes = tuple(size for size in table.sizes if any(not math.isnan(_value(row, size)) for row in rows))
    abreast = len(rows) if any(row.source == "ours" for row in rows) else 1
    width = 0.9 + len(sizes) * max(0.95, _INCHES_PER_NUMBER * abreast)
    return _Panel(dataset, rows, sizes, max(4.0, width))


def _value(row: Row, size: str) -> float:
    """Return the number of a cell in percent, NaN for a blank or a dash."""
    cell = row.cells.get(size)
    return math.nan if cell is None or cell.value is None else cell.value


def _draw_panel(axes: Axes, panel: _Panel, colours: dict[str, str]) -> None:
    # With ours in the panel the rows of a size stand side by side; the paper's alone share one vertical line.
    step = 0.8 / len(panel.rows) if panel.ours else 0.0
    for index, row in enumerate(panel.rows):
        before = [(other.method, other.source) for other in panel.rows[:index]]
        marker = _MARKERS[before.count((row.method, row.source)) % len(_MARKERS)]
        shift = (index - (len(panel.rows) - 1) / 2) * step
        _draw_row(axes, panel, row, shift, marker, colours[row.method])
    style.tidy(axes)
    axes.set_xticks(range(len(panel.sizes)), list(panel.sizes))
    axes.set_xlim(-0.5, len(panel.sizes) - 0.5)
    for index in range(1, len(panel.sizes), 2):
        axes.axvspan(index - 0.5, index + 0.5, color=style.BAND, linewidth=0, zorder=0)
    axes.margins(y=0.14)
    axes.set_xlabel("Model size", fontsize=10)
    axes.set_ylabel("Top-1 accuracy (%)", fontsize=10)
    axes.set_title("\n".join(_wrap(line, panel) for line in _title(panel)), fontsize=9.5, color=style.INK)
    columns = 2 if panel.width > 6 else 1
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)


def _wrap(text: str, panel: _Panel) -> str:
    return textwrap.fill(text, int((panel.width - 0.7) * _CHARACTERS_PER_INCH))


def _title(panel: _Panel) -> tuple[str, str]:
    printed = f"the paper's Table {paper.TABLE_6.number}"
    if not panel.ours:
        return f"{panel.dataset}: {printed}", "no numbers of ours"
    record = next(iter(panel.ours[0].cells.values())).runs[0][1]
    chance = f"{100 / (record.data.classes or 1):.3g}{_NBSP}%"
    facts = f"{record.results.eval_samples:,} evaluation samples, chance {chance}"
    if any(cell.spread is not None for row in panel.ours for cell in row.cells.values()):
        facts += f"; bars: ±{_NBSP}1 standard deviation over seeds"
    whose = "our runs" if len(panel.ours) == len(panel.rows) else f"{printed} and our runs"
    return f"{panel.dataset}: {whose}", facts


def _draw_row(axes: Axes, panel: _Panel, row: Row, shift: float, marker: str, colour: str) -> None:
    ours = row.source == "ours"
    places = [index + shift for index in range(len(panel.sizes))]
    values = [_value(row, size) for size in panel.sizes]
    spreads = [(row.cells[size].spread or 0.0) if size in row.cells else 0.0 for size in panel.sizes]
    axes.errorbar(
        places,
        values,
        yerr=spreads if any(spreads) else None,
        label=_wrap(row.label, panel),
        color=colour,
        linestyle="-" if ours else "--",
        linewidth=1.4 if ours else 1.2,
        marker=marker,
        markersize=7,
        markeredgewidth=1.4,
        markerfacecolor=colour if ours else "white",
        capsize=3,
    )
    for size, x, value, spread in zip(panel.sizes, places, values, spreads, strict=True):
        if not math.isnan(value):
            number = f"{value:.2f}" if ours else f"{value:.1f}"
            _annotate(axes, number, x, value, spread, colour, _side(panel, value, size))


def _side(panel: _Panel, value: float, size: str) -> str:
    """Where a number goes so that those of one size keep clear of each other's markers."""
    if panel.ours:
        return "above"
    others = [other for row in panel.rows if not math.isnan(other := _value(row, size))]
    if value == max(others):
        return "above"
    return "below" if value == min(others) else "right"


def _annotate(axes: Axes, text: str, x: float, value: float, spread: float, colour: str, side: str) -> None:
    offset, ha, va = {
        "above": ((0, 6), "center", "bottom"),
        "below": ((0, -7), "center", "top"),
        "right": ((7, -1), "left", "center"),
    }[side]
    label = axes.annotate(
        text,
        (x, value + spread),
        offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=7.5,
        color=colour,
    )
    # A rim of paper, so that a number stays readable where a line crosses it.
    label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
