"""Units and short formats of numbers and lists."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

GIB = 2**30
GIGA, TERA, PETA, EXA = 1e9, 1e12, 1e15, 1e18
SECONDS_PER_HOUR = 3600
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs


def significant(number: float) -> str:
    """Format a non-negative number with three significant digits and without an exponent."""
    decimals = 2 - math.floor(math.log10(number)) if number else 0
    return f"{round(number, decimals):,.{max(decimals, 0)}f}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 file", "1,200 files", "2 classes"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def first_few(names: Sequence[object], count: int) -> str:
    """Return the first ``count`` names, escaped, separated by commas, and an ellipsis if there are more."""
    return ", ".join(printable(str(name)) for name in names[:count]) + (", ..." if len(names) > count else "")


def printable(name: str) -> str:
    """Return a name from a user's file on one line: what is not UTF-8 and control characters are escaped."""
    return "".join(_escape(letter) if unicodedata.category(letter) in _UNPRINTABLE else letter for letter in name)


def _escape(letter: str) -> str:
    # A byte of a file name that is not UTF-8, as os.fsdecode returns it.
    return f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]


def describe_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Describe the first place at which two lists of names differ, with escapes where the terminal shows no difference.

    Args:
        ours: the names.
        theirs: other names.

    Returns:
        "number 3 is 'cat', the other 'dog'", for example; "" if they are equal.
    """
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one == other:
            continue
        if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
            return f"number {place} is {one!a}, the other {other!a}: the same text in another Unicode form"
        return f"number {place} is {one!r}, the other {other!r}"
    counts = len(ours), len(theirs)
    return f"{counts[0]} names, the other has {counts[1]}" if counts[0] != counts[1] else ""
