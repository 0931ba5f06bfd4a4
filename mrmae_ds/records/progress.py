"""Progress display: a bar on a terminal, periodic lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

_BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, ETA {remaining}{postfix}"


def progress_bar(items: Iterable[Any] = (), **settings: Any) -> tqdm[Any]:
    """Return a tqdm bar on stderr; in a log file, where each update stays, it is updated every 30 seconds.

    Args:
        items: what is iterated over; nothing if the caller updates the bar.
        settings: of tqdm.
    """
    if not sys.stderr.isatty():
        settings |= {"mininterval": 30.0, "maxinterval": 30.0, "delay": 0.0}  # a delayed bar would never be drawn
    return tqdm(items, **settings)


class Progress:
    """Progress of one stage, shown by rank 0 only.

    On a terminal it is a tqdm bar. In the log of a batch job a bar would be one endless line, so a plain line is
    printed for the first update, then at most every `every_seconds`, and for the last step.
    """

    def __init__(
        self,
        label: str,
        total_steps: int,
        done_steps: int = 0,
        *,
        enabled: bool = True,
        every_seconds: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the display.

        Args:
            label: name of the stage.
            total_steps: optimizer steps of the stage.
            done_steps: steps completed before this process started; they do not count for the speed.
            enabled: False on every rank but 0.
            every_seconds: least time between two lines.
            stream: stderr by default.
            clock: seconds, for tests.
        """
        self._label, self._total, self._first = label, total_steps, done_steps
        self._enabled, self._every, self._clock = enabled, every_seconds, clock
        self._stream = stream if stream is not None else sys.stderr
        self._start = clock()
        self._printed: float | None = None
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                desc=label,
                total=total_steps,
                initial=done_steps,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                bar_format=_BAR_FORMAT,
            )

    def update(self, step: int, loss: float, lr: float, images_per_s: float) -> None:
        """Show that `step` steps of the stage are completed; `images_per_s` is the throughput of the whole job."""
        if not self._enabled:
            return
        numbers = f"loss {loss:.4f}, lr {lr:.2e}, {images_per_s:,.0f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        if self._printed is None or now - self._printed >= self._every or step >= self._total:
            first, self._printed = self._printed is None, now
            share = 100 * step / self._total if self._total else 100.0
            position = f"{self._label}: step {step}/{self._total} ({share:.1f} %)"
            print(f"{position}, {numbers}, ETA {self._eta(step, now)}", file=self._stream, flush=True)
            if first:  # the first step also starts and compiles: later estimates leave it out
                self._start, self._first = now, step

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self, step: int, now: float) -> str:
        """Return the remaining time as h:mm:ss at this process's mean speed; "?" before its first step."""
        completed = step - self._first
        if completed <= 0:
            return "?"
        minutes, seconds = divmod(round((now - self._start) / completed * max(self._total - step, 0)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
