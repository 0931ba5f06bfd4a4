"""Which images a run is drawn on: samples of its validation set, or files of the user's, cut as evaluation cuts them.

Shapes: N images, S x S pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.convert.folder import EXTENSIONS
from mrmae_ds.data.convert.images import open_image, pixel_limit, reason, to_rgb
from mrmae_ds.data.convert.options import MAX_SIDE, WriteOptions
from mrmae_ds.data.loaders.crop import resize_and_corner
from mrmae_ds.data.loaders.pillow import BetonSource, center_crop
from mrmae_ds.errors import UserError

MOST = 64  # columns of a figure
_NUMBER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Chosen:
    """Whole RGB images of any sizes, and what is written above each: its class's name or its file's."""

    images: tuple[Image.Image, ...]
    captions: tuple[str, ...]

    def cut(self, view: int, size: int) -> Tensor:
        """What evaluation at ``view`` pixels sees of each image, at ``size`` pixels: float32 [N, 3, S, S] in 0 to 1.

        With ``size`` equal to ``view`` these are evaluation's very pixels. Another ``size`` shows the same part of the
        image (evaluation itself would cut less off above 224 pixels), so that attention can be compared.
        """
        cuts = [center_crop(p, size) if size == view else _resized_view(p, view, size) for p in self.images]
        return torch.from_numpy(np.stack([np.asarray(cut) for cut in cuts])).permute(0, 3, 1, 2).float() / 255


def choose_images(val: Path, wanted: Sequence[str], count: int | None, usual: int) -> tuple[Chosen, str | None]:
    """The images that a command line asks for.

    Args:
        val: the .beton of the validation set; read only if images are taken from it.
        wanted: numbers of samples of ``val``; or image files and folders of them, at any depth; or nothing, which
            takes samples of ``val``, evenly spaced.
        count: how many of ``val`` or of the folders; None where each image is named.
        usual: how many where nothing is said; fewer if there are fewer, or if a figure has not so many columns.

    Returns:
        The images, and what the user should be told about the choice, if anything.

    Raises:
        UserError: for a number, path or count that cannot be, and for files that are no images.
    """
    if count is not None and count < 1:
        raise UserError(f"--num-images: at least 1 image is needed, not {count}")
    numbers = [_NUMBER.fullmatch(word) is not None for word in wanted]
    if any(numbers) and not all(numbers):
        raise UserError(
            f"--images: {wanted[numbers.index(False)]} is no number; give either numbers of the validation set or "
            "files (./7 for a file named 7)"
        )
    if not wanted or all(numbers):
        return _from_validation_set(val, [int(word) for word in wanted], count, usual), None
    return _from_files([Path(word) for word in wanted], count, usual)


def _from_validation_set(val: Path, rows: list[int], count: int | None, usual: int) -> Chosen:
    try:
        info = check_beton(val)
    except UserError as error:
        raise UserError(f"{error}; or show other images: --images FILE_OR_FOLDER") from None
    source = BetonSource(BetonFile(info))
    if rows:
        if count is not None:
            raise UserError("--num-images: the numbers after --images say how many; leave it out")
        wrong = [row for row in rows if not 0 <= row < info.num_samples]
        if wrong:
            raise UserError(
                f"--images: {val} has no image {wrong[0]}; its {info.num_samples:,} images are numbered 0 to "
                f"{info.num_samples - 1}"
            )
    else:
        rows = _evenly_spaced(info.num_samples, _how_many(count, usual, info.num_samples, str(val)))
    _check_columns(len(rows))
    images = []
    for row in rows:
        try:
            images.append(source.image(row))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of damaged files
            raise UserError(f"{val}: damaged image in sample {row} ({error}); copy or write the file again") from None
    captions = [f"{row}: {info.class_names[source.labels[row]]}" for row in rows]
    return Chosen(tuple(images), tuple(captions))


def _from_files(paths: list[Path], count: int | None, usual: int) -> tuple[Chosen, str | None]:
    files, folders = ([path for path in paths if path.is_dir() is wanted] for wanted in (False, True))
    told = None
    if folders:
        below = [file for folder in folders for file in _images_below(folder)]
        where = " and ".join(str(folder) for folder in folders)
        take = _how_many(count, usual, len(below), where)
        if count is None and take < len(below):
            told = f"{take} of the {len(below):,} images of {where}; --num-images takes more"
        files += [below[row] for row in _evenly_spaced(len(below), take)]
    elif count is not None:
        raise UserError("--num-images: the files after --images say how many; leave it out, or name a folder")
    _check_columns(len(files))
    return Chosen(tuple(_open(file) for file in files), tuple(file.name for file in files)), told


def _images_below(folder: Path) -> list[Path]:
    """All image files at any depth, sorted; hidden ones do not count."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not found:
        raise UserError(f"--images: {folder} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return found


def _open(path: Path) -> Image.Image:
    """A file's image, made RGB and upright as the scripts in data/ make it."""
    if not path.exists():
        raise UserError(f"--images: {path}: no such file or folder")
    usual = WriteOptions()
    try:
        with pixel_limit(usual.max_pixels), open_image(path) as image:
            return to_rgb(image, max_side=MAX_SIDE, max_pixels=usual.max_pixels, background=usual.background)[0]
    except Exception as error:  # a damaged file can raise anything
        why = reason(error, usual.max_pixels)
        raise UserError(f"--images: {path}: cannot be read ({why}); remove or replace it") from None


def _how_many(count: int | None, usual: int, there: int, where: str) -> int:
    if count is not None and count > there:
        raise UserError(f"--num-images: {count} images wanted, but {where} has {there:,}")
    return min(usual, there, MOST) if count is None else count


def _evenly_spaced(there: int, count: int) -> list[int]:
    """Sets and folders are mostly sorted by class, so these are images of many classes."""
    return [(2 * number + 1) * there // (2 * count) for number in range(count)]


def _check_columns(count: int) -> None:
    if count > MOST:
        raise UserError(f"--images: {count} images are too many for one figure; choose {MOST} or fewer")


def _resized_view(image: Image.Image, view: int, size: int) -> Image.Image:
    short = np.array(min(image.size))
    edges = []
    for side in image.size:
        resized, corner = (int(value) for value in resize_and_corner(np.array(side), short, view))
        edges.append((corner * side / resized, min((corner + view) * side / resized, side)))
    (left, right), (top, bottom) = edges
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
