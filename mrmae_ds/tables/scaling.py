"""Build the model-scaling table, the paper's Table 6: methods by sizes.

The method of a row of ours is the one that made the initial weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import FROM_SCRATCH
from mrmae_ds.tables import paper
from mrmae_ds.tables.base import Cell, LeftOut, Row, Run, Table
from mrmae_ds.tables.select_runs import dataset_labels, describe_training, fill_cell, finetuned_runs, linear_probes

METHODS = ("MAE", "MCMAE", "MR-MAE", FROM_SCRATCH)
SIZES = ("Tiny", *paper.TABLE_6.columns)


def scaling_table(records: Iterable[Run]) -> Table:
    """Build the table from run folders and their records (see `find_records`)."""
    records = list(records)
    usable, left_out = finetuned_runs(records)
    left_out += [LeftOut(run, reason) for run in usable if (reason := _other_table(run[1]))]
    usable = [run for run in usable if not _other_table(run[1])]
    groups: dict[tuple[str, str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    epochs: dict[tuple[str, str, str], float | None] = {}
    for run, dataset in zip(usable, dataset_labels(usable), strict=True):
        record = run[1]
        key = (record.pretrain_method, dataset, describe_training(record, dataset))
        groups[key][record.size].append(run)
        epochs[key] = record.pretrain_epochs
    ours: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(groups, key=lambda key: (key[1], epochs[key] is None, epochs[key] or 0.0, key[2])):
        method, dataset, training = key
        cells = {}
        for size, runs in groups[key].items():
            cells[size], older = fill_cell(runs)
            left_out += older
        ours[method].append(Row(method, "ours", f"{method}, ours ({training})", dataset, epochs[key], cells))
    sizes = {record.size for _, record in usable}
    title = "Top-1 accuracy after fine-tuning, by model size"
    return Table(6, title, (), _columns(sizes), tuple(_all_rows(ours)), tuple(left_out), linear_probes(records))


def _other_table(record: RunRecord) -> str | None:
    """Return why a run named for a row of another table ("MR-MAE, Table 3 row 2") is excluded from this one."""
    match = re.search(r", Table (\d)", record.pretrain_method)
    return f"a row of another table; see mrmae table --paper {match[1]}" if match else None


def _columns(measured: set[str]) -> tuple[str, ...]:
    """Return the paper's sizes and the `measured` ones in reading order, families ("Tiny-Small", ...) together."""
    known = [size for size in SIZES if size in paper.TABLE_6.columns or size in measured]
    order = {size: index for index, size in enumerate(SIZES)}

    def key(size: str) -> tuple[str, int, str]:
        family, member = split_size(size)
        return family, order.get(member, len(SIZES)), size

    return (*known, *sorted(measured - set(SIZES), key=key))


def split_size(size: str) -> tuple[str, str]:
    """Split a name into family and the paper's size ("Tiny", "Huge-448"); the family is "" without one."""
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
