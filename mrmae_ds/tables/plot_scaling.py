"""A table as an image, one panel a data set: the scaling table over model size, the others a line a row.

The paper's numbers are hollow and gray, ours filled and colored. Ours stand in the paper's panel only where they were
measured on the whole of its data set.
"""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from matplotlib import patheffects
from matplotlib.axes import Axes

from mrmae_ds.figures import style
from mrmae_ds.tables import paper
from mrmae_ds.tables.scaling import METHODS
from mrmae_ds.tables.select_runs import chance
from mrmae_ds.tables.write import Row, Table

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAPER_GRAYS = ("#9a9a9a", "#6b6b6b", "#3c3c3c")
OUR_COLORS = style.PALETTE[:6]  # those after them are gray and black
_INCHES_PER_NUMBER = 0.46  # the room that a printed "88.35" needs beside its neighbors
_CHARACTERS_PER_INCH = 12.5
_WIDEST = 16.0  # inches; wider, a page would shrink the text too much, and panels stand below each other
_NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Panel:
    """One data set: its rows, the columns at which any of them has a number, and its width in inches."""

    table: int
    dataset: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    width: float

    @property
    def ours(self) -> list[Row]:
        """The rows that we measured."""
        return [row for row in self.rows if row.source == "ours"]


def plot(table: Table, path: Path) -> None:
    """Draw `table` to a PNG."""
    if table.number != paper.TABLE_6.number:
        from mrmae_ds.tables.plot_ablations import plot_rows

        plot_rows(table, path)
        return
    panels = [_panel(table, dataset) for dataset in datasets(table)]
    colors = colors_of(table)
    widths = [panel.width for panel in panels]
    height = 4.4 + 0.17 * max(len(panel.rows) for panel in panels)
    stacked = len(panels) > 1 and sum(widths) > _WIDEST
    figure = style.new_figure(max(widths), height * len(panels)) if stacked else style.new_figure(sum(widths), height)
    title = "Model scaling: accuracy after fine-tuning"
    figure.suptitle(title, fontsize=13, fontweight="bold", color=style.INK)
    if stacked:
        all_axes = figure.subplots(len(panels), 1, squeeze=False)
    else:
        all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)
    for axes, panel in zip(all_axes.flat, panels, strict=True):
        _draw_panel(axes, panel, colors)
    style.save(figure, path)


def datasets(table: Table) -> list[str]:
    """The data sets of rows with numbers, the paper's first."""
    names = {row.dataset for row in table.rows if row.cells}
    return sorted(names, key=lambda name: (name != paper.IMAGENET, name))


def colors_of(table: Table) -> dict[tuple[str, str], str]:
    """A color for each method and source: grays for the paper, colors for ours."""
    first = METHODS if table.number == paper.TABLE_6.number else ()
    methods = dict.fromkeys((*first, *(row.method for row in table.rows)))
    ours = {(name, "ours"): OUR_COLORS[index % len(OUR_COLORS)] for index, name in enumerate(methods)}
    printed = {(name, "paper"): PAPER_GRAYS[index % len(PAPER_GRAYS)] for index, name in enumerate(methods)}
    return ours | printed


def marker_of(row: Row, rows: tuple[Row, ...]) -> str:
    """Rows of the paper are told apart by method, ours of one method by their place among each other."""
    if row.source == "paper":
        methods = list(dict.fromkeys(other.method for other in rows if other.source == "paper"))
        return MARKERS[methods.index(row.method) % len(MARKERS)]
    alike = [other for other in rows if (other.method, other.source) == (row.method, row.source)]
    return MARKERS[alike.index(row) % len(MARKERS)]


def value(row: Row, column: str) -> float:
    """Return the number of a cell, NaN for a blank or a dash."""
    cell = row.cells.get(column)
    return math.nan if cell is None or cell.value is None else cell.value


def panel_title(panel: Panel) -> tuple[str, str]:
    """What a panel shows, and on what it was measured."""
    printed = f"the paper's Table {panel.table}"
    if not panel.ours:
        return f"{panel.dataset}: {printed}", "no numbers of ours"
    record = next(iter(panel.ours[0].measured.values())).runs[0][1]
    facts = f"{record.results.eval_samples:,} evaluation samples, chance {chance(record):.3g}{_NBSP}%"
    if any(cell.spread is not None for row in panel.ours for cell in row.cells.values()):
        facts += f"; bars: ±{_NBSP}1 standard deviation over seeds"
    whose = "our runs" if len(panel.ours) == len(panel.rows) else f"{printed} and our runs"
    return f"{panel.dataset}: {whose}", facts


