"""Detections of a trained detector on image files: figures and results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mrmae_ds.data.convert.images import ImageError, read_rgb
from mrmae_ds.detection.coco import ImageEntry
from mrmae_ds.detection.draw import detected_objects, draw_objects
from mrmae_ds.detection.evaluate import Result, image_results
from mrmae_ds.detection.jitter import eval_jitter, jitter_image
from mrmae_ds.detection.loader import DetectionBatch
from mrmae_ds.detection.saved import open_detector
from mrmae_ds.errors import UserError
from mrmae_ds.files import replacing, write_text


class Predictor:
    """A trained detector.

    Args:
        source: folder of a finished stage ``detect``, or a weights file of a whole detector.
        device: to compute on.

    Attributes:
        class_names: of the classes.
        category_ids: of the classes in the training set, int64 [K].

    Raises:
        UserError: as :func:`~mrmae_ds.detection.saved.open_detector`.
    """

    def __init__(self, source: Path, device: torch.device) -> None:
        saved = open_detector(source)
        metadata = saved.metadata
        self.class_names: tuple[str, ...] = tuple(metadata["class_names"])
        self.category_ids = np.array(metadata["category_ids"], dtype=np.int64)
        self.model = saved.load().to(device)
        self.device, self._side = device, saved.image_size
        self._statistics = [
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (metadata["mean"], metadata["std"])
        ]

    @torch.no_grad()
    def detect(self, image: Image.Image, entry: ImageEntry) -> list[Result]:
        """Return the detections in an RGB image as COCO's results, in its pixels."""
        jitter = eval_jitter(image.height, image.width, self._side)
        square = np.zeros((self._side, self._side, 3), dtype=np.uint8)
        square[: jitter.size[0], : jitter.size[1]] = jitter_image(image, jitter)
        batch = DetectionBatch(
            images=torch.from_numpy(square).permute(2, 0, 1)[None].to(self.device),
            sizes=(jitter.size,),
            entries=(entry,),
            indices=torch.zeros(1, dtype=torch.int64),
            valid=(True,),
            targets=(),
        )
        (found,) = self.model(batch.normalized(*self._statistics), batch.sizes)
        return image_results(found, jitter.size, entry, self.category_ids)


def detect_images(
    source: Path, images: Sequence[Path], out: Path, score: float, device: torch.device
) -> Iterator[tuple[Path, int]]:
    """Detect the objects in image files; write a figure (PNG) and the results (JSON) of each.

    Args:
        source: as in :class:`Predictor`.
        images: the files.
        out: folder for the files.
        score: least score that is drawn; the results have all detections.
        device: to compute on.

    Yields:
        Path of each figure, and the number of objects in it.

    Raises:
        UserError: if two images have the same name, one cannot be read, or the source holds no detector.
    """
    stems = [path.stem for path in images]
    repeated = next((stem for stem in stems if stems.count(stem) > 1), None)
    if repeated is not None:
        raise UserError(f"{repeated}: two images have this name; their figures would overwrite each other, rename one")
    predictor = Predictor(source, device)
    names = dict(zip(predictor.category_ids.tolist(), predictor.class_names, strict=True))
    for number, path in enumerate(images):
        try:
            image = read_rgb(path)
        except (OSError, ImageError) as error:
            raise UserError(f"{path}: not a readable image ({error})") from None
        results = predictor.detect(image, ImageEntry(number, path.name, image.height, image.width))
        objects = detected_objects(results, predictor.category_ids, predictor.class_names, score)
        figure = out / f"{path.stem}.png"
        with replacing(figure) as temporary:
            draw_objects(image, objects).save(temporary, format="PNG")
        named: list[dict[str, Any]] = [
            {"file_name": path.name, "category": names[result["category_id"]]} | result for result in results
        ]
        write_text(figure.with_suffix(".json"), json.dumps(named, indent=1) + "\n")
        yield figure, len(objects)
