"""Being asked to stop: signals are noted, and acted upon between two optimizer steps, by all processes together."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
