"""Copies of .beton files on a node's own disk or memory, made once per node and before any process group exists.

The ranks of a node, and other jobs on it, share nothing but the folder. The first to hold a file's lock copies it; the
others wait for the lock and find the copy. The system releases the lock when its holder ends, however it ends, and the
next in line takes over. A copy of 60 GB may take minutes, in which a collective of the process group would time out.

    FOLDER/SHA16.lock  FOLDER/SHA16.SOURCE8.failed  FOLDER/SHA16/NAME.beton  NAME.beton.json  copied.json

NAME is that of the first file of this content to be copied; files of other names share the copy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import AcquireReturnProxy, FileLock, Timeout

from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton, sidecar_path
from mrmae_ds.errors import UserError
from mrmae_ds.files import expand_home, failing_once, replacing, write_text

logger = logging.getLogger(__name__)

_BLOCK = 1 << 24
_POLL_S = 0.2
_RECORD = "copied.json"


@dataclass(frozen=True)
class _Copy:
    """Paths of one file's copy. Files of the same content share it, whatever their names."""

    info: BetonInfo
    folder: Path

    @property
    def place(self) -> Path:
        """Folder of the copy, its sidecar and its record."""
        return self.folder / self.info.sha256[:16]

    @property
    def target(self) -> Path:
        """Path of the copy to be made, if there is none of another name."""
        return self.place / self.info.path.name

    @property
    def record(self) -> Path:
        """Description of the copy, written last."""
        return self.place / _RECORD

    @property
    def lock(self) -> Path:
        """Lock that is held while copying; never removed."""
        return self.place.with_suffix(".lock")

    @property
    def failure(self) -> Path:
        """Reason and time of the last failed attempt to copy from this source; another of the content may be intact."""
        source = hashlib.sha256(os.fsencode(self.info.path.absolute())).hexdigest()[:8]
        return self.place.with_suffix(f".{source}.failed")

    def find(self) -> Path | None:
        """Return the copy, of any name, if it exists and is unchanged since it was made."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            return next(
                (path for path in self.place.iterdir() if self.describe(path) == record and _has_sidecar(path)), None
            )
        except (OSError, ValueError):
            return None

    def describe(self, path: Path) -> dict[str, Any]:
        """Return the record's content for the copy at ``path``."""
        status = path.stat()
        return {"sha256": self.info.sha256, "size": status.st_size, "mtime": status.st_mtime_ns, "file": status.st_ino}


def _has_sidecar(path: Path) -> bool:
    return sidecar_path(path).is_file()


def cache_beton(path: str | Path, folder: str | Path, *, timeout_s: float = 3600) -> Path:
    """Copy a .beton file and its sidecar to a local folder, or find the copy that exists.

    Every rank of a node calls this. One of them copies, comparing the SHA-256 on the way; the others wait. A copy
    stays for later runs.

    Args:
        path: the .beton file.
        folder: on the node, for example /dev/shm/NAME; created if missing; may contain variables ($TMPDIR).
        timeout_s: longest wait for another process's copy, seconds.

    Returns:
        The path of the copy.

    Raises:
        UserError: on every rank of the node, if there is too little space, the disk is full or the file does not match
            its sidecar; or if another process copies for longer than ``timeout_s``.
    """
    copy, started = _Copy(check_beton(path), _make_writable(folder)), time.time()
    if (found := copy.find()) is not None:
        return found
    try:
        with _hold(FileLock(copy.lock), timeout_s):
            if (found := copy.find()) is None:
                with failing_once(copy.failure, started):
                    _make(copy)
    except Timeout:
        raise UserError(f"{copy.lock}: another process has been copying for more than {timeout_s:g} s") from None
    except OSError as error:
        raise UserError(_explain(copy, error)) from error
    return found or copy.target


def _hold(lock: FileLock, timeout_s: float) -> AcquireReturnProxy:
    """Acquire a lock; if another process holds it, say so before waiting."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        limit_min = timeout_s / 60
        logger.info("%s: waiting for another process to copy, at most %g minutes", lock.lock_file, limit_min)
        return lock.acquire(timeout=timeout_s, poll_interval=_POLL_S)


def cache_all(paths: Iterable[str | Path], folder: str | Path | None) -> None:
    """Call ``cache_beton`` for several files; without a folder, do nothing."""
    if folder is not None:
        for path in paths:
            cache_beton(path, folder)


def cached_path(path: str | Path, folder: str | Path | None) -> Path:
    """Return the path of a .beton file's copy, as ``cache_beton`` does; without a folder, ``path`` itself."""
    if folder is None:
        return Path(path)
    copy = _Copy(check_beton(path), _expand(folder))
    return copy.find() or copy.target


def _expand(folder: str | Path) -> Path:
    expanded = Path(expand_home(os.path.expandvars(folder)))
    if "$" in str(expanded):
        raise UserError(f"cache_dir {folder}: a variable in it is not set here")
    return expanded


def _make_writable(folder: str | Path) -> Path:
    path = _expand(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        why = error.strerror
        raise UserError(f"cache_dir {path}: cannot be written to ({why}); name a folder of your own") from error
    return path


def _make(copy: _Copy) -> None:
    """Make the copy while holding its lock."""
    try:
        _remove_leftovers(copy)
        _check_space(copy)
        logger.info("%s: copying %s to %s", copy.info.path, _size(copy.info.size), copy.target)
        _copy_checked(copy)
    except BaseException as error:
        shutil.rmtree(copy.place, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(_explain(copy, error)) from error
        raise


def _remove_leftovers(copy: _Copy) -> None:
    """Remove incomplete copies, of this file or others, whose process has ended."""
    shutil.rmtree(copy.place, ignore_errors=True)
    for lock in copy.folder.glob("*.lock"):
        incomplete = lock.with_suffix("")
        if lock == copy.lock or not incomplete.is_dir() or (incomplete / _RECORD).exists():
            continue
        try:
            with FileLock(lock).acquire(timeout=0):
                shutil.rmtree(incomplete, ignore_errors=True)
        except Timeout:
            continue


def _check_space(copy: _Copy) -> None:
    free = shutil.disk_usage(copy.folder).free
    if free >= copy.info.size:
        return
    others = [f"{path} ({_size(path.stat().st_size)})" for path in sorted(copy.folder.glob("*/*.beton"))]
    raise UserError(
        f"cache_dir {copy.folder}: {copy.info.path} needs {_size(copy.info.size)}, {_size(free)} are free"
        + (f"; remove what no run needs of {', '.join(others)}" if others else "; name another folder")
    )


def _copy_checked(copy: _Copy) -> None:
    source, digest = copy.info.path, hashlib.sha256()
    with replacing(copy.target) as partial:
        with source.open("rb") as original, partial.open("wb") as file:
            for block in _blocks(original):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != copy.info.sha256:
            raise UserError(f"{source}: its SHA-256 differs from its sidecar's, so it changed: copy or write it again")
    shutil.copyfile(sidecar_path(source), sidecar_path(copy.target))
    write_text(copy.record, json.dumps(copy.describe(copy.target)))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _explain(copy: _Copy, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = _size(copy.info.size)
        return f"cache_dir {copy.folder}: the disk is full ({error.strerror}); {copy.info.path} needs {size}"
    return f"cache_dir {copy.folder}: {copy.info.path} cannot be copied there ({error or type(error).__name__})"
