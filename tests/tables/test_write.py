from __future__ import annotations

import csv
import io
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from mrmae_ds.errors import UserError
from mrmae_ds.figures import style
from mrmae_ds.records.record import RunRecord, find_records, summarize_finetuning
from mrmae_ds.records.sections import DataInfo, Init, Member, PretrainSummary, Results, Schedule, TeacherInfo
from mrmae_ds.tables import plot_scaling
from mrmae_ds.tables.base import Row, Run, Table
from mrmae_ds.tables.csv import to_csv
from mrmae_ds.tables.latex import to_latex
from mrmae_ds.tables.markdown import to_markdown
from mrmae_ds.tables.paper import IMAGENET, TABLE_6
from mrmae_ds.tables.scaling import scaling_table
from mrmae_ds.tables.write import write_table
from tests.support.records import make_record, make_run

WHOLE = {"dataset": "ImageNet-1K", "classes": 1000, "samples": 1_281_167, "eval_samples": 50_000}
PAPER_NUMBERS = {value for row in TABLE_6.rows for value in row.cells.values() if value is not None}


def _ours(table: Table, method: str) -> Row:
    (row,) = [row for row in table.rows if (row.method, row.source) == (method, "ours")]
    return row


def _markdown_rows(table: Table) -> dict[str, list[str]]:
    """Parse the first table of the Markdown text: label to cells."""
    grid = to_markdown(table).split("\n\n")[2]
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in grid.splitlines()]
    return {label: cells for label, *cells in lines}


def _section(table: Table, title: str) -> list[list[str]]:
    """The lines of the grid below a heading of the Markdown text, as cells."""
    grid = to_markdown(table).split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in grid.splitlines()[2:]]


def test_without_runs_our_rows_are_blank() -> None:
    table = scaling_table([])
    assert table.columns == TABLE_6.columns
    labels = [row.label for row in table.rows]
    assert labels == [
        "MAE, paper (1600 ep, ImageNet-1K)",
        "MAE, ours (not run)",
        "MCMAE, paper (800 ep, ImageNet-1K)",
        "MCMAE, ours (not run)",
        "MR-MAE, paper (200 ep, ImageNet-1K)",
        "MR-MAE, ours (not run)",
        "From scratch, ours (not run)",
    ]
    rows = _markdown_rows(table)
    assert rows["MAE, paper (1600 ep, ImageNet-1K)"] == ["79.5", "83.6", "85.9", "86.9", "-", "87.8"]
    assert all(set(rows[label]) == {""} for label in labels if "ours" in label)


def test_our_cells_contain_only_measured_values() -> None:
    runs = [
        make_run("a", "MR-MAE", "Tiny", 71.23),
        make_run("b", "MAE", "Base", 61.0),
        make_run("c", "BEiT", "Giant", 55.5),
        make_run("d", "MR-MAE", "Tiny", 99.0, stage="probe"),
    ]
    table = scaling_table(runs)
    assert table.columns == ("Tiny", *TABLE_6.columns, "Giant")
    rows = _markdown_rows(table)
    assert rows["MR-MAE, ours (20 ep, Fashion-MNIST, chance 10 %)"] == ["**71.23** [2]", "", "", "", "", "", "", ""]
    assert rows["MAE, ours (20 ep, Fashion-MNIST, chance 10 %)"] == ["", "", "**61.00** [1]", "", "", "", "", ""]
    assert rows["BEiT, ours (20 ep, Fashion-MNIST, chance 10 %)"][-1] == "**55.50** [3]"
    assert rows["MR-MAE, paper (200 ep, ImageNet-1K)"] == [
        "",
        "83.6",
        "85.5",
        "86.8",
        "88.0",
        "88.5",
        "-",
        "",
    ]
    ours = {cell.value for row in table.rows if row.source == "ours" for cell in row.cells.values()}
    assert ours == {71.23, 61.0, 55.5}
    assert not ours & PAPER_NUMBERS


@pytest.mark.parametrize("status", ["running", "failed", "stopped"])
def test_an_unfinished_run_fills_no_cell(status: str) -> None:
    table = scaling_table([make_run("a", top1=95.0, status=status)])
    assert _ours(table, "MR-MAE").cells == {}
    assert "Tiny" not in table.columns
    assert table.excluded == (f"runs/a/finetune: not finished (status: {status})",)
    assert "95" not in to_csv(table)


