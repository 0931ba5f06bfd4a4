"""Measure how well a teacher's importance maps locate foreground objects, by COCO's instance masks.

    python benchmarks/teacher_foreground.py --coco FOLDER [--split val2017] [--annotations FILE.json] RECIPE.yaml ...

FOLDER contains ``annotations/instances_SPLIT.json`` and the images in ``SPLIT/`` or ``images/SPLIT/``. Each image is
cropped as for the recipe's student (short side resized to its input size, center). The result is the area under the ROC
curve of importance as a classifier of foreground pixels (covered by any annotation): the probability that a foreground
pixel is in a patch of more importance than a background pixel, ties counting half. 0.5 is chance. ``center`` is the AUC
of closeness to the image's center, a strong baseline because photographers center their subjects. Images without
foreground or background are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.figures.teachers import build_teachers
from mrmae_ds.records.environment import collect_versions, cpu_name
from mrmae_ds.teachers import Teacher

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Annotated:
    """An image file, its height and width, and the segmentations of its objects, in COCO's formats."""

    path: Path
    size: tuple[int, int]
    segmentations: tuple[Any, ...]


def read_coco(folder: Path, split: str, annotations: Path | None, count: int | None) -> list[Annotated]:
    """Return the first ``count`` annotated images of a split, by file name.

    Args:
        folder: COCO's folder.
        split: such as ``val2017``.
        annotations: JSON file; None is ``annotations/instances_SPLIT.json``.
        count: None for all.

    Raises:
        UserError: for files that are missing or invalid.
    """
    path = annotations or folder / "annotations" / f"instances_{split}.json"
    images = next((path for path in (folder / split, folder / "images" / split) if path.is_dir()), None)
    if images is None:
        raise UserError(f"{folder}: contains neither {split}/ nor images/{split}/; name another --split")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        segmentations: dict[int, list[Any]] = {}
        for annotation in content["annotations"]:
            segmentations.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
        annotated = [
            Annotated(images / entry["file_name"], (entry["height"], entry["width"]), tuple(segmentations[entry["id"]]))
            for entry in sorted(content["images"], key=lambda entry: entry["file_name"])
            if entry["id"] in segmentations
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no instance annotations of COCO ({type(error).__name__}: {error})") from None
    return annotated[:count]


def foreground(image: Annotated) -> Mask:
    """Return a mask [H, W] of all annotated objects."""
    height, width = image.size
    canvas = Image.new("1", (width, height))
    mask = np.zeros((height, width), dtype=bool)
    for segmentation in image.segmentations:
        if isinstance(segmentation, dict):
            mask |= decode_runs(segmentation)
        else:
            for polygon in segmentation:
                ImageDraw.Draw(canvas).polygon(list(polygon), fill=1)
    return mask | np.asarray(canvas)


def decode_runs(segmentation: dict[str, Any]) -> Mask:
    """Decode COCO's run lengths, plain or packed into a string, to a mask [H, W].

    Runs of background and foreground alternate down the columns. A packed run is 5 bits a character, lowest first,
    from "0" on; bit 5 says that more follow, bit 4 of the last is the sign, and from the fourth run on it is the
    difference to the run two before (pycocotools' maskApi).
    """
    counts, (height, width) = segmentation["counts"], segmentation["size"]
    if isinstance(counts, str):
        runs: list[int] = []
        value = shift = 0
        for character in counts:
            bits = ord(character) - 48
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                value -= (bits >> 4 & 1) << shift
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        counts = runs
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T


def cut(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize the short side to ``size`` and crop the center square."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def shares(mask: Mask, size: int, grid: tuple[int, int]) -> Floats:
    """Return the share of foreground in each patch of the cropped image, [rows, columns] in [0, 1]."""
    small = np.asarray(cut(Image.fromarray(mask.astype(np.uint8) * 255), size, Image.Resampling.BOX)) / 255
    rows, columns = grid
    return small.reshape(rows, size // rows, columns, size // columns).mean(axis=(1, 3))


def area_under_curve(importance: Floats, positive: Floats) -> float | None:
    """Compute the AUC of patches' importance [L], given the foreground share ``positive`` [L] of each.

    This is the weighted Mann-Whitney statistic: ties, and the two parts of one patch, count half.

    Returns:
        None if there is no foreground or no background.
    """
    negative = 1 - positive
    if positive.sum() <= 0 or negative.sum() <= 0:
        return None
    levels, level = np.unique(importance, return_inverse=True)
    above = np.bincount(level, negative, len(levels))
    below = np.cumsum(above) - above / 2
    return float((positive * below[level]).sum() / (positive.sum() * negative.sum()))


def closeness_to_center(grid: tuple[int, int]) -> Floats:
    """Return the negative distance of each patch from the image's center, [rows, columns]."""
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in grid)
    return -np.hypot(rows[:, None], columns[None])


def measure(recipe: Recipe, teachers: dict[str, Teacher], images: list[Annotated]) -> dict[str, dict[str, float]]:
    """Compute the AUC of each teacher of a recipe, and of the center, by image name."""
    size = recipe.model.image_size
    results: dict[str, dict[str, float]] = {name: {} for name in [*teachers, "center"]}
    grid = next(iter(teachers.values())).grid
    for image, pixels, mask in _opened(images, size):
        for name, result in results.items():
            teacher = teachers.get(name)
            importance = closeness_to_center(grid)
            if teacher is not None:
                importance = teacher(pixels).importance[0].double().numpy().reshape(grid)
            auc = area_under_curve(importance.ravel(), shares(mask, size, grid).ravel())
            if auc is not None:
                result[image.path.name] = round(auc, 4)
    return results


def _opened(images: list[Annotated], size: int) -> Iterator[tuple[Annotated, torch.Tensor, Mask]]:
    for number, image in enumerate(images, 1):
        try:
            with Image.open(image.path) as file:
                small = cut(file.convert("RGB"), size, Image.Resampling.BICUBIC)
        except OSError as error:
            raise UserError(f"{image.path}: cannot be read as an image ({error})") from None
        yield image, torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255, foreground(image)
        if number % 20 == 0:
            print(f"{number} of {len(images)} images", file=sys.stderr)


def summary(result: dict[str, float]) -> dict[str, Any]:
    """Return the mean over images, its standard error, the median, and the number of images."""
    values = np.array(list(result.values()))
    if not len(values):
        raise UserError("no image has both foreground and background; name another --split")
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {
        "mean_auc": round(float(values.mean()), 4),
        "standard_error": None if error is None else round(error, 4),
        "median_auc": round(float(np.median(values)), 4),
        "images": len(values),
    }


def run(recipes: list[Path], images: list[Annotated]) -> list[dict[str, Any]]:
    """Return a row for each teacher of each recipe, and one for the center."""
    rows = []
    for path in recipes:
        recipe = load_recipe(path)
        teachers = build_teachers(recipe)
        for name, result in measure(recipe, teachers, images).items():
            row: dict[str, Any] = {"recipe": path.name, "teacher": name}
            if name in teachers:
                teacher = teachers[name]
                row |= {
                    "source": recipe.teachers[name].source,
                    "sha256": teacher.sha256,
                    "pixels": teacher.image_size,
                    "precision": str(teacher.dtype).removeprefix("torch."),
                    **teacher.details,
                }
            else:
                row |= {"source": "closeness to the center", "pixels": recipe.model.image_size}
            grid = next(iter(teachers.values())).grid
            rows.append(row | {"grid": f"{grid[0]}x{grid[1]}", **summary(result), "per_image": result})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    lines = ["| recipe | teacher | source | pixels | grid | AUC | images |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        auc = f"{row['mean_auc']:.3f}" + (f" ± {row['standard_error']:.3f}" if row["standard_error"] else "")
        cells = (row[key] for key in ("recipe", "teacher", "source", "pixels", "grid"))
        lines.append(f"| {' | '.join(map(str, cells))} | {auc} | {row['images']} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write the JSON; return the exit status, 2 for invalid input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("--coco", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--annotations", type=Path, help="default: FOLDER/annotations/instances_SPLIT.json")
    parser.add_argument("--num-images", type=int, help="number of images; default: all")
    parser.add_argument("--out", type=Path, help="JSON file with the AUC of every image")
    args = parser.parse_args(argv)
    try:
        images = read_coco(args.coco, args.split, args.annotations, args.num_images)
        rows = run(args.recipes, images)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.out:
        names = " ".join(path.name for path in args.recipes)
        content = {
            "command": f"python benchmarks/teacher_foreground.py --coco FOLDER --split {args.split} {names}",
            "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "versions": collect_versions()},
            "images": {"split": args.split, "annotated": len(images)},
            "teachers": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
