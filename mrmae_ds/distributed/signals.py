"""Graceful shutdown: stop signals set a flag that all ranks act on at the next optimizer step.

SIGHUP comes from a terminal that closes or a connection that is lost. ``nohup`` has it ignored, which stays so.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@contextmanager
def end_at_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once, before there is anything to save.

    KeyboardInterrupt, Python's own reaction, would be swallowed by some of the imports of torch and DeepSpeed.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


class StopSignals:
    """Records stop signals while it is entered. Only the main thread may enter.

    A second SIGINT (Ctrl-C again) ends the process at once.

    Attributes:
        received: number of the first signal, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in WATCHED:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if not self.received:
            self.received = number
            # Neither print nor logging: this handler may interrupt one of them.
            try:
                os.write(2, f"{signal.Signals(number).name}: saving after this step, then stopping\n".encode())
            except OSError:
                _discard_output()


def _discard_output() -> None:
    """Send what goes to the terminal to nowhere: it has closed, and an error of writing must not prevent the save."""
    nowhere, closed = os.open(os.devnull, os.O_WRONLY), os.fstat(2)
    for output in (1, 2):
        if os.path.samestat(os.fstat(output), closed):
            os.dup2(nowhere, output)