def wrap(text: str, inches: float) -> str:
    """Break a line of small text where it would leave a panel of this width."""
    return textwrap.fill(text, int((inches - 0.7) * _CHARACTERS_PER_INCH))


def short_label(row: Row) -> str:
    """A row's label without what the title of its panel says: the data set and its level of chance."""
    text = re.sub(r",? chance [\d.e-]+ %", "", row.label.replace(row.dataset, ""))
    return text.replace("(, ", "(").replace(", )", ")").replace(" ()", "")


def _panel(table: Table, dataset: str) -> Panel:
    rows = tuple(row for row in table.rows if row.cells and row.dataset == dataset)
    sizes = tuple(size for size in table.columns if any(not math.isnan(value(row, size)) for row in rows))
    abreast = len(rows) if any(row.source == "ours" for row in rows) else 1
    width = 0.9 + len(sizes) * max(0.95, _INCHES_PER_NUMBER * abreast)
    return Panel(table.number, dataset, rows, sizes, max(4.0, width))


def _draw_panel(axes: Axes, panel: Panel, colors: dict[tuple[str, str], str]) -> None:
    # With ours in the panel the rows of a size stand side by side; the paper's alone share one vertical line.
    step = 0.8 / len(panel.rows) if panel.ours else 0.0
    for index, row in enumerate(panel.rows):
        shift = (index - (len(panel.rows) - 1) / 2) * step
        _draw_row(axes, panel, row, shift, colors[row.method, row.source])
    style.tidy(axes)
    axes.set_xticks(range(len(panel.columns)), list(panel.columns))
    axes.set_xlim(-0.5, len(panel.columns) - 0.5)
    for index in range(1, len(panel.columns), 2):
        axes.axvspan(index - 0.5, index + 0.5, color=style.BAND, linewidth=0, zorder=0)
    axes.margins(y=0.14)
    axes.set_xlabel("Model size", fontsize=10)
    axes.set_ylabel("Top-1 accuracy (%)", fontsize=10)
    title = "\n".join(wrap(line, panel.width) for line in panel_title(panel))
    axes.set_title(title, fontsize=9.5, color=style.INK)
    columns = 2 if panel.width > 6 else 1
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)


def _draw_row(axes: Axes, panel: Panel, row: Row, shift: float, color: str) -> None:
    ours = row.source == "ours"
    places = [index + shift for index in range(len(panel.columns))]
    values = [value(row, size) for size in panel.columns]
    spreads = [(row.cells[size].spread or 0.0) if size in row.cells else 0.0 for size in panel.columns]
    axes.errorbar(
        places,
        values,
        yerr=spreads if any(spreads) else None,
        label=wrap(short_label(row), panel.width),
        color=color,
        linestyle="-" if ours else "--",
        linewidth=1.4 if ours else 1.2,
        marker=marker_of(row, panel.rows),
        markersize=7,
        markeredgewidth=1.4,
        markerfacecolor=color if ours else "white",
        capsize=3,
    )
    for size, x, number, spread in zip(panel.columns, places, values, spreads, strict=True):
        if not math.isnan(number):
            text = f"{number:.2f}" if ours else f"{number:.1f}"
            annotate(axes, text, (x, number + spread), color, _side(panel, number, size))


def _side(panel: Panel, number: float, size: str) -> str:
    """Where a number goes so that those of one size keep clear of each other's markers."""
    if panel.ours:
        return "above"
    others = [other for row in panel.rows if not math.isnan(other := value(row, size))]
    if number == max(others):
        return "above"
    return "below" if number == min(others) else "right"


def annotate(axes: Axes, text: str, place: tuple[float, float], color: str, side: str) -> None:
    """Write a small number beside a marker: `above`, `below`, `right` or `left` of it."""
    offset, ha, va = {
        "above": ((0, 6), "center", "bottom"),
        "below": ((0, -7), "center", "top"),
        "right": ((7, -1), "left", "center"),
        "left": ((-7, -1), "right", "center"),
    }[side]
    label = axes.annotate(text, place, offset, textcoords="offset points", ha=ha, va=va, fontsize=7.5, color=color)
    # A rim of paper, so that a number stays readable where a line crosses it.
    label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
