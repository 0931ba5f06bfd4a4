"""Pictures to .beton: whole or not at all, nothing undecodable stored, and no hanging.

FFCV's ``DatasetWriter`` waits for ever when one of its worker processes raises or dies. ``_Writer`` keeps its
file format and its workers' code and replaces the waiting.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from mrmae_ds.data._ffcv import import_ffcv
from mrmae_ds.data.beton import SIDECAR_FORMAT, BetonInfo, check_beton, sidecar_path
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256

import_ffcv()

from ffcv.fields import IntField, RGBImageField  # noqa: E402
from ffcv.memory_allocator import MemoryAllocator  # noqa: E402
from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, worker_job_indexed_dataset  # noqa: E402

_MAX_SIDE = 8192  # a picture must fit into a page of the file, uncompressed to be safe
_CHUNK = 32  # samples that a worker takes at a time
_LISTED = 20  # bad pictures named in the error
_RECORDED = ("ffcv", "numpy", "pillow", "opencv-python", "mrmae_ds")

# The workers read the data set that the parent has opened.
_fork = multiprocessing.get_context("fork")


class PictureDataset(Protocol):
    """What can be written: any indexed sequence of (picture, label).

    An optional method ``name(index) -> str`` tells where a picture comes from, for messages.
    """

    def __len__(self) -> int:
        """How many samples."""
        ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A picture of any mode, and its label in 0..classes-1. May raise: the picture then counts as bad."""
        ...


