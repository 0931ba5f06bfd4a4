"""Images inside tar archives, read at their place without unpacking: WebDataset's shards, ImageNet's archives."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from mrmae_ds.data.convert.images import ImageError, open_content
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.data.convert.splits import is_hidden, is_image, kind_of
from mrmae_ds.errors import UserError
from mrmae_ds.records.progress import progress_bar
from mrmae_ds.units import first_few, printable


class TarMember(NamedTuple):
    """Place of a file in an archive: the archive, the file's name in it, its first byte and its number of bytes."""

    archive: str
    name: str
    offset: int
    size: int


class TarStore:
    """Members of tar archives."""

    def open(self, place: TarMember) -> Image.Image:
        """Open an image by its content."""
        return open_content(read_member(place))

    def name(self, place: TarMember) -> str:
        """Return archive and member."""
        return f"{place.archive}:{place.name}"

    def file(self, place: TarMember) -> str:
        """Return the path of the archive."""
        return place.archive


def read_member(place: TarMember) -> bytes:
    """Return the content of a member; raises ImageError if the archive has become shorter."""
    with open(place.archive, "rb") as file:
        file.seek(place.offset)
        content = file.read(place.size)
    if len(content) != place.size:
        raise ImageError("beyond the end of its archive")
    return content


def list_members(path: Path, place: TarMember | None = None, progress: tqdm[Any] | None = None) -> Iterator[TarMember]:
    """Yield the regular files of an uncompressed archive, in order.

    Args:
        path: the archive.
        place: a member of it that is an archive itself, to list instead.
        progress: bar of bytes, which the bytes of the archive are added to.

    Raises:
        UserError: if it is compressed, truncated or no archive, or holds links.
    """
    counted = 0
    start, size = (place.offset, place.size) if place else (0, path.stat().st_size)
    where = f"{path}:{printable(place.name)}" if place else str(path)
    try:
        with path.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=_Window(file, start, size), mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if progress is not None:
                        progress.update(archive.offset - counted)
                        counted = archive.offset
                    if member.islnk() or member.issym() or member.issparse():
                        raise tarfile.ReadError(
                            f"{printable(member.name)} is a link or has holes, so its content is elsewhere"
                        )
                    if member.isreg():
                        yield TarMember(str(path), member.name, start + member.offset_data, member.size)
                if archive.offset + tarfile.BLOCKSIZE > size:
                    raise tarfile.ReadError("its end is missing")
                if progress is not None:
                    progress.update(size - counted)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{where}: no complete, uncompressed tar archive ({error}); fetch or gunzip it") from error


class _Window:
    """Part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size

    def tell(self) -> int:
        """Return the position in the part."""
        return self._file.tell() - self._start

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a position in the part."""
        return self._file.seek(self._start + place) - self._start

    def read(self, count: int = -1) -> bytes:
        """Read to the end of the part at most."""
        left = max(0, self._size - self.tell())
        return self._file.read(left if count < 0 else min(count, left))


def index_bar(paths: Sequence[Path]) -> tqdm[Any]:
    """Return the progress bar of the bytes of archives that are read for the places of their members."""
    total = sum(path.stat().st_size for path in paths)
    return progress_bar(
        total=total, desc=f"index {first_few([path.name for path in paths], 1)}", unit="B", unit_scale=True
    )


def open_shards(paths: Sequence[Path]) -> ImageIndex:
    """Open WebDataset's shards: KEY.jpg with KEY.cls, or a KEY.json that has "label".

    Args:
        paths: the archives, in order.

    Returns:
        The images, in the order of the archives.

    Raises:
        UserError: for an image without a label, a negative label, and archives without images.
    """
    places: list[TarMember] = []
    labels: list[int] = []
    ignored: Counter[str] = Counter()
    with index_bar(paths) as bar:
        for path in paths:
            images, known = _index_shard(path, ignored, bar)
            missing = [member.name for key, member in images.items() if key not in known]
            if missing:
                raise UserError(
                    f"{path}: {printable(missing[0])} has no label; expected a file of the same name with .cls, or "
                    ".json with `label`"
                )
            places += images.values()
            labels += [known[key] for key in images]
    if not places:
        raise UserError(f"{', '.join(map(str, paths[:3]))}: no images")
    if min(labels) < 0:
        raise UserError(f"{paths[0]}: the label {min(labels)} is negative; every image needs one, 0 or more")
    return ImageIndex(TarStore(), places, np.array(labels, dtype=np.int64), ignored)


def _index_shard(path: Path, ignored: Counter[str], bar: tqdm[Any]) -> tuple[dict[str, TarMember], dict[str, int]]:
    """Return the images and the labels of a shard by key, and count its other files."""
    images: dict[str, TarMember] = {}
    known: dict[str, int] = {}
    for member in list_members(path, progress=bar):
        folder, _, name = member.name.rpartition("/")
        parts = [part for part in member.name.split("/") if part not in (".", "..")]
        if any(map(is_hidden, parts)):  # macOS's ._1.jpg beside 1.jpg
            ignored["hidden files"] += 1
            continue
        key, _, extension = name.partition(".")
        key = f"{folder}/{key}"
        if is_image(f"x.{extension}"):
            if key in images:
                raise UserError(f"{path}: {first_few([member.name, images[key].name], 2)} are two images of one sample")
            images[key] = member
        elif extension in ("cls", "json"):
            label = _label(path, member)
            if label is not None and known.setdefault(key, label) != label:
                raise UserError(f"{path}: {printable(member.name)} says the label {label}, another file {known[key]}")
        else:
            ignored[kind_of(name)] += 1
    return images, known


def _label(path: Path, member: TarMember) -> int | None:
    """Return the label in a .cls or .json; None for a .json without one."""
    content = read_member(member)
    try:
        if member.name.endswith(".cls"):
            return int(content)
        label = json.loads(content).get("label")
        if isinstance(label, (bool, float)):
            raise TypeError(f"{label} is no whole number")
        return None if label is None else int(label)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: {printable(member.name)} is no label ({error})") from error
