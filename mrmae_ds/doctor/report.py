"""Report of the doctor: verdicts over all ranks, doctor.json, and the page that is printed."""

from __future__ import annotations

import json
import math
import socket
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mrmae_ds.doctor.context import Check, DoctorContext
from mrmae_ds.doctor.reading import Expected, collect_constants
from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.profiling.measured_node import FORMAT, MEASURED_KEY, MeasuredNode
from mrmae_ds.records.environment import collect_hardware, collect_versions
from mrmae_ds.units import significant


@dataclass(frozen=True)
class ValueRow:
    """A value over all ranks.

    Attributes:
        name: of the reading.
        value: median of the numbers, or the different texts.
        low: smallest number. high: largest number.
        unit: of the numbers.
        expected: range; None if none is known.
        verdict: ``as expected``, ``OUTSIDE on rank N``, ``not judged``, or empty without an expectation.
        constant: name in ``measured``.
    """

    name: str
    value: float | str
    low: float | None
    high: float | None
    unit: str
    expected: Expected | None
    verdict: str
    constant: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        expected = vars(self.expected) if self.expected else None
        ends = {"min": self.low, "max": self.high} if self.low is not None else {}
        return {"name": self.name, "value": self.value, **ends, "unit": self.unit, "expected": expected} | {
            "verdict": self.verdict
        }


@dataclass(frozen=True)
class CheckResult:
    """Result of a check over all ranks.

    Attributes:
        name: of the check.
        status: ``done``, ``not applicable``, ``failed``, or ``stop`` after a hard failure.
        message: reason, unless ``done``.
        seconds: duration on this rank.
        decides: configuration that the result decides.
        rows: values.
    """

    name: str
    status: str
    message: str
    seconds: float
    decides: str
    rows: list[ValueRow]


def summarize(check: Check, ranks: list[Any], seconds: float, judge: bool) -> CheckResult:
    """Combine the readings of all ranks.

    Args:
        check: the check.
        ranks: status, message and readings of each rank; None of a rank that did not answer.
        seconds: duration.
        judge: compare numbers with expectations.
    """
    absent = [str(rank) for rank, result in enumerate(ranks) if result is None]
    if absent:
        return CheckResult(check.name, "stop", f"no answer from rank {', '.join(absent)}", seconds, check.decides, [])
    order = ("stop", "failed", "not applicable", "done")
    status = min((result["status"] for result in ranks), key=order.index)
    messages = {result["message"]: rank for rank, result in reversed(list(enumerate(ranks))) if result["message"]}
    message = "; ".join(f"rank {rank}: {text}" if len(ranks) > 1 else text for text, rank in messages.items())
    names = dict.fromkeys(reading["name"] for result in ranks for reading in result["readings"])
    rows = [_row(name, ranks, judge) for name in names]
    wrong = [row for row in rows if row.expected and row.expected.hard and row.verdict.startswith("OUTSIDE")]
    if wrong and status == "done":
        status = "stop"
        parts = [f"{row.name}: {_number(row.high, row.unit)}, expected {describe(row.expected)}" for row in wrong]
        message = "; ".join(parts)
    return CheckResult(check.name, status, message, seconds, check.decides, rows)


def _row(name: str, ranks: list[Any], judge: bool) -> ValueRow:
    found = {rank: r for rank, result in enumerate(ranks) for r in result["readings"] if r["name"] == name}
    first = next(iter(found.values()))
    values = {rank: reading["value"] for rank, reading in found.items()}
    if any(isinstance(value, str) for value in values.values()):
        different = list(dict.fromkeys(str(value) for value in values.values()))
        return ValueRow(name, "; ".join(different[:4]), None, None, "", None, "", None)
    limits = {rank: Expected(**r["expected"]) if r["expected"] else None for rank, r in found.items()}
    outside = [rank for rank, value in values.items() if (limit := limits[rank]) and not limit.contains(value)]
    expected, verdict = limits[next(iter(found))], ""
    if expected:
        verdict = "as expected" if not outside else f"OUTSIDE on rank {', '.join(map(str, outside[:8]))}"
        verdict = verdict if judge else "not judged"
    numbers = list(values.values())
    middle = statistics.median(numbers)
    return ValueRow(name, middle, min(numbers), max(numbers), first["unit"], expected, verdict, first["constant"])


