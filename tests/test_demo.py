"""Run `make demo`, every command of the README, on a small folder of images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrmae_ds.records.record import find_records
from tests.support.processes import REPOSITORY, run
from tests.support.sample_data import sample_sets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1900), pytest.mark.multi_process]


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """Ten classes of real images, SRC/CLASS/*.png; the demo's output for them is removed afterwards."""
    source = tmp_path / f"images_{tmp_path.name}"
    for index, (image, label) in enumerate(sample_sets(200, 10)[0]):  # type: ignore[arg-type]
        folder = source / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    yield source
    for folder in ("runs", "datasets"):
        shutil.rmtree(REPOSITORY / folder / f"demo_{source.name}", ignore_errors=True)


def test_demo_on_a_folder(tree: Path) -> None:
    result = run(["make", "demo", f"DATA={tree}"], 1800)
    assert result.status == 0, result.stdout + result.stderr
    runs = REPOSITORY / "runs" / f"demo_{tree.name}"
    stages = {(record.name, record.stage): record.status for _, record in find_records([runs])}
    assert len(stages) == 7 and set(stages.values()) == {"finished"}
    rows = [line for line in (runs / "table.md").read_text().splitlines() if f", {tree.name}, chance" in line]
    assert len(rows) == 4 and all("**" in row for row in rows)
    assert f"{runs.relative_to(REPOSITORY)}/tiny/pretrain/images/" in result.stdout
    assert f"{runs.relative_to(REPOSITORY)}/report.html" in result.stdout
    assert (runs / "report.html").read_text().count("<img") > 10
