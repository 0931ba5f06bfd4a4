"""The paper's Tables 1, 3, 4 and 5: a row a training of Base. A run of ours stands below the paper's row whose parts it
really had, by its record: the losses, the masking, the fusion, the encoder, the teachers, the epochs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Literal

from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import PretrainSummary, TeacherInfo
from mrmae_ds.tables import paper
from mrmae_ds.tables.paper import PARTS, PaperRow
from mrmae_ds.tables.scaling import split_size
from mrmae_ds.tables.select_runs import (
    dataset_labels,
    fill_cell,
    how_trained,
    run_name,
    teachers,
    tuned_runs,
)
from mrmae_ds.tables.write import Cell, Row, Run, Table

OWN_METHODS = ("MAE", "MCMAE", "MR-MAE")
ACCURACY, PARAMETERS, VISIBLE = "FT", "Params (M)", "Ratio (%)"
_NO_PLACE = "what it was trained with is none of the table's rows"


def rows_table(number: int, records: Iterable[Run]) -> Table:
    """Build Table 1, 3, 4 or 5 from run folders and their records (see `find_records`).

    Runs of sizes that are other columns of Table 6 are passed over, and so are those without pre-training.
    """
    printed = paper.TABLES[number]
    usable, left_out = tuned_runs([run for run in records if _is_base(run[1].size)])
    usable = [run for run in usable if any(tuning and tuning.init for tuning in run[1].finetunings)]
    groups: dict[tuple[str, str, str, str], list[Run]] = defaultdict(list)
    for run, dataset in zip(usable, dataset_labels(usable), strict=True):
        place = _PLACES[number](run[1])
        if place is None:
            left_out.append(f"{run_name(run)}: {_NO_PLACE}")
        else:
            groups[place, dataset, run[1].name, how_trained(run[1], dataset)].append(run)
    ours: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(groups, key=lambda key: (key[1], _epochs(groups[key]), key[2:])):
        row, older = _our_row(number, key, groups[key])
        ours[key[0]].append(row)
        left_out += older
    rows = tuple(_all_rows(printed, ours))
    return Table(number, printed.title, _headings(printed), printed.columns, rows, tuple(left_out))


def _all_rows(printed: paper.PaperTable, ours: dict[str, list[Row]]) -> Iterable[Row]:
    for row in printed.rows:
        place = _name(printed.number, row)
        length = "" if row.epochs is None else f"{row.epochs} ep, "
        cells = {column: Cell(value) for column, value in row.cells.items()}
        label = f"{place}, paper ({length}{paper.IMAGENET})"
        yield Row(row.method, "paper", label, paper.IMAGENET, row.epochs, cells, row.labels)
        if place in ours:
            yield from ours.pop(place)
        elif printed.number != 1 or row.method in OWN_METHODS:
            yield Row(row.method, "ours", f"{place}, ours (not run)", "", None, {})
    for place in sorted(ours, key=lambda place: (ours[place][0].epochs or 0.0, place)):
        yield from ours[place]


def _our_row(number: int, key: tuple[str, str, str, str], runs: list[Run]) -> tuple[Row, list[str]]:
    place, dataset, name, how = key
    cell, older = fill_cell(runs)
    records = [record for _, record in cell.runs]
    first = records[0]
    label = f"{place}, ours: {name} ({how})"
    cells = {ACCURACY: cell}
    printed = paper.TABLES[number]
    if PARAMETERS in printed.columns:
        cells[PARAMETERS] = Cell(sum(record.parameters.total for record in records) / len(records) / 1e6)
    known = _pretraining(first)
    if VISIBLE in printed.columns and known and known.design:
        cells[VISIBLE] = Cell(100 * known.design.keep_ratio)
    labels = {}
    if number == 1:
        archs = dict.fromkeys(tuning.model.arch for tuning in first.finetunings if tuning and tuning.model)
        labels = {"Backbone": ", ".join(archs), "Supervision": ", ".join(teachers(first).values()) or "RGB"}
    if number == 3:
        labels = parts_of(known) or {}
    return Row(place, "ours", label, dataset, first.pretrain_epochs, cells, labels), older


def _headings(printed: paper.PaperTable) -> tuple[str, ...]:
    return tuple(dict.fromkeys(heading for row in printed.rows for heading in row.labels))


def _name(number: int, row: PaperRow) -> str:
    """How a row is called; the rows of Table 5 are told apart by their epochs."""
    return f"{row.method}, {row.epochs} epochs" if number == 5 else row.method


def _is_base(size: str) -> bool:
    member = split_size(size)[1]
    return member == "Base" or member not in paper.TABLE_6.columns


def _epochs(runs: list[Run]) -> float:
    return runs[0][1].pretrain_epochs or 0.0


def _pretraining(record: RunRecord) -> PretrainSummary | None:
    """That of a single model."""
    (tuning, *others) = record.finetunings
    return tuning.init.pretrain if tuning and tuning.init and not others else None


def parts_of(known: PretrainSummary | None) -> dict[str, str] | None:
    """What a pre-training had, as the columns of Table 3 say it; None where its record does not tell."""
    if known is None or known.design is None or known.model is None:
        return None
    objectives = known.design.objectives.values()
    low: set[tuple[str, str]] = {(o.tap, o.tokens) for o in objectives if o.target == "pixels"}
    high: set[tuple[str, str]] = {(o.tap, o.tokens) for o in objectives if o.target != "pixels"}
    values = (
        _loss(low),
        _loss(high),
        "yes" if known.design.masking != "random" else "",
        "yes" if known.design.fusion else "",
        "yes" if known.model.convolutional else "",
    )
    return dict(zip(PARTS, values, strict=True))


def _loss(where: set[tuple[str, str]]) -> str:
    names = {("decoder", "masked"): "L_R", ("encoder", "visible"): "L_M"}
    return " and ".join(sorted(names.get(place, ", ".join(place)) for place in where))


def _place_of_parts(record: RunRecord) -> str | None:
    parts = parts_of(_pretraining(record))
    return next((row.method for row in paper.TABLE_3.rows if row.labels == parts), None)


def _is_mrmae(record: RunRecord) -> bool:
    return _place_of_parts(record) == paper.TABLE_3.rows[-1].method


def _place_of_method(record: RunRecord) -> str | None:
    if _is_mrmae(record):
        return "MR-MAE"
    parts = parts_of(_pretraining(record))
    if parts is None or [parts[name] for name in PARTS[:3]] != ["L_R", "", ""]:
        return None
    return "MCMAE" if parts["Masked Conv."] else "MAE"


def _place_of_teachers(record: RunRecord) -> str | None:
    """Of Table 4: one teacher, both at once, or two models with one each."""
    known = [tuning.init.pretrain for tuning in record.finetunings if tuning and tuning.init and tuning.init.pretrain]
    sets = sorted(sorted(str(_kind(teacher)) for teacher in summary.teachers.values()) for summary in known)
    if not record.members:
        joint = {("DINO",): "DINO", ("CLIP",): "CLIP", ("CLIP", "DINO"): "CLIP/DINO (Joint)"}
        return joint.get(tuple(sets[0])) if sets and _is_mrmae(record) else None
    parts = [parts_of(summary) for summary in known]
    whole = all(part == paper.TABLE_3.rows[-1].labels for part in parts)
    return "CLIP/DINO (Sep.)" if whole and sets == [["CLIP"], ["DINO"]] else None


def _kind(teacher: TeacherInfo) -> Literal["CLIP", "DINO"] | None:
    source = teacher.source.lower()
    if teacher.kind == "clip" or (teacher.kind == "timm" and "clip" in source):
        return "CLIP"
    return "DINO" if teacher.kind == "timm" and "dino" in source else None


def _place_of_epochs(record: RunRecord) -> str | None:
    return f"MR-MAE, {record.pretrain_epochs:g} epochs" if _is_mrmae(record) and record.pretrain_epochs else None


_PLACES: dict[int, Callable[[RunRecord], str | None]] = {
    1: _place_of_method,
    3: _place_of_parts,
    4: _place_of_teachers,
    5: _place_of_epochs,
}
