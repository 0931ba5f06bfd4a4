"""Looking into a .beton: what it holds, and whether every image in it can be decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton, read_sidecar
from mrmae_ds.data.convert.skipped import listed, report_path
from mrmae_ds.data.types import IntArray
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256

_CHUNK = 256  # samples decoded at a time


def verify_beton(path: str | Path) -> BetonInfo:
    """Check a .beton thoroughly: size, checksum, labels, row numbers, images of each class, every image decoded.

    Raises UserError that lists what is wrong.
    """
    info = check_beton(path)
    if file_sha256(info.path) != info.sha256:
        raise UserError(f"{path}: has not the SHA-256 in its sidecar, so it has changed: copy or write it again")
    problems = list(_problems(info))
    if problems:
        raise UserError(listed(f"{path}: {len(problems)} bad samples or counts; write it again:", problems))
    return info


def _problems(info: BetonInfo) -> Iterator[str]:
    """One line for each thing that is not as it should be."""
    file = BetonFile(info)
    labels, rows = file.labels, np.arange(info.num_samples)
    strange = (labels < 0) | (labels >= info.num_classes)
    for row in rows[(file.indices != rows) | strange]:
        yield f"sample {row}: index {file.indices[row]}, label {labels[row]} of {info.num_classes}"
    counts = np.bincount(labels[~strange], minlength=info.num_classes).tolist()
    described = read_sidecar(info.path).get("class_counts") or counts
    for name, count, expected in zip(info.class_names, counts, described, strict=True):
        if count != expected:
            yield f"class {name}: {count:,} images, {expected:,} in the sidecar"
    with tqdm(total=len(rows), desc=f"verify {info.path.name}", unit="image") as progress:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            wrong = dict(_sizes(file, chunk))
            undamaged = np.array([row for row in chunk.tolist() if row not in wrong], dtype=np.int64)
            wrong |= {int(row): "damaged JPEG" for row in _damaged(file, undamaged)}
            yield from (f"sample {row}: {what}" for row, what in sorted(wrong.items()))
            progress.update(len(chunk))


def _sizes(file: BetonFile, rows: IntArray) -> Iterator[tuple[int, str]]:
    """The samples whose JPEG has another size than the file's table says, or is none."""
    for row in rows.tolist():
        height, width = file.table[row, 2:].tolist()
        try:
            with Image.open(io.BytesIO(file.jpeg(row)), formats=["JPEG"]) as image:
                if image.size != (width, height):
                    yield row, f"{image.width} x {image.height}, {width} x {height} in the table"
        except (OSError, ValueError, SyntaxError):
            yield row, "damaged JPEG"


def _damaged(file: BetonFile, rows: IntArray) -> list[int]:
    """The samples that cannot be decoded to the last pixel.

    FFCV's decoder is asked where it is installed, since it takes the JPEG library's warnings for errors. Pillow finds
    less, but a file that has its checksum has not changed since each image was encoded.
    """
    if len(rows) == 0:
        return []
    from mrmae_ds.data.loaders.build import check_backend  # imported late: `describe_beton` needs no torch

    try:
        check_backend("ffcv")
    except UserError:
        return [row for row in rows.tolist() if not _decodes(file.jpeg(row))]
    from mrmae_ds.data.loaders.ffcv_decoder import damaged_rows

    return damaged_rows(file, rows).tolist()


def _decodes(jpeg: bytes) -> bool:
    try:
        Image.open(io.BytesIO(jpeg)).load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def describe_beton(path: str | Path) -> str:
    """A few lines for a person: what a .beton holds, from its sidecar.

    Raises UserError.
    """
    info = check_beton(path)
    sidecar: dict[str, Any] = read_sidecar(path)
    names = ", ".join(info.class_names[:5]) + (", ..." if info.num_classes > 5 else "")
    lines = [
        f"{info.path}: {info.name}, {info.num_samples:,} images, {info.num_classes} classes ({names}), "
        f"{info.size / 1e6:.1f} MB",
        f"  source    {info.source}",
        f"  images  JPEG quality {info.quality}, longer side at most {info.max_side} pixels"
        + _listing(", ", sidecar.get("converted")),
        f"  written   {sidecar.get('written', 'unknown')} with "
        + ", ".join(f"{name} {number}" for name, number in sidecar["versions"].items()),
        f"  sha256    {info.sha256}",
    ]
    counts = sidecar.get("class_counts")
    if counts:
        lines[0] += f", {min(counts):,} to {max(counts):,} images a class"
    if sidecar.get("cpu_seconds"):
        rates = [info.num_samples / sidecar[key] for key in ("seconds", "cpu_seconds")]
        lines.append(
            f"  speed     {rates[0]:,.0f} images/s with {sidecar['workers']} workers, {rates[1]:,.0f} a second of "
            f"one core's time, {info.size / info.num_samples:,.0f} bytes an image"
        )
    if sidecar.get("ignored"):
        lines.append(f"  ignored   files that are no images: {_listing('', sidecar['ignored'])}")
    if sidecar.get("skipped"):
        where = report_path(info.path).name
        lines.append(f"  left out  {len(sidecar['skipped']):,} that cannot be read, listed in {where}")
    return "\n".join(lines)


def _listing(start: str, counts: dict[str, int] | None) -> str:
    return start + ", ".join(f"{count:,} {what}" for what, count in counts.items()) if counts else ""
