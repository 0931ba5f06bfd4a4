"""Select the images of a figure: validation samples or the user's files, cropped as in evaluation.

Other commands that take a user's image files read them by the same functions, with the same errors.

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
from mrmae_ds.data.convert.images import ImageError, read_upright
from mrmae_ds.data.convert.options import MAX_SIDE
from mrmae_ds.data.convert.splits import EXTENSIONS
from mrmae_ds.data.loaders.crop import resize_and_corner
from mrmae_ds.data.loaders.pillow import center_crop
from mrmae_ds.errors import UserError
from mrmae_ds.files import expand_home
from mrmae_ds.units import counted, first_few, printable

NUM_IMAGES = 8  # default
MAX_IMAGES = 64  # columns of a figure
_NUMBER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class SelectedImages:
    """Images of a figure.

    Attributes:
        images: whole RGB images of any sizes.
        captions: class or file name of each.
        note: message to the user about the selection, if any.
        problems: messages on files that are left out, because they cannot be read.
    """

    images: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    note: str | None = None
    problems: tuple[str, ...] = ()

    def check(self, written: Sequence[Path]) -> None:
        """Report the files that are left out, after the figures are ``written``.

        Raises:
            UserError: if there are any.
        """
        if self.problems:
            raise left_out(self.problems, len(self.images) + len(self.problems), written)

    def crop(self, view: int, size: int) -> Tensor:
        """Crop each image as evaluation at ``view`` pixels does, and resize it to ``size``.

        With ``size`` equal to ``view``, the pixels are exactly those of evaluation. Another ``size`` shows the same
        part of the image (evaluation at that size would crop differently above 224 pixels), so that attention can be
        compared.

        Returns:
            float32 [N, 3, S, S] in [0, 1].
        """
        crops = [center_crop(p, size) if size == view else _resized_view(p, view, size) for p in self.images]
        return torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2).float() / 255


def select_images(val: Path | None, names: Sequence[str], count: int | None, default_count: int) -> SelectedImages:
    """Select the images named on a command line.

    Args:
        val: .beton file of the validation set, read only if images are taken from it; None if there is none.
        names: numbers of samples of ``val``; or image files and folders of them, at any depth; or nothing, which
            selects samples of ``val``, evenly spaced.
        count: number of images from ``val`` or from the folders; None for the default.
        default_count: number of images without ``count``; at most those available and ``MAX_IMAGES``.

    Raises:
        UserError: for an invalid number, path or count, and if no file can be read; others are left out, see
            :meth:`SelectedImages.check`.
    """
    if count is not None and count < 1:
        raise UserError(f"--num-images: at least 1 image is needed, not {count}")
    numbers = [_NUMBER.fullmatch(name) is not None for name in names]
    if any(numbers) and not all(numbers):
        raise UserError(
            f"--images: {names[numbers.index(False)]} is not a number; give either numbers of validation images or "
            "files (./7 for a file named 7)"
        )
    if not names or all(numbers):
        if val is None:
            raise UserError("--images: give image files or folders; weights of other projects name no validation set")
        return _from_validation_set(val, [int(name) for name in names], count, default_count)
    return _from_files([Path(expand_home(name)) for name in names], count, default_count)


def _from_validation_set(val: Path, rows: list[int], count: int | None, default_count: int) -> SelectedImages:
    try:
        info = check_beton(val)
    except UserError as error:
        raise UserError(f"{error}; or select other images: --images FILE_OR_FOLDER") from None
    file = BetonFile(info)
    if rows:
        if count is not None:
            raise UserError("--num-images: not allowed with numbers after --images; omit it")
        wrong = [row for row in rows if not 0 <= row < info.num_samples]
        if wrong:
            raise UserError(
                f"--images: {val} has no image {wrong[0]}; its {info.num_samples:,} images are numbered 0 to "
                f"{info.num_samples - 1}"
            )
    else:
        rows = evenly_spaced(info.num_samples, _number_to_take(count, default_count, info.num_samples, str(val)))
    _check_columns(len(rows))
    captions = [f"{row}: {printable(info.class_names[file.labels[row]])}" for row in rows]
    return SelectedImages(tuple(file.image(row) for row in rows), tuple(captions))


def _from_files(paths: list[Path], count: int | None, default_count: int) -> SelectedImages:
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    files, folders = ([path for path in paths if path.is_dir() is folder] for folder in (False, True))
    note = None
    if folders:
        available = [file for folder in folders for file in images_below(folder)]
        where = " and ".join(str(folder) for folder in folders)
        take = _number_to_take(count, default_count, len(available), where)
        if count is None and take < len(available):
            note = f"using {take} of the {len(available):,} images of {where}; set --num-images for more"
        files += [available[row] for row in evenly_spaced(len(available), take)]
    elif count is not None:
        raise UserError("--num-images: not allowed with files after --images; omit it, or name a folder")
    _check_columns(len(files))
    opened, problems = dict[int, Image.Image](), list[str]()
    for number, file in enumerate(files):
        try:
            opened[number] = open_upright(file)
        except UserError as error:
            problems.append(str(error))
    if not opened:
        raise left_out(problems, len(files))
    return SelectedImages(tuple(opened.values()), tuple(files[n].name for n in opened), note, tuple(problems))


def images_below(folder: Path) -> list[Path]:
    """Return all image files at any depth, sorted, without hidden ones.

    Raises:
        UserError: if there are none.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(EXTENSIONS))})")
    return files


def open_upright(path: Path, max_side: int | None = MAX_SIDE) -> Image.Image:
    """Open an image as RGB and upright, by default like the conversion to .beton.

    Args:
        path: of the file.
        max_side: pixels; a longer side is reduced to it. None keeps the size.

    Raises:
        UserError: if it is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        return read_upright(path, max_side)
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove or replace it") from None


def left_out(problems: Sequence[str], count: int, written: Sequence[Path] = ()) -> UserError:
    """Return the error of a command that writes a result for each of ``count`` images except unreadable ones.

    Args:
        problems: messages of :func:`open_upright`, at least one.
        count: number of images, unreadable ones among them.
        written: files that hold the results of the others, where the command has not printed them.
    """
    shown = first_few(problems, 3)
    if count == 1:
        return UserError(shown)
    where = f"in {', '.join(map(str, written))}" if written else "written"
    others = "so nothing is written" if len(problems) == count else f"the others are {where}"
    return UserError(f"{len(problems):,} of {counted(count, 'image')} left out, {others}: {shown}")


def _number_to_take(count: int | None, default_count: int, available: int, where: str) -> int:
    if count is not None and count > available:
        raise UserError(f"--num-images: {count} is more than the {available:,} images of {where}")
    return min(default_count, available, MAX_IMAGES) if count is None else count


def evenly_spaced(total: int, count: int) -> list[int]:
    """Space `count` indices evenly: they cover many classes, because most data sets and folders are sorted by class."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _check_columns(count: int) -> None:
    if count > MAX_IMAGES:
        raise UserError(f"--images: {count} images are too many for one figure; select {MAX_IMAGES} or fewer")


def _resized_view(image: Image.Image, view: int, size: int) -> Image.Image:
    short = np.array(min(image.size))
    edges = []
    for side in image.size:
        resized, corner = (int(value) for value in resize_and_corner(np.array(side), short, view))
        edges.append((corner * side / resized, min((corner + view) * side / resized, side)))
    (left, right), (top, bottom) = edges
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
