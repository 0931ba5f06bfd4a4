"""Build the paper's Table 2: AP of detectors by the pre-training of their encoders.

A run of ours is matched to a row by its recorded pre-training, as in Table 1; of weights from elsewhere, by its method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from mrmae_ds.records.record import RunRecord
from mrmae_ds.tables import paper
from mrmae_ds.tables.ablations import PARAMETERS, all_rows, match_method
from mrmae_ds.tables.base import Cell, Row, Run, Table, run_path
from mrmae_ds.tables.detectors import ap_cells, describe_pretraining, detection_data, detector_runs

_ROWS = {"MAE": "ViTDet", "MCMAE": "MCMAE", "MR-MAE": "MR-MAE"}


def detection_table(records: Iterable[Run]) -> Table:
    """Build Table 2 from run folders and their records (see `find_records`)."""
    printed = paper.TABLE_2
    groups: dict[tuple[str, str, str, str], list[Run]] = defaultdict(list)
    usable, excluded = detector_runs(records)
    for run in usable:
        record, row_name = run[1], _row_name(run[1])
        if row_name is None:
            excluded.append(f"{run_path(run)}: its encoder's pre-training matches no row of this table")
        else:
            groups[row_name, detection_data(record), record.name, describe_pretraining(record)].append(run)
    ours: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(groups):
        row, older = _our_row(key, groups[key])
        ours[key[0]].append(row)
        excluded += older
    rows = tuple(all_rows(printed, ours))
    return Table(printed.number, printed.title, (), printed.columns, rows, tuple(excluded))


def _row_name(record: RunRecord) -> str | None:
    """Return the row of a run; of weights from elsewhere, that of the recipe's method."""
    from_elsewhere = record.init is not None and record.init.pretrain is None
    return _ROWS.get((record.method if from_elsewhere else match_method(record)) or "")


def _our_row(key: tuple[str, str, str, str], runs: list[Run]) -> tuple[Row, list[str]]:
    row_name, dataset, run_name, length = key
    cells, older = ap_cells(runs)
    record = cells["AP box"].runs[0][1]
    cells["F-Epochs"] = Cell(record.schedule.epochs)
    cells[PARAMETERS] = Cell(record.parameters.total / 1e6)
    if record.operations is not None and record.operations.forward is not None:
        cells["FLOPs (T)"] = Cell(record.operations.forward / 2e12)  # multiply-adds, as in the paper
    label = f"{row_name}, ours: {run_name} ({length}, {dataset})"
    return Row(row_name, "ours", label, dataset, record.pretrain_epochs, cells), older
