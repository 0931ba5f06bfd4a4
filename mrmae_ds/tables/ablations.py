"""Build the paper's Tables 1, 3, 4 and 5: one row per training of Base.

A run of ours is matched to a row of the paper by its recorded configuration (losses, masking, fusion, encoder,
teachers, epochs), not by its name. Detectors (Tables 3 and 5) have rows of their own, because they are measured on
other data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from mrmae_ds.models.objectives import HOG, PIXELS
from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import ObjectiveInfo, PretrainSummary, TeacherInfo
from mrmae_ds.tables import paper
from mrmae_ds.tables.base import AP_RESULTS, Cell, LeftOut, Row, Run, Table, teacher_sources
from mrmae_ds.tables.detectors import detector_rows
from mrmae_ds.tables.paper import PARTS, PaperRow
from mrmae_ds.tables.scaling import split_size
from mrmae_ds.tables.select_runs import dataset_labels, describe_training, fill_cell, finetuned_runs

OWN_METHODS = ("MAE", "ViTDet", "MaskFeat", "DMAE", "data2vec", "MVP", "MCMAE", "MILAN", "MR-MAE")
ACCURACY, PARAMETERS, VISIBLE = "FT", "Params (M)", "Ratio (%)"
# Decoder or encoder's input, and the configuration as columns of Table 3 (see `parts_of`); relatives match none.
_FEATURE_METHODS = {
    "MILAN": ("prompting", "", "decoder, cosine, class token, all", "yes", "", ""),
    "DMAE": ("mae", "L_R", "encoder block, l1, class token, visible", "", "", ""),
    "MaskFeat": ("mask_tokens, block", "", "encoder, HOG, masked", "", "", ""),
    "data2vec": ("mask_tokens, block", "", "encoder, smooth_l1, moving average, masked", "", "", ""),
    "MVP": ("mask_tokens, block", "", "encoder, cosine, masked", "", "", ""),
}
_NO_ROW = "its training configuration matches no row of this table"


def ablation_table(number: int, records: Iterable[Run]) -> Table:
    """Build Table 1, 3, 4 or 5 from run folders and their records (see `find_records`).

    Runs of sizes that are other columns of Table 6 are skipped, and so are those without pre-training.
    """
    printed, records = paper.TABLES[number], list(records)
    usable, left_out = finetuned_runs([run for run in records if _is_base(run[1].size)])
    usable = [run for run in usable if any(tuning and tuning.init for tuning in run[1].finetunings)]
    groups: dict[tuple[str, str, str, str], list[Run]] = defaultdict(list)
    for run, dataset in zip(usable, dataset_labels(usable), strict=True):
        row_name = _MATCHERS[number](run[1])
        if row_name is None:
            left_out.append(LeftOut(run, _NO_ROW))
        else:
            groups[row_name, dataset, run[1].name, describe_training(run[1], dataset)].append(run)
    ours: dict[str, list[Row]] = defaultdict(list)
    for key in sorted(groups, key=lambda key: (key[1], _epochs(groups[key]), key[2:])):
        row, older = _our_row(number, key, groups[key])
        ours[key[0]].append(row)
        left_out += older
    if AP_RESULTS.keys() <= set(printed.columns):
        left_out += _add_detectors(number, records, ours)
    rows = tuple(all_rows(printed, ours))
    return Table(number, printed.title, _headings(printed), printed.columns, rows, tuple(left_out))


def _add_detectors(number: int, records: Iterable[Run], ours: dict[str, list[Row]]) -> list[LeftOut]:
    """Add rows of detectors, whose data set is another than that of the accuracies; return the other runs of the stage.

    Args:
        number: of the paper's table.
        records: of all runs.
        ours: our rows, by the name of the paper's.
    """
    base = (run for run in records if _is_base(run[1].size))
    rows, left_out = detector_rows(base, _MATCHERS[number], _NO_ROW)
    for row in rows:
        record = row.cells["AP box"].runs[0][1]
        ours[row.method].append(replace(row, labels=parts_of(_pretraining(record)) or {}) if number == 3 else row)
    return left_out


def all_rows(printed: paper.PaperTable, ours: dict[str, list[Row]]) -> Iterable[Row]:
    """Yield the rows of a printed table, each followed by ours of the same name, or by a blank one.

    Args:
        printed: the paper's table.
        ours: our rows, by the name of the paper's.
    """
    for row in printed.rows:
        row_name = _row_name(printed.number, row)
        length = "" if row.epochs is None else f"{row.epochs} ep, "
        cells = {column: Cell(value) for column, value in row.cells.items()}
        dataset = paper.IMAGENET if paper.IMAGENET in printed.dataset else printed.dataset
        label = f"{row_name}, paper ({length}{dataset})"
        yield Row(row.method, "paper", label, dataset, row.epochs, cells, row.labels)
        if row_name in ours:
            yield from ours.pop(row_name)
        elif printed.number not in (1, 2) or row.method in OWN_METHODS:
            yield Row(row.method, "ours", f"{row_name}, ours (not run)", "", None, {})
    for row_name in sorted(ours, key=lambda name: (ours[name][0].epochs or 0.0, name)):
        yield from ours[row_name]


def _our_row(number: int, key: tuple[str, str, str, str], runs: list[Run]) -> tuple[Row, list[LeftOut]]:
    row_name, dataset, run_name, training = key
    cell, older = fill_cell(runs)
    records = [record for _, record in cell.runs]
    first = records[0]
    label = f"{row_name}, ours: {run_name} ({training})"
    cells = {ACCURACY: cell}
    printed = paper.TABLES[number]
    if PARAMETERS in printed.columns:
        cells[PARAMETERS] = Cell(sum(record.parameters.total for record in records) / len(records) / 1e6)
    pretraining = _pretraining(first)
    design = pretraining.design if pretraining else None
    if VISIBLE in printed.columns and design:
        cells[VISIBLE] = Cell(100 * design.keep_ratio if design.encoder_input == "visible" else 100)
    labels = {}
    if number == 1:
        archs = dict.fromkeys(tuning.model.arch for tuning in first.finetunings if tuning and tuning.model)
        objectives = design.objectives.values() if design else ()
        sources = [*teacher_sources(first).values()]
        sources += ["Momentum"] if any(objective.average for objective in objectives) else []
        sources += ["HOG"] if any(objective.target == HOG for objective in objectives) else []
        labels = {"Backbone": ", ".join(archs), "Supervision": ", ".join(sources) or "RGB"}
    if number == 3:
        labels = parts_of(pretraining) or {}
    return Row(row_name, "ours", label, dataset, first.pretrain_epochs, cells, labels), older


def _headings(printed: paper.PaperTable) -> tuple[str, ...]:
    return tuple(dict.fromkeys(heading for row in printed.rows for heading in row.labels))


def _row_name(number: int, row: PaperRow) -> str:
    """Return the name of a row; those of Table 5 differ only in their epochs."""
    return f"{row.method}, {row.epochs} epochs" if number == 5 else row.method


def _is_base(size: str) -> bool:
    member = split_size(size)[1]
    return member == "Base" or member not in paper.TABLE_6.columns


def _epochs(runs: list[Run]) -> float:
    return runs[0][1].pretrain_epochs or 0.0


def _pretraining(record: RunRecord) -> PretrainSummary | None:
    """Return the pre-training behind a single model."""
    (tuning, *others) = record.finetunings
    return tuning.init.pretrain if tuning and tuning.init and not others else None


def parts_of(pretraining: PretrainSummary | None) -> dict[str, str] | None:
    """Return a pre-training's configuration as columns of Table 3; None if it was not recorded."""
    if pretraining is None or pretraining.design is None or pretraining.model is None:
        return None
    objectives = pretraining.design.objectives.values()
    low = {_tap(o) for o in objectives if o.target == PIXELS}
    high = {_tap(o) for o in objectives if o.target != PIXELS}
    values = (
        _loss(low),
        _loss(high),
        "yes" if pretraining.design.masking in ("sample", "topk") else "",
        "yes" if pretraining.design.fusion else "",
        "yes" if pretraining.model.convolutional else "",
    )
    return dict(zip(PARTS, values, strict=True))


