"""Parsing of COCO's JSON into arrays; every error names the file, the entry and the fix.

Letters: N images, A annotations, K categories.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mrmae_ds.detection.coco_fields import KINDS, Entry, check_entries
from mrmae_ds.detection.coco_masks import boxes_of_rle, check_boxes, describe_doubts, encode_mask
from mrmae_ds.detection.rle import mask_api
from mrmae_ds.errors import UserError


def parse_annotations(path: Path) -> tuple[dict[str, npt.NDArray[Any]], list[str], str]:
    """Read a COCO JSON of instances.

    Returns:
        Arrays by name, the K class names, and a warning about its boxes, "" if there is none. ``image_ids`` [N]
        (ascending), ``sizes`` [N, 2], ``names`` (bytes, joined) and ``name_starts`` [N + 1]; ``starts`` [N + 1] of each
        image's annotations, ``annotation_ids``, ``classes`` (0 to K - 1), ``crowd``, ``visible`` (box and mask have
        pixels), ``areas`` [A], ``boxes`` [A, 4]; ``rle`` (bytes, joined) and ``rle_starts`` [A + 1]; ``category_ids``
        [K] (ascending).

    Raises:
        UserError: if the file is invalid.
    """
    content = load_entries(path)
    images, annotations, categories = (sorted(content[kind], key=lambda entry: entry["id"]) for kind in KINDS)
    rows = {image["id"]: row for row, image in enumerate(images)}
    classes = {category["id"]: number for number, category in enumerate(categories)}
    annotations.sort(key=lambda entry: rows[entry["image_id"]])  # stable: by id within an image
    owners = np.array([rows[entry["image_id"]] for entry in annotations], dtype=np.int64)
    sizes = np.array([[image["height"], image["width"]] for image in images], dtype=np.int64).reshape(-1, 2)
    ids = np.array([entry["id"] for entry in annotations], dtype=np.int64)
    boxes = np.array([entry["bbox"] for entry in annotations], dtype=np.float64).reshape(-1, 4)
    check_boxes(path, ids, boxes, sizes[owners])
    pairs = zip(annotations, sizes[owners].tolist(), strict=True)
    masks = [encode_mask(path, entry, size) for entry, size in pairs]
    mask_boxes = boxes_of_rle(masks)
    names = [os.fsencode(image["file_name"]) for image in images]
    # One by one: pycocotools' area of a list fails beyond 255 masks.
    areas = [
        entry["area"] if "area" in entry else mask_api.area(mask)
        for entry, mask in zip(annotations, masks, strict=True)
    ]
    counts = [mask["counts"] for mask in masks]
    arrays: dict[str, npt.NDArray[Any]] = {
        "image_ids": np.array([image["id"] for image in images], dtype=np.int64),
        "sizes": sizes,
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_starts": _starts([len(name) for name in names]),
        "starts": _starts(np.bincount(owners, minlength=len(images))),
        "annotation_ids": ids,
        "classes": np.array([classes[entry["category_id"]] for entry in annotations], dtype=np.int64),
        "crowd": np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], dtype=np.uint8),
        "visible": (np.minimum(boxes, mask_boxes)[:, 2:].min(axis=1, initial=np.inf) > 0).astype(np.uint8),
        "areas": np.array(areas, dtype=np.float64),
        "boxes": boxes,
        "rle": np.frombuffer(b"".join(counts), dtype=np.uint8),
        "rle_starts": _starts([len(count) for count in counts]),
        "category_ids": np.array([category["id"] for category in categories], dtype=np.int64),
    }
    class_names = [category["name"] for category in categories]
    return arrays, class_names, describe_doubts(ids, boxes, mask_boxes, sizes[owners])


def _starts(lengths: Any) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def load_entries(path: Path) -> dict[str, list[Entry]]:
    """Read a COCO JSON and check the fields of its images, annotations and categories; masks are not checked.

    Raises:
        UserError: if the file is torn, or for the first wrong field.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a complete JSON file ({error}); copy or download it again") from None
    missing = [kind for kind in KINDS if not isinstance(content, dict) or not isinstance(content.get(kind), list)]
    if missing:
        raise UserError(
            f"{path}: no list {' and no list '.join(map(repr, missing))}; COCO's instance annotations have images, "
            "annotations and categories"
        )
    check_entries(path, content)
    return content
