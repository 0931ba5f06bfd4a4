"""Values that the doctor reads, the range in which each is expected, and failures of a check."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class HardFailure(Exception):
    """No later check makes sense; the doctor reports and exits with status 1. The message names the fix."""


class NotApplicable(Exception):
    """This machine lacks what a check needs. Raised on all ranks alike; the message names what is missing."""


@dataclass(frozen=True)
class Expected:
    """Range in which a number is expected. An expectation is not a measurement: ``source`` says where it comes from.

    Attributes:
        low: smallest expected number; None for any.
        high: largest expected number; None for any.
        source: origin of the range.
        hard: a number outside ends the doctor.
    """

    low: float | None = None
    high: float | None = None
    source: str = ""
    hard: bool = False

    def contains(self, value: float) -> bool:
        """Return True if a number lies inside; NaN never does."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high) and value == value


@dataclass(frozen=True)
class Reading:
    """Value that a check has found on one rank.

    Attributes:
        name: unique within its check, the same on every rank.
        value: a number, or a text, which is never judged.
        unit: of the number.
        expected: range of the number; None if none is known.
        constant: name of the value in :class:`~mrmae_ds.profiling.measured_node.MeasuredNode`; ``operator_gb_s.NAME``
            of an operator.
    """

    name: str
    value: float | str
    unit: str = ""
    expected: Expected | None = None
    constant: str | None = None


def collect_constants(values: Iterable[tuple[str | None, float | str]]) -> dict[str, Any]:
    """Return the fields of a :class:`~mrmae_ds.profiling.measured_node.MeasuredNode`.

    Args:
        values: ``constant`` and ``value`` of readings; only positive finite numbers that have a constant are taken.
    """
    constants: dict[str, Any] = {}
    for constant, value in values:
        if constant and isinstance(value, float | int) and math.isfinite(value) and value > 0:
            field, _, operator = constant.partition(".")
            if operator:
                constants.setdefault(field, {})[operator] = value
            else:
                constants[field] = value
    return constants
