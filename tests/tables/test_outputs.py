from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from mrmae_ds.figures import style
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.sizes import ARCHITECTURES
from mrmae_ds.records.record import summarize_finetuning
from mrmae_ds.records.sections import Hardware, Member, Operations, Parameters, Results
from mrmae_ds.tables import plot_cost
from mrmae_ds.tables.base import Run, Table, format_number
from mrmae_ds.tables.csv import to_csv
from mrmae_ds.tables.latex import escape, to_latex
from mrmae_ds.tables.markdown import to_markdown
from mrmae_ds.tables.paper import TABLES
from mrmae_ds.tables.write import build_table
from tests.support.records import make_pretraining, make_run, make_tuned

WHOLE = {"dataset": "ImageNet-1K", "classes": 1000, "samples": 1_281_167, "eval_samples": 50_000}


def _known_run(name: str = "a", **fields: object) -> Run:
    """Return a fine-tuning of half an hour on four ranks with recorded cost."""
    values = {
        "hardware": Hardware(device="H100", count=4, world_size=4),
        "wall_seconds": 1800.0,
        "images_seen": 5000,
        "operations": Operations(training=7_000_000, forward=2_500_000_000),
        "parameters": Parameters(total=12_300_000, trainable=1, encoder=1),
        "results": Results(top1=80.0, eval_samples=10_000, images_per_s=321.0),
        **fields,
    }
    return make_tuned(name, make_pretraining(), **values)


