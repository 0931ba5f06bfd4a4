"""A table of results as data, and the functions of a run that its writers and plots share.

Rules that every table keeps: an accuracy of ours comes from a finished fine-tuning run, or from the evaluation of
several fine-tuned models together, and from nothing else; a cell that was not run is blank. A row is the paper's or
ours, never both, and a row of ours holds runs of one method, one number of models, one pre-training length and one
dataset, so that only comparable numbers are averaged or shown side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from mrmae_ds.records.record import RunRecord

Run = tuple[Path, RunRecord]
# Results of detectors by the paper's columns.
AP_RESULTS = {"AP box": "box/AP", "AP mask": "mask/AP"}
TOP1 = "top-1"


@dataclass(frozen=True)
class Cell:
    """One number.

    Attributes:
        value: mean over `runs`; None for a dash in the paper.
        spread: sample standard deviation over seeds; None for a single seed.
        runs: runs that differ only in their seed; empty for a number of the paper.
    """

    value: float | None
    spread: float | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Row:
    """Cells of one source.

    Attributes:
        method: row of the paper that this one is or belongs to.
        source: the paper, or our runs.
        label: text of the first column.
        dataset: "" for a row that was not run.
        epochs: of pre-training; 0 for none, None if unknown.
        cells: by column; a missing column is blank.
        labels: text cells, by heading.
    """

    method: str
    source: Literal["paper", "ours"]
    label: str
    dataset: str
    epochs: float | None
    cells: dict[str, Cell]
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, Cell]:
        """Cells filled by our runs, by column."""
        return {column: cell for column, cell in self.cells.items() if cell.runs}

    def value(self, column: str) -> float:
        """Return the number in `column`, NaN for a blank or a dash."""
        cell = self.cells.get(column)
        return math.nan if cell is None or cell.value is None else cell.value


class LeftOut(NamedTuple):
    """A run that fills no cell, and why."""

    run: Run
    reason: str


@dataclass(frozen=True)
class Table:
    """One of the paper's tables with our runs.

    Attributes:
        number: of the paper's table.
        title: its title.
        headings: text columns.
        columns: columns of numbers.
        rows: from the top.
        left_out: fine-tuning runs that fill no cell.
        probes: finished linear probes, for which the paper has no table.
    """

    number: int
    title: str
    headings: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]
    probes: tuple[Run, ...] = ()

    @property
    def excluded(self) -> tuple[str, ...]:
        """Folders of the runs that fill no cell, each with the reason."""
        return tuple(f"{run_path(run)}: {reason}" for run, reason in self.left_out)

    @property
    def beside(self) -> list[tuple[LeftOut, str]]:
        """Results of finished runs that fill no cell, each with the name of the result, `TOP1` or a column of AP."""
        return [
            (left, name)
            for left in self.left_out
            for name in (TOP1, *AP_RESULTS)
            if left.run[1].status == "finished" and measured_value(left.run[1], name) is not None
        ]

    @property
    def measured(self) -> list[tuple[Row, str, Cell]]:
        """Cells filled by our runs in reading order, each with its row and column."""
        return [(row, c, row.measured[c]) for row in self.rows for c in self.columns if c in row.measured]


def run_path(run: Run) -> str:
    """Return a run's folder relative to the working directory, or its last two components if it is elsewhere."""
    folder = run[0].resolve()
    try:
        return folder.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return "/".join(folder.parts[-2:])


def seeds(record: RunRecord) -> str:
    """Return a run's seed, or those of an ensemble's members ("0+1")."""
    return "+".join(str(tuning.seed) for tuning in record.finetunings if tuning)


def measured_value(record: RunRecord, column: str) -> float | None:
    """Return a record's result in a column of a table, in percent: an AP, or the accuracy."""
    return record.results.value(AP_RESULTS[column]) if column in AP_RESULTS else record.results.top1


def chance_accuracy(record: RunRecord) -> float:
    """Return the accuracy of guessing, in percent."""
    return 100 / (record.data.classes or 1)


def sampling_error(record: RunRecord) -> float:
    """Return the binomial standard error of a record's top-1 in percentage points: sqrt(p (1 - p) / n)."""
    share = (record.results.top1 or 0.0) / 100
    return 100 * math.sqrt(share * (1 - share) / (record.results.eval_samples or 1))


def val_copies(record: RunRecord) -> int:
    """Return the validation images behind a record's accuracy that are copies of training images, as far as known."""
    return record.data.val_copies or (record.finetune_data.val_copies if record.finetune_data else None) or 0


def copies_note(record: RunRecord) -> str:
    """Return the text beside an accuracy that rests on copies of training images; "" for any other."""
    copies = val_copies(record)
    total = record.results.eval_samples or 0
    return f" ({copies:,} of {total:,} validation images are copies of training images)" if copies else ""


def teacher_sources(record: RunRecord) -> dict[str, str]:
    """Return the sources of the teachers behind a record's weights, by their names in the recipes."""
    summaries = [t.init.pretrain for t in record.finetunings if t and t.init and t.init.pretrain]
    return {name: teacher.source for summary in summaries for name, teacher in summary.teachers.items()}


def format_number(value: float | None, digits: int = 3) -> str:
    """Format with this many significant digits, usually without an exponent; "" for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    text = f"{rounded:,.10f}".rstrip("0").rstrip(".")
    return text if text not in ("0", "-0") else f"{rounded:g}"
