"""Runs of the stage detect in tables: which can fill a cell, on which data set, and their cells of AP.

COCO is recognized by its numbers of images, annotations and classes; any other data set is named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from mrmae_ds.records.record import RunRecord
from mrmae_ds.tables import paper
from mrmae_ds.tables.base import AP_RESULTS, Cell, LeftOut, Row, Run, measured_value
from mrmae_ds.tables.select_runs import fill_cell

# Images and annotations that detectors are trained and evaluated on, and classes.
COCO_2017 = {"train images": 117_266, "val images": 5_000, "val annotations": 36_781, "classes": 80}


def detector_rows(
    records: Iterable[Run], row_name_of: Callable[[RunRecord], str | None], no_row: str
) -> tuple[list[Row], list[LeftOut]]:
    """Build the rows of the runs of the stage detect: one for each row of the paper, data set, run and pre-training.

    Args:
        records: of all runs.
        row_name_of: function that returns the paper's row of a run, None if it has none.
        no_row: reason for leaving out a run without a row.

    Returns:
        Our rows with cells of AP, sorted; and the runs of the stage that fill none, each with the reason.
    """
    groups: dict[tuple[str, str, str, str], list[Run]] = defaultdict(list)
    rows, left_out, unmatched = list[Row](), list[LeftOut](), list[LeftOut]()
    for run in (run for run in records if run[1].stage == "detect"):
        record = run[1]
        if reason := _unusable(record):
            left_out.append(LeftOut(run, reason))
        elif (row_name := row_name_of(record)) is None:
            unmatched.append(LeftOut(run, no_row))
        else:
            groups[row_name, _detection_data(record), record.name, _describe_pretraining(record)].append(run)
    left_out += unmatched
    for key in sorted(groups):
        row_name, dataset, run_name, length = key
        cells, older = _ap_cells(groups[key])
        label = f"{row_name}, ours: {run_name} ({length}, {dataset})"
        epochs = cells["AP box"].runs[0][1].pretrain_epochs
        rows.append(Row(row_name, "ours", label, dataset, epochs, cells))
        left_out += older
    return rows, left_out


def _unusable(record: RunRecord) -> str | None:
    if record.status != "finished":
        return f"not finished (status: {record.status})"
    if any(measured_value(record, column) is None for column in AP_RESULTS):
        return "finished without an AP"
    if record.init is not None and record.init.whole:
        return "it continued a trained detector, not a pre-training"
    return None


def _ap_cells(runs: Sequence[Run]) -> tuple[dict[str, Cell], list[LeftOut]]:
    """Return the cells of AP of the newest of ``runs``, and the other runs, each with the reason; see `fill_cell`."""
    cells: dict[str, Cell] = {}
    older: list[LeftOut] = []
    for column in AP_RESULTS:
        cells[column], older = fill_cell(runs, column)
    return cells, older


def _describe_pretraining(record: RunRecord) -> str:
    """Return the length of the encoder's pre-training."""
    epochs = record.pretrain_epochs
    return "unknown pre-training" if epochs is None else f"{epochs:.4g} ep"


def _detection_data(record: RunRecord) -> str:
    """Return "COCO" for the whole of COCO 2017, and a description of any other data set."""
    info = record.detection
    if info is None:
        return record.data.dataset
    train, val = info.train, info.val
    counts = (train.images, val.images, val.annotations, record.data.classes)
    if counts == tuple(COCO_2017.values()):
        return paper.COCO
    return (
        f"{record.data.dataset}: {record.data.classes} classes, {train.images:,} training and {val.images:,} "
        f"evaluation images"
    )
