"""Panels of the table plots: one per dataset, with the same labels, colors and markers everywhere.

The paper's numbers are hollow and gray, ours filled and colored. Ours appear in the paper's panel only if they were
measured on its whole dataset.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from matplotlib import patheffects
from matplotlib.axes import Axes

from mrmae_ds.figures import style
from mrmae_ds.tables import paper
from mrmae_ds.tables.base import Row, Table, chance_accuracy
from mrmae_ds.tables.scaling import METHODS

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAPER_GRAYS = ("#9a9a9a", "#6b6b6b", "#3c3c3c")
OUR_COLORS = style.PALETTE[:6]  # without its gray and black
_CHARACTERS_PER_INCH = 12.5
_NBSP = "\N{NO-BREAK SPACE}"


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
    """Write a small number beside a marker, on the `side` "above", "below", "right" or "left"."""
    offset, ha, va = {
        "above": ((0, 6), "center", "bottom"),
        "below": ((0, -7), "center", "top"),
        "right": ((7, -1), "left", "center"),
        "left": ((-7, -1), "right", "center"),
    }[side]
    label = axes.annotate(text, place, offset, textcoords="offset points", ha=ha, va=va, fontsize=7.5, color=color)
    # A white outline keeps a number readable where a line crosses it.
    label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
