"""Style shared by all figures, and atomic writing of PNGs. Without pyplot, so that figures share no state."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

from mrmae_ds.files import replacing

DPI = 150
INK = "#222222"
MUTED = "#6b6b6b"
GRID = "#e3e3e3"
BAND = "#f7f7f7"
ALARM = "#c1121f"
# Okabe and Ito's palette, which stays distinct for color-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#000000")


def new_figure(width_in: float, height_in: float, *, constrained: bool = True) -> Figure:
    """Return a white figure of this size in inches at `DPI`."""
    size = (width_in, height_in)
    return Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained" if constrained else None)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width in pixels at `DPI` of one line of text of this size in points."""
    font = FontProperties(size=size, weight=weight)
    return _renderer().get_text_width_height_descent(text, font, False)[0]


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def tidy(axes: Axes) -> None:
    """Give a panel a light horizontal grid and remove its box."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG to `path` atomically. Names of users that hold dollar signs are no formulas."""
    for text in figure.findobj(Text):
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():  # the latter of a logarithmic axis
            text.set_parse_math(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
