"""Writing of the two parts of a data set, train.beton and val.beton."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.data.convert.journal import journal_path
from mrmae_ds.data.convert.options import Output
from mrmae_ds.data.convert.subset import split_off
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.errors import UserError
from mrmae_ds.units import printable


def split_validation(
    images: ImageIndex, fraction: float, class_names: Sequence[str], source: Path
) -> tuple[ImageIndex, ImageIndex]:
    """Split the same share of every class off for validation, the same images each time.

    Args:
        images: all images.
        fraction: the share, between 0 and 1.
        class_names: in the order of the labels.
        source: of the images, for the error.

    Returns:
        The training set and the validation set.

    Raises:
        UserError: if ``fraction`` is out of range, or a class has one image only.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction must be between 0 and 1, not {fraction}")
    single = [class_names[label] for label, count in enumerate(np.bincount(images.labels)) if count == 1]
    if single:
        raise UserError(
            f"{source}: the class {printable(single[0])} has a single image, none is left for validation; add "
            "images, remove the class, or make a folder val"
        )
    first, second = split_off(images.labels, fraction)
    return images.take(first), images.take(second)


def check_outputs(paths: Iterable[Path]) -> None:
    """Check that files can be created, before hours of work.

    Raises:
        UserError: naming the path and the fix.
    """
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
        except OSError as error:
            raise UserError(
                f"{error.filename or path.parent}: no files can be written there ({error.strerror}); "
                "name another folder with --out"
            ) from error
        if path.is_dir():
            raise UserError(f"{path}: is a folder; remove it, or name another folder with --out")


def write_parts(
    train: ImageIndex,
    val: ImageIndex,
    output: Output,
    class_names: Sequence[str],
    source: Path,
    origin: Mapping[str, Any],
) -> list[BetonInfo]:
    """Write OUT/train.beton and OUT/val.beton; the same call continues a conversion that was interrupted.

    Args:
        train: all training images.
        val: all validation images.
        output: the files; the default name is the tree's.
        class_names: in the order of the labels.
        source: the tree, for the record.
        origin: arguments that open it again (``compare.open_origin``).

    Returns:
        The written data sets.

    Raises:
        UserError: as ``write_beton`` does, and for a subset of fewer images than classes.
    """
    counts = {"train": output.train_count, "val": output.val_count}
    parts = {"train": train.limited(counts["train"], "train"), "val": val.limited(counts["val"], "val")}
    paths = {part: output.folder / f"{part}.beton" for part in parts}
    check_outputs(paths.values())
    written = [
        write_beton(
            dataset,
            paths[part],
            output.options,
            class_names=class_names,
            name=output.name or source.resolve().name,
            source=f"{source.resolve()}, {part}, {len(dataset)} images",
            origin={**origin, "part": part, "count": counts[part]},
            ignored=dataset.ignored,
            train=(paths["train"], parts["train"]) if part == "val" else None,
            keep_journal=True,
        )
        for part, dataset in parts.items()
    ]
    for path in reversed(paths.values()):
        journal_path(path).unlink()
    return written
