"""Files under construction: hidden, and removed whatever happens to who makes them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what is there when the block ends is removed.

    What killed processes of this machine left there is removed first.
    """
    host = socket.gethostname()
    for leftover in path.parent.glob(f".{path.name}.{host}.*.partial"):
        pid = leftover.name.split(".")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{host}.{os.getpid()}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
