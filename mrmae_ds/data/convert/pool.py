"""Work shared among processes, results in order, and never a hang: a process that dies or is stuck is an error.

``multiprocessing.Pool`` waits for ever when one of its processes is killed; here every process has a pipe of its own,
so that its end is noticed and can spoil nothing of the others.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from mrmae_ds.errors import UserError

T = TypeVar("T")
_CHUNK = 16  # items that a worker is given at a time
_AHEAD = 4  # chunks a worker that may be done before the item that is next in order
_POLL_S = 0.5

# The workers use the data set that the parent has opened.
_fork = multiprocessing.get_context("fork")


class _Worker(Generic[T]):
    """A process and what it was given."""

    def __init__(self, function: Callable[[int], T], others: Sequence[_Worker[T]]) -> None:
        self.connection, remote = _fork.Pipe()
        inherited = [worker.connection for worker in others] + [self.connection]
        self.process = _fork.Process(target=_serve, args=(function, remote, inherited), daemon=True)
        self.process.start()
        remote.close()
        self.items: deque[int] = deque()
        self.since = time.monotonic()

    def give(self, items: Sequence[int]) -> None:
        """Have ``items`` done, one after another."""
        self.items.extend(items)
        self.since = time.monotonic()
        self.connection.send(list(items))

    def take(self) -> tuple[int, T]:
        """The next result. Raises EOFError or OSError if the process has ended."""
        result = self.connection.recv()
        self.since = time.monotonic()
        return self.items.popleft(), result

    def end(self) -> None:
        """Whatever it is doing."""
        self.process.kill()
        self.process.join(timeout=5)  # one that waits for a dead disk cannot be killed
        self.connection.close()


def _serve(function: Callable[[int], T], connection: Connection, inherited: Sequence[Connection]) -> None:
    """What a worker process runs, until its parent ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()  # else the parent's end would outlive the parent
    try:
        while True:
            for item in connection.recv():
                connection.send(function(item))
    except (EOFError, ConnectionError):
        return


def map_in_order(
    function: Callable[[int], T], count: int, *, workers: int, timeout_s: float, name: Callable[[int], str]
) -> Generator[T, None, None]:
    """``function(0)``, ``function(1)``, ... in that order, computed by forked processes. Close it to end them.

    Args:
        function: must not raise.
        workers: how many processes. timeout_s: that one item may take, seconds.
        name: of an item, for messages.

    Raises:
        UserError: naming the item at which a process died or spent too long.
    """
    pool: list[_Worker[T]] = []
    try:
        for _ in range(max(1, min(workers, -(-count // _CHUNK)))):
            pool.append(_Worker(function, pool))
        done: dict[int, T] = {}
        given = 0
        for due in range(count):
            while due not in done:
                given = _hand_out(pool, given, min(count, due + _CHUNK * _AHEAD * len(pool)), name)
                _collect(pool, done, timeout_s, name)
            yield done.pop(due)
    finally:
        for worker in pool:
            worker.end()


def _hand_out(pool: Sequence[_Worker[T]], given: int, limit: int, name: Callable[[int], str]) -> int:
    """Give idle workers the items from ``given`` to ``limit``. Returns the first that is still to be given."""
    for worker in pool:
        if not worker.items and given < limit:
            items = range(given, min(given + _CHUNK, limit))
            given = items.stop
            try:
                worker.give(items)
            except ConnectionError:
                raise _died(worker, name) from None
    return given


def _collect(pool: Sequence[_Worker[T]], done: dict[int, T], timeout_s: float, name: Callable[[int], str]) -> None:
    """Wait for results; see ``map_in_order`` for what is raised."""
    busy = {worker.connection: worker for worker in pool if worker.items}
    for connection in wait(list(busy), timeout=min(_POLL_S, timeout_s)):
        worker = busy[connection]  # type: ignore[index]  # of the connections that were passed
        try:
            item, result = worker.take()
        except (EOFError, OSError):
            raise _died(worker, name) from None
        done[item] = result
    for worker in busy.values():
        if worker.items and time.monotonic() - worker.since > timeout_s:
            raise UserError(
                f"{name(worker.items[0])}: not read within {timeout_s:g} s (--timeout): "
                "see whether its disk answers, or remove the image"
            )


def _died(worker: _Worker[T], name: Callable[[int], str]) -> UserError:
    """The error for a worker that has ended."""
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    killed = "; if memory ran out, take fewer --workers" if code == -signal.SIGKILL else ""
    return UserError(f"{name(worker.items[0])}: the process that read it ended with exit status {code}{killed}")
