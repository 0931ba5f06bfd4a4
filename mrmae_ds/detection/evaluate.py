"""Results in COCO's format from a detector's output, merged over ranks, and COCO's scores of them.

Shapes: n detections of an image, M side of the predicted masks, h x w the image in the model's square input, H x W the
original image, K classes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from mrmae_ds.data.types import BoolArray, IntArray
from mrmae_ds.detection.boxes import Size
from mrmae_ds.detection.coco import CocoIndex, ImageEntry
from mrmae_ds.detection.loader import DetectionBatch
from mrmae_ds.detection.rle import Rle, mask_api
from mrmae_ds.errors import UserError
from mrmae_ds.files import replacing, write_text
from mrmae_ds.units import first_few

Result = dict[str, Any]
ResultsByImage = dict[int, list[Result]]  # an image without detections has an empty list
Scores = dict[str, float | None]

SCORE_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class CocoScores:
    """COCO's scores in percent; None where there is nothing to find.

    Attributes:
        box: :data:`SCORE_NAMES` of the boxes.
        mask: :data:`SCORE_NAMES` of the masks.
        per_class: box AP and mask AP by class name.
    """

    box: Scores
    mask: Scores
    per_class: dict[str, tuple[float | None, float | None]]


def paste_mask(mask: Tensor, box: Sequence[float], height: int, width: int) -> BoolArray:
    """Sample a predicted mask at the centers of the image's pixels, and threshold it.

    Args:
        mask: probabilities, float32 [M, M].
        box: of the mask: left, top, right, bottom, in pixels of the image.
        height: H.
        width: W.

    Returns:
        bool [H, W], in columns-first memory as RLE needs it.
    """
    pasted = np.zeros((height, width), dtype=bool, order="F")
    left, top, right, bottom = box
    columns, rows = _touched(left, right, width), _touched(top, bottom, height)
    if len(columns) and len(rows):
        x, y = (
            ((torch.from_numpy(places).float() + 0.5 - low) / (high - low)) * 2 - 1
            for places, low, high in ((columns, left, right), (rows, top, bottom))
        )
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        sampled = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = (sampled >= MASK_THRESHOLD).numpy()
    return pasted


def _touched(low: float, high: float, side: int) -> IntArray:
    """Return the pixels of an axis that a box can reach; outside it the sampled mask fades to zero."""
    return np.arange(max(int(np.floor(low)) - 1, 0), min(int(np.ceil(high)) + 1, side))


def image_results(
    detections: Mapping[str, Tensor], size: Size, image: ImageEntry, category_ids: IntArray
) -> list[Result]:
    """Convert the detections of one image to COCO's results.

    Args:
        detections: as torchvision's detectors return them: ``boxes`` [n, 4] in pixels of the square input, ``labels``
            [n] (1 to K), ``scores`` [n], ``masks`` [n, 1, M, M] (probabilities in their boxes).
        size: h and w.
        image: the original.
        category_ids: of the classes, int64 [K].

    Returns:
        Entries with ``image_id``, ``category_id``, ``bbox`` (left, top, width, height in original pixels), ``score``
        and ``segmentation`` (RLE, counts as a string). Boxes that are empty in the image are left out.
    """
    scale = torch.tensor([image.width / size[1], image.height / size[0]]).repeat(2)
    limits = torch.tensor([image.width, image.height]).repeat(2)
    boxes = torch.minimum(detections["boxes"].detach().cpu().float() * scale, limits).clamp(min=0)
    masks = detections["masks"].detach().cpu().float().flatten(0, -3)
    categories = category_ids[detections["labels"].cpu().numpy() - 1]
    results = []
    for number, (box, score) in enumerate(zip(boxes.tolist(), detections["scores"].tolist(), strict=True)):
        left, top, right, bottom = box
        if right <= left or bottom <= top:
            continue
        encoded: Rle = mask_api.encode(paste_mask(masks[number], box, image.height, image.width).view(np.uint8))
        results.append(
            {
                "image_id": image.id,
                "category_id": int(categories[number]),
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
                "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode()},
            }
        )
    return results


def batch_results(
    detections: Sequence[Mapping[str, Tensor]], batch: DetectionBatch, category_ids: IntArray
) -> ResultsByImage:
    """Convert the detections of a batch; images that only pad it are left out.

    Args:
        detections: of each image, see :func:`image_results`.
        batch: the images.
        category_ids: of the classes, int64 [K].
    """
    images = zip(detections, batch.sizes, batch.entries, batch.valid, strict=True)
    return {entry.id: image_results(found, size, entry, category_ids) for found, size, entry, valid in images if valid}


def gather_results(own: ResultsByImage) -> list[ResultsByImage] | None:
    """Collect the results of all ranks on rank 0; None on the others. All ranks must call it."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts, dst=0)
    return parts


