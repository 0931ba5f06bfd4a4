"""A table as CSV."""

from __future__ import annotations

import csv
import io

from mrmae_ds.tables.costs import cell_facts
from mrmae_ds.tables.markdown import seeds
from mrmae_ds.tables.select_runs import chance, run_name, teachers
from mrmae_ds.tables.write import Cell, Table

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
    "gflop_an_image",
    "pretrain_pflop",
    "pretrain_device_hours",
    "pretrain_images_per_s",
    "finetune_device_hours",
    "finetune_images_per_s",
    "device",
    "teachers",
    "recipe_hash",
    "seeds",
    "runs",
)


def to_csv(table: Table) -> str:
    """Return `COLUMNS` with one line a row and column; a blank cell has an empty value, the paper's dash a "-"."""
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
                "column": column,
            }
            line["pretrain_epochs"] = _digits(row.epochs)
            if cell := row.cells.get(column):
                line |= _cell(cell)
            writer.writerow(line)
    return text.getvalue()


def _cell(cell: Cell) -> dict[str, object]:
    fields: dict[str, object] = {"value": "-" if cell.value is None else f"{cell.value:.6g}"}
    if cell.runs:
        record, facts = cell.runs[0][1], cell_facts(cell)
        fields |= {
            "std_over_seeds": _digits(cell.spread),
            "n_seeds": len(cell.runs),
            "finetune_epochs": _digits(record.finetune_epochs),
            "eval_samples": record.results.eval_samples,
            "chance_percent": f"{chance(record):g}",
            "parameters_m": _digits(facts.parameters),
            "gflop_an_image": _digits(facts.forward),
            "pretrain_pflop": _digits(facts.pretrain_work),
            "pretrain_device_hours": _digits(facts.pretrain_hours),
            "pretrain_images_per_s": _digits(facts.pretrain_speed),
            "finetune_device_hours": _digits(facts.tuning_hours),
            "finetune_images_per_s": _digits(facts.tuning_speed),
            "device": facts.device,
            "teachers": " ".join(teachers(record).values()),
            "recipe_hash": record.recipe_hash,
            "seeds": " ".join(seeds(record) for _, record in cell.runs),
            "runs": " ".join(run_name(run) for run in cell.runs),
        }
    return fields


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
