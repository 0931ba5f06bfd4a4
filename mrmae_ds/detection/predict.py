"""Detections of a trained detector on image files: figures and results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mrmae_ds.detection.coco import ImageEntry
from mrmae_ds.detection.draw import detected_objects, draw_objects
from mrmae_ds.detection.evaluate import Result, image_results
from mrmae_ds.detection.jitter import eval_jitter, jitter_image
from mrmae_ds.detection.loader import DetectionBatch
from mrmae_ds.detection.saved import open_detector
from mrmae_ds.errors import UserError
from mrmae_ds.figures.select_images import images_below, left_out, open_upright
from mrmae_ds.files import check_writable, replacing, write_text
from mrmae_ds.units import first_few


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

    Figure and results are of the upright image, turned by its EXIF orientation.

    Args:
        source: as in :class:`Predictor`.
        images: as in :func:`plan_outputs`.
        out: folder for the files.
        score: least score that is drawn; the results have all detections.
        device: to compute on.

    Yields:
        Path of each figure, and the number of objects in it.

    Raises:
        UserError: as :func:`plan_outputs` and :class:`Predictor`, if ``out`` cannot be written, and, when all others
            are written, if images cannot be read.
    """
    planned = plan_outputs(images, out)
    check_writable(planned[0].figure)
    predictor = Predictor(source, device)
    class_names = dict(zip(predictor.category_ids.tolist(), predictor.class_names, strict=True))
    problems = []
    for number, (path, name, figure) in enumerate(planned):
        try:
            image = open_upright(path, max_side=None)
        except UserError as error:
            problems.append(str(error))
            continue
        results = predictor.detect(image, ImageEntry(number, name, image.height, image.width))
        objects = detected_objects(results, predictor.category_ids, predictor.class_names, score)
        with replacing(figure) as temporary:
            draw_objects(image, objects).save(temporary, format="PNG")
        named: list[dict[str, Any]] = [
            {"file_name": name, "category": class_names[result["category_id"]]} | result for result in results
        ]
        write_text(figure.with_suffix(".json"), json.dumps(named, indent=1, ensure_ascii=False) + "\n")
        yield figure, len(objects)
    if problems:
        raise left_out(problems, len(planned))


class PlannedImage(NamedTuple):
    """An image to detect objects in.

    Attributes:
        path: of the image.
        name: path below the folder that was given; of a file its name.
        figure: path of the PNG; the JSON is beside it.
    """

    path: Path
    name: str
    figure: Path


def plan_outputs(images: Sequence[Path], out: Path) -> list[PlannedImage]:
    """List images, each once, and name their figures so that none replaces another or an image.

    A figure has the name of its image without the extension. If two are equal, all have the path below the folder that
    the images share, and the extension too if two differ in it alone.

    Args:
        images: files, and folders whose images are taken at any depth, except those in ``out``.
        out: folder for the figures.

    Raises:
        UserError: if there are no images, or a figure would be beside an image.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # by absolute path: as given, and below the folder that was given
    for path in images:
        folder = path if path.is_dir() else path.parent
        for file in images_below(path) if path.is_dir() else [path]:
            if not _is_below(file, out) or not _is_below(out, folder):
                found.setdefault(_absolute(file), (file, file.relative_to(folder)))
    if not found:
        raise UserError(f"{first_few(images, 3)}: no images but those of {out}; name other images")
    shared = os.path.commonpath([place.parent for place in found])
    whole = [place.relative_to(shared) for place in found]
    below = [name for _, name in found.values()]
    for names in ([name.with_suffix("") for name in below], [name.with_suffix("") for name in whole], whole):
        if len(set(names)) == len(names):
            break
    figures = [out / f"{name}.png" for name in names]
    folders = {place.parent.resolve() for place in found}
    beside = next((figure.parent for figure in figures if figure.parent.resolve() in folders), None)
    if beside is not None:
        raise UserError(
            f"{beside}: the output would be beside the images and could replace files of theirs; name another folder"
        )
    pairs = zip(found.values(), figures, strict=True)
    return [PlannedImage(path, str(name), figure) for (path, name), figure in pairs]


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _is_below(path: Path, folder: Path) -> bool:
    return _absolute(folder) in _absolute(path).parents