def merge_results(parts: Sequence[ResultsByImage], image_ids: IntArray) -> list[Result]:
    """Merge the results of the ranks; an image that several of them have counts once.

    Args:
        parts: by rank.
        image_ids: of the images to evaluate on.

    Returns:
        The results in the order of ``image_ids``, whatever the number of ranks.

    Raises:
        UserError: if no rank has an image: its objects would count as missed.
    """
    merged: ResultsByImage = {}
    for part in reversed(parts):
        merged |= part
    missing = [number for number in image_ids.tolist() if number not in merged]
    if missing:
        raise UserError(
            f"no rank has evaluated {len(missing):,} of {len(image_ids):,} images (ids {first_few(missing, 3)}); "
            "evaluate again"
        )
    return [result for number in image_ids.tolist() for result in merged[number]]


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write results as COCO's evaluation servers take them."""
    write_text(path, json.dumps(list(results)))


def ground_truth(index: CocoIndex, rows: IntArray) -> COCO:
    """Build pycocotools' data set from the annotations of some images."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows.tolist():
        image, own = index.image(row), index.annotations(row)
        images.append({"id": image.id, "height": image.height, "width": image.width})
        columns = zip(own.classes, own.crowd, own.areas, own.boxes, own.masks, strict=True)
        for kind, crowd, area, box, mask in columns:
            annotations.append(
                {
                    # COCOeval takes a match with id 0 for none.
                    "id": len(annotations) + 1,
                    "image_id": image.id,
                    "category_id": int(index.category_ids[kind]),
                    "iscrowd": int(crowd),
                    "area": float(area),
                    "bbox": box.tolist(),
                    "segmentation": mask,
                }
            )
    numbered = zip(index.category_ids.tolist(), index.class_names, strict=True)
    categories = [{"id": number, "name": name} for number, name in numbered]
    return _data_set({"images": images, "annotations": annotations, "categories": categories})


def coco_scores(results: Sequence[Result], index: CocoIndex, rows: IntArray) -> CocoScores:
    """Score results by pycocotools.

    Args:
        results: COCO's results; not changed.
        index: annotations of the data set.
        rows: of the images that were evaluated.
    """
    truth = ground_truth(index, rows)
    box, box_by_class = _score(truth, results, "bbox")
    mask, mask_by_class = _score(truth, results, "segm")
    pairs = zip(box_by_class, mask_by_class, strict=True)
    return CocoScores(box, mask, dict(zip(index.class_names, pairs, strict=True)))


def _score(truth: COCO, results: Sequence[Result], kind: Literal["bbox", "segm"]) -> tuple[Scores, list[float | None]]:
    """Return the scores of boxes or masks, and AP by class."""
    own = [dict(result) for result in results]  # pycocotools writes into them
    if kind == "segm":
        for result in own:
            del result["bbox"]  # or the sizes of detections would be those of their boxes
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes fails on an empty list.
        found = truth.loadRes(own) if own else _data_set({**truth.dataset, "annotations": []})
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoUs, recalls, classes; all sizes, 100 detections
    scores = dict(zip(SCORE_NAMES, map(_percent, evaluation.stats), strict=True))
    return scores, [_percent(_mean(precision[:, :, number])) for number in range(precision.shape[2])]


def _data_set(content: dict[str, Any]) -> COCO:
    data_set = COCO()
    data_set.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        data_set.createIndex()
    return data_set


def _mean(values: Any) -> float:
    """Return the mean of the values that are not -1, which stands for nothing to find; -1 if there are none."""
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def _percent(value: float) -> float | None:
    return None if value == -1 else 100 * float(value)


def write_per_class(scores: CocoScores, path: Path) -> None:
    """Write AP by class as CSV; classes without annotations are blank."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "box AP", "mask AP"))
        for name, values in scores.per_class.items():
            writer.writerow((name, *("" if value is None else f"{value:.2f}" for value in values)))
