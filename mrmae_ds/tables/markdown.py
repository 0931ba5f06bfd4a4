"""Write a table as Markdown, and build the grids of text that the LaTeX writer shares."""

from __future__ import annotations

from collections.abc import Iterator

from tabulate import tabulate

from mrmae_ds.records.record import RunRecord
from mrmae_ds.tables import paper
from mrmae_ds.tables.base import (
    AP_RESULTS,
    Cell,
    Row,
    Run,
    Table,
    chance_accuracy,
    copies_note,
    format_number,
    measured_value,
    run_path,
    sampling_error,
    seeds,
    teacher_sources,
)
from mrmae_ds.tables.costs import run_costs
from mrmae_ds.tables.scaling import split_size
from mrmae_ds.weights.changed import changed_weights

Marks = dict[tuple[str, str], str]  # (row label, column) of a cell of ours to its number, "[1]"
Grid = tuple[list[str], list[list[str]]]  # head and body, as text

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
BOTH = "top-1 or AP (%)"
DETECTION_RUN_COLUMNS = tuple(
    "AP (%)" if column == "top-1 (%)" else column
    for column in RUN_COLUMNS
    if column not in ("sampling error", "chance (%)")
)
COST_COLUMNS = (
    "cell",
    "seed",
    "parameters (M)",
    "GFLOP/image",
    "pre-training PFLOP",
    "pre-training GPU-hours",
    "pre-training images/s",
    "fine-tuning GPU-hours",
    "fine-tuning images/s",
    "device",
)
BESIDE_COLUMNS = ("run folder", "method, size", "dataset", "result", "(%)", *RUN_COLUMNS[4:])
PROBE_COLUMNS = (
    "run folder",
    "method, size",
    "dataset",
    "top-1 (%)",
    "chance (%)",
    "pre-training epochs",
    "probe epochs",
    "seed",
)
PROBES = "Linear classifiers on our frozen encoders. The paper has no such table, so they fill no cell above."
SOURCES = (
    "Rows marked **paper** are copied from the paper's Table {number}; a dash is blank in the paper. Rows marked "
    "**ours**, in bold, were measured by the runs listed below, on the dataset named in the row. Accuracies on "
    "different datasets are not comparable. Cells that were not run are blank. ep = epochs of pre-training."
)
BESIDE = "These runs have results, which are of no row or cell of the table."
ERRORS = (
    "Sampling error: one binomial standard error of the run's own accuracy. Chance: 100 / classes. A cell with several "
    "runs shows their mean ± sample standard deviation over n seeds."
)
COSTS = (
    "Parameters: the fine-tuned model with its head. GFLOP/image: its forward pass. Pre-training PFLOP: all steps with "
    "teachers, backward pass and recomputation; a multiply-add counts as two operations. GPU-hours: ranks times "
    "wall-clock hours, evaluation included; on CPUs these are rank-hours. Images/s: median throughput of the job. "
    "Blank: unknown."
)


def to_markdown(table: Table) -> str:
    """Return a table, the runs behind our cells with their costs, and the paper's errata as GitHub Markdown."""
    marks = cell_marks(table)
    parts = [f"# {table.title}", SOURCES.format(number=table.number)]
    parts += [_layout(grid, numbers_from=1 + len(table.headings)) for grid in grids(table, marks)]
    if marks:
        parts += ["## Runs behind our numbers", _layout((run_columns(table), list(run_lines(table, marks)))), ERRORS]
        parts += ["## Cost of these runs", _layout((list(COST_COLUMNS), list(cost_lines(table, marks))), 2), COSTS]
    else:
        parts.append("No run of ours has finished fine-tuning yet.")
    if table.probes:
        lines = [_probe_line(run) for run in table.probes]
        parts += ["## Linear probes", PROBES, _layout((list(PROBE_COLUMNS), lines))]
    if table.left_out:
        parts += ["## Fine-tuning runs that fill no cell", "\n".join(f"- {line}" for line in table.excluded)]
    if table.beside:
        costs = {left.run[0]: [run_path(left.run), *_costs_of(left.run[1])] for left, _ in table.beside}
        parts += [BESIDE, _layout((list(BESIDE_COLUMNS), list(_beside_lines(table))))]
        parts.append(_layout((["run folder", *COST_COLUMNS[1:]], list(costs.values())), 2))
        parts += [] if marks else [COSTS]
    errata = paper.errata_of(table.number)
    parts += ["## Errata of the paper", "\n".join(f"- {erratum}" for erratum in errata)]
    return "\n\n".join(parts) + "\n"


def grids(table: Table, marks: Marks, bold: str = "**{}**") -> Iterator[Grid]:
    """Yield one grid; for the scaling table, one more for each family of sizes of our own."""
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
    """Return the rows of the paper's grid, with a blank row of ours for methods run only at other sizes, or not run."""
    rows: list[Row] = []
    for row in table.rows:
        blank = Row(row.method, "ours", f"{row.method}, ours (not run)", "", None, {})
        if row in filled or not row.cells:
            rows.append(row)
        elif blank not in rows and any(other.method == row.method for other in filled):
            rows.append(blank)
    return rows