def _tap(objective: ObjectiveInfo) -> tuple[str, str]:
    """Return tap and tokens of a loss; the tap says in words what no row of Table 3 has."""
    words = [objective.tap if objective.block is None else f"{objective.tap} block"]
    words += [] if objective.loss in (None, "l2", "l2_sum") else [objective.loss]
    words += ["class token"] if objective.class_token else []
    words += ["moving average"] if objective.average else []
    words += ["HOG"] if objective.target == HOG else []
    return ", ".join(words), objective.tokens


def _loss(taps: set[tuple[str, str]]) -> str:
    names = {("decoder", "masked"): "L_R", ("encoder", "visible"): "L_M"}
    return " and ".join(sorted(names.get(tap, ", ".join(tap)) for tap in taps))


def _match_table_3(record: RunRecord) -> str | None:
    parts = parts_of(_pretraining(record))
    return next((row.method for row in paper.TABLE_3.rows if row.labels == parts), None)


def _is_mrmae(record: RunRecord) -> bool:
    return _match_table_3(record) == paper.TABLE_3.rows[-1].method


def match_method(record: RunRecord) -> str | None:
    """Return the method of the pre-training behind a single model; None for one that is no row of Table 1."""
    if _is_mrmae(record):
        return "MR-MAE"
    pretraining = _pretraining(record)
    parts = parts_of(pretraining)
    if pretraining is not None and pretraining.design is not None and parts is not None:
        design = pretraining.design
        seen = design.decoder if design.encoder_input == "visible" else f"{design.encoder_input}, {design.masking}"
        found = (seen, *(parts[name] for name in PARTS))
        method = next((method for method, wanted in _FEATURE_METHODS.items() if found == wanted), None)
        if method is not None:
            return method
    if parts is None or [parts[name] for name in PARTS[:3]] != ["L_R", "", ""]:
        return None
    return "MCMAE" if parts["Masked Conv."] else "MAE"


