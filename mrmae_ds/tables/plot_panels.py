"""Panels of the table plots: one per dataset, with the same labels, colors and markers everywhere.

The paper's numbers are hollow and gray, ours filled and colored. Ours appear in the paper's panel only if they were
measured on its whole dataset.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from mrmae_ds.figures import style
from mrmae_ds.tables import paper
from mrmae_ds.tables.base import Row, Table, chance_accuracy
from mrmae_ds.tables.scaling import METHODS

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAPER_GRAYS = ("#9a9a9a", "#6b6b6b", "#3c3c3c")
OUR_COLORS = style.PALETTE[:6]  # without its gray and black
_CHARACTERS_PER_INCH = 12.5
_NBSP = "\N{NO-BREAK SPACE}"
_SIZE = 7.5  # points, of numbers and names beside markers
_LINE = 1.35 * _SIZE  # points from one line of labels to the next
_MARKER = 5.5  # points from a marker's center to its edge, with the space around it
_CROSSING = 8.0  # points that a label may be farther from its marker if a line less crosses it
_MOST_LINES = 9  # farthest from its marker that a label may be


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        table: number of the paper's table.
        dataset: that its rows were measured on.
        rows: from the top.
        columns: in which any row has a number.
        width: in inches.
    """

    table: int
    dataset: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    width: float

    @property
    def ours(self) -> list[Row]:
        """Rows that we measured."""
        return [row for row in self.rows if row.source == "ours"]


def datasets(table: Table) -> list[str]:
    """Return the datasets of rows with numbers, the paper's first."""
    names = {row.dataset for row in table.rows if row.cells}
    return sorted(names, key=lambda name: (name != paper.IMAGENET, name))


def colors_of(table: Table) -> dict[tuple[str, str], str]:
    """Return a color for each method and source: grays for the paper, colors for ours."""
    first = METHODS if table.number == paper.TABLE_6.number else ()
    methods = dict.fromkeys((*first, *(row.method for row in table.rows)))
    ours = {(name, "ours"): OUR_COLORS[index % len(OUR_COLORS)] for index, name in enumerate(methods)}
    printed = {(name, "paper"): PAPER_GRAYS[index % len(PAPER_GRAYS)] for index, name in enumerate(methods)}
    return ours | printed


def marker_of(row: Row, rows: tuple[Row, ...]) -> str:
    """Return the marker of a row: the paper's differ by method, ours of one method by their order."""
    if row.source == "paper":
        methods = list(dict.fromkeys(other.method for other in rows if other.source == "paper"))
        return MARKERS[methods.index(row.method) % len(MARKERS)]
    alike = [other for other in rows if (other.method, other.source) == (row.method, row.source)]
    return MARKERS[alike.index(row) % len(MARKERS)]


def panel_title(panel: Panel) -> tuple[str, str]:
    """Return the title and the subtitle with evaluation samples and chance accuracy."""
    printed = f"the paper's Table {panel.table}"
    if not panel.ours:
        return f"{panel.dataset}: {printed}", "no numbers of ours"
    record = next(iter(panel.ours[0].measured.values())).runs[0][1]
    subtitle = f"{record.results.eval_samples:,} evaluation samples"
    if record.detection is None:
        subtitle += f", chance {chance_accuracy(record):.3g}{_NBSP}%"
    if any(cell.spread is not None for row in panel.ours for cell in row.cells.values()):
        subtitle += f"; bars: ±{_NBSP}1 standard deviation over seeds"
    source = "our runs" if len(panel.ours) == len(panel.rows) else f"{printed} and our runs"
    return f"{panel.dataset}: {source}", subtitle


def wrap(text: str, inches: float) -> str:
    """Wrap small text to a panel of this width in inches."""
    return textwrap.fill(text, int((inches - 0.7) * _CHARACTERS_PER_INCH))


