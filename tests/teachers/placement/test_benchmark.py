"""benchmarks/teacher_placement.py: summary of its measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import teacher_placement


def _round(seconds: float, peak: int = 3_000_000, total: float = 1.5) -> dict[str, Any]:
    sizes = {"weights": 3_000_000, "between": 0, "peak": peak}
    return {**sizes, "seconds": seconds, "cpu_seconds": 2 * seconds, "sum": total}


def test_ratios_are_within_a_round_and_their_median_counts() -> None:
    rounds = {"device": [_round(s) for s in (1.0, 10.0, 2.0)], "step": [_round(s) for s in (3.0, 10.0, 4.0)]}
    rows = teacher_placement.summary(rounds)
    assert rows["device"]["ratio"] == [1.0, 1.0, 1.0]
    assert rows["step"]["ratio"] == rows["step"]["cpu_ratio"] == [2.0, 1.0, 3.0]
    assert rows["step"]["seconds"] == 4.0


def test_other_targets_are_an_error_and_not_a_time() -> None:
    with pytest.raises(RuntimeError, match="step: targets differ"):
        teacher_placement.summary({"device": [_round(1.0)], "step": [_round(1.0, total=1.5000001)]})


def test_keeps_rows_of_other_teachers_and_writes_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "placement.json"
    args = argparse.Namespace(out=out, dino=Path("/home/me/dino.safetensors"), accelerator="cpu")
    monkeypatch.setattr("sys.argv", ["teacher_placement.py", "--dino", str(args.dino), "--out", str(out)])

    def write(*rows: tuple[str, int]) -> list[tuple[str, int]]:
        content = [{"teacher": teacher, "processes": processes} for teacher, processes in rows]
        teacher_placement.write(args, content, {}, {})
        return [(row["teacher"], row["processes"]) for row in json.loads(out.read_text())["rows"]]

    assert write(("dino", 1), ("dino", 1)) == [("dino", 1)] * 2
    assert write(("clip", 1), ("dino", 2)) == [("dino", 1), ("dino", 1), ("clip", 1), ("dino", 2)]
    assert write(("dino", 1)) == [("clip", 1), ("dino", 2), ("dino", 1)]
    assert "/home/me" not in out.read_text() and "--dino FILE" in out.read_text()
    assert teacher_placement.ON_CPU in out.read_text()
