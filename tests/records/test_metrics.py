from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mrmae_ds.errors import UserError
from mrmae_ds.records.metrics import MetricsWriter, read_metrics


def _events(run: Path, tag: str) -> list[tuple[int, float]]:
    """Return a tag's points, read by TensorBoard."""
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_writes_a_line_and_an_event_per_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"loss": 0.5, "lr": 1e-4, "skipped": 2})
        # On disk before the writer is closed, so that a killed job keeps it.
        assert len(read_metrics(tmp_path)) == 1
        writer.write(20, {"loss": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 0.5, "lr": 1e-4, "skipped": 2}, {"step": 20, "loss": 0.25}]
    assert read_metrics(tmp_path) == lines
    assert _events(tmp_path, "loss") == [(10, 0.5), (20, 0.25)]


def test_nonfinite_values_are_null_and_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=pytest.fail)
    assert line == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
        "nonfinite": {"loss": "nan", "grad_norm": "inf"},
    }


def test_resuming_purges_superseded_steps(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": float(step)})
    with MetricsWriter(tmp_path, resume_step=4) as writer:
        for step in range(5, 9):
            writer.write(step, {"loss": step + 0.5})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5), (7, 7.5), (8, 8.5)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == expected
    assert _events(tmp_path, "loss") == expected


def test_resuming_drops_a_truncated_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 3.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}]


def test_a_new_run_drops_the_old_log(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, {"loss": 5.0})
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert _events(tmp_path, "loss") == [(1, 1.0)]


def test_rejects_a_step_out_of_order(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 5 is logged after step 5"):
            writer.write(5, {"top1": 1.0})
        with pytest.raises(ValueError, match="reserved"):
            writer.write(6, {"step": 1})


def test_names_a_broken_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="nothing"):
        read_metrics(tmp_path / "nothing")


def test_no_host_name_in_the_run_folder(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    host = socket.gethostname()
    for path in (tmp_path / "tensorboard").iterdir():
        assert host not in path.name
        assert host.encode() not in path.read_bytes()
