"""Plot the scaling table: accuracy over model size, one panel per dataset."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes

from mrmae_ds.figures import style
from mrmae_ds.tables.base import Row, Table
from mrmae_ds.tables.plot_panels import (
    Panel,
    annotate,
    colors_of,
    datasets,
    marker_of,
    panel_title,
    short_label,
    wrap,
)

_INCHES_PER_NUMBER = 0.46  # width of a printed "88.35" beside its neighbors
_WIDEST = 16.0  # inches; panels that would be wider together are stacked, so that a page need not shrink the text


def plot_scaling(table: Table, path: Path) -> None:
    """Draw `table` to a PNG."""
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


def _panel(table: Table, dataset: str) -> Panel:
    rows = tuple(row for row in table.rows if row.cells and row.dataset == dataset)
    sizes = tuple(size for size in table.columns if any(not math.isnan(row.value(size)) for row in rows))
    abreast = len(rows) if any(row.source == "ours" for row in rows) else 1
    width = 0.9 + len(sizes) * max(0.95, _INCHES_PER_NUMBER * abreast)
    return Panel(table.number, dataset, rows, sizes, max(4.0, width))


def _draw_panel(axes: Axes, panel: Panel, colors: dict[tuple[str, str], str]) -> None:
    # With ours in the panel, the rows of a size are drawn side by side; the paper's alone share one vertical line.
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
    positions = [index + shift for index in range(len(panel.columns))]
    values = [row.value(size) for size in panel.columns]
    spreads = [(row.cells[size].spread or 0.0) if size in row.cells else 0.0 for size in panel.columns]
    axes.errorbar(
        positions,
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
    for size, x, number, spread in zip(panel.columns, positions, values, spreads, strict=True):
        if not math.isnan(number):
            text = f"{number:.2f}" if ours else f"{number:.1f}"
            annotate(axes, text, (x, number + spread), color, _side(panel, number, size))


def _side(panel: Panel, number: float, size: str) -> str:
    """Return the side of a label that avoids the other markers of its size."""
    if panel.ours:
        return "above"
    others = [other for row in panel.rows if not math.isnan(other := row.value(size))]
    if number == max(others):
        return "above"
    return "below" if number == min(others) else "right"