def _costs(table: Table) -> list[list[str]]:
    grid = to_markdown(table).split("## Cost of these runs\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in grid.splitlines()[2:]]


@pytest.mark.parametrize("table", [3, 6])
def test_lists_the_cost_of_each_run(table: int) -> None:
    # 0.5 h x 4 ranks = 2 GPU-hours; the pre-training's 30 hours and 2e18 operations are the builder's.
    (line,) = _costs(build_table(table, [_known_run()]))
    assert line == ["[1]", "0", "12.3", "2.5", "2,000", "30", "1,000", "2", "321", "H100"]
    text = to_csv(build_table(table, [_known_run()]))
    (row,) = [row for row in csv.DictReader(io.StringIO(text)) if row["runs"]]
    assert row["parameters_m"] == "12.3" and row["gflop_per_image"] == "2.5" and row["pretrain_pflop"] == "2000"
    assert row["pretrain_gpu_hours"] == "30" and row["finetune_gpu_hours"] == "2"
    assert (row["pretrain_images_per_s"], row["finetune_images_per_s"]) == ("1000", "321")


@pytest.mark.parametrize("number", [1, 3])
def test_lists_the_results_of_runs_that_fill_no_cell(number: int) -> None:
    teacher_only = make_pretraining(6, design=None, method="MaskAlign")
    runs = [
        make_tuned(f"other{seed}", teacher_only, 71.25, seed=seed, wall_seconds=3600.0, recipe_hash="c0ffee" * 5)
        for seed in (3, 4)
    ]
    runs += [make_tuned("failed", teacher_only, 99.5, status="failed")]
    table = build_table(number, runs)
    assert not table.measured and len(table.excluded) == 3
    section = to_markdown(table).split("## Fine-tuning runs that fill no cell")[1].split("## Errata")[0]
    grids = [part for part in section.split("\n\n") if part.startswith("|")]
    (results, costs) = ([[c.strip() for c in line.split("|")[1:-1]] for line in grid.splitlines()] for grid in grids)
    teacher = "t: ViT-B-16-quickgelu"
    # The binomial standard error of 71.25 % of 10,000 samples: 100 sqrt(0.7125 * 0.2875 / 10000) = 0.4526.
    assert results[2:] == [
        [
            *(f"runs/other{seed}/finetune", "MaskAlign, Base", "Fashion-MNIST", "top-1", "71.25", "± 0.45", "10"),
            *("10,000", "60,000", "200", "10", seed, "c0ffeec0ffee", teacher),
        ]
        for seed in "34"
    ]
    assert len(results[0]) == len(results[2]) and len(costs[0]) == len(costs[2])
    assert [line[1] for line in costs[2:]] == ["3", "4"] and costs[2][5] == "30" and costs[2][7] == "1"
    assert "99.5" not in to_markdown(table) + to_csv(table)
    lines = [line for line in csv.DictReader(io.StringIO(to_csv(table))) if line["fills_no_cell"]]
    assert [(line["row"], line["source"], line["value"], line["seeds"]) for line in lines] == [
        ("", "ours", "71.25", seed) for seed in "34"
    ]
    assert {line["recipe_hash"] for line in lines} == {"c0ffee" * 5} and lines[0]["finetune_gpu_hours"] == "1"


def test_unknown_costs_are_blank_and_no_pretraining_costs_zero() -> None:
    unknown = make_tuned("a", make_pretraining(spent=None), wall_seconds=36.0)
    scratch = make_run("b", "From scratch", "Base", pretrain=None, wall_seconds=36.0)
    lines = {line[0]: line[2:-1] for line in _costs(build_table(6, [unknown, scratch]))}
    assert lines == {
        "[1]": ["0.00003", "", "0", "0", "", "0.01", ""],
        "[2]": ["0.00003", "", "", "", "", "0.01", ""],
    }


def test_the_cost_of_an_ensemble_is_the_sum_over_its_members() -> None:
    members = [
        Member(file="m", sha256=str(n), finetune=summarize_finetuning(_known_run(wall_seconds=1800.0 * n)[1]))
        for n in (1, 2)
    ]
    known = _known_run(
        stage="evaluate", members=members, init=None, parameters=Parameters(total=2, trainable=0, encoder=2)
    )
    (line,) = _costs(build_table(6, [known]))
    assert line[1:] == ["0+0", "0.000002", "5", "4,000", "60", "1,000", "6", "321", "H100"]


def test_the_cost_of_a_cell_is_the_mean_over_its_seeds() -> None:
    runs = [_known_run("a"), _known_run("a", seed=1, wall_seconds=3600.0)]
    (row,) = [r for r in csv.DictReader(io.StringIO(to_csv(build_table(3, runs)))) if r["runs"]]
    assert row["finetune_gpu_hours"] == "3" and row["n_seeds"] == "2"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (0, "0"), (0.012345, "0.0123"), (1234567.0, "1,230,000"), (99.95, "100"), (3e-12, "3e-12")],
)
def test_numbers_have_three_digits_and_no_exponent(value: float | None, shown: str) -> None:
    assert format_number(value) == shown


@pytest.mark.parametrize("number_", [1, 3, 4, 5, 6])
def test_the_latex_has_the_same_cells(number_: int) -> None:
    table = build_table(number_, [_known_run("a_b"), _known_run("a_b", seed=1)])
    text = to_latex(table)
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 3
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    columns = 1 + len(table.headings) + len(table.columns)
    cells = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in body.splitlines()]
    assert len(cells) == len(table.rows) and {len(line) for line in cells} == {columns}
    bold = [cell.strip() for line in cells for cell in line if "textbf" in cell]
    assert bold == [r"\textbf{80.00 $\pm$ 0.00 (n=2)} [1]"]
    assert r"runs/a\_b/finetune" in text
    accuracies = ("FT", *TABLES[6].columns)
    printed = [[row.cells[c] for c in row.cells if c in accuracies] for row in TABLES[number_].rows]
    shown = [[cell.strip() for cell in line[1:]] for line in cells if ", paper" in line[0]]
    for values, line in zip(printed, shown, strict=True):
        assert [cell for cell in line if cell in {"-" if v is None else f"{v:.1f}" for v in values}][: len(values)] == [
            "-" if value is None else f"{value:.1f}" for value in values
        ]


def test_a_leading_bracket_is_not_the_option_of_a_line_break() -> None:
    text = to_latex(build_table(6, [_known_run()]))
    assert "\n{[}1] & runs/a/finetune" in text and "\n[" not in text


