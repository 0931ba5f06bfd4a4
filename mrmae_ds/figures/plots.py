"""Plots of a run: loss curves, grids of reconstructions and of attention maps.

Shapes: N images, 3 colors, H x W pixels, h x w grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes

from mrmae_ds.errors import UserError
from mrmae_ds.figures import style
from mrmae_ds.figures.image_grid import GridRow, draw_grid
from mrmae_ds.records.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    import torch

    Images: TypeAlias = np.ndarray | torch.Tensor

_SMOOTH_FROM = 200  # points
HIDDEN = 0.82  # gray of an invisible patch


def denormalize(images: Images, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo `(x - mean) / std` of images [N, 3, H, W] and clip them to [0, 1], in float32."""
    shape = (1, 3, 1, 1)
    colors = _array(images) * np.asarray(std, np.float32).reshape(shape) + np.asarray(mean, np.float32).reshape(shape)
    return np.clip(colors, 0, 1)


def reconstruction_rows(
    original: Images,
    masked: Images,
    reconstructed: Images | Mapping[str, Images],
    *,
    keep_ratio: float = 0.25,
    mask_of: Sequence[str] = (),
) -> list[GridRow]:
    """Return the rows of :func:`reconstruction_grid`, from the top."""
    count, _, height, width = _images(original, "original").shape
    results = reconstructed if isinstance(reconstructed, Mapping) else {"Reconstructed": reconstructed}
    grid = []
    visible = "\n".join([f"Visible ({100 * keep_ratio:.0f} %)", *mask_of])
    for label, images in {"Original": original, visible: masked, **results}.items():
        array = _images(images, label)
        if array.shape != (count, 3, height, width):
            raise ValueError(f"{label}: shape {array.shape} differs from the originals' {(count, 3, height, width)}")
        grid.append(GridRow(label, array))
    return grid


def reconstruction_grid(
    original: Images,
    masked: Images,
    reconstructed: Images | Mapping[str, Images],
    out_png: str | Path,
    *,
    keep_ratio: float = 0.25,
    mask_of: Sequence[str] = (),
    captions: Sequence[str] | None = None,
    title: str | None = None,
    legend: Sequence[str] = (),
) -> None:
    """Draw rows of images: the original, its visible share, and each reconstruction.

    Args:
        original: [N, 3, H, W] in [0, 1]; values outside are clipped, here and below.
        masked: visible share, of the same shape.
        reconstructed: reconstructions of the same shape, one or several by label.
        out_png: the PNG file.
        keep_ratio: visible share of the patches, for the label.
        mask_of: lines that name the run whose mask it is, for the label, where there are several.
        captions: texts above the N columns.
        title: text at the top.
        legend: paragraphs at the bottom.

    Raises:
        ValueError: if shapes differ.
    """
    rows = reconstruction_rows(original, masked, reconstructed, keep_ratio=keep_ratio, mask_of=mask_of)
    draw_grid(rows, Path(out_png), captions=captions, title=title, legend=legend)


def attention_rows(
    images: Images, maps: Mapping[str, Images], visible: Images | None, mask_of: Sequence[str] = ()
) -> list[GridRow]:
    """Return the rows of :func:`attention_grid`, from the top."""
    array = _images(images, "images")
    grid = [GridRow("Image", array)]
    gray = np.repeat(array.mean(axis=1, keepdims=True), 3, axis=1)
    for label, heat in maps.items():
        grid.append(GridRow(label, gray, heat=scale_maps(_maps(heat, len(array), label))))
    if visible is not None:
        kept = _maps(visible, len(array), "visible") > 0.5
        share = 100 * kept.mean()
        for label, shown in {f"Kept ({share:.0f} %)": kept, f"Removed ({100 - share:.0f} %)": ~kept}.items():
            grid.append(GridRow("\n".join([label, *mask_of]), _hide(array, shown)))
    return grid


def attention_grid(
    images: Images,
    maps: Mapping[str, Images],
    visible: Images | None,
    out_png: str | Path,
    *,
    mask_of: Sequence[str] = (),
    captions: Sequence[str] | None = None,
    title: str | None = None,
    legend: Sequence[str] = (),
) -> None:
    """Draw attention as in Fig. 3 of the paper: a row of images, a row a model, rows of kept and removed patches.

    Args:
        images: [N, 3, H, W] in [0, 1].
        maps: [N, h, w] of any grid, by label; each map is drawn over the gray image, scaled from its minimum to its
            maximum.
        visible: [N, h, w], 1 (or True) for kept patches; None omits the last two rows.
        out_png: the PNG file.
        mask_of: lines that name the run whose patches are kept, for the labels, where there are several.
        captions: texts above the N columns.
        title: text at the top.
        legend: paragraphs at the bottom.

    Raises:
        ValueError: if shapes do not fit.
    """
    rows = attention_rows(images, maps, visible, mask_of)
    draw_grid(rows, Path(out_png), captions=captions, title=title, legend=legend)


