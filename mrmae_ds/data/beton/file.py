"""The layout of a .beton as this project writes it (FFCV's format 2), read with numpy alone: no ffcv needed.

A file is a header, a descriptor for each field, a table of samples, pages of JPEGs, and a table of what lies where.
The fields of a sample are its image, label, row, and the Adler-32 of its JPEG. A file of FFCV's own writer with the
first three is read too, unchecked.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import numpy.typing as npt

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.types import IntArray
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
    """An open .beton.

    Attributes:
        table: where each JPEG lies, int64 [N, 4]: offset and length in the file (bytes), height and width (pixels).
        labels, indices: int64 [N]. checksums: Adler-32 of each JPEG, int64 [N]; -1 where it is not known.
        content: the whole file, mapped, uint8 [bytes].
    """

    def __init__(self, info: BetonInfo) -> None:
        """Open ``info.path``. Whether its tables are as they were written is checked, the JPEGs are not yet.

        Raises:
            UserError: if it is not the file of JPEGs that its sidecar describes.
        """
        num_samples = info.num_samples
        try:
            self.content: npt.NDArray[np.uint8] = np.memmap(info.path, dtype=np.uint8, mode="r").view(np.ndarray)
            header = self.content[: HEADER.itemsize].view(HEADER)[0]
            fields = self._array(FIELD, int(header["fields"]), HEADER.itemsize)
            names = [bytes(name).rstrip(b"\0").decode("ascii") for name in fields["name"]]
            known = {tuple(NAMES): SAMPLE, tuple(NAMES[:3]): _UNCHECKED}.get(tuple(names))
            if header["version"] != VERSION or known is None or header["samples"] != num_samples:
                raise ValueError(f"version {header['version']}, {header['samples']} samples, fields {names}")
            samples = self._array(known, num_samples, HEADER.itemsize + fields.nbytes)
            rest = (len(self.content) - int(header["allocations"])) // ALLOCATION.itemsize
            allocations = self._array(ALLOCATION, rest, int(header["allocations"]))
            if info.tables_sha256 not in (None, tables_sha256(self.content)):
                raise ValueError("its tables have changed since they were written")
            if (samples["image"]["mode"] != JPEG).any():
                raise ValueError("images that are not JPEGs")
            self.table = _jpeg_table(samples["image"], allocations)
            if (self.table[:, 0] + self.table[:, 1] > len(self.content)).any():
                raise ValueError("images beyond its end")
        except (ValueError, IndexError) as error:  # numpy's, of a file too short or of another kind
            raise UserError(
                f"{info.path}: does not hold what its sidecar describes ({error}); copy or write it again"
            ) from None
        self.labels = samples["label"].astype(np.int64)
        self.indices = samples["index"].astype(np.int64)
        checked = "adler32" in names
        self.checksums = samples["adler32"].astype(np.int64) if checked else np.full(num_samples, -1, dtype=np.int64)

    def _array(self, dtype: np.dtype, count: int, offset: int) -> npt.NDArray[np.void]:
        end = offset + count * dtype.itemsize
        if end > len(self.content):
            raise ValueError("it is cut off")
        return self.content[offset:end].view(dtype)

    def jpeg(self, row: int) -> bytes:
        """The JPEG of one sample, as it lies in the file. Raises ValueError if it has changed since it was written."""
        offset, length = self.table[row, :2]
        content = self.content[offset : offset + length].tobytes()
        if self.checksums[row] not in (-1, zlib.adler32(content)):
            raise ValueError("its checksum is another than when it was written")
        return content


def tables_sha256(content: npt.NDArray[np.uint8]) -> str:
    """Of all but the pages of JPEGs: of what lies before the first page, and after the last.

    Args:
        content: the whole file, uint8 [bytes].
    """
    header = content[: HEADER.itemsize].view(HEADER)[0]
    head = HEADER.itemsize + int(header["fields"]) * FIELD.itemsize + int(header["samples"]) * SAMPLE.itemsize
    digest = hashlib.sha256(content[:head].data)
    digest.update(content[int(header["allocations"]) :].data)
    return digest.hexdigest()


def _jpeg_table(images: npt.NDArray[np.void], allocations: npt.NDArray[np.void]) -> IntArray:
    """Join the samples with the table of allocations, which alone knows how long each JPEG is."""
    order = np.argsort(allocations["place"])
    found = np.searchsorted(allocations["place"], images["place"], sorter=order)
    if (found == len(order)).any() or (allocations["place"][order[found]] != images["place"]).any():
        raise ValueError("images that its table does not list")
    lengths = allocations["size"][order[found]]
    columns = [images["place"], lengths, images["height"], images["width"]]
    return np.stack([column.astype(np.int64) for column in columns], axis=1)
