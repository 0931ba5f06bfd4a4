"""The report page: complete, self-contained, and equal to the records."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mrmae_ds.errors import UserError
from mrmae_ds.records.metrics import MetricsWriter
from mrmae_ds.records.record import RECIPE_FILE
from mrmae_ds.records.sections import Results, TeacherInfo
from mrmae_ds.report.collect import collect_stages, describe_results, differing_settings, filled_cells
from mrmae_ds.report.page import MAX_WIDTH, write_report
from tests.support.records import make_record


class Page(HTMLParser):
    """Cells of all tables, images by their alternative text, headings, and addresses that the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.images: dict[str, str] = {}
        self.loaded: list[str] = []
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "wbr":
            return
        if tag == "img":
            self.images[values["alt"] or ""] = values["src"] or ""
        self.loaded += [value for key, value in attrs if key in ("src", "href") and value]
        self._into = self.cells if tag in ("td", "th") else self.headings if tag in ("h1", "h2", "h3") else None
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


def write_stage(folder: Path, recipe: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Write a stage's record, recipe, engine config and ten logged steps."""
    folder.mkdir(parents=True)
    make_record(**fields).write(folder)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe or {"name": folder.parent.name}))
    (folder / "engine.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with MetricsWriter(folder) as writer:
        for step in range(10):
            writer.write(step, {"loss": 2.0 / (1 + step), "lr": 0.1, "images_per_s": 5.0})
    return folder


def test_a_report_has_every_section_and_needs_no_other_file(tmp_path: Path) -> None:
    for seed, (name, top1) in enumerate((("a", 80.0), ("b", 70.0))):
        recipe = {"name": name, "stages": {"finetune": {"epochs": 3}, "pretrain": {"epochs": top1}}}
        write_stage(tmp_path / name / "finetune", recipe, top1=top1, name=name, seed=seed)
    images = tmp_path / "a/finetune/images"
    images.mkdir()
    Image.new("RGB", (2 * MAX_WIDTH, 10), (200, 30, 30)).save(images / "attention.png")
    path = write_report([tmp_path / "a", tmp_path / "b"])
    assert path == tmp_path / "a/report.html"
    page = Page(path.read_text())
    assert page.headings[:2] == ["a and b", "Cells of the paper's tables"]
    assert all(address.startswith("data:image/") for address in page.loaded) and page.loaded
    assert {"75.00 ± 7.07 (n=2)", "top-1 80.00 ± 0.40 %", "recipe.name"} <= set(page.cells)
    assert page.cells[page.cells.index("recipe.name") + 1 :][:2] == ["a", "b"]
    loss = next(source for alt, source in page.images.items() if alt.startswith("loss over"))
    assert Image.open(io.BytesIO(base64.b64decode(loss.partition(",")[2]))).size == (750, 510)
    drawn = next(source for alt, source in page.images.items() if alt.endswith("images/attention.png"))
    shown = Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2])))
    assert shown.width == MAX_WIDTH and abs(shown.getpixel((0, 0))[0] - 200) < 5  # type: ignore[index]


def test_only_settings_of_the_own_stage_that_differ_are_shown(tmp_path: Path) -> None:
    for name, epochs in (("a", 3), ("b", 4)):
        stages = {"finetune": {"epochs": epochs, "flip": 0.5}, "pretrain": {"epochs": 10 * epochs}}
        write_stage(
            tmp_path / name / "finetune", {"seed": 0, "stages": stages, "extra": {"k": 1} if epochs > 3 else {}}
        )
    differences = differing_settings(collect_stages([tmp_path]))
    assert differences == {"recipe.stages.finetune.epochs": ["3", "4"], "recipe.extra.k": ["", "1"]}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_teachers_are_settings_of_the_stages_that_have_one(stage: str, tmp_path: Path) -> None:
    teacher = TeacherInfo(kind="clip", source="ViT-B-16", sha256=None)
    teachers = {"clip": teacher} if stage == "pretrain" else {}
    write_stage(tmp_path / "a" / stage, {"teachers": {"clip": {"kind": "clip"}}}, stage=stage, teachers=teachers)
    (found,) = collect_stages([tmp_path])
    assert found.settings.get("recipe.teachers.clip.kind") == ("clip" if stage == "pretrain" else None)


def test_a_pretraining_has_its_last_loss_as_result(tmp_path: Path) -> None:
    record = make_record(stage="pretrain", top1=None)
    record.results = Results(images_per_s=5.0, last_loss=0.25)
    assert describe_results(record) == "loss 0.2500"


def test_on_a_phone_each_differing_value_names_its_stage(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_stage(tmp_path / name / "finetune", {"name": name})
    text = write_report([tmp_path]).read_text()
    row = next(line for line in text.splitlines() if "recipe.<wbr>name" in line)
    assert re.findall(r'data-label="([^"]*)">([^<]*)<', row) == [("a/finetune", "a"), ("b/finetune", "b")]


def test_stages_are_ordered_as_they_build_on_each_other(tmp_path: Path) -> None:
    for stage in ("evaluate", "finetune", "pretrain"):
        top1 = None if stage == "pretrain" else 80.0
        write_stage(tmp_path / "a" / stage, stage=stage, top1=top1)
    assert [stage.record.stage for stage in collect_stages([tmp_path])] == ["pretrain", "finetune", "evaluate"]


def test_cells_name_the_papers_number_and_the_runs(tmp_path: Path) -> None:
    write_stage(tmp_path / "a/finetune", size="Huge", top1=88.0)
    cell = next(cell for cell in filled_cells(collect_stages([tmp_path])) if cell.table == "Table\N{NO-BREAK SPACE}6")
    assert (cell.column, cell.ours, cell.runs) == ("Huge", "88.00", "a/finetune")
    assert cell.paper == "88.0 (MR-MAE, paper (200 ep, ImageNet-1K))"


def test_names_of_users_are_escaped(tmp_path: Path) -> None:
    write_stage(tmp_path / "a/finetune", {"name": "<script>alert(1)</script>"}, name="<b>&</b>")
    write_stage(tmp_path / "b/finetune", {"name": "plain"})
    text = write_report([tmp_path], tmp_path / "out.html").read_text()
    assert "<script" not in text and "<b>" not in text and "&lt;b&gt;&amp;&lt;/b&gt;" in text


def test_a_run_without_logs_or_result_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "a/pretrain"
    folder.mkdir(parents=True)
    record = make_record(stage="pretrain", status="failed", top1=None)
    record.write(folder)
    page = Page(write_report([tmp_path]).read_text())
    assert "failed" in page.cells and not page.images and describe_results(record) == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "metrics.jsonl").write_text("{\n{}\n"), "metrics.jsonl"),
        (lambda folder: (folder / RECIPE_FILE).write_text("a: [\n"), "recipe.yaml: unreadable"),
        (lambda folder: (folder / "engine.json").write_text("["), "engine.json: unreadable"),
        (lambda folder: (folder / "engine.json").write_text("[1]"), "engine.json: unreadable"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(write_stage(tmp_path / "a/finetune"))
    with pytest.raises(UserError, match=re.escape(message)):
        write_report([tmp_path])


def test_a_damaged_image_and_wrong_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        write_report([tmp_path])
    folder = write_stage(tmp_path / "a/finetune")
    with pytest.raises(UserError, match="is a folder; --out names the HTML file"):
        write_report([tmp_path], folder)
    (folder / "images").mkdir()
    (folder / "images/attention.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"attention\.png: not a readable image"):
        write_report([tmp_path])
