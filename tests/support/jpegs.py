"""Content of a .beton, read without the code under test, and a data set of files' contents."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# FFCV's format, version 2: header, descriptor for each field, table of samples, pages, allocations.
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")],
    align=True,
)
_DESCRIPTOR_BYTES = 1 + 16 + 1024
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8"), ("index", "<i8"), ("adler32", "<i8")], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])


def stored_jpegs(path: Path, intact: bool = True) -> list[tuple[bytes, int, int]]:
    """Return (JPEG, label, index) of every sample of a .beton.

    Args:
        path: a file with these three fields and the JPEG's Adler-32.
        intact: True checks the Adler-32.
    """
    content = path.read_bytes()
    header = np.frombuffer(content, _HEADER, count=1)[0]
    assert header["version"] == 2 and header["fields"] in (4, 5)
    sample = _SAMPLE if header["fields"] == 4 else np.dtype([*_SAMPLE.descr, ("pixels", "<i8")])
    fields = int(header["fields"]) * _DESCRIPTOR_BYTES
    samples = np.frombuffer(content, sample, int(header["samples"]), _HEADER.itemsize + fields)
    allocations = np.frombuffer(content, _ALLOCATION, offset=int(header["allocations"]))
    sizes = dict(zip(allocations["place"].tolist(), allocations["size"].tolist(), strict=True))
    places = samples["image"]["place"].tolist()
    labels, indices = samples["label"].tolist(), samples["index"].tolist()
    stored = [
        (content[place : place + sizes[place]], label, index)
        for place, label, index in zip(places, labels, indices, strict=True)
    ]
    assert not intact or samples["adler32"].tolist() == [zlib.adler32(jpeg) for jpeg, _, _ in stored]
    return stored


class Files:
    """Data set of files' contents, all of class 0."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.contents[index])), 0
