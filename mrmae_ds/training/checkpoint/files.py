"""One file of a checkpoint: its SHA-256 is taken as it is written, and what goes wrong is told in words."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from mrmae_ds.training.checkpoint.manifest import FileEntry


class _HashingFile:
    """A file that takes the SHA-256 of what goes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and count; torch hides what a write raises, so it is remembered."""
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Of the file."""
        self.file.flush()


@contextmanager
def _without_crc() -> Iterator[None]:
    """torch's own checksums, which nothing reads, take as long as the SHA-256 that stands in for them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_shard(path: Path, part: Any) -> FileEntry:
    """Write what ``torch.save`` gets, and see it on the disk.

    Args:
        path: of the file; its folder is made.
        part: what to write.

    Raises:
        OSError: as the file system said it, which torch itself hides.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            with _without_crc():
                torch.save(part, hashing)
            file.flush()
            os.fsync(file.fileno())
        except Exception as error:
            raise hashing.error or error from None
    return FileEntry(size=hashing.size, sha256=hashing.digest.hexdigest())


def told(error: Exception, path: Path) -> str:
    """An error of writing ``path`` in words, with a mend where there is one."""
    if not isinstance(error, OSError):
        return f"{path}: {error or type(error).__name__}"
    mends = {
        errno.ENOSPC: "free space there, or keep fewer checkpoints (checkpoint.keep_last)",
        errno.EDQUOT: "your quota is used up; keep fewer checkpoints (checkpoint.keep_last)",
        errno.EACCES: "make the folder writable",
        errno.EROFS: "make the file system writable",
    }
    mend = mends.get(error.errno or 0)
    return f"{error.filename or path}: {error.strerror or error}" + (f"; {mend}" if mend else "")
