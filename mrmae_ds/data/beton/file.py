"""Layout of a .beton as this project writes it (FFCV's format 2), and a reader that needs numpy and Pillow only.

A file is a header, a descriptor for each field, a table of samples, pages of images, and a table of their locations.
The fields of a sample are its image, label, row, the Adler-32 of its JPEG, and where JPEGs may be kept as they came a
digest of its pixels before encoding. A file of FFCV's own writer needs the first two; its images may be JPEGs or raw
pixels, and their Adler-32 are in the sidecar (``convert.adopt``).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mrmae_ds.data.beton.segments import describe_damage
from mrmae_ds.data.beton.sidecar import BetonInfo, sidecar_path
from mrmae_ds.data.types import ImageArray, IntArray
from mrmae_ds.errors import UserError

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("kind", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8"), ("adler32", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
DIGESTED_SAMPLE = np.dtype([*((name, SAMPLE[name]) for name in SAMPLE.names or ()), ("pixels", "<i8")], align=True)
JPEG, RAW = 0, 1
_KINDS = {0: "<f8", 1: "<i8", 2: IMAGE}  # FFCV's numbers for floating point, integer and image fields


class BetonFile:
    """An open .beton, memory-mapped.

    Attributes:
        names: of the fields.
        table: of the images, int64 [N, 5]: offset and length in the file (bytes), height and width (pixels), and the
            mode, ``JPEG`` or ``RAW``.
        labels: int64 [N].
        indices: row of each sample, int64 [N].
        checksums: Adler-32 of each stored image, int64 [N]; -1 where it is unknown.
        pixels: digest of each image's pixels before encoding (``pixel_digest``), int64 [N]; None if it is unknown.
        content: the whole file, uint8 [bytes].
    """

    def __init__(self, info: BetonInfo) -> None:
        """Open a file and check its tables against their checksum; the images are checked when they are read.

        Args:
            info: its description.

        Raises:
            UserError: if it is not the file of images that its sidecar describes.
        """
        self._info, num_samples = info, info.num_samples
        try:
            self.content: ImageArray = np.memmap(info.path, dtype=np.uint8, mode="r").view(np.ndarray)
            header = self.content[: HEADER.itemsize].view(HEADER)[0]
            fields = self._array(FIELD, int(header["fields"]), HEADER.itemsize)
            names = self.names = [bytes(name).rstrip(b"\0").decode("ascii") for name in fields["name"]]
            sample = sample_type(fields)
            kinds = dict(zip(names, fields["kind"].tolist(), strict=True))
            if header["version"] != VERSION or sample is None or header["samples"] != num_samples:
                raise ValueError(f"version {header['version']}, {header['samples']} samples, fields {kinds}")
            if (kinds.get("image"), kinds.get("label")) != (2, 1):
                raise ValueError(f"fields {names}, without an `image` of RGBImageField and a `label` of IntField")
            samples = self._array(sample, num_samples, HEADER.itemsize + fields.nbytes)
            rest = (len(self.content) - int(header["allocations"])) // ALLOCATION.itemsize
            allocations = self._array(ALLOCATION, rest, int(header["allocations"]))
            if info.tables_sha256 not in (None, tables_sha256(self.content)):
                raise ValueError("its tables have changed since they were written")
            if (samples["image"]["mode"] > RAW).any():
                raise ValueError("images that are neither JPEGs nor raw")
            self.table = _image_table(samples["image"], allocations)
            if (self.table[:, 0] + self.table[:, 1] > len(self.content)).any():
                raise ValueError("images beyond its end")
        except (ValueError, IndexError) as error:  # numpy's, of a file that is too short or of another kind
            described = "what its sidecar describes" if info.sha256 else "samples of an image and a label"
            fix = "copy or write it again" if info.sha256 else "it needs `image` (RGBImageField) and `label` (IntField)"
            raise UserError(f"{info.path}: does not hold {described} ({error}); {fix}") from None
        self.labels = samples["label"].astype(np.int64)
        self.indices = samples["index"].astype(np.int64) if "index" in names else np.arange(num_samples)
        self.checksums = (
            samples["adler32"].astype(np.int64) if "adler32" in names else read_checksums(info.path, num_samples)
        )

        self.pixels = samples["pixels"].astype(np.int64) if "pixels" in names else None

    def __reduce__(self) -> tuple[type[BetonFile], tuple[BetonInfo]]:
        """Pickle the description; the file is opened again, and its content is not copied."""
        return BetonFile, (self._info,)

    def _array(self, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[np.void]:
        end = offset + count * dtype.itemsize
        if end > len(self.content):
            raise ValueError("it is truncated")
        return self.content[offset:end].view(dtype)

    def image(self, row: int) -> Image.Image:
        """Return one sample, decoded to RGB by Pillow.

        Raises:
            UserError: if it is damaged, or has changed since it was written.
        """
        height, width, mode = self.table[row, 2:].tolist()
        try:
            content = self.jpeg(row)
            if mode == RAW:
                return Image.frombytes("RGB", (width, height), content)
            return Image.open(io.BytesIO(content)).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of damaged files
            raise self.damaged([f"{row} ({error})"]) from None

    def damaged(self, samples: Sequence[str]) -> UserError:
        """Return the error of damaged images, from their rows, each with what is known of its damage."""
        path = self._info.path
        return UserError(
            f"{path}: damaged image in sample {', '.join(samples)}; "
            f"`mrmae data verify {path}` lists all of them; copy or write the file again"
        )

    def jpeg(self, row: int) -> bytes:
        """Return the JPEG of one sample, or its raw pixels, as stored; raises ValueError if it has changed."""
        offset, length = self.table[row, :2]
        content = self.content[offset : offset + length].tobytes()
        if self._has_changed(row, content):
            raise ValueError(f"its checksum has changed since it was written {describe_damage(content)}".strip())
        return content

    def describe_damage(self, row: int) -> str:
        """Return the damaged segments of a JPEG that has changed since it was written; "" if they are not known."""
        offset, length = self.table[row, :2]
        content = self.content[offset : offset + length].tobytes()
        return describe_damage(content) if self._has_changed(row, content) else ""

    def _has_changed(self, row: int, content: bytes) -> bool:
        return self.checksums[row] not in (-1, zlib.adler32(content))


def pixel_digest(image: Image.Image) -> int:
    """Return 64 bits of a digest of an image's size and pixels, as a signed integer."""
    digest = hashlib.blake2b(b"%d %d " % image.size, digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def tables_sha256(content: ImageArray) -> str:
    """Return the SHA-256 of all but the pages of images, of the content before the first page and after the last.

    Args:
        content: the whole file, uint8 [bytes].
    """
    header = content[: HEADER.itemsize].view(HEADER)[0]
    fields = content[HEADER.itemsize : HEADER.itemsize + int(header["fields"]) * FIELD.itemsize].view(FIELD)
    sample = sample_type(fields)
    if sample is None:
        raise ValueError("fields of unknown kinds")
    head = HEADER.itemsize + fields.nbytes + int(header["samples"]) * sample.itemsize
    digest = hashlib.sha256(content[:head].data)
    digest.update(content[int(header["allocations"]) :].data)
    return digest.hexdigest()


def sample_type(fields: npt.NDArray[np.void]) -> np.dtype[Any] | None:
    """Return the type of a sample with these fields, or None if there are fields other than images and numbers."""
    if not all(kind in _KINDS for kind in fields["kind"].tolist()):
        return None
    names = [bytes(name).rstrip(b"\0").decode("ascii") for name in fields["name"]]
    return np.dtype(
        [(name, _KINDS[kind]) for name, kind in zip(names, fields["kind"].tolist(), strict=True)], align=True
    )


def read_checksums(path: Path, count: int) -> IntArray:
    """Return the Adler-32 of each image from the sidecar, where the file has none; -1 if the sidecar has none too."""
    sidecar = sidecar_path(path)
    stored = json.loads(sidecar.read_text(encoding="utf-8")).get("adler32") if sidecar.is_file() else None
    if stored is None:
        return np.full(count, -1, dtype=np.int64)
    try:
        checksums = np.frombuffer(base64.b64decode(stored, validate=True), dtype="<u4").astype(np.int64)
    except ValueError as error:
        raise UserError(f"{sidecar}: its checksums are damaged ({error}); adopt the file again") from None
    if len(checksums) != count:
        raise UserError(f"{sidecar}: has {len(checksums):,} checksums for {count:,} images; adopt the file again")
    return checksums


def _image_table(images: npt.NDArray[np.void], allocations: npt.NDArray[np.void]) -> IntArray:
    """Join the samples with the table of allocations, which holds the length of each image."""
    order = np.argsort(allocations["place"])
    places = np.searchsorted(allocations["place"], images["place"], sorter=order)
    if (places == len(order)).any() or (allocations["place"][order[places]] != images["place"]).any():
        raise ValueError("images that its table does not list")
    lengths = allocations["size"][order[places]]
    columns = [images["place"], lengths, images["height"], images["width"], images["mode"]]
    table = np.stack([column.astype(np.int64) for column in columns], axis=1)
    raw = table[table[:, 4] == RAW]
    if (raw[:, 1] != 3 * raw[:, 2] * raw[:, 3]).any():
        raise ValueError("raw images whose size does not fit their number of bytes")
    return table
