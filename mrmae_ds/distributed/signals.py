"""Being asked to stop: signals are noted, and acted upon between two optimizer steps, by all processes together."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

# sysexits.h: a temporary failure, try again. A stopped stage goes on when the same command is given again.
STOPPED_STATUS = 75
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """A signal ended the stage after a checkpoint. Every process raises it."""

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}; the same command goes on from there")


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and SIGINT while it is entered; ``received`` is the number of the first, 0 before.

    A second SIGINT (Ctrl-C again) ends the process at once, as without this. Only the main thread may enter.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in WATCHED:
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
            # Not print: a handler may interrupt one.
            os.write(2, f"{signal.Signals(number).name}: saving after this step, then stopping\n".encode())
