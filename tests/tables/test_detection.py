"""The paper's Table 2 with runs of the stage detect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.records.sections import CocoInfo, DataInfo, DetectionInfo, Init, Operations, Parameters, Results
from mrmae_ds.tables.base import Row, Run, Table
from mrmae_ds.tables.csv import to_csv
from mrmae_ds.tables.latex import to_latex
from mrmae_ds.tables.markdown import to_markdown
from mrmae_ds.tables.paper import TABLES
from mrmae_ds.tables.write import build_table, write_table
from tests.support.records import make_pretraining, make_record, make_tuned

TRAIN, VAL = (117_266, 860_001), (5_000, 36_781)


def detected(
    name: str = "coco", row: int = 7, *, box: float | None = 50.0, epochs: int = 400, val: Any = VAL, **fields: Any
) -> Run:
    """Return a run whose encoder was pre-trained as a row of Table 3."""
    sets = [CocoInfo(images=images, annotations=annotations, sha256="ab") for images, annotations in (TRAIN, val)]
    found = {"box/AP": box, "mask/AP": 45.0} if box is not None else {}
    pretrain = make_pretraining(row, epochs=epochs)
    record = make_record(
        top1=None,
        **{
            "stage": "detect",
            "detection": DetectionInfo(image_size=1024, detector={}, train=sets[0], val=sets[1]),
            "data": DataInfo(dataset="instances_train2017", file="x.json", samples=TRAIN[0], classes=80),
            "parameters": Parameters(total=109_704_629, trainable=109_704_629, encoder=84_693_504),
            "operations": Operations(training=3, forward=1_912_000_000_000),
            "init": Init(file="model.safetensors", pretrain=pretrain),
            "results": Results(eval_samples=val[0], **found),
            "name": name,
            **fields,
        },
    )
    return Path("runs") / name / "detect", record


def ours(table: Table) -> list[Row]:
    return [row for row in table.rows if row.measured]


def test_without_runs_ours_are_blank() -> None:
    table, printed = build_table(2, []), TABLES[2]
    papers = [row for row in table.rows if row.source == "paper"]
    assert [{c: cell.value for c, cell in row.cells.items()} for row in papers] == [row.cells for row in printed.rows]
    assert papers[0].label == "ViTDet, paper (1600 ep, COCO)"
    blank = [row.label for row in table.rows if row.source == "ours"]
    assert blank == [f"{name}, ours (not run)" for name in ("ViTDet", "MCMAE", "MR-MAE")]
    text = to_markdown(table)
    for fact in ("53.9 / 47.6", "51.6 / 45.9", "109.7 M", "multiply-adds"):
        assert fact in text


def test_a_run_appears_below_the_papers_row() -> None:
    table = build_table(2, [detected()])
    (row,) = ours(table)
    assert row.label == "MR-MAE, ours: coco (400 ep, COCO)" and row.dataset == "COCO"
    assert table.rows[table.rows.index(row) - 1].label == "MR-MAE, paper (400 ep, COCO)"
    values = {column: cell.value for column, cell in row.cells.items()}
    assert values == {
        "AP box": 50.0, "AP mask": 45.0, "F-Epochs": 10, "Params (M)": 109.704629, "FLOPs (T)": 0.956,
    }  # fmt: skip
    text = to_markdown(table)
    assert "**50.00** [1]" in text and "**45.00** [2]" in text and "AP (%)" in text and "top-1" not in text
    assert "chance" not in text.split("## Runs behind our numbers")[1].split("\n")[2]


@pytest.mark.parametrize(("row", "method"), [(7, "MR-MAE"), (1, "ViTDet")])
def test_runs_are_matched_by_their_pretraining(row: int, method: str) -> None:
    (found,) = ours(build_table(2, [detected(row=row)]))
    assert found.method == method


def test_weights_from_elsewhere_are_those_of_the_recipes_method() -> None:
    run = detected(method="MAE", init=Init(file="mae_pretrain_vit_base.pth"))
    (row,) = ours(build_table(2, [run]))
    assert row.label == "ViTDet, ours: coco (unknown pre-training, COCO)"
    table = build_table(2, [detected(init=None)])
    assert not ours(table) and "matches no row" in table.excluded[0]


def test_another_data_set_is_named() -> None:
    """Not COCO's counts of images and annotations: the row says what it was measured on."""
    for val in ((100, 736), (5_000, 36_000)):
        (row,) = ours(build_table(2, [detected(val=val)]))
        assert row.dataset == f"instances_train2017: 80 classes, 117,266 training and {val[0]:,} evaluation images"
        assert row.dataset in row.label


