"""The model-scaling table, the paper's Table 6: methods by sizes.

The method of a row of ours is the one that really made the initial weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import FROM_SCRATCH
from mrmae_ds.tables import paper
from mrmae_ds.tables.select_runs import dataset_labels, fill_cell, how_trained, probed_runs, run_name, tuned_runs
from mrmae_ds.tables.write import Cell, Row, Run, Table

METHODS = ("MAE", "MCMAE", "MR-MAE", FROM_SCRATCH)
SIZES = ("Tiny", *paper.TABLE_6.columns)


def scaling_table(records: Iterable[Run]) -> Table:
    """Build the table from run folders and their records (see `find_records`)."""
    records = list(records)
    usable, left_out = tuned_runs(records)
    left_out += [f"{run_name(run)}: {reason}" for run in usable if (reason := _of_ablation(run[1]))]
    usable = [run for run in usable if not _of_ablation(run[1])]
    groups: dict[tuple[str, str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    epochs: dict[tuple[str, str, str], float | None] = {}
    for run, dataset in zip(usable, dataset_labels(usable), strict=True):
        record = run[1]
        key = (record.pretrain_method, dataset, how_trained(record, dataset))
        groups[key][record.size].append(run)
        epochs[key] = record.pretrain_epochs
    ours: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(groups, key=lambda key: (key[1], epochs[key] is None, epochs[key] or 0.0, key[2])):
        method, dataset, how = key
        cells = {}
        for size, runs in groups[key].items():
            cells[size], older = fill_cell(runs)
            left_out += older
        ours[method].append(Row(method, "ours", f"{method}, ours ({how})", dataset, epochs[key], cells))
    found = {record.size for _, record in usable}
    rows = tuple(_all_rows(ours))
    title = "Top-1 accuracy after fine-tuning, by model size"
    return Table(6, title, (), columns(found), rows, tuple(left_out), probed_runs(records))


def _of_ablation(record: RunRecord) -> str | None:
    """Why a run named for a row of another table ("MR-MAE, Table 3 row 2") is not shown in this one."""
    found = re.search(r", Table (\d)", record.pretrain_method)
    return f"a row of another table; see mrmae table --paper {found[1]}" if found else None


def columns(found: set[str]) -> tuple[str, ...]:
    """The paper's sizes and those that ran, in reading order; families ("Tiny-Small", "Tiny-Base", ...) stay
    together."""
    known = [size for size in SIZES if size in paper.TABLE_6.columns or size in found]
    places = {size: place for place, size in enumerate(SIZES)}

    def order(size: str) -> tuple[str, int, str]:
        family, member = split_size(size)
        return family, places.get(member, len(SIZES)), size

    return (*known, *sorted(found - set(SIZES), key=order))


def split_size(size: str) -> tuple[str, str]:
    """The family and the paper's size of a name: "Tiny", "Huge-448" of "Tiny-Huge-448"; "" and the name without one."""
    for known in sorted(paper.TABLE_6.columns, key=len, reverse=True):
        if size.endswith(f"-{known}"):
            return size.removesuffix(f"-{known}"), known
    return "", size


def _all_rows(ours: dict[str, list[Row]]) -> Iterable[Row]:
    printed = {row.method: row for row in paper.TABLE_6.rows}
    for method in (*METHODS, *sorted(ours.keys() - set(METHODS))):
        if row := printed.get(method):
            cells = {size: Cell(value) for size, value in row.cells.items()}
            label = f"{method}, paper ({row.epochs} ep, {paper.TABLE_6.dataset})"
            yield Row(method, "paper", label, paper.TABLE_6.dataset, row.epochs, cells)
        yield from ours.get(method) or [Row(method, "ours", f"{method}, ours (not run)", "", None, {})]
