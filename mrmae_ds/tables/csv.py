"""Write a table as CSV."""

from __future__ import annotations

import csv
import io

from mrmae_ds.tables.base import (
    Cell,
    Table,
    chance_accuracy,
    measured_value,
    run_path,
    seeds,
    teacher_sources,
    val_copies,
)
from mrmae_ds.tables.costs import cell_costs

COLUMNS = (
    "table",
    "row",
    "method",
    "source",
    "dataset",
    "pretrain_epochs",
    "column",
    "value",
    "std_over_seeds",
    "n_seeds",
    "finetune_epochs",
    "eval_samples",
    "chance_percent",
    "parameters_m",
    "gflop_per_image",
    "pretrain_pflop",
    "pretrain_gpu_hours",
    "pretrain_images_per_s",
    "finetune_gpu_hours",
    "finetune_images_per_s",
    "device",
    "teachers",
    "recipe_hash",
    "seeds",
    "runs",
    "val_copies",
    "fills_no_cell",
)


def to_csv(table: Table) -> str:
    """Return a table as CSV, one line per row and column.

    Each line names its source, so that the paper's numbers and ours cannot be mixed up. A blank cell has an empty
    value, a dash of the paper a "-". The results of runs that fill no cell follow, with the reason in the last column
    and no row.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for row in table.rows:
        for column in table.columns:
            line: dict[str, object] = {
                "table": table.number,
                "row": row.label,
                "method": row.method,
                "source": row.source,
                "dataset": row.dataset,
                "pretrain_epochs": _digits(row.epochs),
                "column": column,
            }
            if cell := row.cells.get(column):
                line |= _cell(cell)
            writer.writerow(line)
    for (run, reason), name in table.beside:
        record = run[1]
        about = {
            "table": table.number,
            "method": record.pretrain_method,
            "source": "ours",
            "dataset": (record.finetune_data or record.data).dataset,
            "pretrain_epochs": _digits(record.pretrain_epochs),
            "column": name,
            "fills_no_cell": reason,
        }
        writer.writerow(about | _cell(Cell(measured_value(record, name), runs=(run,))))
    return text.getvalue()


def _cell(cell: Cell) -> dict[str, object]:
    value: dict[str, object] = {"value": "-" if cell.value is None else f"{cell.value:.6g}"}
    if not cell.runs:
        return value
    record, costs = cell.runs[0][1], cell_costs(cell)
    return {
        **value,
        "std_over_seeds": _digits(cell.spread),
        "n_seeds": len(cell.runs),
        "finetune_epochs": _digits(record.finetune_epochs),
        "eval_samples": record.results.eval_samples,
        "chance_percent": "" if record.detection else f"{chance_accuracy(record):g}",
        **{name: _digits(number) for name, number in costs.numbers().items()},
        "device": costs.device,
        "teachers": " ".join(teacher_sources(record).values()),
        "recipe_hash": record.recipe_hash,
        "seeds": " ".join(seeds(record) for _, record in cell.runs),
        "runs": " ".join(run_path(run) for run in cell.runs),
        "val_copies": max(val_copies(record) for _, record in cell.runs) or "",
    }


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
