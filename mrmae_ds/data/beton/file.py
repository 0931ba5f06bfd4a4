"""Layout of a .beton as this project writes it (FFCV's format 2), and a reader that needs numpy only.

A file is a header, a descriptor for each field, a table of samples, pages of JPEGs, and a table of their locations.
The fields of a sample are its image, label, row, and the Adler-32 of its JPEG. A file of FFCV's own writer with the
first three is read too, unchecked.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.types import ImageArray, IntArray
from mrmae_ds.errors import UserError

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("kind", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8"), ("adler32", "<i8")], align=True)
_UNCHECKED = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
NAMES = ["image", "label", "index", "adler32"]
JPEG = 0


class BetonFile:
    """An open .beton, memory-mapped.

    Attributes:
        table: of the JPEGs, int64 [N, 4]: offset and length in the file (bytes), height and width (pixels).
        labels: int64 [N].
        indices: row of each sample, int64 [N].
        checksums: Adler-32 of each JPEG, int64 [N]; -1 where it is unknown.
        content: the whole file, uint8 [bytes].
    """

    def __init__(self, info: BetonInfo) -> None:
        """Open a file and check its tables against their checksum; the JPEGs are checked when they are read.

        Args:
            info: its description.

        Raises:
            UserError: if it is not the file of JPEGs that its sidecar describes.
        """
        self._info, num_samples = info, info.num_samples
        try:
            self.content: ImageArray = np.memmap(info.path, dtype=np.uint8, mode="r").view(np.ndarray)
            header = self.content[: HEADER.itemsize].view(HEADER)[0]
            fields = self._array(FIELD, int(header["fields"]), HEADER.itemsize)
            names = [bytes(name).rstrip(b"\0").decode("ascii") for name in fields["name"]]
            sample = {tuple(NAMES): SAMPLE, tuple(NAMES[:3]): _UNCHECKED}.get(tuple(names))
            if header["version"] != VERSION or sample is None or header["samples"] != num_samples:
                raise ValueError(f"version {header['version']}, {header['samples']} samples, fields {names}")
            samples = self._array(sample, num_samples, HEADER.itemsize + fields.nbytes)
            rest = (len(self.content) - int(header["allocations"])) // ALLOCATION.itemsize
            allocations = self._array(ALLOCATION, rest, int(header["allocations"]))
            if info.tables_sha256 not in (None, tables_sha256(self.content)):
                raise ValueError("its tables have changed since they were written")
            if (samples["image"]["mode"] != JPEG).any():
                raise ValueError("images that are not JPEGs")
            self.table = _jpeg_table(samples["image"], allocations)
            if (self.table[:, 0] + self.table[:, 1] > len(self.content)).any():
                raise ValueError("images beyond its end")
        except (ValueError, IndexError) as error:  # numpy's, of a file that is too short or of another kind
            raise UserError(
                f"{info.path}: does not hold what its sidecar describes ({error}); copy or write it again"
            ) from None
        self.labels = samples["label"].astype(np.int64)
        self.indices = samples["index"].astype(np.int64)
        checked = "adler32" in names
        self.checksums = samples["adler32"].astype(np.int64) if checked else np.full(num_samples, -1, dtype=np.int64)

    def __reduce__(self) -> tuple[type[BetonFile], tuple[BetonInfo]]:
        """Pickle the description; the file is opened again, and its content is not copied."""
        return BetonFile, (self._info,)

    def _array(self, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[np.void]:
        end = offset + count * dtype.itemsize
        if end > len(self.content):
            raise ValueError("it is truncated")
        return self.content[offset:end].view(dtype)

    def jpeg(self, row: int) -> bytes:
        """Return the JPEG of one sample, as stored; raises ValueError if it has changed since it was written."""
        offset, length = self.table[row, :2]
        content = self.content[offset : offset + length].tobytes()
        if self.checksums[row] not in (-1, zlib.adler32(content)):
            raise ValueError("its checksum has changed since it was written")
        return content


def tables_sha256(content: ImageArray) -> str:
    """Return the SHA-256 of all but the pages of JPEGs, of the content before the first page and after the last.

    Args:
        content: the whole file, uint8 [bytes].
    """
    header = content[: HEADER.itemsize].view(HEADER)[0]
    head = HEADER.itemsize + int(header["fields"]) * FIELD.itemsize + int(header["samples"]) * SAMPLE.itemsize
    digest = hashlib.sha256(content[:head].data)
    digest.update(content[int(header["allocations"]) :].data)
    return digest.hexdigest()


def _jpeg_table(images: npt.NDArray[np.void], allocations: npt.NDArray[np.void]) -> IntArray:
    """Join the samples with the table of allocations, which holds the length of each JPEG."""
    order = np.argsort(allocations["place"])
    places = np.searchsorted(allocations["place"], images["place"], sorter=order)
    if (places == len(order)).any() or (allocations["place"][order[places]] != images["place"]).any():
        raise ValueError("images that its table does not list")
    lengths = allocations["size"][order[places]]
    columns = [images["place"], lengths, images["height"], images["width"]]
    return np.stack([column.astype(np.int64) for column in columns], axis=1)
