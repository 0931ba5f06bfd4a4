"""Small COCO data sets: one that is written by the tests, and 100 + 100 real images where they are installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api

from tests.support.processes import REPOSITORY
from tests.support.sample_data import photograph

SIZES = ((96, 64), (64, 96), (80, 80), (50, 70), (96, 96), (33, 90))  # width, height
CATEGORIES = {1: "person", 3: "car", 7: "train", 90: "toothbrush"}  # ids with holes, as COCO's
# Real COCO: images/{train,val} and annotations/instances_{train,val}{,_poly}.json of 100 images each.
COCO200 = Path(os.environ.get("COCO200", REPOSITORY / "datasets" / "coco200"))

needs_coco200 = pytest.mark.skipif(
    not (COCO200 / "annotations").is_dir(), reason=f"needs 200 images of COCO in {COCO200} (COCO200=FOLDER)"
)


def small_coco() -> dict[str, Any]:
    """Return annotations of six images: every form of mask, a crowd, an image with a crowd alone, an empty image."""
    images = [
        {"id": 10 * number + 7, "file_name": f"{number}.jpg", "width": width, "height": height}
        for number, (width, height) in enumerate(SIZES)
    ]
    annotations: list[dict[str, Any]] = []
    for image in images[:4]:
        for place, category in enumerate(CATEGORIES):
            box = 3 + 10 * place, 2 + 7 * place, 9 + 2 * place, 8 + 5 * place
            annotations.append(_annotation(image, category, box, len(annotations)))
    annotations.append(_annotation(images[0], 1, (40, 30, 30, 20), len(annotations)) | {"iscrowd": 1})
    annotations.append(_annotation(images[4], 1, (5, 5, 30, 20), len(annotations)) | {"iscrowd": 1})
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(image: dict[str, Any], category: int, box: tuple[int, int, int, int], number: int) -> dict[str, Any]:
    """Annotate a rectangle; polygons, uncompressed and compressed RLE take turns."""
    left, top, width, height = box
    mask = np.zeros((image["height"], image["width"]), dtype=np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    right, bottom = left + width, top + height
    compressed = mask_api.encode(mask)
    forms: list[Any] = [
        [[left, top, right, top, right, bottom, left, bottom]],
        {"size": list(mask.shape), "counts": _runs(mask)},
        {"size": list(mask.shape), "counts": compressed["counts"].decode()},
    ]
    return {
        "id": 1000 - number,
        "image_id": image["id"],
        "category_id": category,
        "bbox": list(box),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": forms[number % 3],
    }


def _runs(mask: np.ndarray) -> list[int]:
    """Return the lengths of the runs of equal pixels, columns first, from zeros."""
    flat = np.concatenate([[0], mask.T.ravel()])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff([0, *edges, mask.size]).tolist()


def write_coco(folder: Path, content: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Write a data set of crops of a photograph; return the JSON and the image folder."""
    content = content or small_coco()
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(SIZES):
        crop = photograph().crop((20 * number, 30 * number, 20 * number + width, 30 * number + height))
        crop.save(images / f"{number}.jpg", quality=95)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path, images
