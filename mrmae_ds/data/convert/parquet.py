"""Hugging Face data sets on disk as conversion sources: Parquet files, and the Arrow files of ``save_to_disk``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mrmae_ds.data.convert.images import ImageError, open_content
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.errors import UserError
from mrmae_ds.records.progress import progress_bar
from mrmae_ds.units import first_few, printable

_USUAL = {"image": ("image", "img", "jpg"), "label": ("label", "labels", "cls")}


class Place(NamedTuple):
    """Place of an image: its file, the row group in it, and the row in the group."""

    file: str
    group: int
    row: int


class TableStore:
    """Images in a column of Parquet or Arrow files. Each process keeps the row group that it read last.

    Args:
        column: name of the column.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._last: tuple[tuple[int, str, int], Any] | None = None

    def open(self, place: Place) -> Image.Image:
        """Open an image by its content."""
        key = (os.getpid(), place.file, place.group)
        if self._last is None or self._last[0] != key:
            self._last = key, _read(place.file, place.group, self._column)
        value = self._last[1][place.row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ImageError("the row has no bytes of an image")
        return open_content(content)

    def name(self, place: Place) -> str:
        """Return file, row group and row."""
        return f"{place.file}:{place.group}:{place.row}"

    def file(self, place: Place) -> str:
        """Return the path of the file."""
        return place.file


def _read(path: str, group: int, column: str) -> Any:
    """Return one column of a row group."""
    import pyarrow.parquet as pq

    if path.endswith(".parquet"):
        return pq.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False).column(column)
    return _arrow_table(path).to_batches()[group].column(column)


def _arrow_table(path: str) -> Any:
    """Read an Arrow file, in the format of streams (Hugging Face's) or of files (Feather)."""
    import pyarrow as pa

    mapped = pa.memory_map(path)
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(mapped).read_all()


def _check_image_type(path: Path, column: Any) -> None:
    """Check that a column holds encoded images: bytes, or a struct with ``bytes``; raises UserError otherwise."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{path}: column {printable(column.name)} holds {printable(str(column.type))}, but images are bytes of a "
            "file such as JPEG, alone or as `bytes` of a struct; encode them first"
        )


def open_tables(
    paths: Sequence[Path], image: str | None = None, label: str | None = None
) -> tuple[ImageIndex, list[str] | None]:
    """Open the files of one part.

    Args:
        paths: .parquet or .arrow, in order.
        image: column of the images; None is the one of Hugging Face's type Image, or of a usual name.
        label: column of the labels, integers; None is the one of type ClassLabel, or of a usual name.

    Returns:
        The images in the order of the rows, and the names of the classes if the files state them.

    Raises:
        UserError: without pyarrow; for a missing column, and for rows without a label.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"Parquet and Arrow files need pyarrow ({error}); in the clone: pip install -e '.[parquet]' "
            "-c constraints.txt"
        ) from error
    places: list[Place] = []
    labels: list[int] = []
    names: list[str] | None = None
    columns: tuple[str, str] | None = None
    for path in progress_bar(paths, desc=f"index {first_few([path.name for path in paths], 1)}", unit="file"):
        try:
            if path.suffix == ".parquet":
                file = pq.ParquetFile(path)
                schema, sizes = (
                    file.schema_arrow,
                    [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
                )
            else:
                table = _arrow_table(str(path))
                schema, sizes = table.schema, [batch.num_rows for batch in table.to_batches()]
            features = _features(schema)
            found = _column(path, schema, features, "image", image), _column(path, schema, features, "label", label)
            if columns not in (None, found):
                raise UserError(f"{path}: its columns are {found}, those of {paths[0]} {columns}")
            columns = found
            _check_image_type(path, schema.field(found[0]))
            column = file.read([found[1]]) if path.suffix == ".parquet" else table.select([found[1]])
            values = column.column(0).to_pylist()
        except pa.ArrowException as error:
            with path.open("rb") as start:
                pointer = start.read(24) == b"version https://git-lfs."
            fix = "it is a pointer of Git LFS: `git lfs pull` fetches the file" if pointer else "fetch it again"
            raise UserError(f"{path}: cannot be read ({error}); {fix}") from error
        stated = features.get(found[1], {}).get("names")
        if names is not None and stated != names:
            raise UserError(f"{path}: its classes differ from those of {paths[0]}")
        names = stated
        # Not isinstance: of True and False it is not known which class is which.
        wrong = next((row for row, value in enumerate(values) if type(value) is not int or value < 0), None)
        if wrong is not None:
            raise UserError(
                f"{path}: row {wrong} has the label {values[wrong]!r}; every row needs a whole number, 0 or more"
            )
        labels += values
        places += [Place(str(path), group, row) for group, size in enumerate(sizes) for row in range(size)]
    if not places or columns is None:
        raise UserError(f"{', '.join(map(str, paths[:3]))}: no rows")
    return ImageIndex(TableStore(columns[0]), places, np.array(labels, dtype=np.int64)), names


def _features(schema: Any) -> dict[str, Any]:
    """Return Hugging Face's description of the columns; {} without one that can be read."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _column(path: Path, schema: Any, features: dict[str, Any], kind: str, chosen: str | None) -> str:
    """Return the name of the column of images or of labels."""
    if chosen is not None:
        candidates = [chosen] if chosen in schema.names else []
    else:
        type_name = {"image": "Image", "label": "ClassLabel"}[kind]
        candidates = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == type_name]
        candidates = candidates or [name for name in schema.names if name in _USUAL[kind]]
    if len(candidates) != 1:
        raise UserError(
            f"{path}: {len(candidates)} columns may hold the {kind}s, of {', '.join(map(printable, schema.names))}; "
            f"name it with --{kind}-column"
        )
    return candidates[0]
