"""A copy of a .beton on a node's own disk or memory, made once a node and before any process group exists.

The processes of a node agree by files in the folder alone: a lock that the copying one holds (the system releases it
when that process ends, however it ends), a record that appears when the copy is whole, and a note when it failed. A
copy of 60 GB may take minutes, in which a collective of the process group would run into its time limit.

    FOLDER/SHA16.lock  FOLDER/SHA16.failed  FOLDER/SHA16/NAME.beton  NAME.beton.json  staged.json
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton, sidecar_path
from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text

_BLOCK = 1 << 24
_POLL_S = 0.2
_GRACE_S = 5.0  # from the end of one process that copied to the beginning of another


@dataclass(frozen=True)
class _Place:
    """Where one file is staged; see the module."""

    info: BetonInfo
    folder: Path

    @property
    def key(self) -> str:
        """Files of the same content share a copy."""
        return self.info.sha256[:16]

    @property
    def target(self) -> Path:
        """The copy."""
        return self.folder / self.key / self.info.path.name

    @property
    def record(self) -> Path:
        """Written last."""
        return self.target.with_name("staged.json")

    @property
    def lock(self) -> Path:
        """Held while copying, and never removed."""
        return self.folder / f"{self.key}.lock"

    @property
    def failed(self) -> Path:
        """Why the last attempt failed."""
        return self.folder / f"{self.key}.failed"

    def finished(self) -> bool:
        """Whether the copy is there, and has not been touched since it was made."""
        try:
            return json.loads(self.record.read_text(encoding="utf-8")) == self.described() and (
                sidecar_path(self.target).is_file()
            )
        except (OSError, ValueError):
            return False

    def described(self) -> dict[str, Any]:
        """What the record says of the copy. Raises OSError if there is none."""
        status = self.target.stat()
        return {"sha256": self.info.sha256, "size": status.st_size, "mtime": status.st_mtime_ns, "file": status.st_ino}


def stage_beton(
    path: str | Path,
    folder: str | Path,
    *,
    is_leader: bool,
    timeout_s: float = 3600,
    start_s: float = 300,
    announce: Callable[[str], None] = print,
) -> Path:
    """Copy a .beton and its sidecar to a local folder, or find the copy that is there.

    To be called by all processes of a node. One of them copies, checking the SHA-256 on the way; the others wait for
    it. A copy stays for later runs; runs that need the same one at the same time share it.

    Args:
        path: the .beton.
        folder: on the node, for example /dev/shm/NAME; made if missing; may hold variables ($TMPDIR).
        is_leader: true in one process of the node.
        timeout_s: how long to wait for another process's copy, seconds. start_s: for it to begin.
        announce: is told what the leader does.

    Returns the path of the copy.

    Raises:
        UserError: in every process of the node, if there is too little space, the disk is full, the file is not what
            its sidecar says, or the copying process failed or ended.
    """
    info = check_beton(path)
    place = _Place(info, _made(folder))
    if not is_leader:
        _wait(place, timeout_s, start_s)
        return place.target
    with _disk_errors(place), _locked(place.lock, timeout_s):
        place.failed.unlink(missing_ok=True)
        if place.finished():
            announce(f"{info.path}: staged already, {place.target}")
            return place.target
        try:
            _remove_leftovers(place)
            _check_space(place)
            announce(f"{info.path}: copying {_size(info.size)} to {place.target}")
            _copy(place)
        except BaseException as error:
            shutil.rmtree(place.target.parent, ignore_errors=True)
            _leave_note(place, error)
            raise
    return place.target


def cache_all(paths: Iterable[str | Path], folder: str | Path | None, *, is_leader: bool) -> None:
    """``stage_beton`` of several files; nothing without a folder. Raises UserError."""
    if folder is not None:
        for path in paths:
            stage_beton(path, folder, is_leader=is_leader)


def located(path: str | Path, folder: str | Path | None) -> Path:
    """Where ``stage_beton`` puts a .beton; without a folder, where it is. Raises UserError."""
    return Path(path) if folder is None else _Place(check_beton(path), _expanded(folder)).target


def _expanded(folder: str | Path) -> Path:
    expanded = Path(os.path.expandvars(folder)).expanduser()
    if "$" in str(expanded):
        raise UserError(f"cache_dir {folder}: a variable in it is not set here")
    return expanded


def _made(folder: str | Path) -> Path:
    made = _expanded(folder)
    try:
        made.mkdir(parents=True, exist_ok=True)
        if not os.access(made, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        why = error.strerror
        raise UserError(f"cache_dir {made}: cannot be written to ({why}); name a folder of your own") from error
    return made


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock, waiting for another run's copy. Raises UserError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    with path.open("a") as file:
        while not _try_lock(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UserError(f"{path}: another process has been copying for more than {timeout_s:g} s")
            time.sleep(_POLL_S)
        yield


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock now."""
    try:
        with path.open("a") as file:
            return not _try_lock(file.fileno(), fcntl.LOCK_SH)
    except OSError:
        return False