def test_escapes_latex() -> None:
    assert escape("50 % of a_b & c # {d} ~ \\") == (r"50 \% of a\_b \& c \# \{d\} \textasciitilde{} \textbackslash{}")


def test_parameters_of_the_papers_points_equal_those_of_the_models() -> None:
    for family, sizes in {"vit": plot_cost.VIT, "cvit": plot_cost.CVIT}.items():
        for column, millions in sizes.items():
            name, _, pixels = column.partition("-")
            with torch.device("meta"):
                model = build_encoder(ARCHITECTURES[f"{family}_{name.lower()}"], int(pixels or 224), 1000)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def _cost_plot(table: Table, monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, _: figures.append(figure))
    plot_cost.plot_cost(table, Path("unused.png"))
    return figures[0]


def _cost_panels(table: Table, monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    return _cost_plot(table, monkeypatch).axes


def test_cost_plot_has_gpu_hours_for_our_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _known_run(**WHOLE, results=Results(top1=80.0, eval_samples=50_000))
    left, right = _cost_panels(build_table(6, [run]), monkeypatch)
    by_parameters = [box[0] for box in left.containers]
    gray = [line for line in by_parameters if len(set(to_rgb(line.get_color()))) == 1]
    (ours,) = [line for line in by_parameters if line not in gray]
    assert len(gray) == 3 and {line.get_markerfacecolor() for line in gray} == {"white"}
    assert list(gray[0].get_xdata()) == [22.05, 86.57, 304.33, 632.05, 633.03]  # MAE has no 392
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([12.3], [80.0])
    (hours,) = [box[0] for box in right.containers]
    assert list(hours.get_xdata()) == [30.0] and "H100" in right.get_xlabel()


def test_cost_plot_has_separate_panels_for_other_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = _cost_panels(build_table(6, [_known_run()]), monkeypatch)
    assert [len(panel.containers) for panel in axes] == [3, 1, 1]
    assert "Fashion-MNIST" in axes[1].get_title() and "chance 10" in axes[1].get_title()


def test_the_cost_plot_has_no_panel_without_points(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow, _ = (axes.get_position() for axes in _cost_panels(build_table(6, [_known_run()]), monkeypatch))
    assert wide.width > 2 * narrow.width
    (only,) = _cost_panels(build_table(6, []), monkeypatch)
    assert len(only.containers) == 3


@pytest.mark.parametrize("number", [1, 3, 6])
def test_no_label_of_the_cost_plot_covers_another_or_a_marker(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of equal cost and nearly equal accuracy, as fine-tunings of one pre-training at three resolutions have."""
    runs = []
    for method, accuracy in (("MAE", 80.0), ("MCMAE", 80.1), ("MR-MAE", 80.2)):
        for place, size in enumerate(TABLES[6].columns):
            total = Parameters(total=12_300_000 + 100 * place, trainable=1, encoder=1)
            known = make_pretraining(7 if method == "MR-MAE" else 1, method=method)
            result = Results(top1=accuracy + 0.05 * place, eval_samples=10_000)
            runs.append(make_tuned(f"{method}{place}", known, size=size, parameters=total, results=result))
    figure = _cost_plot(build_table(number, runs), monkeypatch)
    figure.draw_without_rendering()
    renderer = RendererAgg(*map(int, figure.bbox.size), figure.dpi)
    for axes in figure.axes:
        labels = [text for text in axes.texts if text.get_text()]
        boxes = [Text.get_window_extent(text, renderer) for text in labels]
        points = [axes.transData.transform(text.xy) for text in labels]
        assert len(labels) == sum(len(box[0].get_xdata()) for box in axes.containers) > 0
        for box, label in zip(boxes, labels, strict=True):
            assert not [other for other in boxes if other is not box and box.overlaps(other)], label
            assert not [point for point in points if box.contains(*point)], label
            assert axes.bbox.fully_containsx(box.x0) and axes.bbox.fully_containsx(box.x1), label
