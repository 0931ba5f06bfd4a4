"""COCO instance annotations: a strict reader, and an index file that processes memory-map.

The JSON of COCO's training set has 450 MB. It is parsed once, into an index under the JSON's hash in which every mask
is compressed RLE, whatever its form was. Opening the index reads nothing; worker processes share its pages, whereas
lists of Python objects would be copied into each of them.

Letters: N images in ascending order of their ids, A annotations in the order of their images, K classes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from safetensors import safe_open
from safetensors.numpy import save_file

from mrmae_ds.data.types import BoolArray, FloatArray, IntArray
from mrmae_ds.detection.coco_json import parse_annotations
from mrmae_ds.detection.rle import Rle
from mrmae_ds.errors import UserError
from mrmae_ds.files import failing_once, file_sha256, replacing
from mrmae_ds.units import counted, describe_difference, first_few

logger = logging.getLogger(__name__)

_LAYOUT = 2  # of the index and the checks before it; part of its name


class ImageEntry(NamedTuple):
    """An image of the data set.

    Attributes:
        id: COCO's.
        name: file name below the image folder.
        height: pixels.
        width: pixels.
    """

    id: int
    name: str
    height: int
    width: int


class Annotations(NamedTuple):
    """The n annotations of one image.

    Attributes:
        ids: int64 [n].
        classes: int64 [n], 0 to K - 1.
        crowd: bool [n]; True marks a region of many objects.
        boxes: float64 [n, 4], as stored: left, top, width, height.
        areas: float64 [n], as stored, pixels.
        masks: at the image's size.
    """

    ids: IntArray
    classes: IntArray
    crowd: BoolArray
    boxes: FloatArray
    areas: FloatArray
    masks: list[Rle]


class CocoIndex:
    """Annotations of a data set, memory-mapped.

    Args:
        file: the index, from :func:`open_index`.

    Attributes:
        sha256: of the JSON.
        class_names: K names, in ascending order of the categories' ids.
        category_ids: the categories' ids in the JSON, int64 [K].
        image_ids: int64 [N], ascending.
        num_annotations: A.
        doubts: warning about boxes, "" if there is none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with safe_open(file, framework="pt") as opened:  # torch's tensors are views of the mapped file, numpy's copies
            metadata = opened.metadata()
            self._arrays = {name: opened.get_tensor(name).numpy() for name in opened.keys()}  # noqa: SIM118
        self.sha256: str = metadata["sha256"]
        self.doubts: str = metadata["doubts"]
        self.class_names: tuple[str, ...] = tuple(json.loads(metadata["class_names"]))
        self.category_ids: IntArray = self._arrays["category_ids"]
        self.image_ids: IntArray = self._arrays["image_ids"]
        self.num_annotations = len(self._arrays["annotation_ids"])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __reduce__(self) -> tuple[type[CocoIndex], tuple[Path]]:
        return CocoIndex, (self.file,)  # a worker maps the file again

    def image(self, row: int) -> ImageEntry:
        """Return an image's entry."""
        first, last = self._arrays["name_starts"][row : row + 2]
        height, width = self._arrays["sizes"][row].tolist()
        name = os.fsdecode(self._arrays["names"][first:last].tobytes())
        return ImageEntry(int(self.image_ids[row]), name, height, width)

    def annotations(self, row: int) -> Annotations:
        """Return an image's annotations, crowds among them."""
        arrays, size = self._arrays, self._arrays["sizes"][row].tolist()
        part = slice(*arrays["starts"][row : row + 2])
        starts = arrays["rle_starts"][part.start : part.stop + 1]
        counts = arrays["rle"][starts[0] : starts[-1]].tobytes()
        bounds = (starts - starts[0]).tolist()
        return Annotations(
            ids=arrays["annotation_ids"][part],
            classes=arrays["classes"][part],
            crowd=arrays["crowd"][part].astype(bool),
            boxes=arrays["boxes"][part],
            areas=arrays["areas"][part],
            masks=[{"size": size, "counts": counts[a:b]} for a, b in pairwise(bounds)],
        )

    @property
    def annotation_counts(self) -> IntArray:
        """Number of annotations of each image, crowds among them, int64 [N]."""
        return np.diff(self._arrays["starts"])

    def trainable_rows(self) -> IntArray:
        """Return the rows of the images with an annotation that is not a crowd."""
        return self._rows_of(self._arrays["crowd"] == 0)

    def rows_with_objects(self) -> IntArray:
        """Return the rows of the images with an annotation that is no crowd and whose box and mask have pixels."""
        return self._rows_of((self._arrays["crowd"] == 0) & (self._arrays["visible"] != 0))

    def _rows_of(self, annotations: BoolArray) -> IntArray:
        owners = np.repeat(np.arange(len(self)), self.annotation_counts)
        return np.unique(owners[annotations])