def test_a_finished_run_without_an_accuracy_fills_no_cell() -> None:
    table = scaling_table([make_run("a", results=Results(loss=0.5))])
    assert _ours(table, "MR-MAE").cells == {}
    assert table.excluded == ("runs/a/finetune: finished without a top-1 accuracy",)


def test_averages_the_newest_run_of_each_seed() -> None:
    runs = [
        make_run("s0-old", top1=10.0, seed=0, day=1),
        make_run("s0", top1=80.0, seed=0, day=2),
        make_run("s1", top1=81.0, seed=1, day=2),
        make_run("s2", top1=83.5, seed=2, day=2),
    ]
    table = scaling_table(runs)
    cell = _ours(table, "MR-MAE").cells["Tiny"]
    assert cell.value == pytest.approx((80.0 + 81.0 + 83.5) / 3)
    assert cell.spread == pytest.approx(statistics.stdev([80.0, 81.0, 83.5]))
    assert _markdown_rows(table)["MR-MAE, ours (20 ep, Fashion-MNIST, chance 10 %)"][0] == "**81.50 ± 1.80 (n=3)** [1]"
    assert table.excluded == ("runs/s0-old/finetune: a newer run fills the cell",)
    assert len(_section(table, "Runs behind our numbers")) == len(_section(table, "Cost of these runs")) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"recipe_hash": "another"},
        {"schedule": Schedule(epochs=5, global_batch=64, steps=50, steps_done=50)},
        {"init": Init(file="m", pretrain=PretrainSummary(method="MR-MAE", epochs=20, dataset="Fashion-MNIST"))},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(other: dict[str, object]) -> None:
    table = scaling_table([make_run("old", top1=10.0, seed=1, **other), make_run("new", top1=80.0, day=2)])
    cell = _ours(table, "MR-MAE").cells["Tiny"]
    assert (cell.value, cell.spread, len(cell.runs)) == (80.0, None, 1)


def test_pretraining_lengths_and_datasets_have_separate_rows() -> None:
    elsewhere = PretrainSummary(method="MR-MAE", epochs=7, dataset="ImageNet-1K")
    runs = [
        make_run("a", top1=70.0, pretrain=100),
        make_run("b", top1=60.0, pretrain=20),
        make_run("c", top1=50.0, dataset="CIFAR-10", samples=50_000),
        make_run("d", top1=40.0, init=Init(file="m", pretrain=elsewhere)),
        make_run("e", top1=30.0, init=Init(file="released.pth")),
        make_run("f", top1=20.0, pretrain=None),
        make_run("g", "From scratch", top1=15.0, pretrain=None),
    ]
    labels = [row.label for row in scaling_table(runs).rows if row.cells and row.source == "ours"]
    assert labels == [
        "MR-MAE, ours (20 ep, CIFAR-10, chance 10 %)",
        "MR-MAE, ours (7 ep on ImageNet-1K, then Fashion-MNIST, chance 10 %)",
        "MR-MAE, ours (20 ep, Fashion-MNIST, chance 10 %)",
        "MR-MAE, ours (100 ep, Fashion-MNIST, chance 10 %)",
        "MR-MAE, ours (unknown pre-training, Fashion-MNIST, chance 10 %)",
        "From scratch, ours (no pre-training, Fashion-MNIST, chance 10 %)",
        "From scratch, ours (no pre-training, model of MR-MAE, Fashion-MNIST, chance 10 %)",
    ]


def test_only_the_whole_of_imagenet_has_the_papers_name() -> None:
    whole = scaling_table([make_run("a", size="Base", **WHOLE)])
    assert _ours(whole, "MR-MAE").dataset == IMAGENET
    part = scaling_table([make_run("a", size="Base", **(WHOLE | {"eval_samples": 400}))])
    assert _ours(part, "MR-MAE").dataset != IMAGENET
    assert "400 evaluation samples" in _ours(part, "MR-MAE").label
    alias = scaling_table([make_run("a", size="Base", **(WHOLE | {"dataset": "imagenet_1k", "samples": 1000}))])
    assert "ImageNet-1K part: 1000 classes, 1,000 training" in _ours(alias, "MR-MAE").label


def test_separates_two_parts_of_one_dataset() -> None:
    table = scaling_table([make_run("a", top1=70.0), make_run("b", "MAE", top1=60.0, samples=600)])
    labels = [row.label for row in table.rows if row.cells and row.source == "ours"]
    assert "600 training" in labels[0]
    assert "60,000 training" in labels[1]


