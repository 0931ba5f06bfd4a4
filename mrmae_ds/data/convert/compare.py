"""Stored images against those that they were made from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton, read_sidecar
from mrmae_ds.data.convert.images import pixel_limit, reason, to_rgb
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.reopen import open_origin
from mrmae_ds.data.convert.skipped import listed
from mrmae_ds.data.convert.writer import ImageDataset
from mrmae_ds.errors import UserError

_SLACK_DB = 1.0  # between the JPEG libraries of then and now


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images of one size, dB; infinite for equal ones."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = np.square(difference).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def compare_with_source(path: str | Path, source: str | Path, count: int, seed: int = 0) -> float:
    """Compare ``count`` stored images, drawn by ``seed``, with their files below ``source``; see ``compare``."""
    return compare(path, open_origin(Path(source), read_sidecar(path)), count, seed)


def compare(path: str | Path, dataset: ImageDataset, count: int, seed: int = 0) -> float:
    """Compare ``count`` stored images, drawn by ``seed``, with the same rows of a data set.

    The label and the size must be equal, and the stored image as near to the source as a JPEG of the recorded
    quality is, made of it here and now.

    Returns the lowest PSNR found, dB.

    Raises:
        UserError: that lists the differing images.
    """
    info = check_beton(path)
    if len(dataset) != info.num_samples:
        raise UserError(f"{path}: holds {info.num_samples:,} images, the source {len(dataset):,}")
    rows = np.sort(np.random.default_rng(seed).permutation(info.num_samples)[:count])
    file, sidecar = BetonFile(info), read_sidecar(path)
    lowest, problems = float("inf"), []
    for row in tqdm(rows.tolist(), desc=f"compare {info.path.name}", unit="image"):
        found = _compare_one(file, info, sidecar, dataset, row)
        if isinstance(found, str):
            problems.append(f"sample {row}: {found}")
        else:
            lowest = min(lowest, found)
    if problems:
        head = f"{path}: {len(problems)} of {len(rows)} images are not those of the source; write it again:"
        raise UserError(listed(head, problems))
    return lowest


def _compare_one(
    file: BetonFile, info: BetonInfo, sidecar: dict[str, Any], dataset: ImageDataset, row: int
) -> float | str:
    """The PSNR of one image, or what is wrong with it."""
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
    stored = Image.open(io.BytesIO(file.jpeg(row))).convert("RGB")
    if file.labels[row] != label:
        return f"has the label {file.labels[row]}, {name} {label}"
    if stored.size != expected.size:
        return f"{stored.width} x {stored.height}, {name} gives {expected.width} x {expected.height}"
    again = io.BytesIO()
    expected.save(again, "JPEG", quality=info.quality)
    bound = psnr(Image.open(again).convert("RGB"), expected) - _SLACK_DB
    found = psnr(stored, expected)
    return found if found >= bound else f"{found:.1f} dB from {name}, a JPEG of it has {bound + _SLACK_DB:.1f}"
