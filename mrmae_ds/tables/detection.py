"""Build the paper's Table 2: AP of detectors by the pre-training of their encoders.

A run of ours is matched to a row by its recorded pre-training, as in Table 1; of weights from elsewhere, by its method.
COCO is recognized by its numbers of images, annotations and classes; any other data set is named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from mrmae_ds.records.record import RunRecord
from mrmae_ds.tables import paper
from mrmae_ds.tables.ablations import PARAMETERS, all_rows, match_method
from mrmae_ds.tables.base import AP_RESULTS, Cell, Row, Run, Table, measured_value, run_path
from mrmae_ds.tables.select_runs import fill_cell

# Images and annotations that detectors are trained and evaluated on, and classes.
COCO_2017 = {"train images": 117_266, "val images": 5_000, "val annotations": 36_781, "classes": 80}
_ROWS = {"MAE": "ViTDet", "MCMAE": "MCMAE", "MR-MAE": "MR-MAE"}


def detection_table(records: Iterable[Run]) -> Table:
    """Build Table 2 from run folders and their records (see `find_records`)."""
    printed = paper.TABLE_2
    groups: dict[tuple[str, str, str, str], list[Run]] = defaultdict(list)
    excluded = []
    for run in records:
        if run[1].stage != "detect":
            continue
        if reason := _unusable(run[1]):
            excluded.append(f"{run_path(run)}: {reason}")
            continue
        epochs = run[1].pretrain_epochs
        length = "unknown pre-training" if epochs is None else f"{epochs:.4g} ep"
        groups[str(_row_name(run[1])), _data_set(run[1]), run[1].name, length].append(run)
    ours: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(groups):
        row, older = _our_row(key, groups[key])
        ours[key[0]].append(row)
        excluded += older
    rows = tuple(all_rows(printed, ours))
    return Table(printed.number, printed.title, (), printed.columns, rows, tuple(excluded))


def _unusable(record: RunRecord) -> str | None:
    if record.status != "finished":
        return f"not finished (status: {record.status})"
    if any(measured_value(record, column) is None for column in AP_RESULTS):
        return "finished without an AP"
    if _row_name(record) is None:
        return "its encoder's pre-training matches no row of this table"
    return None


def _row_name(record: RunRecord) -> str | None:
    """Return the row of a run; of weights from elsewhere, that of the recipe's method."""
    from_elsewhere = record.init is not None and record.init.pretrain is None
    return _ROWS.get((record.method if from_elsewhere else match_method(record)) or "")


def _our_row(key: tuple[str, str, str, str], runs: list[Run]) -> tuple[Row, list[str]]:
    row_name, dataset, run_name, length = key
    cells: dict[str, Cell] = {}
    older: list[str] = []
    for column in AP_RESULTS:
        cells[column], older = fill_cell(runs, column)
    record = cells["AP box"].runs[0][1]
    cells["F-Epochs"] = Cell(record.schedule.epochs)
    cells[PARAMETERS] = Cell(record.parameters.total / 1e6)
    if record.operations is not None and record.operations.forward is not None:
        cells["FLOPs (T)"] = Cell(record.operations.forward / 2e12)  # multiply-adds, as in the paper
    label = f"{row_name}, ours: {run_name} ({length}, {dataset})"
    return Row(row_name, "ours", label, dataset, record.pretrain_epochs, cells), older


def _data_set(record: RunRecord) -> str:
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
