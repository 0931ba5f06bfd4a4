"""A table as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from mrmae_ds.records.record import RunRecord
from mrmae_ds.tables import paper
from mrmae_ds.tables.costs import Facts, number
from mrmae_ds.tables.scaling import split_size
from mrmae_ds.tables.select_runs import chance, run_name, sampling_error, teachers
from mrmae_ds.tables.write import Cell, Row, Run, Table

RUN_COLUMNS = (
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
COST_COLUMNS = (
    "cell",
    "seed",
    "parameters (M)",
    "GFLOP an image",
    "pre-training PFLOP",
    "pre-training device-hours",
    "pre-training images/s",
    "fine-tuning device-hours",
    "fine-tuning images/s",
    "device",
)
PROBE_COLUMNS = (
    "run folder",
    "method, size",
    "data set",
    "top-1 (%)",
    "chance (%)",
    *RUN_COLUMNS[8:9],
    "probe epochs",
    "seed",
)
PROBES = "Ours, of a linear classifier on the frozen encoder; the paper has none, and they stand in no cell above."
SOURCES = (
    "Rows marked **paper** are copied from the paper's Table {number}; a dash is its own blank. Rows marked **ours**, "
    "in bold, were measured by the runs listed below, on the data set that the row names. Accuracies on different data "
    "sets cannot be compared. What was not run is blank. ep = epochs of pre-training."
)
ERRORS = (
    "Sampling error: one binomial standard error of the run's own accuracy. Chance: 100 / classes. A "
    "cell with several runs shows their mean ± sample standard deviation over n seeds."
)
COSTS = (
    "Parameters are the fine-tuned model's, with its head; GFLOP its forward pass. Pre-training PFLOP: all its steps, "
    "teachers, backward and recomputation included, two operations a multiply-add. Device-hours: processes times hours "
    "as they ran, evaluation included; on GPUs these are GPU-hours. Images/s: of the whole job, the median of what it "
    "logged. Blank is not known."
)


def to_markdown(table: Table) -> str:
    """Return the table, the footnotes and two lines for every run behind our cells, as GitHub Markdown."""
    marks = cell_marks(table)
    parts = [f"# {table.title}", SOURCES.format(number=table.number)]
    parts += [_grid(head, body, numbers_from=1 + len(table.headings)) for head, body in grids(table, marks)]
    if marks:
        parts += ["## The runs behind our numbers", _grid(list(RUN_COLUMNS), list(run_lines(table, marks))), ERRORS]
        parts += ["## What they cost", _grid(list(COST_COLUMNS), list(cost_lines(table, marks)), 2), COSTS]
    else:
        parts.append("No run of ours has finished fine-tuning yet.")
    if table.probes:
        lines = [_probe_line(run) for run in table.probes]
        parts += ["## Linear probes", PROBES, _grid(list(PROBE_COLUMNS), lines)]
    if table.left_out:
        parts += ["## Fine-tuning runs that fill no cell", "\n".join(f"- {line}" for line in table.left_out)]
    notes = paper.slips_of(table.number)
    parts += ["## Notes on the paper's numbers", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def grids(
    table: Table, marks: dict[tuple[str, str], str], bold: str = "**{}**"
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Heads and bodies, as text: one grid, and of the scaling table one more for each family of sizes of our own."""
    families = dict.fromkeys(split_size(column)[0] for column in table.columns)
    for family in families:
        columns = [column for column in table.columns if split_size(column)[0] == family]
        rows = [row for row in table.rows if row.cells.keys() & set(columns)]
        if not family:
            rows = _with_blank_rows(table, rows)
        head = ["Top-1 accuracy (%)" if table.number == 6 else "", *table.headings, *columns]
        body = [
            [
                row.label,
                *(row.labels.get(heading, "") for heading in table.headings),
                *(cell_text(row, column, marks, bold) for column in columns),
            ]
            for row in rows
        ]
        yield head, body


def _with_blank_rows(table: Table, filled: list[Row]) -> list[Row]:
    """The rows with cells in the paper's grid, and a blank one of ours for what was run only at sizes of another, or
    not at all."""
    rows: list[Row] = []
    for row in table.rows:
        blank = Row(row.method, "ours", f"{row.method}, ours (not run)", "", None, {})
        if row in filled or not row.cells:
            rows.append(row)
        elif blank not in rows and any(other.method == row.method for other in filled):
            rows.append(blank)
    return rows


def cell_marks(table: Table) -> dict[tuple[str, str], str]:
    """Number our cells in reading order: (row label, column) to "[1]"."""
    return {(row.label, column): f"[{n}]" for n, (row, column, _) in enumerate(table.measured, start=1)}


def cell_text(row: Row, column: str, marks: dict[tuple[str, str], str], bold: str) -> str:
    """A cell as it is shown: the paper's as printed, ours in `bold` with its spread and its mark."""
    cell = row.cells.get(column)
    if cell is None:
        return ""
    if row.source == "paper":
        return "-" if cell.value is None else paper_number(column, cell.value)
    if not cell.runs:
        return number(cell.value)
    return f"{bold.format(measured_text(cell))} {marks[row.label, column]}"


def measured_text(cell: Cell) -> str:
    """Mean, and spread over seeds if there are several."""
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f} (n={len(cell.runs)})"
    return f"{cell.value:.2f}{spread}"


def paper_number(column: str, value: float) -> str:
    """As the paper prints it: whole numbers of parameters, ratios and epochs, else one decimal."""
    return f"{value:.0f}" if column in ("Params (M)", "Ratio (%)", "F-Epochs") else f"{value:.1f}"


def run_lines(table: Table, marks: dict[tuple[str, str], str]) -> Iterator[list[str]]:
    """`RUN_COLUMNS` of every run behind a cell."""
    for row, column, cell in table.measured:
        for run in cell.runs:
            record = run[1]
            yield [
                marks[row.label, column],
                run_name(run),
                f"{record.pretrain_method}, {record.size}",
                f"{record.results.top1:.2f}",
                f"± {sampling_error(record):.2f}",
                f"{chance(record):.4g}",
                f"{record.results.eval_samples:,}",
                f"{(record.finetune_data or record.data).samples:,}",
                _epochs(record.pretrain_epochs),
                _epochs(record.finetune_epochs),
                seeds(record),
                record.recipe_hash[:12],
                "; ".join(f"{name}: {source}" for name, source in teachers(record).items()) or "none",
            ]


def cost_lines(table: Table, marks: dict[tuple[str, str], str]) -> Iterator[list[str]]:
    """`COST_COLUMNS` of every run behind a cell."""
    for row, column, cell in table.measured:
        for _, record in cell.runs:
            facts = Facts.of(record)
            values = (
                facts.parameters,
                facts.forward,
                facts.pretrain_work,
                facts.pretrain_hours,
                facts.pretrain_speed,
                facts.tuning_hours,
                facts.tuning_speed,
            )
            yield [marks[row.label, column], seeds(record), *map(number, values), facts.device]


def _probe_line(run: Run) -> list[str]:
    record = run[1]
    return [
        run_name(run),
        f"{record.pretrain_method}, {record.size}",
        record.data.dataset,
        f"{record.results.top1:.2f}",
        f"{chance(record):.4g}",
        _epochs(record.pretrain_epochs),
        _epochs(record.schedule.epochs),
        str(record.seed),
    ]


def seeds(record: RunRecord) -> str:
    """The run's seed; of an ensemble those of its members, "0+1"."""
    return "+".join(str(tuning.seed) for tuning in record.finetunings if tuning)


def _epochs(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


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
