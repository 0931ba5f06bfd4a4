"""Plot the paper's Tables 1 to 5: one line per row, accuracy or box AP to the right, one panel per dataset."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes

from mrmae_ds.figures import style
from mrmae_ds.tables.ablations import ACCURACY
from mrmae_ds.tables.base import Row, Table
from mrmae_ds.tables.plot_panels import (
    OUR_COLORS,
    PAPER_GRAYS,
    Panel,
    annotate,
    datasets,
    panel_title,
    short_label,
    wrap,
)

BOX = "AP box"
_TITLES = {ACCURACY: "Top-1 accuracy (%)", BOX: "AP of boxes (%)"}
_INCHES_PER_ROW = 0.3
_WIDTH = 5.6
_LABEL_CHARACTERS = 58


def plot_ablations(table: Table, path: Path) -> None:
    """Draw the accuracies of `table` to a PNG, and box APs of the data sets of detectors."""
    panels = []
    for dataset in datasets(table):
        rows = [row for row in table.rows if row.dataset == dataset]
        column = ACCURACY if any(ACCURACY in row.cells for row in rows) else BOX
        filled = tuple(row for row in rows if not math.isnan(row.value(column)))
        panels.append(Panel(table.number, dataset, filled, (column,), _WIDTH))
    heights = [0.9 + _INCHES_PER_ROW * len(panel.rows) for panel in panels]
    figure = style.new_figure(_WIDTH + 4.2, 0.6 + sum(heights))
    figure.suptitle(wrap(table.title, _WIDTH + 3), fontsize=12, fontweight="bold", color=style.INK)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    style.save(figure, path)


def _draw(axes: Axes, panel: Panel) -> None:
    (column,) = panel.columns
    numbers = [row.value(column) for row in panel.rows]
    for position, (row, number) in enumerate(zip(panel.rows, numbers, strict=True)):
        ours = row.source == "ours"
        color = OUR_COLORS[0] if ours else PAPER_GRAYS[1]
        spread = row.cells[column].spread or 0.0
        axes.errorbar(
            [number],
            [position],
            xerr=[spread] if spread else None,
            color=color,
            marker="o" if ours else "s",
            markersize=7,
            markeredgewidth=1.4,
            markerfacecolor=color if ours else "white",
            linestyle="none",
            capsize=3,
        )
        annotate(axes, f"{number:.2f}" if ours else f"{number:.1f}", (number + spread, position), color, "right")
    axes.set_yticks(range(len(panel.rows)), [_label(row) for row in panel.rows])
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    margin = max(0.15 * (max(numbers) - min(numbers)), 0.5)
    axes.set_xlim(min(numbers) - margin, max(numbers) + 1.5 * margin)
    style.tidy(axes)
    axes.grid(axis="x", color=style.GRID, linewidth=0.8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(_TITLES[column], fontsize=9)
    axes.set_title("\n".join(wrap(line, _WIDTH + 1) for line in panel_title(panel)), fontsize=9.5, color=style.INK)


def _label(row: Row) -> str:
    """Return a row's label without the dataset that the panel names; for Table 3, with its parts."""
    parts = [f"{k}: {v}" if v not in ("yes", "") else k for k, v in row.labels.items() if v]
    text = short_label(row)
    shown = f"{text}  [{'; '.join(parts)}]" if parts and row.source == "paper" else text
    return shown if len(shown) <= _LABEL_CHARACTERS else _two_lines(shown)


def _two_lines(text: str) -> str:
    """Break a long label at the space nearest to its middle."""
    spaces = [index for index, character in enumerate(text) if character == " "]
    middle = min(spaces, key=lambda index: abs(index - len(text) / 2))
    return f"{text[:middle].rstrip()}\n{text[middle:].lstrip()}"