@dataclass(frozen=True)
class CocoSplit:
    """Images that are trained or evaluated on.

    Attributes:
        index: annotations.
        folder: of the image files.
        rows: of the images in the index, int64.
        path: of the JSON.
    """

    index: CocoIndex
    folder: Path
    rows: IntArray
    path: Path

    @property
    def name(self) -> str:
        """Name of the data set, ``instances_train2017``."""
        return self.path.stem

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.index.class_names

    @property
    def sha256(self) -> str:
        """SHA-256 of the JSON."""
        return self.index.sha256

    @property
    def num_annotations(self) -> int:
        """Number of annotations of the images, crowds among them."""
        return int(self.index.annotation_counts[self.rows].sum())

    def annotated_rows(self) -> IntArray:
        """Return the rows of the images with an annotation that is not a crowd."""
        return np.intersect1d(self.rows, self.index.trainable_rows())


def open_split(
    annotations: Path, images: Path, *, training: bool, first: int | None = None, index_folder: Path | None = None
) -> CocoSplit:
    """Open a data set, and check that its image files exist.

    Args:
        annotations: COCO JSON.
        images: folder of the image files.
        training: leave out images without an annotation or with crowds only.
        first: only the first images; None is all.
        index_folder: folder of the index; None is that of ``annotations``.

    Raises:
        UserError: if the annotations are invalid, the images have no object, or files are missing.
    """
    index = open_index(annotations, index_folder)
    rows = (index.trainable_rows() if training else np.arange(len(index)))[:first]
    if not len(np.intersect1d(rows, index.rows_with_objects())):
        chosen = f"the first {counted(first, 'image')}" if first is not None and first < len(index) else "its images"
        raise UserError(
            f"{annotations}: no object to {'train' if training else 'evaluate'} on in {chosen}; crowds, and boxes or "
            f"masks without a pixel, are none. Name another annotation file{' or raise first' if first else ''}"
        )
    _check_files(index, rows, images)
    return CocoSplit(index, images, rows, annotations)


def open_index(annotations: Path, folder: Path | None = None) -> CocoIndex:
    """Open the index of a COCO JSON, which is written if it does not exist.

    Of processes that call it at once, one parses the JSON, and the others wait for the index or its error. Rank 0 warns
    of boxes that cannot be right.

    Args:
        annotations: COCO JSON.
        folder: of the index; None is that of ``annotations``.

    Raises:
        UserError: if the JSON is missing or invalid, or the index cannot be written.
    """
    started = time.time()
    try:
        sha256 = file_sha256(annotations)
    except FileNotFoundError:
        raise UserError(f"{annotations}: no such annotation file; correct its path, or download it") from None
    folder = folder or annotations.parent
    file = folder / f"{annotations.stem}.{sha256[:16]}.{_LAYOUT}.index"
    if not file.exists():  # it is written atomically
        _write_index(annotations, sha256, file, started)
    index = CocoIndex(file)
    if index.doubts and os.environ.get("RANK", "0") == "0":
        logger.warning("%s: %s", annotations, index.doubts)
    return index


def _write_index(annotations: Path, sha256: str, file: Path, started: float) -> None:
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                with failing_once(file.with_name(f"{file.name}.failed"), started):
                    arrays, class_names, doubts = parse_annotations(annotations)
                metadata = {"sha256": sha256, "class_names": json.dumps(class_names), "doubts": doubts}
                with replacing(file) as temporary:
                    save_file(arrays, temporary, metadata)
    except PermissionError:
        raise UserError(
            f"{folder}: the index of {annotations.name} cannot be written here; set loader.cache_dir to a folder that "
            "can be written"
        ) from None


def check_same_categories(train: CocoIndex, val: CocoIndex) -> None:
    """Check that training and validation set have the same categories.

    Raises:
        UserError: naming the first difference.
    """
    ours, theirs = (
        [f"{number}: {name}" for number, name in zip(index.category_ids, index.class_names, strict=True)]
        for index in (train, val)
    )
    difference = describe_difference(ours, theirs)
    if difference:
        raise UserError(
            f"data.detection: the categories of train and val differ ({difference}); use annotation files of one data "
            "set"
        )


def _check_files(index: CocoIndex, rows: IntArray, folder: Path) -> None:
    """Compare the names with one listing of the folder; a shared file system answers a query a file slowly."""
    try:
        present = set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no such image folder; correct its path, or download the images") from None
    names = [index.image(row).name for row in rows.tolist()]
    missing = [name for name in names if name not in present and not ("/" in name and (folder / name).is_file())]
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(names):,} annotated images are missing ({first_few(missing, 3)}); "
            "copy them here, or name the folder of the annotations' images"
        )