def short_label(row: Row) -> str:
    """Return a row's label without the dataset and chance accuracy that the panel's title states."""
    text = re.sub(r",? chance [\d.e-]+ %", "", row.label.replace(row.dataset, ""))
    return text.replace("(, ", "(").replace(", )", ")").replace(" ()", "")


def annotate(axes: Axes, text: str, place: tuple[float, float], color: str, side: str) -> None:
    """Write a small number beside a marker, on the `side` "above", "below" or "right"."""
    offset, ha, va = {
        "above": ((0, 6), "center", "bottom"),
        "below": ((0, -7), "center", "top"),
        "right": ((7, -1), "left", "center"),
    }[side]
    label = axes.annotate(text, place, offset, textcoords="offset points", ha=ha, va=va, fontsize=_SIZE, color=color)
    # A white outline keeps a number readable where a line crosses it.
    label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


@dataclass(frozen=True)
class Label:
    """The name of a point.

    Attributes:
        text: of one line.
        place: of the point, in data.
        spread: half the length of its vertical error bar, in data.
        color: of the text.
        side: preferred, -1 for the left and 1 for the right.
    """

    text: str
    place: tuple[float, float]
    spread: float
    color: str
    side: int


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write the names of points where they cover neither each other nor a marker, and join distant ones to their point.

    The limits of the axes and the figure's layout must be final.

    Args:
        axes: with the points.
        labels: of all points; the first are placed first.
    """
    scale = style.DPI / 72  # pixels per point
    points = axes.transData.transform([label.place for label in labels])
    ends = axes.transData.transform([(label.place[0], label.place[1] + label.spread) for label in labels])
    taken = [_box(point, 2 * _MARKER * scale, 2 * _MARKER * scale) for point in points]
    bars = [_box(p, _MARKER * scale, 2 * (end[1] - p[1])) for p, end in zip(points, ends, strict=True)]
    tracks = [axes.transData.transform_path(line.get_path()) for line in axes.lines if line.get_linestyle() != "None"]
    # Offsets in points of a label's anchor: beside the marker, line by line, or above and below it.
    lines = sorted(range(-_MOST_LINES, _MOST_LINES + 1), key=abs)
    offsets = [(side * (_MARKER + 2), line * _LINE) for line, side in product(lines, (-1, 1))]
    offsets += [(0.0, line * _LINE + math.copysign(2, line)) for line in lines if line]
    for label, point in zip(labels, points, strict=True):
        width, height = style.text_width(label.text, _SIZE), _LINE * scale
        found: list[tuple[float, tuple[float, float], Bbox]] = []
        for dx, dy in offsets:
            center = point + scale * np.array([dx, dy]) + [np.sign(dx) * width / 2, 0]
            box = _box(center, width, height)
            covered = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, axes.bbox)
            crossed = sum(_overlap(box, bar) for bar in bars)
            far = math.hypot(dx, dy) + (1 if dx * label.side < 0 else 0)
            crossings = sum(track.intersects_bbox(box, filled=False) for track in tracks)
            cost = far + crossed / (10 * scale) + _CROSSING * crossings + 1000 * covered
            found.append((cost, (dx, dy), box))
        _, offset, box = min(found, key=lambda candidate: candidate[0])
        taken.append(box)
        _write(axes, label, offset)


def _write(axes: Axes, label: Label, offset: tuple[float, float]) -> None:
    dx, dy = offset
    ha = "center" if dx == 0 else "left" if dx > 0 else "right"
    joined = {"arrowstyle": "-", "color": label.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    arrow = joined if abs(dy) > 1.5 * _LINE else None
    text = axes.annotate(
        label.text, label.place, offset, textcoords="offset points", ha=ha, va="center", fontsize=_SIZE,
        color=label.color, arrowprops=arrow,
    )  # fmt: skip
    text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])


def _box(center: np.ndarray, width: float, height: float) -> Bbox:
    x, y = center
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _overlap(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else common.width * common.height
