"""Draw the README's figure: images of a finished MR-MAE run, and the paper's Table 6 in miniature.

python scripts/overview_figure.py runs/tiny/pretrain --out docs/assets/overview.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import SubFigure
from torch import Tensor
from torch.nn import functional as F

from mrmae_ds import MRMAE
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.figures import style
from mrmae_ds.figures.plots import scale_maps
from mrmae_ds.figures.select_images import select_images

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = REPOSITORY / "docs" / "results" / "table6.csv"
NUM_IMAGES = 5


def draw_images(panel: SubFigure, run: Path) -> None:
    """Draw a column per image: input, visible patches, reconstruction, attention of teacher and student."""
    model = MRMAE.from_run(run).eval()
    recipe = load_recipe(run / "recipe.yaml")
    selected = select_images(Path(recipe.data.val), (), NUM_IMAGES, NUM_IMAGES)
    images = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in selected.images])
    rebuilt = model.reconstruct(images, generator=torch.Generator().manual_seed(0))
    attention = model.attention(images)
    teacher = next(iter(attention.teachers.values()))
    rows = {
        "input": images.float() / 255,
        "25 % visible": rebuilt.masked,
        "reconstruction": rebuilt.reconstruction,
        "teacher's attention": _heat(teacher, images.shape[-1]),
        "student's attention": _heat(attention.student, images.shape[-1]),
    }
    grid = panel.subplots(len(rows), NUM_IMAGES, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    panel.subplots_adjust(left=0.31, right=0.99, top=0.93, bottom=0.04)
    panel.suptitle("Fashion-MNIST, after make demo", fontsize=11, color=style.INK)
    for axes_row, (label, values) in zip(grid, rows.items(), strict=True):
        for axes, value in zip(axes_row, values, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            axes.imshow(value.permute(1, 2, 0) if value.ndim == 3 else value, cmap="magma")
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, color=style.INK)


def _heat(maps: Tensor, size: int) -> Tensor:
    """Scale maps [B, h, w] to [0, 1] each and enlarge them to [B, size, size]."""
    scaled = torch.from_numpy(scale_maps(maps.numpy()))
    return F.interpolate(scaled[:, None], size=(size, size), mode="bilinear")[:, 0]


def draw_table(panel: SubFigure) -> None:
    """Plot our cells of the miniature Table 6: accuracy by size, mean and standard deviation over seeds."""
    axes = panel.subplots()
    panel.subplots_adjust(left=0.14, right=0.97, top=0.88, bottom=0.13)
    with TABLE.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "ours" and row["value"]]
    sizes = ["Tiny-Small", "Tiny-Base", "Tiny-Large", "Tiny-Huge"]
    for number, method in enumerate(("MAE", "MCMAE", "MR-MAE")):
        cells = {row["column"]: row for row in rows if row["method"] == method and float(row["pretrain_epochs"] or 0)}
        axes.errorbar(
            sizes,
            [float(cells[size]["value"]) for size in sizes],
            yerr=[float(cells[size]["std_over_seeds"]) for size in sizes],
            label=method,
            color=style.PALETTE[number],
            marker="o",
            capsize=3,
        )
    axes.set_ylabel("top-1 accuracy after fine-tuning (%)", fontsize=10, color=style.INK)
    axes.legend(frameon=False, fontsize=10)
    style.tidy(axes)
    panel.suptitle("Table 6 in miniature, Tiny-ImageNet-60, chance 1.67 %", fontsize=11, color=style.INK)


def main() -> None:
    """Parse the command line and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished pre-training stage with a teacher")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "assets" / "overview.png")
    args = parser.parse_args()
    figure = style.new_figure(11.5, 4.8, constrained=False)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    draw_images(left, args.run)
    draw_table(right)
    style.save(figure, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
