"""Sidecars for .beton files of FFCV's own writer, made once after a check of every sample."""

from __future__ import annotations

import base64
import json
import logging
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from mrmae_ds.data.beton.copies import find_copies
from mrmae_ds.data.beton.file import HEADER, RAW, VERSION, BetonFile, tables_sha256
from mrmae_ds.data.beton.sidecar import SIDECAR_FORMAT, BetonInfo, check_beton, sidecar_path
from mrmae_ds.data.convert.imagenet_labels import read_lines
from mrmae_ds.data.convert.jpegs import record_versions
from mrmae_ds.data.convert.skipped import format_list
from mrmae_ds.data.convert.splits import check_look_alikes
from mrmae_ds.data.convert.verify import find_problems
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256, write_text
from mrmae_ds.units import counted, first_few, printable

logger = logging.getLogger(__name__)

_MAX_LABEL = 100_000  # without names of the classes


def adopt_beton(path: str | Path, classes: str | Path | None = None, name: str | None = None) -> BetonInfo:
    """Check every sample of a .beton of FFCV's writer, and write its sidecar.

    Args:
        path: the file, with an ``image`` (RGBImageField: JPEGs, raw, or both) and a ``label`` (IntField).
        classes: file of the class names, a line for each label from 0; None names them by their numbers.
        name: of the data set, as tables show it; None is the file's.

    Returns:
        The data set.

    Raises:
        UserError: if the file has a sidecar already, or other fields; listing damaged samples and labels without a
            class.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if sidecar_path(path).exists():
        raise UserError(f"{path}: has a sidecar already, {sidecar_path(path).name}; remove it to adopt the file again")
    info = _describe(path, name or path.stem)
    file = BetonFile(info)
    if info.num_samples == 0:
        raise UserError(f"{path}: holds no samples")
    highest = int(file.labels.max())
    if not classes and highest > _MAX_LABEL:
        raise UserError(f"{path}: has the label {highest}; name the classes with --classes")
    if not classes:
        logger.info("%s: names no classes, which are called by their numbers; --classes FILE names them", path)
    names = read_classes(Path(classes)) if classes else [str(label) for label in range(highest + 1)]
    check_look_alikes(classes or path, names)
    empty = sorted(set(range(len(names))) - set(file.labels.tolist()))
    if empty:
        logger.warning(
            "%s: no sample of %s: %s", path, counted(len(empty), "class"), first_few([names[i] for i in empty], 5)
        )
    raw = file.table[:, 4] == RAW
    max_side = int(file.table[:, 2:4].max())
    info = replace(info, class_names=tuple(names), num_classes=len(names), max_side=max_side)
    problems = list(find_problems(info, {}))
    if problems:
        head = f"{path}: {counted(len(problems), 'bad sample')}; no sidecar is written, repair the file:"
        raise UserError(format_list(head, problems))
    checksums = np.array([zlib.adler32(file.jpeg(row)) for row in range(info.num_samples)], dtype="<u4")
    modes = {"JPEG": int((~raw).sum()), "raw": int(raw.sum())}
    sidecar = {
        "format": SIDECAR_FORMAT,
        "num_samples": info.num_samples,
        "class_names": names,
        "class_counts": np.bincount(file.labels, minlength=len(names)).tolist(),
        "max_side": max_side,
        "quality": None,
        "modes": {mode: count for mode, count in modes.items() if count},
        "name": info.name,
        "source": info.source,
        "size": info.size,
        "sha256": file_sha256(path),
        "tables_sha256": tables_sha256(file.content),
        "adler32": base64.b64encode(checksums.tobytes()).decode("ascii"),
        "versions": dict(record_versions()),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    file.checksums = checksums.astype(np.int64)
    copies = find_copies(file)
    sidecar["copies"] = copies.describe(None, lambda row: f"sample {row}", lambda row: f"sample {row}")
    write_text(sidecar_path(path), json.dumps(sidecar, indent=1) + "\n")
    return check_beton(path)


def _describe(path: Path, name: str) -> BetonInfo:
    """Return what is known of a file before its samples are read; its classes are not."""
    with path.open("rb") as file:
        head = file.read(HEADER.itemsize)
    if len(head) < HEADER.itemsize:
        raise UserError(f"{path}: is no .beton, it has {len(head)} bytes")
    header = np.frombuffer(head, dtype=HEADER)[0]
    if header["version"] != VERSION:
        raise UserError(f"{path}: is no .beton of FFCV's format {VERSION}")
    return BetonInfo(
        path=path,
        num_samples=int(header["samples"]),
        num_classes=0,
        class_names=(),
        max_side=0,
        quality=None,
        size=path.stat().st_size,
        sha256="",
        tables_sha256=None,
        name=name,
        source=f"{path.resolve()}, written by FFCV",
    )


def read_classes(path: Path) -> list[str]:
    """Read class names, a line each; raises UserError for a name that is there twice, and for an empty file."""
    names = read_lines(path)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated or not names:
        fault = f"{printable(repeated[0])} is there twice" if repeated else "it is empty"
        raise UserError(f"{path}: expected one class name a line, each once, but {fault}")
    return names
