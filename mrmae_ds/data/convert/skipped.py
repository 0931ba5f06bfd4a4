"""Images that are left out: the list of them, for people and for the sidecar."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text

_LISTED = 20  # lines of a list in an error


@dataclass(frozen=True)
class Skipped:
    """An image that is left out: its row in the source, what it is called there, and why."""

    row: int
    name: str
    reason: str


def listed(head: str, lines: Sequence[str]) -> str:
    """A message about many things: the first lines, and how many more there are."""
    more = [f"and {len(lines) - _LISTED:,} more"] if len(lines) > _LISTED else []
    return "\n  ".join([head, *lines[:_LISTED], *more])


def report_path(beton: Path) -> Path:
    """``train.beton`` -> ``train.beton.skipped.csv``."""
    return beton.with_name(beton.name + ".skipped.csv")


def printable(name: str) -> str:
    """A file's name that can be written as UTF-8, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def write_report(beton: Path, skipped: Sequence[Skipped]) -> None:
    """Write the list beside the .beton, or remove an older one where nothing was left out."""
    path = report_path(beton)
    if not skipped:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", "name", "reason"])
    lines.writerows([entry.row, entry.name, entry.reason] for entry in skipped)
    write_text(path, text.getvalue())


def too_many(beton: Path, skipped: Sequence[Skipped], seen: int, count: int, limit: int) -> UserError:
    """The error for more bad images than ``limit``, after ``seen`` of ``count`` were looked at."""
    looked = "" if seen == count else f" (stopped after {seen:,})"
    head = (
        f"{beton}: {len(skipped):,} of {count:,} images cannot be read{looked}, more than the {limit:,} that "
        f"--max-bad allows; mend or remove them ({report_path(beton).name} lists all), or raise --max-bad:"
    )
    return UserError(listed(head, [f"{entry.name}: {entry.reason}" for entry in skipped]))