def _wait(place: _Place, timeout_s: float, start_s: float) -> None:
    """Until the leader's copy is there; see ``stage_beton``."""
    began, deadline = time.time(), time.monotonic() + timeout_s
    seen, idle_since = False, time.monotonic()
    while not place.finished():
        note = _read_note(place)
        if note is not None and note["time"] >= began:
            raise UserError(note["message"])
        now = time.monotonic()
        if _is_held(place.lock):
            seen, idle_since = True, now
        elif now - idle_since > (_GRACE_S if seen else start_s):
            if place.finished():
                return
            what = "ended without finishing" if seen else f"has not begun within {start_s:g} s"
            raise UserError(f"{place.target}: the process that was to copy it {what}; see its messages")
        if now > deadline:
            raise UserError(f"{place.target}: is not there after {timeout_s:g} s")
        time.sleep(_POLL_S)


def _leave_note(place: _Place, error: BaseException) -> None:
    """Tell the other processes, if the disk lets us."""
    message = str(error) if isinstance(error, UserError) else _explained(place, error)
    try:
        write_text(place.failed, json.dumps({"time": time.time(), "message": message}))
    except OSError:
        return


def _read_note(place: _Place) -> dict[str, Any] | None:
    try:
        return json.loads(place.failed.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove_leftovers(place: _Place) -> None:
    """Remove what processes left that ended while copying, this file or another."""
    shutil.rmtree(place.target.parent, ignore_errors=True)
    for lock in place.folder.glob("*.lock"):
        unfinished = lock.with_suffix("")
        if lock == place.lock or not unfinished.is_dir() or (unfinished / "staged.json").exists():
            continue
        with lock.open("a") as file:
            if _try_lock(file.fileno(), fcntl.LOCK_EX):
                shutil.rmtree(unfinished, ignore_errors=True)


def _check_space(place: _Place) -> None:
    free = shutil.disk_usage(place.folder).free
    if free >= place.info.size:
        return
    held = [f"{path} ({_size(path.stat().st_size)})" for path in sorted(place.folder.glob("*/*.beton"))]
    raise UserError(
        f"cache_dir {place.folder}: {place.info.path} needs {_size(place.info.size)}, {_size(free)} are free"
        + (f"; remove what no run needs of {', '.join(held)}" if held else "; name another folder")
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _copy(place: _Place) -> None:
    """Copy under another name, compare the checksum, rename, then describe."""
    source, target = place.info.path, place.target
    target.parent.mkdir()
    partial = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    with source.open("rb") as original, partial.open("wb") as copy:
        for block in _blocks(original):
            digest.update(block)
            copy.write(block)
        copy.flush()
        os.fsync(copy.fileno())
    if digest.hexdigest() != place.info.sha256:
        raise UserError(f"{source}: has not the SHA-256 in its sidecar, so it has changed: copy or write it again")
    shutil.copyfile(sidecar_path(source), sidecar_path(target))
    os.replace(partial, target)
    write_text(place.record, json.dumps(place.described()))


@contextmanager
def _disk_errors(place: _Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(_explained(place, error)) from error


def _explained(place: _Place, error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = _size(place.info.size)
        return f"cache_dir {place.folder}: the disk is full ({error.strerror}); {place.info.path} needs {size}"
    return f"cache_dir {place.folder}: {place.info.path} cannot be copied there ({error or type(error).__name__})"