def loss_curves(run_dir: str | Path, out_png: str | Path) -> None:
    """Plot a run's losses over optimizer steps, with its learning rate and, if measured, top-1 accuracy or AP below.

    Above 200 points, a curve is drawn faint with its running mean on top. Red lines mark steps with a non-finite loss.

    Args:
        run_dir: folder with `metrics.jsonl`.
        out_png: the PNG file.

    Raises:
        UserError: if the run logged no loss.
    """
    lines = read_metrics(run_dir)
    names = dict.fromkeys(name for line in lines for name in line)
    losses = [name for name in names if name in ("loss",) or name.startswith("loss/") or name.endswith("/loss")]
    if not losses:
        raise UserError(f"{Path(run_dir) / METRICS_FILE}: no loss was logged, so there is nothing to plot")
    panels = [("Loss", losses, 3.0)]
    if "lr" in names:
        panels.append(("Learning rate", ["lr"], 1.0))
    if accuracies := [name for name in names if name.rpartition("/")[2] == "top1"]:
        panels.append(("Top-1 accuracy (%)", accuracies, 1.4))
    if precisions := [name for name in names if name.rpartition("/")[2] == "AP"]:
        panels.append(("AP (%)", precisions, 1.4))
    heights = [height for _, _, height in panels]
    figure = style.new_figure(8, 0.8 + sum(heights))
    figure.suptitle("/".join(Path(run_dir).resolve().parts[-2:]), fontsize=12, fontweight="bold", color=style.INK)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (label, series, _) in zip(axes, panels, strict=True):
        _draw_series(panel, lines, series)
        panel.set_ylabel(label, fontsize=10)
    nonfinite = [line["step"] for line in lines if any(name in line.get("nonfinite", {}) for name in losses)]
    for index, step in enumerate(nonfinite):
        once = {"label": "not finite"} if index == 0 else {}
        axes[0].axvline(step, color=style.ALARM, linewidth=0.8, alpha=0.6, **once)
    for panel, (_, series, _) in zip(axes, panels, strict=True):
        style.tidy(panel)
        panel.margins(x=0.01)
        if series != ["lr"]:
            panel.legend(fontsize=8, frameon=False)
    figure.align_ylabels()
    axes[-1].set_xlabel("Optimizer step", fontsize=10)
    style.save(figure, Path(out_png))


def compare_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, out_png: str | Path) -> None:
    """Plot one logged scalar of several runs over optimizer steps, on a figure that is readable on a phone.

    Args:
        runs: lines of their ``metrics.jsonl`` (see :func:`~mrmae_ds.records.metrics.read_metrics`), by label. Each has
            its color by its place, also if it did not log the scalar, so that colors agree between figures.
        name: of the scalar.
        out_png: the PNG file.
    """
    figure = style.new_figure(5, 3.4)
    axes = figure.subplots()
    for index, (label, lines) in enumerate(runs.items()):
        if any(line.get(name) is not None for line in lines):
            # matplotlib leaves labels that start with an underscore out of legends.
            shown = f" {label}" if label.startswith("_") else label
            _draw_curve(axes, lines, name, style.PALETTE[index % len(style.PALETTE)], shown)
    style.tidy(axes)
    axes.margins(x=0.01)
    axes.set_xlabel("Optimizer step", fontsize=10)
    axes.set_ylabel("learning rate" if name == "lr" else name, fontsize=10)
    if axes.lines:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", fontsize=8, frameon=False)
    style.save(figure, Path(out_png))


def _draw_series(axes: Axes, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        color = style.INK if name == "loss" else style.PALETTE[index % len(style.PALETTE)]
        _draw_curve(axes, lines, name, color, name)


def _draw_curve(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, color: str, label: str) -> None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = np.array([p[0] for p in points]), np.array([p[1] for p in points], np.float64)
    # A few points (one accuracy per epoch) get markers; many make a line.
    marker = "o" if len(points) <= 30 else ""
    smooth = len(points) > _SMOOTH_FROM and name != "lr"
    axes.plot(
        steps,
        values,
        color=color,
        alpha=0.25 if smooth else 1,
        linewidth=1.3,
        marker=marker,
        markersize=4,
        label=None if smooth else label,
    )
    if smooth:
        width = math.ceil(len(points) / 50)
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color=color, linewidth=1.6, label=label)


def _array(values: Images) -> np.ndarray:
    """Convert a NumPy array, or a tensor on any device and of any precision, to float32."""
    if not isinstance(values, np.ndarray):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)


def _images(values: Images, name: str) -> np.ndarray:
    array = _array(values)
    if array.ndim != 4 or array.shape[1] != 3 or array.shape[0] == 0:
        raise ValueError(f"{name}: expected [N, 3, H, W] with N > 0, got {array.shape}")
    return np.clip(np.nan_to_num(array), 0, 1)


def _maps(values: Images, count: int, name: str) -> np.ndarray:
    array = _array(values)
    if array.ndim != 3 or array.shape[0] != count:
        raise ValueError(f"{name}: expected [{count}, h, w], got {array.shape}")
    return array


def scale_maps(maps: np.ndarray) -> np.ndarray:
    """Stretch each map [N, h, w] to [0, 1]; a constant one becomes 0."""
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return (maps - low) / np.where(high > low, high - low, 1)


def _hide(images: np.ndarray, kept: np.ndarray) -> np.ndarray:
    height, width = images.shape[-2:]
    rows = np.arange(height) * kept.shape[1] // height
    columns = np.arange(width) * kept.shape[2] // width
    return np.where(kept[:, None][:, :, rows][:, :, :, columns], images, np.float32(HIDDEN))
