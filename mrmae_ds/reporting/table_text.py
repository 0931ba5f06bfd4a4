"""The scaling table as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from mrmae_ds.reporting import paper
from mrmae_ds.reporting.records import RunRecord
from mrmae_ds.reporting.table import Cell, Row, Table, run_name, sampling_error

CSV_COLUMNS = (
    "method",
    "source",
    "dataset",
    "pretrain_epochs",
    "size",
    "top1_percent",
    "std_over_seeds",
    "n_seeds",
    "finetune_epochs",
    "eval_samples",
    "chance_percent",
    "recipe_hash",
    "seeds",
    "runs",
)
_RUN_COLUMNS = (
    "cell",
    "run folder",
    "method, size",
    "top-1 (%)",
    "sampling error",
    "chance (%)",
    "eval samples",
    "training samples",
    "pre-training epochs",
    "fine-tuning epochs",
    "seed",
    "recipe hash",
    "teachers",
)


def to_markdown(table: Table) -> str:
    """Return the table, the footnotes and a line for every run behind our cells, as GitHub Markdown."""
    marks = _marks(table)
    head = ["Top-1 accuracy (%)", *table.sizes]
    body = [[row.label, *(_text(row, size, marks) for size in table.sizes)] for row in table.rows]
    parts = [
        "# Top-1 accuracy after fine-tuning, by model size",
        f"Rows marked **paper** are copied from the paper's Table {paper.TABLE_6.number}, {paper.IMAGENET}; "
        "a dash is its own blank. Rows marked **ours**, in bold, were measured by the runs listed below, on "
        "the data set that the row names. Accuracies on different data sets cannot be compared. What was not "
        "run is blank. ep = epochs of pre-training.",
        _grid(head, body, numbers_from=1),
    ]
    if marks:
        parts += ["## The runs behind our numbers", _grid(list(_RUN_COLUMNS), list(_run_lines(table, marks)))]
        parts.append(
            "Sampling error: one binomial standard error of the run's own accuracy. Chance: 100 / classes. A "
            "cell with several runs shows their mean ± sample standard deviation over n seeds."
        )
    else:
        parts.append("No run of ours has finished fine-tuning yet.")
    if table.left_out:
        parts += ["## Fine-tuning runs that fill no cell", "\n".join(f"- {line}" for line in table.left_out)]
    notes = paper.slips_of(paper.TABLE_6.number)
    parts += ["## Notes on the paper's numbers", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table) -> str:
    """Return `CSV_COLUMNS` with one line a row and size; a blank cell has an empty top-1, the paper's dash a
    "-"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for row in table.rows:
        for size in table.sizes:
            line: dict[str, object] = {
                "method": row.method,
                "source": row.source,
                "dataset": row.dataset,
                "size": size,
            }
            line["pretrain_epochs"] = "" if row.epochs is None else f"{row.epochs:g}"
            if cell := row.cells.get(size):
                line |= _csv_cell(cell)
            writer.writerow(line)
    return text.getvalue()


def _csv_cell(cell: Cell) -> dict[str, object]:
    fields: dict[str, object] = {"top1_percent": "-" if cell.value is None else f"{cell.value:.6g}"}
    if cell.runs:
        record = cell.runs[0][1]
        fields |= {
            "std_over_seeds": "" if cell.spread is None else f"{cell.spread:.6g}",
            "n_seeds": len(cell.runs),
            "finetune_epochs": "" if record.tuning_epochs is None else f"{record.tuning_epochs:g}",
            "eval_samples": record.results.eval_samples,
            "chance_percent": f"{_chance(record):g}",
            "recipe_hash": record.recipe_hash,
            "seeds": " ".join(_seeds(record) for _, record in cell.runs),
            "runs": " ".join(run_name(run) for run in cell.runs),
        }
    return fields


def _marks(table: Table) -> dict[tuple[str, str], str]:
    """Number our cells in reading order: (row label, size) to "[1]"."""
    filled = [
        (row.label, size) for row in table.rows for size in table.sizes if row.source == "ours" and size in row.cells
    ]
    return {place: f"[{number}]" for number, place in enumerate(filled, start=1)}


def _text(row: Row, size: str, marks: dict[tuple[str, str], str]) -> str:
    cell = row.cells.get(size)
    if cell is None:
        return ""
    if row.source == "paper":
        return "-" if cell.value is None else f"{cell.value:.1f}"
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f} (n={len(cell.runs)})"
    return f"**{cell.value:.2f}{spread}** {marks[row.label, size]}"


def _run_lines(table: Table, marks: dict[tuple[str, str], str]) -> Iterator[list[str]]:
    for row in table.rows:
        for size in table.sizes:
            for run in row.cells[size].runs if size in row.cells else ():
                record = run[1]
                yield [
                    marks[row.label, size],
                    run_name(run),
                    f"{row.method}, {size}",
                    f"{record.results.top1:.2f}",
                    f"± {sampling_error(record):.2f}",
                    f"{_chance(record):.4g}",
                    f"{record.results.eval_samples:,}",
                    f"{(record.tuning_data or record.data).samples:,}",
                    _epochs(record.pretrain_epochs),
                    _epochs(record.tuning_epochs),
                    _seeds(record),
                    record.recipe_hash[:12],
                    _teachers(record),
                ]


def _teachers(record: RunRecord) -> str:
    inits = [tuning.init for tuning in record.tunings if tuning and tuning.init]
    teachers = [item for init in inits if init.pretrain for item in init.pretrain.teachers.items()]
    return "; ".join(dict.fromkeys(f"{name}: {teacher.source}" for name, teacher in teachers)) or "none"


def _seeds(record: RunRecord) -> str:
    """The run's seed; of an ensemble those of its members, "0+1"."""
    return "+".join(str(tuning.seed) for tuning in record.tunings if tuning)


def _epochs(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _chance(record: RunRecord) -> float:
    return 100 / (record.data.classes or 1)


def _grid(head: list[str], body: list[list[str]], numbers_from: int | None = None) -> str:
    """Lay out a Markdown table, padded so that it reads well as plain text; columns from `numbers_from` on go
    right."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *body)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]
    right = [numbers_from is not None and i >= numbers_from for i in range(len(head))]
    rule = ["-" * (width - 1) + (":" if at_right else "-") for width, at_right in zip(widths, right, strict=True)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        padded = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)