def cell_marks(table: Table) -> Marks:
    """Number our cells in reading order."""
    return {(row.label, column): f"[{n}]" for n, (row, column, _) in enumerate(table.measured, start=1)}


def cell_text(row: Row, column: str, marks: Marks, bold: str) -> str:
    """Return the text of a cell: the paper's as printed, ours in `bold` with spread and mark."""
    cell = row.cells.get(column)
    if cell is None:
        return ""
    if row.source == "paper":
        return "-" if cell.value is None else _as_printed(column, cell.value)
    if not cell.runs:
        return format_number(cell.value)
    note = max((copies_note(record) for _, record in cell.runs), key=len)
    return f"{bold.format(_measured(cell))} {marks[row.label, column]}{note}"


def _measured(cell: Cell) -> str:
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f} (n={len(cell.runs)})"
    return f"{cell.value:.2f}{spread}"


def _as_printed(column: str, value: float) -> str:
    """Format as in the paper: whole numbers of parameters, ratios and epochs, otherwise one decimal."""
    return f"{value:.0f}" if column in ("Params (M)", "Ratio (%)", "F-Epochs") else f"{value:.1f}"


def run_columns(table: Table) -> list[str]:
    """Return the headings of :func:`run_lines`."""
    if table.number == paper.TABLE_2.number:
        return list(DETECTION_RUN_COLUMNS)
    both = AP_RESULTS.keys() <= set(table.columns)
    return [BOTH if both and column == "top-1 (%)" else column for column in RUN_COLUMNS]


def run_lines(table: Table, marks: Marks) -> Iterator[list[str]]:
    """Yield :func:`run_columns` of every run behind a cell."""
    headings = run_columns(table)
    for row, column, cell in table.measured:
        for run in cell.runs:
            values = _run_values(run, column) | {"cell": marks[row.label, column]}
            yield [values[heading] for heading in headings]


def _beside_lines(table: Table) -> Iterator[list[str]]:
    """Yield `BESIDE_COLUMNS` of every result of a run that fills no cell."""
    for left, name in table.beside:
        record = left.run[1]
        data = (record.finetune_data or record.data).dataset
        values = _run_values(left.run, name) | {"dataset": data, "result": name}
        yield [values[heading] for heading in BESIDE_COLUMNS]


def _run_values(run: Run, column: str) -> dict[str, str]:
    """Return the text of a run and of its result in `column`, by heading."""
    record = run[1]
    value = f"{measured_value(record, column):.2f}"
    samples = record.results.eval_samples
    return {
        "run folder": _folder(run),
        "method, size": f"{record.pretrain_method}, {record.size}",
        **dict.fromkeys(("top-1 (%)", "AP (%)", BOTH, "(%)"), value),
        "sampling error": "" if column in AP_RESULTS else f"± {sampling_error(record):.2f}",
        "chance (%)": "" if column in AP_RESULTS else f"{chance_accuracy(record):.4g}",
        "eval samples": "" if samples is None else f"{samples:,}",
        "training samples": f"{(record.finetune_data or record.data).samples:,}",
        "pre-training epochs": _epochs(record.pretrain_epochs),
        "fine-tuning epochs": _epochs(record.finetune_epochs),
        "seed": seeds(record),
        "recipe hash": record.recipe_hash[:12],
        "teachers": "; ".join(f"{name}: {source}" for name, source in teacher_sources(record).items()) or "none",
    }


def cost_lines(table: Table, marks: Marks) -> Iterator[list[str]]:
    """Yield `COST_COLUMNS` of every run behind a cell."""
    for row, column, cell in table.measured:
        for _, record in cell.runs:
            yield [marks[row.label, column], *_costs_of(record)]


def _costs_of(record: RunRecord) -> list[str]:
    """Return `COST_COLUMNS` of a run, without the cell."""
    costs = run_costs(record)
    return [seeds(record), *map(format_number, costs.numbers().values()), costs.device]


def _probe_line(run: Run) -> list[str]:
    record = run[1]
    return [
        _folder(run),
        f"{record.pretrain_method}, {record.size}",
        record.data.dataset,
        f"{record.results.top1:.2f}{copies_note(record)}",
        f"{chance_accuracy(record):.4g}",
        _epochs(record.pretrain_epochs),
        _epochs(record.schedule.epochs),
        str(record.seed),
    ]


def _folder(run: Run) -> str:
    changed = ", ".join(f"{path.parent.parent.name}/{path.parent.name}" for path in changed_weights(*run))
    return run_path(run) + (f" (of other weights than {changed} has by now)" if changed else "")


def _epochs(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _layout(grid: Grid, numbers_from: int | None = None) -> str:
    """Align a grid as a Markdown table; columns from `numbers_from` on are right-aligned."""
    head, *body = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (grid[0], *grid[1]))
    left = len(head) if numbers_from is None else numbers_from
    alignment = ["left"] * left + ["right"] * (len(head) - left)
    return tabulate(body, head, tablefmt="pipe", colalign=alignment, disable_numparse=True)
