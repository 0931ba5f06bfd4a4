from __future__ import annotations

from pathlib import Path

import pytest

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.records.record import RunRecord, summarize_finetuning
from mrmae_ds.records.sections import DataInfo, Member, Parameters, Schedule
from mrmae_ds.tables.base import Row, Run, Table
from mrmae_ds.tables.markdown import to_markdown
from mrmae_ds.tables.paper import TABLES
from mrmae_ds.tables.write import build_table
from mrmae_ds.training.tasks.pretrain import describe_design
from tests.support.records import make_pretraining, make_record, make_run, make_tuned

WHOLE = {"dataset": "ImageNet-1K", "classes": 1000, "samples": 1_281_167, "eval_samples": 50_000}
CLIP, DINO = "ViT-B-16-quickgelu", "vit_base_patch16_224.dino"
NO_ROW = "its training configuration matches no row of this table"


def _ours(table: Table) -> list[Row]:
    return [row for row in table.rows if row.measured]


def _paper_row(table: Table, row: Row) -> Row:
    """Return the paper's row above one of ours."""
    before = table.rows[: table.rows.index(row)]
    return [other for other in before if other.source == "paper"][-1]


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_without_runs_the_papers_rows_are_as_printed_and_ours_are_blank(number: int) -> None:
    table, printed = build_table(number, []), TABLES[number]
    papers = [row for row in table.rows if row.source == "paper"]
    assert [{c: cell.value for c, cell in row.cells.items()} for row in papers] == [row.cells for row in printed.rows]
    assert [row.labels for row in papers] == [row.labels for row in printed.rows]
    ours = [row for row in table.rows if row.source == "ours"]
    assert len(ours) == (8 if number == 1 else len(printed.rows))
    assert all(row.cells == {} and "not run" in row.label for row in ours)
    assert "No run of ours" in to_markdown(table)


@pytest.mark.parametrize("row", range(1, 8))
def test_a_run_is_listed_below_the_row_of_table_3_that_it_matches(row: int) -> None:
    table = build_table(3, [make_tuned("any", make_pretraining(row), 77.0)])
    (ours,) = _ours(table)
    printed = _paper_row(table, ours)
    assert printed.method == f"row {row}" and printed.labels == ours.labels
    assert ours.label == f"row {row}, ours: any (200 ep, Fashion-MNIST, chance 10 %)"
    assert ours.cells["FT"].value == 77.0 and ours.cells.keys() == {"FT"}
    blank = [other.method for other in table.rows if other.source == "ours" and not other.cells]
    assert blank == [f"row {n}" for n in range(1, 8) if n != row]


def test_reports_runs_that_match_no_row() -> None:
    mcmae = make_pretraining(7, {})
    assert mcmae.design is not None
    del mcmae.design.objectives["loss1"]
    unknown = make_pretraining(7, design=None)
    table = build_table(3, [make_tuned("mcmae", mcmae), make_tuned("old", unknown)])
    assert not _ours(table)
    assert [line.split(":")[0] for line in table.excluded] == ["runs/mcmae/finetune", "runs/old/finetune"]


def test_seeds_share_a_cell_and_recipes_do_not() -> None:
    runs = [make_tuned("a", make_pretraining(2), 80.0), make_tuned("a", make_pretraining(2), 82.0, seed=1)]
    runs += [make_tuned("b", make_pretraining(2), 70.0), make_tuned("a", make_pretraining(2, epochs=400), 90.0)]
    cells = {row.label: row.cells["FT"] for row in _ours(build_table(3, runs))}
    assert {label: (cell.value, len(cell.runs)) for label, cell in cells.items()} == {
        "row 2, ours: a (200 ep, Fashion-MNIST, chance 10 %)": (81.0, 2),
        "row 2, ours: b (200 ep, Fashion-MNIST, chance 10 %)": (70.0, 1),
        "row 2, ours: a (400 ep, Fashion-MNIST, chance 10 %)": (90.0, 1),
    }


@pytest.mark.parametrize("size", ["Small", "Huge-448", "Tiny-Large"])
def test_skips_other_sizes_of_the_scaling_table(size: str) -> None:
    for kept in ("Base", "Tiny-Base", "Tiny"):
        runs = [make_tuned("a", make_pretraining(), size=size), make_tuned("b", make_pretraining(), size=kept)]
        table = build_table(3, runs)
        (row,) = _ours(table)
        assert row.cells["FT"].runs[0][1].size == kept and table.excluded == ()


def test_skips_runs_without_pretraining() -> None:
    table = build_table(3, [make_run("scratch", "From scratch", "Base", pretrain=None)])
    assert not _ours(table) and table.excluded == ()


def test_table_1_matches_by_method_and_names_backbone_and_supervision() -> None:
    runs = [
        make_tuned("a", make_pretraining(1), 71.0),
        make_tuned("b", make_pretraining(7), 73.0, parameters=Parameters(total=85_374_824, trainable=1, encoder=1)),
        make_tuned("c", make_pretraining(2), 74.0),
    ]
    table = build_table(1, runs)
    mae, mrmae = _ours(table)
    assert (_paper_row(table, mae).method, _paper_row(table, mrmae).method) == ("MAE", "MR-MAE")
    assert mae.labels == {"Backbone": "vit_base", "Supervision": "RGB"}
    assert mrmae.labels == {"Backbone": "cvit_base", "Supervision": CLIP}
    assert mrmae.cells["Params (M)"].value == pytest.approx(85.374824) and mrmae.cells["Ratio (%)"].value == 25
    assert table.excluded == ("runs/c/finetune: its training configuration matches no row of this table",)
    methods = [row.method for row in table.rows if row.source == "ours"]
    assert methods == ["MAE", "MaskFeat", "DMAE", "data2vec", "MVP", "MCMAE", "MILAN", "MR-MAE"]