def test_seeds_are_averaged_and_other_runs_explained() -> None:
    runs = [detected(box=50.0), detected(box=52.0, seed=1), detected("old", row=4), detected("none", box=None)]
    runs += [detected("running", status="stopped")]
    table = build_table(2, runs)
    (row,) = ours(table)
    assert row.cells["AP box"].value == 51.0 and row.cells["AP box"].spread == pytest.approx(2**0.5)
    assert sorted(line.split(":")[0] for line in table.excluded) == [
        f"runs/{name}/detect" for name in ("none", "old", "running")
    ]


@pytest.mark.parametrize(("number", "row", "name"), [(3, 7, "row 7"), (3, 4, "row 4"), (5, 7, "MR-MAE, 200 epochs")])
def test_detectors_fill_the_coco_columns_of_the_ablations(number: int, row: int, name: str, tmp_path: Path) -> None:
    """AP in a row of its own, without an accuracy; the accuracy's row has no AP."""
    tuned = make_tuned("tuned", make_pretraining(row, epochs=200))
    runs = [detected(row=row, epochs=200), detected("other", row=1, epochs=200, box=40.0), tuned]
    table = build_table(number, runs)
    own = [found for found in ours(table) if found.label.startswith(name)]
    ap, accuracy = sorted(own, key=lambda found: found.dataset)
    assert (ap.label, ap.dataset) == (f"{name}, ours: coco (200 ep, COCO)", "COCO")
    assert {column: cell.value for column, cell in ap.cells.items()} == {"AP box": 50.0, "AP mask": 45.0}
    assert accuracy.label.startswith(f"{name}, ours") and "AP box" not in accuracy.cells
    assert (ap.labels == {**accuracy.labels}) and not build_table(4, runs[:1]).measured
    text = to_markdown(table)
    (line,) = [line for line in text.splitlines() if "| **50.00** [" in line]
    assert name in line
    (run,) = [line for line in text.splitlines() if "coco/detect" in line and "50.00" in line]
    assert [cell.strip() for cell in run.split("|")[4:7]] == ["50.00", "", ""] and "top-1 or AP (%)" in text
    blank = [row.label for row in build_table(number, []).rows if row.source == "ours"]
    assert all("not run" in label for label in blank)
    _, paths = write_table(runs, tmp_path, number)
    assert all(path.stat().st_size > 1000 for path in paths)
    assert write_table(runs[:1], tmp_path, number)[1] == paths  # without an accuracy


def test_detectors_of_other_encoders_fill_no_row() -> None:
    runs = [detected(row=1), detected("whole", init=Init(file="model_final.pth", whole=True), method="MR-MAE")]
    table = build_table(5, runs)
    assert not ours(table) and [line.split(": ")[1] for line in sorted(table.excluded)] == [
        "its training configuration matches no row of this table",
        "it continued a trained detector, not a pre-training",
    ]
    assert not ours(build_table(2, runs[1:]))


def test_files(tmp_path: Path) -> None:
    table, paths = write_table([detected()], tmp_path, 2)
    assert [path.name for path in paths] == ["table2.md", "table2.csv", "table2.tex", "table2.png"]
    assert all(path.stat().st_size > 1000 for path in paths)
    lines = [line for line in to_csv(table).splitlines() if ",ours," in line and ",AP box," in line and ",50," in line]
    assert len(lines) == 1 and ",117266," not in lines[0]
    assert "\\textbf{50.00}" in to_latex(table)
