"""Comparison of stored images with the files that they were made from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton, read_sidecar
from mrmae_ds.data.convert.folder import open_folder
from mrmae_ds.data.convert.imagenet import ImageNetSource, open_imagenet
from mrmae_ds.data.convert.images import pixel_limit, reason, to_rgb
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.shards import ShardOptions, open_parts
from mrmae_ds.data.convert.skipped import format_list
from mrmae_ds.data.convert.writer import ImageDataset
from mrmae_ds.errors import UserError
from mrmae_ds.records.progress import progress_bar

_SLACK_DB = 1.0  # between the JPEG libraries of the writing and of the comparison


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two RGB images of one size, dB; infinite for equal ones."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = np.square(difference).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def compare_with_source(path: str | Path, source: str | Path, count: int, seed: int = 0) -> float:
    """Compare a sample of the stored images with their files below ``source``; see ``compare``."""
    return compare(path, open_origin(Path(source), read_sidecar(path)), count, seed)


def open_origin(source: Path, sidecar: dict[str, Any]) -> ImageIndex:
    """Open the files of ``source`` that a .beton was made from, in its order.

    Args:
        source: the tree that was converted, at its present place.
        sidecar: of the .beton; its "origin" says how the tree was opened.

    Returns:
        The images that were stored.

    Raises:
        UserError: if the .beton was not made from files, or the tree has changed in shape or number.
    """
    origin = dict(sidecar.get("origin") or {})
    layout, part, count = (origin.pop(key, None) for key in ("layout", "part", "count"))
    if layout == "folder":
        train, val, _ = open_folder(source, **origin)
    elif layout == "imagenet":
        train, val, _ = open_imagenet(ImageNetSource(source, **origin))
    elif layout in ("tars", "parquet"):
        train, val, _ = open_parts(source, layout, ShardOptions(**origin))
    else:
        raise UserError(
            "the sidecar names no folder of images, so there is nothing to compare with; "
            "mrmae_ds.data.convert.compare.compare compares with any data set"
        )
    dataset = {"train": train, "val": val}[part].limited(count, part)
    skipped = [entry["row"] for entry in sidecar.get("skipped", ())]
    stored = dataset.take(np.setdiff1d(np.arange(len(dataset)), skipped))
    if len(stored) != sidecar["num_samples"]:
        raise UserError(
            f"{source}: has {len(stored):,} images for {part} (without those left out), the .beton "
            f"{sidecar['num_samples']:,}; the tree has changed since"
        )
    return stored


def compare(path: str | Path, dataset: ImageDataset, count: int, seed: int = 0) -> float:
    """Compare a sample of the stored images with the same rows of a data set.

    Label and size must be equal, and a stored image must be as near to its source as a JPEG of the recorded quality
    that is made from it now.

    Args:
        path: the .beton.
        dataset: the images that it was made from.
        count: number of images to compare, at most.
        seed: of the choice.

    Returns:
        The lowest PSNR, dB.

    Raises:
        UserError: listing the images that differ.
    """
    info = check_beton(path)
    if len(dataset) != info.num_samples:
        raise UserError(f"{path}: holds {info.num_samples:,} images, the source {len(dataset):,}")
    rows = np.sort(np.random.default_rng(seed).permutation(info.num_samples)[:count])
    file, sidecar = BetonFile(info), read_sidecar(path)
    lowest, problems = float("inf"), []
    for row in progress_bar(rows.tolist(), desc=f"compare {info.path.name}", unit="image"):
        result = _compare_one(file, info, sidecar, dataset, row)
        if isinstance(result, str):
            problems.append(f"sample {row}: {result}")
        else:
            lowest = min(lowest, result)
    if problems:
        head = f"{path}: {len(problems)} of {len(rows)} images are not those of the source; write it again:"
        raise UserError(format_list(head, problems))
    return lowest


def _compare_one(
    file: BetonFile, info: BetonInfo, sidecar: dict[str, Any], dataset: ImageDataset, row: int
) -> float | str:
    """Return the PSNR of one image, or a description of the difference."""
    limit = sidecar.get("max_pixels", WriteOptions.max_pixels)
    background = sidecar.get("background", WriteOptions.background)
    name = getattr(dataset, "name", lambda row: "its source")(row)
    try:
        with pixel_limit(limit):
            image, label = dataset[row]
            with image:
                expected, _ = to_rgb(image, max_side=info.max_side, max_pixels=limit, background=background)
    except Exception as error:
        return f"{name} cannot be read: {reason(error, limit)}"
    stored = file.image(row).convert("RGB")
    if file.labels[row] != label:
        return f"has the label {file.labels[row]}, {name} {label}"
    if stored.size != expected.size:
        return f"{stored.width} x {stored.height}, {name} gives {expected.width} x {expected.height}"
    again = io.BytesIO()
    expected.save(again, "JPEG", quality=info.quality or WriteOptions.quality)
    bound = psnr(Image.open(again).convert("RGB"), expected) - _SLACK_DB
    ratio = psnr(stored, expected)
    return ratio if ratio >= bound else f"{ratio:.1f} dB from {name}, a JPEG of it has {bound + _SLACK_DB:.1f}"
