"""Build the paper's Table 2: AP of detectors by the pre-training of their encoders.

A run of ours is matched to a row by its recorded pre-training, as in Table 1; of weights from elsewhere, by its method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from mrmae_ds.records.record import RunRecord
from mrmae_ds.tables import paper
from mrmae_ds.tables.ablations import PARAMETERS, all_rows, match_method
from mrmae_ds.tables.base import Cell, Row, Run, Table
from mrmae_ds.tables.detectors import detector_rows

_ROWS = {"MAE": "ViTDet", "MCMAE": "MCMAE", "MR-MAE": "MR-MAE"}


def detection_table(records: Iterable[Run]) -> Table:
    """Build Table 2 from run folders and their records (see `find_records`)."""
    printed = paper.TABLE_2
    ours: dict[str, list[Row]] = defaultdict(list)
    found, left_out = detector_rows(records, _row_name, "its encoder's pre-training matches no row of this table")
    for row in found:
        ours[row.method].append(replace(row, cells=row.cells | _more_cells(row)))
    rows = tuple(all_rows(printed, ours))
    return Table(printed.number, printed.title, (), printed.columns, rows, tuple(left_out))


def _row_name(record: RunRecord) -> str | None:
    """Return the row of a run; of weights from elsewhere, that of the recipe's method."""
    from_elsewhere = record.init is not None and record.init.pretrain is None
    return _ROWS.get((record.method if from_elsewhere else match_method(record)) or "")


def _more_cells(row: Row) -> dict[str, Cell]:
    """Return the cells of a row besides AP."""
    record = row.cells["AP box"].runs[0][1]
    cells = {"F-Epochs": Cell(record.schedule.epochs), PARAMETERS: Cell(record.parameters.total / 1e6)}
    if record.operations is not None and record.operations.forward is not None:
        cells["FLOPs (T)"] = Cell(record.operations.forward / 2e12)  # multiply-adds, as in the paper
    return cells
