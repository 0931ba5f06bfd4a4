"""Writing of the two parts of a data set, train.beton and val.beton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.data.convert.options import Output
from mrmae_ds.data.convert.writer import check_outputs, write_beton


def write_parts(
    train: ImageIndex,
    val: ImageIndex,
    output: Output,
    class_names: Sequence[str],
    source: Path,
    origin: Mapping[str, Any],
) -> list[BetonInfo]:
    """Write OUT/train.beton and OUT/val.beton.

    Args:
        train: all training images.
        val: all validation images.
        output: the files.
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
    return [
        write_beton(
            dataset,
            paths[part],
            output.options,
            class_names=class_names,
            name=output.name or "",
            source=f"{source.resolve()}, {part}, {len(dataset)} images",
            origin={**origin, "part": part, "count": counts[part]},
            ignored=dataset.ignored,
        )
        for part, dataset in parts.items()
    ]
