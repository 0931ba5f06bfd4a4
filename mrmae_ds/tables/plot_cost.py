"""Plot accuracy over parameters of the fine-tuned model and over GPU-hours of pre-training, one row per dataset.

The paper prints parameters only in Tables 1 and 4, and GPU-hours nowhere. Its numbers of the other tables are therefore
drawn at the parameters of the architectures as built here, and none are drawn over GPU-hours. A panel without points is
left out, and the other one of its row is as wide as both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mrmae_ds.figures import style
from mrmae_ds.tables import paper
from mrmae_ds.tables.ablations import ACCURACY, OWN_METHODS, PARAMETERS
from mrmae_ds.tables.base import Cell, Row, Table, format_number
from mrmae_ds.tables.costs import cell_costs
from mrmae_ds.tables.plot_panels import (
    Label,
    Panel,
    colors_of,
    datasets,
    marker_of,
    panel_title,
    place_labels,
    short_label,
    wrap,
)
from mrmae_ds.tables.scaling import split_size

# Millions of parameters of the fine-tuned models with 1000 classes, as built here, by column of Table 6.
VIT = {"Small": 22.05, "Base": 86.57, "Large": 304.33, "Huge": 632.05, "Huge-392": 632.72, "Huge-448": 633.03}
CVIT = {"Small": 22.33, "Base": 85.37, "Large": 311.17, "Huge": 652.30, "Huge-392": 652.98, "Huge-448": 653.29}
_WIDTH, _HEIGHT = 5.4, 3.9
_WIDE = 3.0  # ratio of the largest to the smallest value above which a scale is logarithmic
_SHORT = 36  # characters below which two legend entries fit side by side


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    spread: float
    name: str


_XOf = Callable[[int, Row, str, Cell], float | None]


def plot_cost(table: Table, path: Path) -> None:
    """Draw `table`'s accuracies over parameters and over GPU-hours of pre-training to a PNG."""
    names = [name for name in datasets(table) if any(row.dataset == name for row in _rows(table))]
    lines = len(_rows(table))
    figure = style.new_figure(2 * _WIDTH, 0.6 + _HEIGHT * len(names) + 0.1 * lines)
    title = "Accuracy after fine-tuning, by parameters and by the cost of pre-training"
    figure.suptitle(title, fontsize=13, fontweight="bold", color=style.INK)
    grid = figure.add_gridspec(len(names), 2)
    colors = colors_of(table)
    drawn: list[tuple[Axes, list[Label]]] = []
    for line, name in enumerate(names):
        rows = tuple(row for row in _rows(table) if row.dataset == name)
        panel = Panel(table.number, name, rows, _accuracies(table), _WIDTH)
        hours = any(_points(panel, row, _hours) for row in rows)
        left = figure.add_subplot(grid[line, 0] if hours else grid[line, :])
        drawn.append((left, _draw(left, panel, _parameters, colors)))
        left.set_xlabel("Parameters of the fine-tuned model (M)", fontsize=9)
        columns = 2 if len(rows) > 3 and max(len(short_label(row)) for row in rows) < _SHORT else 1
        left.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)
        _set_title(left, "\n".join(panel_title(panel)))
        if hours:
            right = figure.add_subplot(grid[line, 1])
            drawn.append((right, _draw(right, panel, _hours, colors)))
            devices = dict.fromkeys(cell_costs(cell).device for row in panel.ours for cell in row.measured.values())
            where = ", ".join(devices)
            right.set_xlabel(wrap(f"GPU-hours of pre-training ({where})", _WIDTH), fontsize=9)
            _set_title(right, panel.dataset)
            right.set_ylim(left.get_ylim())
    figure.draw_without_rendering()  # lays the panels out, on which depends where labels are free of each other
    figure.set_layout_engine("none")
    for axes, labels in drawn:
        place_labels(axes, labels)
    style.save(figure, path)


def _set_title(axes: Axes, text: str) -> None:
    axes.set_title("\n".join(wrap(line, _WIDTH) for line in text.split("\n")), fontsize=9.5, color=style.INK)


def _rows(table: Table) -> list[Row]:
    """Return the rows with accuracies; of the paper's Table 1, those of methods that can be run here."""
    foreign = {row.method for row in table.rows} - {*OWN_METHODS} if table.number == paper.TABLE_1.number else set()
    columns = set(_accuracies(table))
    return [row for row in table.rows if row.cells.keys() & columns and row.method not in foreign]


def _accuracies(table: Table) -> tuple[str, ...]:
    return table.columns if table.number == paper.TABLE_6.number else (ACCURACY,)


def _draw(axes: Axes, panel: Panel, x_of: _XOf, colors: dict[tuple[str, str], str]) -> list[Label]:
    """Draw a panel's rows, and return the labels of their points."""
    labels: list[Label] = []
    for row in panel.rows:
        points = _points(panel, row, x_of)
        if not points:
            continue
        ours, color = row.source == "ours", colors[row.method, row.source]
        spreads = [point.spread for point in points]
        axes.errorbar(
            [point.x for point in points],
            [point.y for point in points],
            yerr=spreads if any(spreads) else None,
            label=wrap(short_label(row), _WIDTH),
            color=color,
            linestyle="-" if ours else "--",
            linewidth=1.3,
            marker=marker_of(row, panel.rows),
            markersize=6.5,
            markeredgewidth=1.4,
            markerfacecolor=color if ours else "white",
            capsize=3,
        )
        # Plain ViTs are the smallest of a size, so that the space to their left is free.
        side = -1 if row.method == "MAE" else 1
        labels += [Label(point.name, (point.x, point.y), point.spread, color, side) for point in points]
    _set_scales(axes)
    return labels


def _set_scales(axes: Axes) -> None:
    style.tidy(axes)
    low, high = axes.dataLim.intervalx
    if math.isfinite(high) and high > _WIDE * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_number(x)))
    axes.set_ylabel("Top-1 accuracy (%)", fontsize=9)
    axes.margins(x=0.2, y=0.16)


def _points(panel: Panel, row: Row, x_of: _XOf) -> list[_Point]:
    """Return a row's points from left to right, without those whose x is unknown or 0."""
    points = []
    for column in panel.columns:
        if math.isnan(row.value(column)):
            continue
        cell = row.cells[column]
        if x := x_of(panel.table, row, column, cell):
            name = row.method if column == ACCURACY else split_size(column)[1]
            points.append(_Point(x, row.value(column), cell.spread or 0.0, name))
    return sorted(points, key=lambda point: point.x)


def _hours(table: int, row: Row, column: str, cell: Cell) -> float | None:
    return cell_costs(cell).pretrain_gpu_hours if cell.runs else None


def _parameters(table: int, row: Row, column: str, cell: Cell) -> float | None:
    if cell.runs:
        return cell_costs(cell).parameters_m
    if PARAMETERS in row.cells:
        return row.cells[PARAMETERS].value
    if table == paper.TABLE_6.number:
        return (VIT if row.method == "MAE" else CVIT)[column]
    convolutional = table == paper.TABLE_5.number or row.labels.get("Masked Conv.") == "yes"
    return (CVIT if convolutional else VIT)["Base"]