def _of_recipe(name: str) -> Run:
    """A run whose record has the design of a recipe in ds_configs/methods."""
    recipe = load_recipe(Path("ds_configs/methods") / f"{name}.yaml")
    assert recipe.stages.pretrain is not None
    design = describe_design(recipe, recipe.stages.pretrain)
    known = make_pretraining(1, {"t": CLIP}, design=design, method=recipe.method)
    return make_tuned(name, known, 75.0)


@pytest.mark.parametrize("size", ["base", "tiny"])
@pytest.mark.parametrize("method", ["MILAN", "DMAE", "MaskFeat", "data2vec", "MVP"])
def test_a_run_of_a_method_is_listed_below_its_row_of_table_1(method: str, size: str) -> None:
    name = f"{method.lower()}_{size}"
    table = build_table(1, [_of_recipe(name)])
    (ours,) = _ours(table)
    assert _paper_row(table, ours).method == method
    more = {"MaskFeat": ", HOG", "data2vec": ", Momentum"}.get(method, "")  # besides the teacher that each run has here
    assert ours.labels["Supervision"] == CLIP + more
    assert ours.cells["Ratio (%)"].value == _paper_row(table, ours).cells["Ratio (%)"].value
    assert build_table(3, [_of_recipe(name)]).excluded == (f"runs/{name}/finetune: {NO_ROW}",)


RELATIVES = ["milan_mae_decoder", "dmae_last_block", "mvp_mae_style", "maskalign_last_block", "maskfeat_mae_style"]


@pytest.mark.parametrize("name", [*RELATIVES, "maskalign_base", "fd_base", "simmim_vit_base"])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_relatives_are_no_rows(name: str, number: int) -> None:
    table = build_table(number, [_of_recipe(name)])
    assert not _ours(table) and table.excluded == (f"runs/{name}/finetune: {NO_ROW}",)


def _evaluated(name: str, *tuned: RunRecord, top1: float) -> Run:
    members = [Member(file="m", sha256=f"{i}", finetune=summarize_finetuning(t)) for i, t in enumerate(tuned)]
    data = DataInfo(dataset="Fashion-MNIST", file="val.beton", sha256="cd", samples=10_000, classes=10)
    record = make_record(
        top1=top1, size="Base", name=name, stage="evaluate", init=None, members=members, data=data,
        schedule=Schedule(epochs=0, global_batch=32, steps=0),
    )  # fmt: skip
    return Path("runs") / name / "evaluate", record


def test_table_4_matches_by_teachers() -> None:
    clip, dino = make_tuned("clip", make_pretraining()), make_tuned("dino", make_pretraining(7, {"t": DINO}))
    runs = [
        clip,
        dino,
        make_tuned("joint", make_pretraining(7, {"a": DINO, "b": CLIP})),
        make_tuned("other", make_pretraining(7, {"t": "efficientnet_lite0"})),
        make_tuned("plain", make_pretraining(3)),
        _evaluated("sep", clip[1], dino[1], top1=88.0),
        _evaluated("twice", clip[1], clip[1], top1=87.0),
    ]
    table = build_table(4, runs)
    assert {row.label.split(": ")[1].split(" (")[0]: _paper_row(table, row).method for row in _ours(table)} == {
        "clip": "CLIP",
        "dino": "DINO",
        "joint": "CLIP/DINO (Joint)",
        "sep": "CLIP/DINO (Sep.)",
    }
    assert [line.split("/")[1] for line in table.excluded] == ["other", "plain", "twice"]


def test_table_5_matches_by_epochs_and_adds_rows_for_others() -> None:
    runs = [make_tuned(str(n), make_pretraining(epochs=n)) for n in (400, 100, 30)]
    table = build_table(5, runs)
    places = [(row.label.split(", ours")[0], row.source) for row in table.rows]
    paper = [(f"MR-MAE, {n} epochs", "paper") for n in (200, 400, 800)]
    assert [place[0].split(", paper")[0] for place in places if place[1] == "paper"] == [name for name, _ in paper]
    assert [place[0] for place in places if place[1] == "ours"][-2:] == ["MR-MAE, 30 epochs", "MR-MAE, 100 epochs"]
    (four,) = [row for row in _ours(table) if row.epochs == 400]
    assert _paper_row(table, four).epochs == 400


def test_only_the_whole_of_imagenet_has_the_papers_name() -> None:
    whole, part = (make_tuned(n, make_pretraining(dataset="ImageNet-1K"), **WHOLE) for n in ("whole", "part"))
    part[1].results.eval_samples = 400
    labels = [row.label for row in _ours(build_table(3, [whole, part]))]
    assert labels[0] == "row 7, ours: whole (200 ep, ImageNet-1K)"
    assert "400 evaluation samples" in labels[1] and "chance 0.1 %" in labels[1]
