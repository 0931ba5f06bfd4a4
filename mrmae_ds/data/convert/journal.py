"""Journal of a conversion, by which the same command continues after an interruption.

    .train.beton.partial    the images so far
    .train.beton.journal    lines of JSON: sources and options, then each batch of samples, at the end the sidecar

A batch is added when its images are on the disk (fsync), so what lies beyond the last complete line is cut off and made
again. The lines hold all that the file's tables need, and the size and time of every source file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mrmae_ds.data.beton.file import tables_sha256
from mrmae_ds.data.beton.file_writer import StoredImage
from mrmae_ds.data.convert.skipped import Skipped
from mrmae_ds.errors import UserError
from mrmae_ds.files import make_folder
from mrmae_ds.units import counted

logger = logging.getLogger(__name__)


@dataclass
class SampleBatch:
    """Consecutive samples of a data set.

    Attributes:
        images: those that are stored.
        skipped: those that are left out.
        kinds: number of conversions by kind.
        stamps: of the source files of all samples, as they were before they were read.
    """

    images: list[StoredImage] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    stamps: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images) + len(self.skipped)

    def extend(self, line: Mapping[str, Any]) -> None:
        """Append the samples of a line of the journal."""
        self.images += [StoredImage(*image) for image in line["images"]]
        self.skipped += [Skipped(**entry) for entry in line["skipped"]]
        self.kinds.update(line["kinds"])


class Journal:
    """The journal of a file that is being written, as a context manager; one process at a time holds it.

    Attributes:
        partial: path of the images so far.
        done: the samples in it; empty if there is nothing to continue.
        sidecar: of the complete file; None while it is not complete.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], stamp: Callable[[int], str] | None) -> None:
        """Name the files; nothing is opened yet.

        Args:
            path: the .beton.
            identity: all that its content depends on, but for the content of the source files.
            stamp: returns the size and time of a sample's file; None if they are unknown, so that nothing is kept.
        """
        self._target, self._path, self.partial = path, journal_path(path), path.with_name(f".{path.name}.partial")
        self._identity, self._stamp = json.loads(json.dumps(identity)), stamp
        self.done = SampleBatch()
        self.sidecar: dict[str, Any] | None = None

    def __enter__(self) -> Journal:
        make_folder(self._path.parent)
        self._file = _open_locked(self._path, self._target)
        try:
            self._load()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._stamp is None:
            self.remove()
        self._file.close()

    def _load(self) -> None:
        """Take over what an interrupted conversion left, or remove it."""
        lines = list(_complete_lines(self._file))
        others = self._compare(lines) if lines and self._stamp else ""
        if others:
            logger.warning("%s: an interrupted conversion had other %s; starting over", self._target, others)
        if others or not lines or not self._stamp:
            self.done, self.sidecar = SampleBatch(), None
            self.partial.unlink(missing_ok=True)
            self._file.truncate(0)
            self._append(self._identity)
        elif self.sidecar is not None:
            logger.info("%s: is complete already", self._target)
        elif len(self.done):
            logger.info("%s: continuing after %s", self._target, counted(len(self.done), "sample"))

    def _compare(self, lines: Sequence[tuple[dict[str, Any], int]]) -> str:
        """Take over the lines whose images are on the disk; return what differs from this conversion, if anything."""
        assert self._stamp is not None
        head, end = lines[0]
        if others := [key for key in self._identity if head.get(key) != self._identity[key]]:
            return ", ".join(others)
        sidecar = lines[-1][0].get("sidecar")
        exists = self.partial.exists()
        complete = sidecar is not None and _is_described(self.partial if exists else self._target, sidecar)
        size = self.partial.stat().st_size if exists else 0
        for line, line_end in lines[1:]:
            if "sidecar" in line or (line["end"] > size and not complete):
                break
            first = len(self.done)
            self.done.extend(line)
            if _digest(map(self._stamp, range(first, len(self.done)))) != line["stamp"]:
                return "images"
            end = line_end
        if complete:
            self.sidecar = sidecar
        else:
            self._file.truncate(end)
        return ""

    def add(self, batch: SampleBatch, end: int) -> None:
        """Add samples, when the first ``end`` bytes of the file are on the disk."""
        images, skipped = [list(image) for image in batch.images], [asdict(entry) for entry in batch.skipped]
        stamp = _digest(batch.stamps)
        self._append({"images": images, "skipped": skipped, "kinds": batch.kinds, "stamp": stamp, "end": end})

    def finish(self, sidecar: dict[str, Any]) -> None:
        """Add the sidecar of the complete file."""
        self._append({"sidecar": sidecar})
        self.sidecar = sidecar

    def remove(self) -> None:
        """Remove the files."""
        self.partial.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(line).encode("ascii") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def journal_path(beton: Path) -> Path:
    """Return the path of a .beton's journal."""
    return beton.with_name(f".{beton.name}.journal")


def _open_locked(path: Path, target: Path) -> BinaryIO:
    """Open a journal for reading and writing, with a lock that ends with this process."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, workers do not inherit it
        current = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError as error:
        current = error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks
    if not current:
        file.close()
        raise UserError(f"{target}: another conversion writes it; wait for it, or name another folder with --out")
    return file


def _complete_lines(file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the content of each line and the place of its end; what follows a torn line is lost."""
    file.seek(0)
    for line in iter(file.readline, b""):
        try:
            content = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if not isinstance(content, dict):
            return
        yield content, file.tell()


def _is_described(path: Path, sidecar: Mapping[str, Any]) -> bool:
    """Return True if a file is the complete one that a sidecar describes, by its size and tables."""
    try:
        same_size = path.stat().st_size == sidecar["size"]
        return same_size and tables_sha256(np.memmap(path, dtype=np.uint8, mode="r")) == sidecar["tables_sha256"]
    except (OSError, ValueError, IndexError):
        return False


def _digest(stamps: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(stamps).encode(), digest_size=16).hexdigest()