def _match_table_4(record: RunRecord) -> str | None:
    """Match by teachers: one, both at once, or two models with one each."""
    summaries = [t.init.pretrain for t in record.finetunings if t and t.init and t.init.pretrain]
    teachers = sorted(sorted(str(_family(teacher)) for teacher in summary.teachers.values()) for summary in summaries)
    if not record.members:
        joint = {("DINO",): "DINO", ("CLIP",): "CLIP", ("CLIP", "DINO"): "CLIP/DINO (Joint)"}
        return joint.get(tuple(teachers[0])) if teachers and _is_mrmae(record) else None
    parts = [parts_of(summary) for summary in summaries]
    all_mrmae = all(part == paper.TABLE_3.rows[-1].labels for part in parts)
    return "CLIP/DINO (Sep.)" if all_mrmae and teachers == [["CLIP"], ["DINO"]] else None


def _family(teacher: TeacherInfo) -> Literal["CLIP", "DINO"] | None:
    source = teacher.source.lower()
    if teacher.kind == "clip" or (teacher.kind == "timm" and "clip" in source):
        return "CLIP"
    return "DINO" if teacher.kind == "timm" and "dino" in source else None


def _match_table_5(record: RunRecord) -> str | None:
    return f"MR-MAE, {record.pretrain_epochs:g} epochs" if _is_mrmae(record) and record.pretrain_epochs else None


_MATCHERS: dict[int, Callable[[RunRecord], str | None]] = {
    1: match_method,
    3: _match_table_3,
    4: _match_table_4,
    5: _match_table_5,
}