def test_lists_every_run_behind_a_cell() -> None:
    teacher = {"clip": TeacherInfo(kind="clip", source="openai/ViT-B-16")}
    known = PretrainSummary(method="MR-MAE", epochs=20, dataset="Fashion-MNIST", teachers=teacher)
    record = make_record(top1=80.0, seed=3, recipe_hash="0123456789abcdef", init=Init(file="m", pretrain=known))
    table = scaling_table([(Path("runs/tiny/finetune"), record)])
    (cells,) = _section(table, "Runs behind our numbers")
    # The sampling error: 100 * sqrt(0.8 * 0.2 / 10000) = 0.4
    assert cells == [
        "[1]", "runs/tiny/finetune", "MR-MAE, Tiny", "80.00", "± 0.40", "10", "10,000", "60,000", "20", "10",
        "3", "0123456789ab", "clip: openai/ViT-B-16",
    ]  # fmt: skip
    assert "Huge-393" in to_markdown(table)


def test_csv_contains_every_cell() -> None:
    runs = [make_run("s0", top1=80.0), make_run("s1", top1=81.0, seed=1), make_run("b", "MAE", "Base", 61.0)]
    table = scaling_table(runs)
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(lines) == len(table.rows) * len(table.columns)
    for line, (row, size) in zip(lines, [(r, s) for r in table.rows for s in table.columns], strict=True):
        assert (line["method"], line["source"], line["column"]) == (row.method, row.source, size)
        cell = row.cells.get(size)
        if cell is None:
            assert line["value"] == ""
        elif cell.value is None:
            assert line["value"] == "-"
        else:
            assert float(line["value"]) == pytest.approx(cell.value)
    (filled,) = [line for line in lines if line["source"] == "ours" and line["n_seeds"] == "2"]
    assert filled["value"] == "80.5"
    assert filled["pretrain_epochs"] == "20"
    assert (filled["seeds"], filled["chance_percent"], filled["eval_samples"]) == ("0 1", "10", "10000")
    assert filled["runs"] == "runs/s0/finetune runs/s1/finetune"


def test_escapes_a_bar_in_markdown() -> None:
    rows = _markdown_rows(scaling_table([make_run("a", "A|B", top1=70.0)]))
    assert rows["A\\|B, ours (20 ep, Fashion-MNIST, chance 10 %)"][0] == "**70.00** [1]"


def test_our_own_size_family_has_a_separate_grid() -> None:
    runs = [make_run("a", size="Tiny-Huge-448", top1=60.0), make_run("b", size="Tiny-Small", top1=50.0)]
    runs += [make_run("c", "BEiT", "Tiny-Base", top1=40.0)]
    table = scaling_table(runs)
    assert table.columns == (*TABLE_6.columns, "Tiny-Small", "Tiny-Base", "Tiny-Huge-448")
    papers, own = to_markdown(table).split("\n\n")[2:4]
    assert "Tiny" not in papers and "ours (not run)" in papers and "BEiT" not in papers
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in own.splitlines()]
    assert lines[0][1:] == ["Tiny-Small", "Tiny-Base", "Tiny-Huge-448"]
    assert [line[1:] for line in lines[2:]] == [["**50.00** [1]", "", "**60.00** [2]"], ["", "**40.00** [3]", ""]]


def test_linear_probes_are_listed_and_fill_no_cell() -> None:
    runs = [
        make_run("a", "MAE", "Base", 41.5, stage="probe", seed=3),
        make_run("b", top1=9.0, stage="probe", status="failed"),
    ]
    table = scaling_table(runs)
    assert not table.measured and table.excluded == ()
    text = to_markdown(table).split("## Linear probes")[1].split("\n\n")[2]
    (line,) = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:]]
    assert line == ["runs/a/finetune", "MAE, Base", "Fashion-MNIST", "41.50", "10", "20", "10", "3"]
    assert "Linear probes" not in to_markdown(scaling_table([]))


def test_families_stay_together_in_the_papers_order() -> None:
    sizes = ("B-Small", "A-Large", "Giant", "A-Small")
    table = scaling_table([make_run(size, size=size) for size in sizes])
    assert table.columns == (*TABLE_6.columns, "Giant", "A-Small", "A-Large", "B-Small")


