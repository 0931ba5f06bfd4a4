"""Inspection of a .beton: its description, and a check that every image can be decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrmae_ds.data.beton.copies import describe_copies, find_copies
from mrmae_ds.data.beton.file import RAW, BetonFile
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton, read_sidecar
from mrmae_ds.data.convert.skipped import format_list, report_path
from mrmae_ds.data.convert.splits import describe_ignored
from mrmae_ds.data.types import IntArray
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.records.progress import progress_bar
from mrmae_ds.units import counted, first_few, printable

_CHUNK = 256  # samples decoded at a time


def verify_beton(path: str | Path) -> BetonInfo:
    """Check a .beton thoroughly: size, checksum, labels, row numbers, images of each class, every image decoded.

    Args:
        path: the .beton.

    Returns:
        Its description.

    Raises:
        UserError: listing the faults.
    """
    info = check_beton(path)
    changed = file_sha256(info.path) != info.sha256
    problems = list(find_problems(info, read_sidecar(path)))
    if changed:
        head = f"{path}: its SHA-256 differs from its sidecar's, so it changed: copy or write it again"
        raise UserError(format_list(head, problems))
    if problems:
        raise UserError(format_list(f"{path}: {counted(len(problems), 'fault')}; write it again:", problems))
    return info


def find_stored_copies(info: BetonInfo) -> list[str]:
    """Find the exact copies in a file, also of images of the train.beton beside a val.beton.

    Returns:
        Lines for the terminal that name the rows.
    """
    beside = info.path.with_name("train.beton")
    train = check_beton(beside) if info.path.name == "val.beton" and beside.is_file() else None
    file = BetonFile(info)

    def name(row: int) -> str:
        return f"sample {row} ({printable(info.class_names[file.labels[row]])})"

    copies = find_copies(file, BetonFile(train) if train else None)
    found = copies.describe(train, name, lambda row: f"{beside.name}'s sample {row}")
    return describe_copies(found, info.num_samples)


def find_problems(info: BetonInfo, sidecar: dict[str, Any]) -> Iterator[str]:
    """Check every sample.

    Args:
        info: the data set.
        sidecar: its sidecar, or {} if there is none yet.

    Yields:
        One line for each fault.
    """
    file = BetonFile(info)
    labels, rows = file.labels, np.arange(info.num_samples)
    strange = (labels < 0) | (labels >= info.num_classes)
    for row in rows[(file.indices != rows) | strange]:
        yield f"sample {row}: index {file.indices[row]}, label {labels[row]} of {info.num_classes}"
    counts = np.bincount(labels[~strange], minlength=info.num_classes).tolist()
    described = sidecar.get("class_counts") or counts
    for name, count, expected in zip(info.class_names, counts, described, strict=True):
        if count != expected:
            yield f"class {printable(name)}: {count:,} images, {expected:,} in the sidecar"
    # It appears after the first images, for which the decoder may be compiled.
    with progress_bar(total=len(rows), desc=f"verify {info.path.name}", unit="image", delay=0.1) as progress:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            wrong = dict(_sizes(file, chunk))
            undamaged = np.array([row for row in chunk.tolist() if row not in wrong], dtype=np.int64)
            wrong |= {int(row): _damage(file, int(row)) for row in _damaged(file, undamaged)}
            yield from (f"sample {row}: {fault}" for row, fault in sorted(wrong.items()))
            progress.update(len(chunk))


def _sizes(file: BetonFile, rows: IntArray) -> Iterator[tuple[int, str]]:
    """Yield the samples whose JPEG's size differs from the file's table, or that are no JPEG."""
    for row in rows.tolist():
        height, width, mode = file.table[row, 2:].tolist()
        if mode == RAW:
            continue
        try:
            with Image.open(io.BytesIO(file.jpeg(row)), formats=["JPEG"]) as image:
                if image.size != (width, height):
                    yield row, f"{image.width} x {image.height}, {width} x {height} in the table"
        except (OSError, ValueError, SyntaxError):
            yield row, _damage(file, row)


def _damage(file: BetonFile, row: int) -> str:
    return f"damaged image {file.describe_damage(row)}".strip()


def _damaged(file: BetonFile, rows: IntArray) -> list[int]:
    """Return the samples that cannot be decoded to the last pixel.

    FFCV's decoder is used where it is installed, because it treats the JPEG library's warnings as errors. Pillow
    detects less damage, but a file with the right checksum has not changed since its images were encoded.
    """
    if len(rows) == 0:
        return []
    from mrmae_ds.data.loaders.build import check_backend  # late: `describe_beton` needs no torch

    try:
        check_backend("ffcv")
    except UserError:
        return [row for row in rows.tolist() if not _decodes(file, row)]
    from mrmae_ds.data.loaders.ffcv_decoder import damaged_rows

    return damaged_rows(file, rows).tolist()


def _decodes(file: BetonFile, row: int) -> bool:
    try:
        file.image(row)
    except UserError:
        return False
    return True


def describe_beton(path: str | Path) -> str:
    """Return a description of a .beton for the terminal, a few lines, from its sidecar.

    Raises:
        UserError: if the file or its sidecar is missing or damaged.
    """
    info = check_beton(path)
    sidecar: dict[str, Any] = read_sidecar(path)
    names = first_few(info.class_names, 5)
    lines = [
        f"{info.path}: {info.name}, {counted(info.num_samples, 'image')}, {counted(info.num_classes, 'class')} "
        f"({names}), "
        f"{info.size / 1e6:.1f} MB",
        f"  source    {info.source}",
        f"  images    {_quality(info, sidecar)}, longer side at most {info.max_side} pixels"
        + _listing(", ", sidecar.get("converted")),
        f"  written   {sidecar.get('written', 'unknown')} with "
        + ", ".join(f"{name} {number}" for name, number in sidecar["versions"].items()),
        f"  sha256    {info.sha256}",
    ]
    counts = sidecar.get("class_counts")
    if counts:
        lowest = f"{min(counts):,} to " if min(counts) < max(counts) else ""
        lines[0] += f", {lowest}{counted(max(counts), 'image')} per class"
    # The file is larger by its tables, and by up to a page of 2 MB that is not full.
    lines[2] += f", {BetonFile(info).table[:, 1].mean():,.0f} bytes per image"
    if all(sidecar.get(key) for key in ("seconds", "cpu_seconds", "workers")):
        rates = [info.num_samples / sidecar[key] for key in ("seconds", "cpu_seconds")]
        lines.append(
            f"  speed     {rates[0]:,.0f} images/s with {counted(sidecar['workers'], 'worker')}, {rates[1]:,.0f} per "
            "core-second"
        )
    if sidecar.get("ignored"):
        lines.append(f"  ignored   {_listing('', sidecar['ignored'])}")
    lines += [f"  copies    {line}" for line in describe_copies(sidecar.get("copies"), info.num_samples)]
    if sidecar.get("skipped"):
        where = report_path(info.path).name
        lines.append(f"  left out  {len(sidecar['skipped']):,} that cannot be read, listed in {where}")
    return "\n".join(map(printable, lines))


def _quality(info: BetonInfo, sidecar: dict[str, Any]) -> str:
    """Return how the images are stored."""
    if not info.quality:
        return "as FFCV wrote them, " + _listing("", sidecar["modes"])
    modes, jpegs = sidecar.get("modes", {}), f"JPEG quality {info.quality}"
    if "raw" not in modes:
        return jpegs
    return f"{modes['raw']:,} raw, {modes['JPEG']:,} {jpegs}" if "JPEG" in modes else "raw"


def _listing(start: str, counts: dict[str, int] | None) -> str:
    return start + describe_ignored(counts) if counts else ""
