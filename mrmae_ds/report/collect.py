"""Collect the contents of a report from run folders: settings that differ, results, and cells of the paper's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import UserError
from mrmae_ds.records.metrics import METRICS_FILE, read_metrics
from mrmae_ds.records.record import RECIPE_FILE, RunRecord, find_records, stage_cost
from mrmae_ds.tables.base import AP_RESULTS, Cell, Row, Run, Table, run_path, sampling_error
from mrmae_ds.tables.paper import TABLES
from mrmae_ds.tables.write import build_table
from mrmae_ds.units import PETA, SECONDS_PER_HOUR, significant

ENGINE_FILE = "engine.json"
STAGES: tuple[str, ...] = get_args(StageName)  # in the order in which they build on each other
# Parts of a record that describe the machine and the code, not the experiment's own settings.
_CIRCUMSTANCES = ("hardware", "versions", "kernels", "git")


@dataclass(frozen=True)
class ReportedStage:
    """One stage of a run, as a report shows it.

    Attributes:
        folder: the stage's folder.
        name: its path in the report.
        record: its record.
        settings: values of recipe, engine config and circumstances, each by its dotted key.
        lines: of ``metrics.jsonl``; empty if there are none.
    """

    folder: Path
    name: str
    record: RunRecord
    settings: Mapping[str, str]
    lines: Sequence[Mapping[str, Any]]

    @property
    def run(self) -> str:
        """Path of the run that the stage belongs to."""
        return self.name.rpartition("/")[0] or self.name

    @property
    def images(self) -> list[Path]:
        """Figures that were drawn into the stage's folder, but not its curves, which the report draws itself."""
        return sorted(path for path in self.folder.glob("images/**/*") if path.suffix in (".png", ".jpg"))


@dataclass(frozen=True)
class FilledCell:
    """Cell of one of the paper's tables that reported runs fill.

    Attributes:
        table: number of the table.
        row: label of our row.
        column: heading.
        ours: our number, with its spread over seeds if there are several.
        paper: the paper's number for this method and column; "" if it has none.
        runs: names of the runs behind our number.
    """

    table: str
    row: str
    column: str
    ours: str
    paper: str
    runs: str


def collect_stages(roots: Sequence[Path]) -> list[ReportedStage]:
    """Return the stages at or below ``roots``, by run and then in the order in which stages build on each other.

    Raises:
        UserError: if there is none, or a file of one is unreadable.
    """
    found = find_records(roots)
    if not found:
        raise UserError(
            f"{', '.join(map(str, roots))}: no run (record.json) at any depth, so there is nothing to report"
        )
    order = {kind: number for number, kind in enumerate(STAGES)}
    stages = [_stage(run) for run in found]
    return sorted(stages, key=lambda stage: (stage.run, order.get(stage.record.stage, len(order)), stage.name))


def _stage(run: Run) -> ReportedStage:
    folder, record = run
    recipe = _load(folder / RECIPE_FILE, yaml.safe_load)
    # A recipe has the settings of all stages; those of the others did not influence this one.
    recipe["stages"] = {record.stage: (recipe.get("stages") or {}).get(record.stage)}
    if not record.teachers:  # of other stages, too
        recipe.pop("teachers", None)
    circumstances = {part: value for part, value in record.model_dump(mode="json").items() if part in _CIRCUMSTANCES}
    groups = {"recipe": recipe, "engine": _load(folder / ENGINE_FILE, json.loads), "": circumstances}
    settings = {key: value for group, tree in groups.items() for key, value in _flatten(tree, group)}
    lines = read_metrics(folder) if (folder / METRICS_FILE).exists() else []
    return ReportedStage(folder, run_path(run), record, settings, lines)


def _load(path: Path, parse: Any) -> dict[str, Any]:
    """Return the content of a stage's file; an empty one for a file that this stage does not write."""
    try:
        content = parse(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: unreadable ({error}); restore it from a copy of the run") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: unreadable (not a mapping of keys); restore it from a copy of the run")
    return content


def _flatten(tree: object, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the values of a tree of mappings with their dotted keys; an empty mapping has none."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif tree is not None:
        yield prefix, tree if isinstance(tree, str) else json.dumps(tree)


def differing_settings(stages: Sequence[ReportedStage]) -> dict[str, list[str]]:
    """Return the settings in which stages of one kind differ, by key: one value a stage, "" where it is not set."""
    keys = dict.fromkeys(key for stage in stages for key in stage.settings)
    rows = {key: [stage.settings.get(key, "") for stage in stages] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def describe_results(record: RunRecord) -> str:
    """Return a stage's result in one line: accuracy with its sampling error, APs, or the evaluated or last loss."""
    results = record.results
    if results.top1 is not None:
        return f"top-1 {results.top1:.2f} ± {sampling_error(record):.2f} %"
    known = {column: value for column, key in AP_RESULTS.items() if (value := results.value(key)) is not None}
    if known:
        return ", ".join(f"{column} {value:.1f} %" for column, value in known.items())
    loss = results.value("last_loss") if results.loss is None else results.loss
    return "" if loss is None else f"loss {loss:.4f}"


def cost_values(record: RunRecord) -> dict[str, str]:
    """Return the measured cost of a stage by its heading; "" is unknown."""
    cost = stage_cost(record)
    return {
        "device": f"{record.hardware.world_size} x {cost.device}",
        "hours": significant(record.wall_seconds / SECONDS_PER_HOUR),
        "GPU-hours": significant(cost.device_hours),
        "images/s": "" if cost.images_per_s is None else f"{cost.images_per_s:,.0f}",
        "PFLOP": "" if cost.operations is None else significant(cost.operations / PETA),
        "parameters (M)": significant(record.parameters.total / 1e6),
    }


def filled_cells(stages: Sequence[ReportedStage]) -> list[FilledCell]:
    """Return the cells of the paper's tables that the stages fill."""
    runs: list[Run] = [(stage.folder, stage.record) for stage in stages]
    return [
        _filled(table, *found) for number in TABLES for table in [build_table(number, runs)] for found in table.measured
    ]


def _filled(table: Table, row: Row, column: str, cell: Cell) -> FilledCell:
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f} (n={len(cell.runs)})"
    printed = [other for other in table.rows if other.source == "paper" and other.method == row.method]
    published = [f"{value:.1f} ({other.label})" for other in printed if not math.isnan(value := other.value(column))]
    return FilledCell(
        table=f"Table\N{NO-BREAK SPACE}{table.number}",
        row=row.label,
        column=column,
        ours=f"{cell.value:.2f}{spread}",
        paper="; ".join(published),
        runs=", ".join(run_path(run) for run in cell.runs),
    )
