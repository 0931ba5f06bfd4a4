"""Parsing and checks of COCO's JSON; every error names the file, the entry and the fix.

Letters: N images, A annotations, K categories.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mrmae_ds.detection.rle import Rle, mask_api
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, first_few

Entry = dict[str, Any]
_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_POINTS = 3  # of the smallest polygon


def parse_annotations(path: Path) -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    """Read a COCO JSON of instances.

    Returns:
        Arrays by name, and the K class names. ``image_ids`` [N] (ascending), ``sizes`` [N, 2], ``names`` (bytes,
        joined) and ``name_starts`` [N + 1]; ``starts`` [N + 1] of each image's annotations, ``annotation_ids``,
        ``classes`` (0 to K - 1), ``crowd``, ``areas`` [A], ``boxes`` [A, 4]; ``rle`` (bytes, joined) and
        ``rle_starts`` [A + 1]; ``category_ids`` [K] (ascending).

    Raises:
        UserError: if the file is invalid.
    """
    content = _load(path)
    images, annotations, categories = (sorted(content[kind], key=lambda entry: entry["id"]) for kind in _KEYS)
    _check_references(path, images, annotations, categories)
    rows = {image["id"]: row for row, image in enumerate(images)}
    classes = {category["id"]: number for number, category in enumerate(categories)}
    annotations.sort(key=lambda entry: rows[entry["image_id"]])  # stable: by id within an image
    masks = [_encode(path, entry, images[rows[entry["image_id"]]]) for entry in annotations]
    names = [image["file_name"].encode() for image in images]
    per_image = np.bincount([rows[entry["image_id"]] for entry in annotations], minlength=len(images))
    boxes = [entry["bbox"] for entry in annotations]
    areas = [entry.get("area", mask_api.area(mask)) for entry, mask in zip(annotations, masks, strict=True)]
    counts = [mask["counts"] for mask in masks]
    arrays: dict[str, npt.NDArray[Any]] = {
        "image_ids": np.array([image["id"] for image in images], dtype=np.int64),
        "sizes": np.array([[image["height"], image["width"]] for image in images], dtype=np.int64).reshape(-1, 2),
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_starts": _starts([len(name) for name in names]),
        "starts": _starts(per_image),
        "annotation_ids": np.array([entry["id"] for entry in annotations], dtype=np.int64),
        "classes": np.array([classes[entry["category_id"]] for entry in annotations], dtype=np.int64),
        "crowd": np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], dtype=np.uint8),
        "areas": np.array(areas, dtype=np.float64),
        "boxes": np.array(boxes, dtype=np.float64).reshape(-1, 4),
        "rle": np.frombuffer(b"".join(counts), dtype=np.uint8),
        "rle_starts": _starts([len(count) for count in counts]),
        "category_ids": np.array([category["id"] for category in categories], dtype=np.int64),
    }
    return arrays, [category["name"] for category in categories]


def _starts(lengths: Any) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _load(path: Path) -> dict[str, list[Entry]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not a complete JSON file ({error}); copy or download it again") from None
    missing = [kind for kind in _KEYS if not isinstance(content, dict) or not isinstance(content.get(kind), list)]
    if missing:
        raise UserError(
            f"{path}: no list {' and no list '.join(map(repr, missing))}; COCO's instance annotations have images, "
            "annotations and categories"
        )
    for kind, keys in _KEYS.items():
        for number, entry in enumerate(content[kind]):
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                raise UserError(f"{path}: {kind}[{number}] has no {absent[0]!r}; correct or remove it")
        repeated = [key for key, count in Counter(entry["id"] for entry in content[kind]).items() if count > 1]
        if repeated:
            raise UserError(
                f"{path}: {kind} with the same id: {first_few(repeated, 3)}; ids must be unique, so that nothing is "
                "counted twice"
            )
    return content


def _check_references(
    path: Path, images: Sequence[Entry], annotations: Sequence[Entry], categories: Sequence[Entry]
) -> None:
    repeated = [name for name, count in Counter(entry["name"] for entry in categories).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: categories with the same name: {first_few(repeated, 3)}; names must be unique")
    for key, entries in (("image_id", images), ("category_id", categories)):
        known = {entry["id"] for entry in entries}
        wrong = next((entry for entry in annotations if entry[key] not in known), None)
        if wrong is not None:
            raise UserError(
                f"{path}: annotation {wrong['id']} names {key} {wrong[key]}, which does not exist; add it or remove "
                "the annotation"
            )
    boxes_only = [entry["id"] for entry in annotations if not entry.get("segmentation")]
    if boxes_only:
        raise UserError(
            f"{path}: {counted(len(boxes_only), 'annotation')} without segmentation, the first with id "
            f"{boxes_only[0]}; masks cannot be trained or evaluated on boxes alone"
        )


def _encode(path: Path, annotation: Entry, image: Entry) -> Rle:
    """Convert a segmentation of any form to compressed RLE."""
    segmentation, where = annotation["segmentation"], f"{path}: annotation {annotation['id']}"
    size = [image["height"], image["width"]]
    if isinstance(segmentation, list):
        short = next((polygon for polygon in segmentation if len(polygon) < 2 * _POINTS or len(polygon) % 2), None)
        if short is not None:
            raise UserError(
                f"{where} has a polygon of {len(short)} numbers; it needs x and y of at least {_POINTS} points"
            )
        return mask_api.merge(mask_api.frPyObjects(segmentation, *size))
    if segmentation.get("size") != size:
        raise UserError(
            f"{where} has a mask of size {segmentation.get('size')}, its image {image['id']} is {size} (height, "
            "width); correct one of the two"
        )
    counts = segmentation.get("counts")
    runs = np.array(counts or [0], dtype=np.int64) if isinstance(counts, list) else run_lengths(str(counts).encode())
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:  # pycocotools leaves the rest undefined
        raise UserError(
            f"{where} has a torn mask: its runs cover {runs.sum()} of {size[0] * size[1]} pixels; download or write "
            "the file again"
        )
    return (
        mask_api.frPyObjects(segmentation, *size)
        if isinstance(counts, list)
        else {"size": size, "counts": counts.encode()}
    )


def run_lengths(counts: bytes) -> npt.NDArray[np.int64]:
    """Read compressed counts: numbers of 5 bits a character, each from the third on less the one two before it."""
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    last = digits & 0x20 == 0
    if len(digits) == 0 or not last[-1]:
        return np.zeros(1, dtype=np.int64)
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff([*starts, len(digits)])
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 0x1F) << (5 * places), starts)
    runs -= np.where(digits[last] & 0x10, 1 << (5 * lengths), 0)  # negative numbers
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs
