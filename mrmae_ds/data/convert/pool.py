"""Ordered map over forked processes; a worker that dies or is stuck is an error that names its item.

``multiprocessing.Pool`` waits forever if one of its processes is killed. ``concurrent.futures.ProcessPoolExecutor``
detects it, but does not report the item, cannot stop a worker that is stuck, and leaves its workers running if the
parent is killed. Here every worker has a pipe of its own, whose end-of-file reports the end of either side.
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
_CHUNK = 16  # items sent to a worker at a time
_AHEAD = 4  # chunks per worker that may be computed ahead of the next item in order
_POLL_S = 0.5

# Forked, so that the workers use the data set that the parent has opened.
_fork = multiprocessing.get_context("fork")


class _Worker(Generic[T]):
    """A process and the items sent to it."""

    def __init__(self, function: Callable[[int], T], others: Sequence[_Worker[T]]) -> None:
        self.connection, remote = _fork.Pipe()
        inherited = [worker.connection for worker in others] + [self.connection]
        self.process = _fork.Process(target=_serve, args=(function, remote, inherited), daemon=True)
        self.process.start()
        remote.close()
        self.items: deque[int] = deque()
        self.since = time.monotonic()

    def send(self, items: Sequence[int]) -> None:
        """Send items to compute, one after another."""
        self.items.extend(items)
        self.since = time.monotonic()
        self.connection.send(list(items))

    def receive(self) -> tuple[int, T]:
        """Return the next item and its result; raises EOFError or OSError if the process has ended."""
        result = self.connection.recv()
        self.since = time.monotonic()
        return self.items.popleft(), result

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join(timeout=5)  # a process that waits for an unresponsive disk cannot be killed
        self.connection.close()


def _serve(function: Callable[[int], T], connection: Connection, inherited: Sequence[Connection]) -> None:
    """Run a worker process until its parent kills it or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()  # otherwise the pipe would stay open after the parent's end
    try:
        while True:
            for item in connection.recv():
                connection.send(function(item))
    except (EOFError, ConnectionError):
        return


def map_in_order(
    function: Callable[[int], T], count: int, *, workers: int, timeout_s: float, name: Callable[[int], str]
) -> Generator[T, None, None]:
    """Yield ``function(0)``, ``function(1)``, ... in that order, computed by forked processes.

    Closing the generator ends the processes.

    Args:
        function: must not raise.
        count: number of items.
        workers: number of processes.
        timeout_s: limit for one item, seconds.
        name: returns the name of an item, for messages.

    Yields:
        The results.

    Raises:
        UserError: naming the item at which a process died or exceeded the limit.
    """
    pool: list[_Worker[T]] = []
    try:
        for _ in range(max(1, min(workers, -(-count // _CHUNK)))):
            pool.append(_Worker(function, pool))
        results: dict[int, T] = {}
        num_sent = 0
        for item in range(count):
            while item not in results:
                num_sent = _send_items(pool, num_sent, min(count, item + _CHUNK * _AHEAD * len(pool)), name)
                _collect(pool, results, timeout_s, name)
            yield results.pop(item)
    finally:
        for worker in pool:
            worker.end()


def _send_items(pool: Sequence[_Worker[T]], num_sent: int, limit: int, name: Callable[[int], str]) -> int:
    """Send the items from ``num_sent`` to ``limit`` to idle workers. Returns the new number of items sent."""
    for worker in pool:
        if not worker.items and num_sent < limit:
            items = range(num_sent, min(num_sent + _CHUNK, limit))
            num_sent = items.stop
            try:
                worker.send(items)
            except ConnectionError:
                raise _died(worker, name) from None
    return num_sent


def _collect(pool: Sequence[_Worker[T]], results: dict[int, T], timeout_s: float, name: Callable[[int], str]) -> None:
    """Wait for results and store them; raises UserError as ``map_in_order`` does."""
    busy = {worker.connection: worker for worker in pool if worker.items}
    for connection in wait(list(busy), timeout=min(_POLL_S, timeout_s)):
        worker = busy[connection]  # type: ignore[index]  # of the connections that were passed
        try:
            item, result = worker.receive()
        except (EOFError, OSError):
            raise _died(worker, name) from None
        results[item] = result
    for worker in busy.values():
        if worker.items and time.monotonic() - worker.since > timeout_s:
            raise UserError(
                f"{name(worker.items[0])}: not read within {timeout_s:g} s (--timeout): "
                "check that its disk responds, or remove the image"
            )


def _died(worker: _Worker[T], name: Callable[[int], str]) -> UserError:
    """Return the error for a worker that has ended."""
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    killed = "; if memory ran out, use fewer --workers" if code == -signal.SIGKILL else ""
    return UserError(f"{name(worker.items[0])}: the process that read it ended with exit status {code}{killed}")
