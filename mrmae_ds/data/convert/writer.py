"""Conversion of an image data set to a .beton: atomic, without undecodable images, and without hanging."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mrmae_ds.data.beton.copies import find_copies
from mrmae_ds.data.beton.file import BetonFile, pixel_digest, tables_sha256
from mrmae_ds.data.beton.file_writer import BetonWriter, StoredImage
from mrmae_ds.data.beton.sidecar import (
    SIDECAR_FORMAT,
    BetonInfo,
    check_beton,
    describe_content,
    read_sidecar,
    sidecar_path,
)
from mrmae_ds.data.convert.expected_size import announce_size
from mrmae_ds.data.convert.images import pixel_limit, reason, warn_of_dark
from mrmae_ds.data.convert.journal import Journal, SampleBatch
from mrmae_ds.data.convert.jpegs import check_jpegtran, shaping, store, stored_by
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.pool import map_in_order
from mrmae_ds.data.convert.skipped import Skipped, too_many, write_report
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256, flush_folder, write_text
from mrmae_ds.records.progress import progress_bar
from mrmae_ds.units import counted, first_few, printable

SAVE_EVERY_S = 2.0  # between two lines of the journal: what an interruption costs at most
_ENOUGH = 1000  # unreadable images beyond the limit, after which the rest is not read
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ImageDataset(Protocol):
    """Indexed sequence of (image, label), for example a torchvision data set.

    Four methods are optional: ``name(index) -> str`` is the origin of an image, for messages; ``label(index) -> int``
    is its label without reading it, which distinguishes a class whose images are all unreadable from an empty one;
    ``digest() -> str`` identifies the samples and their order, and ``stamp(index) -> str`` the state of a sample's file
    (size and time). With both of these, an interrupted conversion continues.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image of any mode and its label in 0..classes-1. If it raises, the image counts as unreadable."""
        ...


class _Encoded(NamedTuple):
    """An image as it is stored, with the digest of its pixels; ``kinds`` are the conversions that it needed."""

    content: bytes
    width: int
    height: int
    label: int
    pixels: int | None
    raw: bool
    kinds: list[str]


@dataclass
class _Tally:
    """Counts of what was written."""

    class_counts: list[int]
    modes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, image: StoredImage) -> None:
        """Count an image that was written."""
        self.class_counts[image.label] += 1
        self.modes["raw" if image.raw else "JPEG"] += 1


def write_beton(
    dataset: ImageDataset,
    path: str | Path,
    options: WriteOptions | None = None,
    *,
    class_names: Sequence[str],
    name: str,
    source: str,
    origin: Mapping[str, Any] | None = None,
    ignored: Mapping[str, int] | None = None,
    train: tuple[Path, ImageDataset] | None = None,
    keep_journal: bool = False,
) -> BetonInfo:
    """Write images as JPEGs or raw pixels into a .beton, and its sidecar.

    Every image is decoded completely and converted to RGB (``images.to_rgb``). Unreadable ones are left out and listed
    in the sidecar and in a report beside it, up to ``options.max_bad``. The file appears under its name when it is
    complete; an older one stays until then. The same images give the same bytes with any number of workers. If it is
    interrupted, the same call continues from its journal where the data set has ``stamp`` and ``digest``, as
    ``index.ImageIndex`` has.

    Args:
        dataset: the images.
        path: the .beton; its folder is created if missing.
        options: of the conversion.
        class_names: in the order of the labels.
        name: of the data set, as tables show it.
        source: description of the images.
        origin: arguments that open the source again, for ``verify --source`` (``compare.open_origin``).
        ignored: number of files of the source that are no images, by extension; for the record.
        train: the written training set and its images, to find validation images that are copies of them.
        keep_journal: leave the journal, by which the same call finds that the file is complete.

    Returns:
        The written data set.

    Raises:
        UserError: for an empty set, a label without a class, more unreadable images than allowed, a class without
            readable images, a worker that died or is stuck (naming the image), a full disk, ``jpegtran`` that is
            missing where ``options`` need it.
    """
    path, options = Path(path), options or WriteOptions()
    check_jpegtran(options)
    if len(dataset) == 0:
        raise UserError(f"{path}: nothing to write, the data set is empty")
    about = {"name": name, "source": source, "origin": origin, "ignored": dict(ignored or {})}
    digest = getattr(dataset, "digest", lambda: None)()
    identity = {**shaping(options), **about, "classes": list(class_names), "places of images": digest}
    journal = Journal(path, identity, getattr(dataset, "stamp", None))
    with _disk_errors(path, journal), journal:
        if journal.sidecar is None:
            tally = _write_images(dataset, path, journal, options, class_names)
            _check_classes(dataset, path, tally, class_names)
            warn_of_dark(path, tally.kinds)
            journal.finish({**_describe(journal.partial, tally, options, class_names), **about})
        _publish(path, journal, dataset, train)
        if not keep_journal:
            journal.remove()
    return check_beton(path)


def _publish(path: Path, journal: Journal, dataset: ImageDataset, train: tuple[Path, ImageDataset] | None) -> None:
    """Give the complete file its name, and write its report and sidecar. A repeated call changes nothing."""
    assert journal.sidecar is not None
    sidecar = dict(journal.sidecar)
    write_report(path, [Skipped(**entry) for entry in sidecar["skipped"]])
    if journal.partial.exists():
        # A .beton never stands beside the sidecar of another.
        sidecar_path(path).unlink(missing_ok=True)
        os.replace(journal.partial, path)
        flush_folder(path.parent)
    name, train_info = _stored_name(sidecar, dataset), check_beton(train[0]) if train else None
    copies = find_copies(BetonFile(describe_content(path, sidecar)), BetonFile(train_info) if train_info else None)
    train_name = _stored_name(read_sidecar(train[0]), train[1]) if train else name
    sidecar["copies"] = copies.describe(train_info, name, train_name)
    write_text(sidecar_path(path), json.dumps(sidecar, indent=1) + "\n")


def _stored_name(sidecar: Mapping[str, Any], dataset: ImageDataset) -> Callable[[int], str]:
    """Return the function that names a row of the file; the data set has the images that were left out as well."""
    skipped = [entry["row"] for entry in sidecar["skipped"]]
    rows = np.setdiff1d(np.arange(len(dataset)), skipped)
    return lambda row: _name(dataset, int(rows[row]))


def _write_images(
    dataset: ImageDataset, path: Path, journal: Journal, options: WriteOptions, class_names: Sequence[str]
) -> _Tally:
    """Convert all images that the journal does not have, and write the readable ones to its partial file."""
    count, limit, done = len(dataset), options.bad_limit(len(dataset)), journal.done
    tally = _Tally([0] * len(class_names), kinds=done.kinds, skipped=done.skipped)
    for image in done.images:
        tally.add(image)
    start, batch, row = len(done), SampleBatch(), len(done) - 1
    if not start:
        announce_size(path, _Converter(dataset, options, 0).size, count, options)
    began, cpu_began = time.monotonic(), _cpu_seconds()
    results = map_in_order(
        _Converter(dataset, options, start),
        count - start,
        workers=options.num_workers,
        timeout_s=options.timeout_s,
        name=lambda item: _name(dataset, start + item),
    )
    with (
        closing(results),
        BetonWriter(journal.partial, count, options.max_side, options.jpegs != "encode", done.images) as file,
    ):
        saved = time.monotonic()
        bar = progress_bar(results, initial=start, total=count, desc=path.stem, unit="image")
        for row, (stamp, result) in enumerate(bar, start):
            batch.stamps.append(stamp)
            if isinstance(result, str):
                batch.skipped.append(Skipped(row, _name(dataset, row), result))
                tally.skipped.append(batch.skipped[-1])
                if len(tally.skipped) > limit + _ENOUGH:
                    break
            else:
                _check_label(result.label, dataset, row, class_names)
                batch.kinds.update(result.kinds)
                if len(tally.skipped) <= limit:
                    batch.images.append(file.append(*result[:-1]))
                    tally.add(batch.images[-1])
            if time.monotonic() - saved >= SAVE_EVERY_S and len(tally.skipped) <= limit:
                journal.add(batch, file.sync())
                tally.kinds.update(batch.kinds)
                batch, saved = SampleBatch(), time.monotonic()
        if len(tally.skipped) > limit:
            write_report(path, tally.skipped)
            raise too_many(path, tally.skipped, row + 1, count, limit)
        journal.add(batch, file.sync())
        tally.kinds.update(batch.kinds)
    if not start:
        tally.seconds, tally.cpu_seconds = time.monotonic() - began, _cpu_seconds() - cpu_began
    return tally


def _check_label(label: int, dataset: ImageDataset, row: int, class_names: Sequence[str]) -> None:
    """Check that a label has a class; raises UserError otherwise."""
    if not 0 <= label < len(class_names):
        classes = counted(len(class_names), "class")
        raise UserError(f"{_name(dataset, row)}: its label is {label}, but there must be {classes}, labels from 0")


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _describe(partial: Path, tally: _Tally, options: WriteOptions, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the sidecar's description of a written file."""
    return {
        "format": SIDECAR_FORMAT,
        "num_samples": sum(tally.class_counts),
        "class_names": list(class_names),
        "class_counts": tally.class_counts,
        **asdict(options),
        "modes": dict(sorted(tally.modes.items())),
        "workers": options.num_workers,
        "size": partial.stat().st_size,
        "sha256": file_sha256(partial),
        "tables_sha256": tables_sha256(np.memmap(partial, dtype=np.uint8, mode="r").view(np.ndarray)),
        "versions": stored_by(options),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(tally.seconds, 3),
        "cpu_seconds": round(tally.cpu_seconds, 3),
        "converted": dict(tally.kinds.most_common()),
        "skipped": [asdict(entry) for entry in tally.skipped],
    }


