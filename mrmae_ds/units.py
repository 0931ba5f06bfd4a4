"""Units and short formats of numbers and lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

GIB = 2**30
GIGA, TERA, PETA, EXA = 1e9, 1e12, 1e15, 1e18
SECONDS_PER_HOUR = 3600


def significant(number: float) -> str:
    """Format a non-negative number with three significant digits and without an exponent."""
    decimals = 2 - math.floor(math.log10(number)) if number else 0
    return f"{round(number, decimals):,.{max(decimals, 0)}f}"


def first_few(names: Sequence[object], count: int) -> str:
    """Return the first ``count`` names, separated by commas, and an ellipsis if there are more."""
    return ", ".join(map(str, names[:count])) + (", ..." if len(names) > count else "")