def test_excludes_rows_of_other_tables() -> None:
    table = scaling_table([make_run("a", "MR-MAE, Table 3 row 2", "Base")])
    assert not table.measured
    assert table.excluded == ("runs/a/finetune: a row of another table; see mrmae table --paper 3",)


def _panels(table: Table, monkeypatch: pytest.MonkeyPatch, path: Path) -> dict[str, Axes]:
    """Plot, and return the panels by the first line of their title."""
    figures: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, _: figures.append(figure))
    plot_scaling.plot_scaling(table, path)
    return {axes.get_title().split(":")[0]: axes for axes in figures[0].axes}


@pytest.mark.parametrize("many", [False, True])
def test_stacks_panels_that_would_be_too_wide(many: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [f"Tiny-{size}" for size in TABLE_6.columns] if many else ["Small"]
    methods = ["MAE", "MCMAE", "MR-MAE", "MR-MAE-2"] if many else ["MAE"]
    runs = [make_run(f"{m}{s}", m, s) for m in methods for s in sizes]
    paper_axes, ours = _panels(scaling_table(runs), monkeypatch, tmp_path / "t.png").values()
    places = [axes.get_subplotspec().get_geometry() for axes in (paper_axes, ours)]
    assert places == ([(2, 1, 0, 0), (2, 1, 1, 1)] if many else [(1, 2, 0, 0), (1, 2, 1, 1)])


def test_other_datasets_have_a_separate_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run("a", top1=71.0), make_run("b", size="Small", top1=72.0)]
    panels = _panels(scaling_table(runs), monkeypatch, tmp_path / "t.png")
    assert set(panels) == {IMAGENET, "Fashion-MNIST"}
    paper_lines = [box[0] for box in panels[IMAGENET].containers]
    assert {line.get_markerfacecolor() for line in paper_lines} == {"white"}
    assert {line.get_linestyle() for line in paper_lines} == {"--"}
    assert all(len(set(to_rgb(line.get_color()))) == 1 for line in paper_lines)  # gray
    (ours,) = [box[0] for box in panels["Fashion-MNIST"].containers]
    assert list(ours.get_ydata()) == [71.0, 72.0]
    assert ours.get_markerfacecolor() != "white"
    assert [tick.get_text() for tick in panels["Fashion-MNIST"].get_xticklabels()] == ["Tiny", "Small"]


def test_imagenet_runs_are_in_the_papers_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = _panels(scaling_table([make_run("a", size="Base", **WHOLE)]), monkeypatch, tmp_path / "t.png")
    assert list(panels) == [IMAGENET]
    colors = [to_rgb(box[0].get_color()) for box in panels[IMAGENET].containers]
    assert [len(set(color)) == 1 for color in colors].count(False) == 1  # ours alone is no gray
    faces = [box[0].get_markerfacecolor() for box in panels[IMAGENET].containers]
    assert faces.count("white") == 3
    assert len(faces) == 4