class _Converter:
    """Function of the workers: an item to the stamp of its file, and the stored image or why it is unreadable.

    The items are the rows of the data set from ``start``.
    """

    def __init__(self, dataset: ImageDataset, options: WriteOptions, start: int) -> None:
        self.dataset, self.options, self.start = dataset, options, start
        self._stamp = getattr(dataset, "stamp", lambda row: "")

    def __call__(self, item: int) -> tuple[str, _Encoded | str]:
        """Convert one image; never raises."""
        row = self.start + item
        return self._stamp(row), self._convert(row)

    def size(self, row: int) -> tuple[int, bool] | None:
        """Return the bytes of an image and whether they are raw pixels; None if it is unreadable."""
        result = self._convert(row)
        return None if isinstance(result, str) else (len(result.content), result.raw)

    def _convert(self, row: int) -> _Encoded | str:
        options = self.options
        try:
            with pixel_limit(options.max_pixels):
                image, label = self.dataset[row]
                with image:
                    content, raw, rgb, kinds = store(image, options)
            pixels = None if options.jpegs == "encode" else pixel_digest(rgb)
            return _Encoded(content, rgb.width, rgb.height, int(label), pixels, raw, kinds)
        except Exception as error:
            return reason(error, options.max_pixels)


def _name(dataset: ImageDataset, row: int) -> str:
    """Return the origin of a sample, if the data set has names."""
    name = getattr(dataset, "name", None)
    return printable(name(row)) if name is not None else f"sample {row}"


def _check_classes(dataset: ImageDataset, path: Path, tally: _Tally, class_names: Sequence[str]) -> None:
    """Check that every class has kept an image; raises UserError otherwise."""
    if not tally.skipped:
        return
    label = getattr(dataset, "label", None)
    if label is None:
        affected = {place for place, count in enumerate(tally.class_counts) if count == 0}
    else:
        affected = {label(entry.row) for entry in tally.skipped}
    names = [class_names[place] for place in sorted(affected) if tally.class_counts[place] == 0]
    if names:
        write_report(path, tally.skipped)
        first = tally.skipped[0]
        raise UserError(
            f"{path}: no image of the class {first_few(names, 10)} can be read ({first.name}: {first.reason}); "
            "repair them or remove the class"
        )


@contextmanager
def _disk_errors(path: Path, journal: Journal) -> Iterator[None]:
    """Convert OSErrors of the disk that is written to."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            left = (
                f"{journal.partial.name} is kept, to continue"
                if journal.partial.exists()
                else "no partial file is left"
            )
            raise UserError(
                f"{path}: the disk is full ({error.strerror}), {left}; free some space or write elsewhere"
            ) from error
        raise UserError(f"{path}: cannot be written ({error})") from error