class DoctorReport:
    """Collects results on every rank; rank 0 prints each and writes the file as it comes, and at the end the page.

    Args:
        context: of the doctor.
        checks: names of the checks to run.
    """

    def __init__(self, context: DoctorContext, checks: Sequence[str]) -> None:
        self.context, self.checks, self.results = context, checks, list[CheckResult]()
        self.began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(self, result: CheckResult) -> None:
        """Add a result, print a line, and write the report so far."""
        self.results.append(result)
        if self.context.launch.rank == 0:
            outside = sum(row.verdict.startswith("OUTSIDE") for row in result.rows)
            found = f"{outside} of {len(result.rows)} values outside" if outside else result.status
            print(f"{result.name}: {result.message or found} ({result.seconds:.1f} s)", flush=True)
            with suppress(OSError, UserError):  # finish() reports it
                self._write()

    def finish(self) -> None:
        """Print the page, write doctor.json, and name the checks without a result, on rank 0.

        Raises:
            UserError: if the file cannot be written.
        """
        if self.context.launch.rank:
            return
        print(f"\n{page(self.results)}\n", flush=True)
        try:
            self._write()
        except OSError as error:
            raise UserError(f"--out {self.context.request.out}: cannot be written ({error.strerror})") from None
        lines = [f"written: {self.context.request.out}"]
        for status, names in {"failed": self.failed(), "not run": self._not_run()}.items():
            lines += [f"{status}: {', '.join(names)}"] if names else []
        print("\n".join(lines), flush=True)

    def failed(self) -> list[str]:
        """Return the names of the checks that ended with an error or a hard failure."""
        return [result.name for result in self.results if result.status in ("failed", "stop")]

    def _not_run(self) -> list[str]:
        done = {result.name for result in self.results}
        return [name for name in self.checks if name not in done]

    def _write(self) -> None:
        write_text(self.context.request.out, json.dumps(_finite(self.to_json()), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """Return the content of doctor.json."""
        context = self.context
        checks = [
            {key: value for key, value in vars(result).items() if key != "rows"}
            | {"rows": [row.to_json() for row in result.rows]}
            for result in self.results
        ]
        return {
            "format": FORMAT,
            "began": self.began,
            "host": socket.gethostname(),
            "world_size": context.launch.world_size,
            "ranks_per_node": context.launch.local_size,
            "hardware": collect_hardware(context.launch.world_size, context.device).model_dump(),
            "gpu": context.gpu.key if context.gpu else None,
            "ds_config": str(context.request.ds_config) if context.request.ds_config else None,
            "versions": collect_versions(),
            "checks": checks,
            "not_run": self._not_run(),
            MEASURED_KEY: measured_node(self.context, self.results).known(),
        }


def measured_node(context: DoctorContext, results: list[CheckResult]) -> MeasuredNode:
    """Return the constants that ``mrmae plan --measured`` reads: medians over ranks, positive and finite ones only."""
    device = {"device": collect_hardware(1, context.device).device}
    rows = ((row.constant, row.value) for result in results for row in result.rows)
    return MeasuredNode.model_validate(device | collect_constants(rows))


def page(results: list[CheckResult]) -> str:
    """Return the page: a table of the values of each check, and what they decide."""
    lines: list[str] = []
    for result in results:
        lines += ["", f"{result.name}: {result.status}" + (f", {result.message}" if result.message else "")]
        lines += [f"  decides {result.decides}"] if result.rows else []
        for row in result.rows:
            measured = row.value if isinstance(row.value, str) else _number(row.value, row.unit)
            if row.low is not None and row.low != row.high:
                measured += f" ({_number(row.low)} to {_number(row.high)})"
            expected = f"; expected {describe(row.expected)}: {row.verdict}" if row.expected else ""
            lines.append(f"  {row.name}: {measured}{expected}")
    return "\n".join(lines).strip()


def describe(expected: Expected | None) -> str:
    """Return a range in words."""
    if expected is None:
        return "nothing"
    low, high = expected.low, expected.high
    if low is not None and low == high:
        return _number(low)
    parts = [f"at least {_number(low)}"] if low is not None else []
    return " and ".join([*parts, *([f"at most {_number(high)}"] if high is not None else [])])


def _number(value: float | None, unit: str = "") -> str:
    """Format a number with three digits, small ones with an exponent."""
    if value is None or value != value or abs(value) == math.inf:
        text = str(value)
    elif 0 < abs(value) < 1e-3:
        text = f"{value:.1e}"
    else:
        text = ("-" if value < 0 else "") + significant(abs(value))
    return f"{text} {unit}".strip()


def _finite(value: Any) -> Any:
    """Return a JSON value whose NaN and infinite numbers are texts, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