def test_write_table_writes_all_files(tmp_path: Path) -> None:
    make_record(top1=71.23).write(tmp_path / "runs" / "tiny" / "finetune")
    table, written = write_table(find_records([tmp_path / "runs"]), tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    assert [path.name for path in written] == ["table.md", "table.csv", "table.tex", "table.png", "table_cost.png"]
    assert (tmp_path / "out" / "table.tex").read_text() == to_latex(table)
    assert (tmp_path / "out" / "table.md").read_text() == to_markdown(table)
    assert (tmp_path / "out" / "table.csv").read_text() == to_csv(table)
    assert "tiny/finetune" in to_markdown(table)
    assert str(tmp_path) not in to_markdown(table)
    with Image.open(tmp_path / "out" / "table.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert tuple(bytes.fromhex(style.PALETTE[2][1:])) in colors  # MR-MAE's
    with pytest.raises(UserError, match="no such folder"):
        find_records([tmp_path / "missing"])


def _ensemble(folder: str, *tuned: RunRecord | None, top1: float = 90.0, **fields: Any) -> Run:
    members = [
        Member(file="m", sha256=f"{i}{t and t.seed}", finetune=t and summarize_finetuning(t))
        for i, t in enumerate(tuned)
    ]
    data = DataInfo(dataset="Fashion-MNIST", file="val.beton", sha256="cd", samples=10_000, classes=10)
    schedule = Schedule(epochs=0, global_batch=32, steps=0)
    values = {"stage": "evaluate", "init": None, "members": members, "data": data, "schedule": schedule, **fields}
    return Path("runs") / folder / "evaluate", make_record(top1=top1, **values)


def test_an_ensemble_has_a_row_besides_those_of_its_members() -> None:
    teacher = {"dino": TeacherInfo(kind="timm", source="vit.dino")}
    known = PretrainSummary(method="MR-MAE", epochs=20, dataset="Fashion-MNIST", teachers=teacher)
    one, two = make_record(top1=80.0, seed=4), make_record(top1=82.0, seed=5, init=Init(file="m", pretrain=known))
    runs = [(Path("runs/one/finetune"), one), (Path("runs/two/finetune"), two), _ensemble("both", one, two)]
    table = scaling_table(runs)
    rows = _markdown_rows(table)
    assert rows["MR-MAE, ours (20 ep, Fashion-MNIST, chance 10 %, 2 models averaged)"][0] == "**90.00** [2]"
    # The two differ in how they were pre-trained, so the newer of equal age fills the cell, never the ensemble.
    assert "90" not in rows["MR-MAE, ours (20 ep, Fashion-MNIST, chance 10 %)"][0]
    (cells,) = [line for line in _section(table, "Runs behind our numbers") if line[0] == "[2]"]
    assert cells[1:6] == ["runs/both/evaluate", "MR-MAE, Tiny", "90.00", "± 0.30", "10"]
    assert cells[6:11] == ["10,000", "60,000", "20", "10", "4+5"] and cells[12] == "dino: vit.dino"
    (filled,) = [row for row in csv.DictReader(io.StringIO(to_csv(table))) if row["runs"] == "runs/both/evaluate"]
    assert (filled["finetune_epochs"], filled["seeds"], filled["eval_samples"]) == ("10", "4+5", "10000")


def test_skips_the_evaluation_of_a_single_model() -> None:
    table = scaling_table([make_run("a", top1=80.0), _ensemble("a", make_record(), top1=80.0)])
    cell = _ours(table, "MR-MAE").cells["Tiny"]
    assert [folder.name for folder, _ in cell.runs] == ["finetune"] and table.excluded == ()


@pytest.mark.parametrize("second", [None, make_record(samples=600), make_record(dataset="CIFAR-10")])
def test_an_ensemble_of_different_data_fills_no_cell(second: RunRecord | None) -> None:
    table = scaling_table([_ensemble("both", make_record(), second)])
    assert _ours(table, "MR-MAE").cells == {}
    assert "runs/both/evaluate: its members were fine-tuned on different or unknown data" in table.excluded[0]


def test_averages_ensembles_over_seeds_but_not_over_repeated_evaluations() -> None:
    def pair(seed: int) -> tuple[RunRecord, RunRecord]:
        return make_record(seed=seed), make_record(seed=seed)

    runs = [_ensemble("a", *pair(0), top1=80.0), _ensemble("b", *pair(1), top1=90.0, seed=1)]
    repeated = [_ensemble("c", *pair(0), top1=80.0, seed=9, day=2)]
    cell = _ours(scaling_table(runs + repeated), "MR-MAE").cells["Tiny"]
    assert (cell.value, len(cell.runs)) == (85.0, 2)


def test_labels_an_ensemble_of_different_pretraining() -> None:
    runs = [_ensemble("both", make_record(), make_record(method="MAE", pretrain=40), method="Two")]
    (row,) = [row for row in scaling_table(runs).rows if row.cells and row.source == "ours"]
    assert row.label == "Two, ours (different or unknown pre-training, Fashion-MNIST, chance 10 %, 2 models averaged)"


def test_a_cell_that_rests_on_copies_says_so() -> None:
    data = DataInfo(dataset="d", file="train.beton", sha256="ab", samples=80, classes=2, val_copies=8)
    runs = [make_run("a", top1=99.0, data=data, eval_samples=20), make_run("b", size="Base", top1=90.0)]
    table = scaling_table(runs)
    text = to_markdown(table)
    assert "**99.00** [2] (8 of 20 validation images are copies of training images)" in text
    assert "**90.00** [1] |" in text and "(8 of 20 validation" in to_latex(table)
    copies = {line["value"]: line["val_copies"] for line in csv.DictReader(io.StringIO(to_csv(table)))}
    assert (copies["99"], copies["90"]) == ("8", "")
