"""Atomic replacement of files, files that one of several processes makes, and checksums."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mrmae_ds.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces ``path`` when the block ends without an error.

    The folder is created if missing. The content is on the disk before the name changes (fsync, then ``os.replace``),
    so no reader sees a torn file. If the block raises, the temporary file is removed and ``path`` stays as it was. The
    temporary files that killed processes of this machine left for ``path`` are removed first.

    Args:
        path: the file to write.

    Yields:
        An empty file, to be written by the block.
    """
    make_folder(path.parent)
    prefix = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        process = leftover.name.removeprefix(prefix).split(".")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            leftover.unlink(missing_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f"{prefix}{os.getpid()}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # which a reader knows
        raise
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp creates a private file; give it the mode of the old one, or that of a plain open().
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def failing_once(record: Path, started: float) -> Iterator[None]:
    """Share the failure of a block with the processes that wait for a lock to do the same.

    The block is entered while holding the lock.

    Args:
        record: file of the last failure's time and message; removed before the block.
        started: time at which this process began to wait, ``time.time()``.

    Raises:
        UserError: of another process that failed since ``started``, instead of failing again.
    """
    try:
        failure = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        failure = {"time": float("-inf")}
    if failure["time"] >= started:
        raise UserError(failure["message"])
    record.unlink(missing_ok=True)
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError):  # the disk is full: the others fail on their own
            write_text(record, json.dumps({"time": time.time(), "message": str(error)}))
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are missing.

    Raises:
        UserError: if it cannot be made, with the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # ENOENT too, as below /proc
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    Raises:
        UserError: if it cannot.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}; name a file")
    make_folder(path.parent)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a file in another folder") from None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by a file that holds ``text``, UTF-8; bytes of file names that are not UTF-8 are escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def flush_folder(folder: Path) -> None:
    """Write a folder's entries to the disk (fsync), so that a rename in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def expand_home(path: str) -> str:
    """Replace the leading tilde of a path by the home directory: shells leave it alone in quotes and in ``--run=~/x``.

    Raises:
        UserError: if it names an unknown user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path}: no such user has a home directory; ./{path} is a file of that name")
    return expanded


def split_choice(source: Path | str) -> tuple[Path, str]:
    """Split ``FILE#KEY``, one of several sets of weights in a file, into the file and the key.

    The key is "" if there is none, or if a file of the whole name exists.
    """
    path, _, choice = str(source).rpartition("#")
    return (Path(path), choice) if path and not Path(source).exists() else (Path(source), "")