class _Prepared:
    """The samples as FFCV's workers take them: (RGB array [H, W, 3], label, row). Never raises.

    A picture that cannot be had is noted in ``bad`` (a file, so that a note survives its worker), and a small
    black one takes its place in a file that will be thrown away.
    """

    def __init__(self, dataset: PictureDataset, rows: Sequence[int], bad: Path, max_side: int, classes: int) -> None:
        self.dataset, self.rows, self.bad, self.max_side, self.classes = dataset, rows, bad, max_side, classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[npt.NDArray[np.uint8], int, int]:
        row = int(self.rows[place])
        try:
            picture, label = self.dataset[row]
            if not 0 <= label < self.classes:
                raise ValueError(f"label {label}, but there are {self.classes} classes")
            return self._pixels(picture), int(label), int(place)
        except Exception as error:
            note = json.dumps({"row": row, "reason": f"{type(error).__name__}: {error}"[:500]})
            with self.bad.open("a", encoding="utf-8") as file:
                file.write(note + "\n")
            return np.zeros((8, 8, 3), dtype=np.uint8), 0, int(place)

    def _pixels(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        """Decode fully, reduce the longer side to ``max_side``. Raises whatever Pillow raises."""
        picture = picture.convert("RGB")
        ratio = self.max_side / max(picture.size)
        if ratio < 1:
            width, height = (max(1, round(side * ratio)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(picture)


class _Writer(DatasetWriter):
    """FFCV's writer with a way out: a worker that dies is an error."""

    def write(self, samples: _Prepared) -> None:
        """Write the whole file. Raises RuntimeError if a worker process dies."""
        self.num_samples = len(samples)
        self.prepare()
        try:
            self.finalize(self._encode(samples))
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _encode(self, samples: _Prepared) -> list[Any]:
        """Run the workers, return the table of what lies where in the file."""
        work, allocations = _fork.Queue(), _fork.Queue()
        places = [(place, place) for place in range(len(samples))]
        for start in range(0, len(places), _CHUNK):
            work.put(places[start : start + _CHUNK])
        done = _fork.Value("Q", 0)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        memory, kind = self.metadata_sm, self.metadata_type
        shared = (work, memory, kind, self.fields, allocator, done, allocations, samples)
        job = partial(_fork.Process, target=worker_job_indexed_dataset, args=shared)
        workers = [job() for _ in range(self.num_workers)]
        for worker in workers:
            work.put(None)
            worker.start()
        try:
            return self._collect(workers, allocations, done)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
            work.cancel_join_thread()

    def _collect(self, workers: list[Any], allocations: Any, done: Any) -> list[Any]:
        """Wait for every worker's table, watching that all of them live."""
        collected: list[Any] = []
        finished = 0
        with tqdm(total=self.num_samples, desc=Path(self.fname).stem, unit="picture") as progress:
            while finished < len(workers):
                # The exit codes are read first: a worker that ended well has put its table before.
                ended = [worker.exitcode for worker in workers]
                try:
                    collected += allocations.get(timeout=0.1)
                    finished += 1
                except Empty:
                    failed = [code for code in ended if code not in (None, 0)]
                    if failed:
                        raise RuntimeError(f"a worker process ended with exit status {failed[0]}") from None
                progress.update(done.value - progress.n)
        return collected


def write_beton(
    dataset: PictureDataset,
    path: str | Path,
    *,
    max_side: int,
    quality: int,
    workers: int | None = None,
    class_names: Sequence[str],
    name: str,
    source: str,
    skip_bad: bool = False,
) -> BetonInfo:
    """Write pictures as JPEGs into a .beton with the fields image, label and index (the row), and a sidecar.

    Every picture is fully decoded and converted to RGB. The file appears under its name when it is whole;
    what was there before stays until then.

    Args:
        path: the .beton; its folder is made.
        max_side: larger pictures are reduced to this many pixels on the longer side.
        quality: of the JPEGs, 1..100.
        workers: processes; None: the cores this process may use, 8 at most.
        class_names: in the order of the labels.
        name: of the data set, as tables show it.
        source: what the pictures are, in words.
        skip_bad: leave bad pictures out, listed in the sidecar under "skipped", instead of refusing to write.

    Raises UserError for an empty set or bad values, for bad pictures (one error that lists them), and
    RuntimeError if a worker process is killed.
    """
    path = Path(path)
    if len(dataset) == 0:
        raise UserError(f"{path}: nothing to write, the data set is empty")
    if not 1 <= max_side <= _MAX_SIDE or not 1 <= quality <= 100:
        raise UserError(f"max_side must be in 1..{_MAX_SIDE} and quality in 1..100, not {max_side} and {quality}")
    workers = min(len(os.sched_getaffinity(0)), 8) if workers is None else workers
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: Sequence[int] = range(len(dataset))
    skipped: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        bad = _write_pass(dataset, rows, written, max_side, quality, workers, len(class_names))
        if bad and skip_bad and len(bad) < len(rows):
            skipped = [{"name": _name(dataset, row), "reason": reason} for row, reason in sorted(bad.items())]
            rows = [row for row in rows if row not in bad]
            bad = _write_pass(dataset, rows, written, max_side, quality, workers, len(class_names))
        if bad:
            raise UserError(_bad_pictures(dataset, bad))
        sidecar = _sidecar(written, len(rows), class_names, max_side, quality, name, source, skipped)
        _publish(written, path, sidecar)
    return check_beton(path)


def _write_pass(
    dataset: PictureDataset,
    rows: Sequence[int],
    path: Path,
    max_side: int,
    quality: int,
    workers: int,
    classes: int,
) -> dict[int, str]:
    """Write ``rows`` of the data set to ``path``. Returns the bad ones with the reasons."""
    notes = path.with_name("bad.jsonl")
    notes.unlink(missing_ok=True)
    page_size = max(MIN_PAGE_SIZE, 1 << (3 * max_side * max_side - 1).bit_length())
    fields = {
        "image": RGBImageField(write_mode="jpg", jpeg_quality=quality),
        "label": IntField(),
        "index": IntField(),
    }
    writer = _Writer(str(path), fields, page_size=page_size, num_workers=min(workers, -(-len(rows) // _CHUNK)))
    writer.write(_Prepared(dataset, rows, notes, max_side, classes))
    if not notes.exists():
        return {}
    lines = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    return {line["row"]: line["reason"] for line in lines}


def _name(dataset: PictureDataset, row: int) -> str:
    """Where a sample comes from, as far as the data set can tell."""
    name = getattr(dataset, "name", None)
    return name(row) if name is not None else f"sample {row}"


def _bad_pictures(dataset: PictureDataset, bad: dict[int, str]) -> str:
    """The one message about all bad pictures."""
    lines = [f"  {_name(dataset, row)}: {reason}" for row, reason in sorted(bad.items())[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  and {len(bad) - _LISTED} more")
    head = f"{len(bad)} of {len(dataset)} samples are bad; mend, remove or skip them (--skip-bad):"
    return "\n".join([head, *lines])


def _sidecar(
    beton: Path,
    count: int,
    class_names: Sequence[str],
    max_side: int,
    quality: int,
    name: str,
    source: str,
    skipped: list[Any],
) -> dict[str, Any]:
    """What the sidecar says of a written file."""
    return {
        "format": SIDECAR_FORMAT,
        "num_samples": count,
        "class_names": list(class_names),
        "max_side": max_side,
        "quality": quality,
        "name": name,
        "source": source,
        "size": beton.stat().st_size,
        "sha256": file_sha256(beton),
        "versions": dict(_versions()),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "skipped": skipped,
    }


def _versions() -> Iterator[tuple[str, str]]:
    """The versions of the packages that shaped the file."""
    for package in _RECORDED:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _publish(written: Path, path: Path, sidecar: dict[str, Any]) -> None:
    """Move a finished file to its place; at no point does a .beton stand beside the sidecar of another."""
    described = written.with_name("sidecar.json")
    described.write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    for file in (written, described):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    sidecar_path(path).unlink(missing_ok=True)
    os.replace(written, path)
    os.replace(described, sidecar_path(path))
