"""Looking into a .beton: what it holds, and whether every picture in it can be decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mrmae_ds.data.beton import BetonInfo, check_beton, read_sidecar
from mrmae_ds.data.beton_file import BetonFile
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256

_LISTED = 20  # samples named in the error
_CHUNK = 256  # samples decoded at a time


def verify_beton(path: str | Path) -> BetonInfo:
    """Check a .beton thoroughly: size, checksum, labels, row numbers, and every picture decoded.

    Raises UserError that lists what is wrong.
    """
    info = check_beton(path)
    if file_sha256(info.path) != info.sha256:
        raise UserError(f"{path}: has not the SHA-256 in its sidecar, so it has changed: copy or write it again")
    problems = list(_problems(info))
    if problems:
        more = [f"  and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        head = f"{path}: {len(problems)} bad samples; write it again:"
        raise UserError("\n".join([head, *problems[:_LISTED], *more]))
    return info


def _problems(info: BetonInfo) -> Iterator[str]:
    """One line for each thing that is not as it should be."""
    # Imported late: `describe_beton` needs no ffcv.
    from mrmae_ds.data.ffcv_decoder import damaged_rows

    beton = BetonFile(info.path, info.num_samples)
    content, table, labels, indices = beton.content, beton.table, beton.labels, beton.indices
    rows = np.arange(len(table))
    for row in rows[(indices != rows) | (labels < 0) | (labels >= info.num_classes)]:
        yield f"  sample {row}: index {indices[row]}, label {labels[row]} of {info.num_classes}"
    with tqdm(total=len(table), desc=f"verify {info.path.name}", unit="picture") as progress:
        for start in range(0, len(table), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            yield from (f"  sample {row}: damaged JPEG" for row in damaged_rows(content, table, chunk))
            progress.update(len(chunk))


def describe_beton(path: str | Path) -> str:
    """A few lines for a person: what a .beton holds, from its sidecar.

    Raises UserError.
    """
    info = check_beton(path)
    sidecar: dict[str, Any] = read_sidecar(path)
    names = ", ".join(info.class_names[:5]) + (", ..." if info.num_classes > 5 else "")
    lines = [
        f"{info.path}: {info.name}, {info.num_samples:,} pictures, {info.num_classes} classes ({names}), "
        f"{info.size / 1e6:.1f} MB",
        f"  source    {info.source}",
        f"  pictures  JPEG quality {info.quality}, longer side at most {info.max_side} pixels",
        f"  written   {sidecar.get('written', 'unknown')} with "
        + ", ".join(f"{name} {number}" for name, number in sidecar["versions"].items()),
        f"  sha256    {info.sha256}",
    ]
    if sidecar.get("skipped"):
        lines.append(f"  left out  {len(sidecar['skipped'])} bad pictures, listed in the sidecar")
    return "\n".join(lines)
