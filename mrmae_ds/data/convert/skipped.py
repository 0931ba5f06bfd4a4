"""Report of the images that were left out of a data set."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.units import printable

_MAX_LINES = 20  # of a list in an error


@dataclass(frozen=True)
class Skipped:
    """An image that was left out.

    Attributes:
        row: in the source.
        name: in the source.
        reason: one line.
    """

    row: int
    name: str
    reason: str


def format_list(head: str, lines: Sequence[str]) -> str:
    """Return a message of ``head``, the first lines, and the number of further ones."""
    more = [f"and {len(lines) - _MAX_LINES:,} more"] if len(lines) > _MAX_LINES else []
    return "\n  ".join([head, *map(printable, lines[:_MAX_LINES]), *more])


def report_path(beton: Path) -> Path:
    """Return the path of a .beton's report, ``train.beton.skipped.csv``."""
    return beton.with_name(beton.name + ".skipped.csv")


def write_report(beton: Path, skipped: Sequence[Skipped]) -> None:
    """Write the report beside the .beton, or remove an older one if no image was left out."""
    path = report_path(beton)
    if not skipped:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", "name", "reason"])
    lines.writerows([entry.row, entry.name, entry.reason] for entry in skipped)
    write_text(path, text.getvalue())


def too_many(beton: Path, skipped: Sequence[Skipped], num_read: int, count: int, limit: int) -> UserError:
    """Return the error for more than ``limit`` unreadable images among the first ``num_read`` of ``count``."""
    stopped = "" if num_read == count else f" (stopped after {num_read:,})"
    head = (
        f"{beton}: {len(skipped):,} of {count:,} images cannot be read{stopped}, more than the {limit:,} that "
        f"--max-bad allows; repair or remove them ({report_path(beton).name} lists all), or raise --max-bad:"
    )
    return UserError(format_list(head, [f"{entry.name}: {entry.reason}" for entry in skipped]))
