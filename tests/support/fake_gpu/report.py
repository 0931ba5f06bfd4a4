"""Record of a program on the stand-in: waits of the host by place, and counters by step."""

from __future__ import annotations

import collections
import ctypes
import json
import statistics
import traceback
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tests.support.fake_gpu import preload
from tests.support.processes import REPOSITORY

PACKAGE = REPOSITORY / "mrmae_ds"
HERE = Path(__file__).parent
# In the order of `enum counter` in fake_cuda.h.
COUNTERS = (
    "launches",
    "copies_to_device",
    "copies_to_host",
    "copies_on_device",
    "stream_waits",
    "other_waits",
    "races",
    "library_calls",
)


@dataclass(frozen=True)
class Wait:
    """Place in the code at which the host waits for the device. Line numbers are left out: they change too often.

    Attributes:
        where: innermost file and function of the package; empty in a hook of DeepSpeed.
        code: its line.
        via: file, function and line of the library that waits; empty if the package's own line waits.
    """

    where: str
    code: str
    via: str

    @property
    def key(self) -> tuple[str, str]:
        """Both functions, without the code of their lines."""
        return self.where, self.via.partition(" `")[0]

    def __str__(self) -> str:
        return " -> ".join(part for part in (f"{self.where} `{self.code}`" if self.where else "", self.via) if part)


@dataclass
class Report:
    """Waits and counters of a program.

    Attributes:
        steps: number of optimizer steps.
        facts: further values for tests: accumulation, parameter groups.
        in_step: waits inside steps, from the second step on.
        between: waits outside steps.
        counts: counters of each step, from the second step on.
        seconds: CPU time of the process in each of these steps.
        races: pinned buffers that changed while a copy read them.
        not_computed: operators whose results are not those of a GPU, because the CPU does not have them.
    """

    steps: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    in_step: collections.Counter[Wait] = field(default_factory=collections.Counter)
    between: collections.Counter[Wait] = field(default_factory=collections.Counter)
    counts: list[dict[str, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    races: int = 0
    not_computed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.waits: collections.Counter[Wait] | None = self.between  # where the next wait belongs; None is nowhere

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content |= {name: _rows(content[name]) for name in ("in_step", "between")}
        content["not_computed"] = sorted(self.not_computed)
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report."""
        content = json.loads(path.read_text())
        for name in ("in_step", "between"):
            content[name] = collections.Counter({Wait(**row): times for times, row in content[name]})
        return cls(**content)

    def text(self) -> str:
        """Return the report as text."""
        watched = max(self.steps - 1, 1)
        lines = [f"{self.steps} steps, {len(self.counts)} of them watched; {self.races} races"]
        if self.counts:
            lines.append("  last step: " + ", ".join(f"{value} {name}" for name, value in self.counts[-1].items()))
            milliseconds = 1e3 * statistics.median(self.seconds)
            lines.append(f"  CPU time of a step: {milliseconds:.0f} ms (median; all threads, decoding included)")
        lines.append("  waits in steps, per step:")
        lines += [f"    {times / watched:8.2f}  {wait}" for wait, times in self.in_step.most_common()]
        lines.append("  waits between steps, in all:")
        lines += [f"    {times:8}  {wait}" for wait, times in self.between.most_common()]
        return "\n".join(lines)


def _rows(waits: collections.Counter[Wait]) -> list[tuple[int, dict[str, str]]]:
    return [(times, asdict(wait)) for wait, times in waits.most_common()]


class Counters:
    """Counters of the preloaded stand-in."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(preload.build()))

    def read(self) -> dict[str, int]:
        """Return all counters."""
        values = (ctypes.c_long * len(COUNTERS))()
        self._library.fake_cuda_counts(values)
        return dict(zip(COUNTERS, values, strict=True))

    def reset(self) -> None:
        """Set all counters to zero."""
        self._library.fake_cuda_reset()

    def write_kernels(self, path: Path) -> None:
        """Write a line per kernel launched since the last reset: number of launches, tab, mangled name."""
        self._library.fake_cuda_kernels(str(path).encode())


def place_of_wait() -> Wait:
    """Return the place of the wait that the caller was informed of, from the stack."""
    stack = [frame for frame in traceback.extract_stack() if not _is_ours(frame.filename)]
    own = [frame for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]
    inner = stack[stack.index(own[-1]) + 1 :] if own else stack
    libraries = [frame for frame in inner if "/deepspeed/" in frame.filename] or inner
    where, code = (_name(own[-1]), own[-1].line or "") if own else ("", "")
    via = f"{_name(libraries[-1])} `{libraries[-1].line or ''}`" if libraries else ""
    return Wait(where, code, via)


def _is_ours(path: str) -> bool:
    return Path(path).parent == HERE or path.endswith("/warnings.py")


def _name(frame: traceback.FrameSummary) -> str:
    path = frame.filename.partition("site-packages/")[2] or frame.filename
    return f"{path.removeprefix(f'{REPOSITORY}/')} {frame.name}"
