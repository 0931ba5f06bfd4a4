"""Verdicts over ranks, doctor.json and the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.doctor.context import Check, DoctorContext, DoctorRequest
from mrmae_ds.doctor.ranks import RankStore
from mrmae_ds.doctor.reading import Expected, NotApplicable, Reading
from mrmae_ds.doctor.report import CheckResult, DoctorReport, page, summarize
from mrmae_ds.errors import UserError
from mrmae_ds.profiling.measured_node import MeasuredNode, read_measured
from mrmae_ds.records.environment import cpu_name

SPEED = Expected(low=10.0, high=20.0, source="data sheet")


def _no_check(context: DoctorContext) -> list[Reading]:
    raise NotApplicable("never run")


CHECK = Check("speed", _no_check, "a key", 5.0)


def _rank(*readings: Reading, status: str = "done", message: str = "") -> dict[str, Any]:
    return {"status": status, "message": message, "readings": [asdict(reading) for reading in readings]}


def _summary(*ranks: Any, judge: bool = True) -> CheckResult:
    # As they arrive through the store.
    return summarize(CHECK, json.loads(json.dumps(ranks)), 1.0, judge)


def _context(folder: Path) -> DoctorContext:
    launch = Launch(0, 0, 1, 1)
    request = DoctorRequest(out=folder / "doctor.json")
    return DoctorContext(request, launch, torch.device("cpu"), None, RankStore(launch), folder)


def test_a_row_has_the_median_and_the_ends_and_names_the_ranks_outside() -> None:
    result = _summary(*(_rank(Reading("copy", value, "GB/s", SPEED)) for value in (12.0, 30.0, 9.0, 14.0)))
    (row,) = result.rows
    assert (row.value, row.low, row.high) == (13.0, 9.0, 30.0)
    assert row.verdict == "OUTSIDE on rank 1, 2" and result.status == "done"
    assert "copy: 13.0 GB/s (9.00 to 30.0); expected at least 10.0 and at most 20.0: OUTSIDE on rank 1, 2" in page(
        [result]
    )


@pytest.mark.parametrize(
    ("value", "verdict"), [(10.0, "as expected"), (20.0, "as expected"), (9.99, "OUTSIDE on rank 0")]
)
def test_bounds_are_inside(value: float, verdict: str) -> None:
    assert _summary(_rank(Reading("copy", value, "", SPEED))).rows[0].verdict == verdict


def test_nan_is_outside_and_the_file_stays_json(tmp_path: Path) -> None:
    result = _summary(_rank(Reading("copy", float("nan"), "GB/s", SPEED, "memory_gb_s")))
    assert result.rows[0].verdict == "OUTSIDE on rank 0"
    report = DoctorReport(_context(tmp_path), ["speed"])
    report.add(result)
    report.finish()
    written = json.loads((tmp_path / "doctor.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written["checks"][0]["rows"][0]["value"] == "nan" and written["measured"] == {"device": cpu_name()}


def test_without_an_expectation_there_is_no_verdict() -> None:
    assert _summary(_rank(Reading("copy", 1.0))).rows[0].verdict == ""


def test_values_are_not_judged_if_they_mean_nothing() -> None:
    hard = Expected(high=1.0, hard=True)
    result = _summary(_rank(Reading("loss", 5.0, "", hard)), judge=False)
    assert result.rows[0].verdict == "not judged" and result.status == "done"


def test_a_hard_value_outside_stops_with_value_and_range() -> None:
    result = _summary(_rank(Reading("loss", 0.5, "", Expected(high=1e-5, hard=True))))
    assert result.status == "stop" and result.message == "loss: 0.500, expected at most 1.0e-05"


def test_one_failed_rank_fails_the_check_and_is_named() -> None:
    result = _summary(_rank(), _rank(status="failed", message="RuntimeError: broken"), _rank())
    assert (result.status, result.message) == ("failed", "rank 1: RuntimeError: broken")


def test_a_rank_that_does_not_answer_stops() -> None:
    result = _summary(_rank(), None, None)
    assert (result.status, result.message) == ("stop", "no answer from rank 1, 2")


def test_different_texts_are_listed() -> None:
    readings = [Reading("driver", "580.1"), Reading("driver", "570.2"), Reading("driver", "580.1")]
    (row,) = _summary(*map(_rank, readings)).rows
    assert row.value == "580.1; 570.2" and row.verdict == ""


def test_the_plan_reads_the_medians_of_the_constants(tmp_path: Path) -> None:
    report = DoctorReport(_context(tmp_path), ["speed"])
    zero = Reading("x", 0.0, "", None, "op_us")  # not measured: it must be above 0
    gelu = Reading("gelu", 900.0, "GB/s", None, "operator_gb_s.gelu")
    ranks = [
        _rank(
            Reading("empty kernel", value, "us", None, "launch_us"),
            Reading("cores", int(value) + 4, "", None, "loader_cores"),
            zero,
            gelu,
        )
        for value in (2.0, 3.0)
    ]
    report.add(_summary(*ranks))
    report.finish()
    assert read_measured(tmp_path / "doctor.json") == MeasuredNode(
        device=cpu_name(), launch_us=2.5, loader_cores=6.5, operator_gb_s={"gelu": 900.0}
    )
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["versions"]["torch"] == torch.__version__ and written["host"] and written["world_size"] == 1


def test_every_result_is_in_the_file_and_the_page_does_not_depend_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = DoctorReport(_context(tmp_path), ["speed", "links"])
    report.add(_summary(_rank(Reading("copy", 12.0, "GB/s"))))
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert [check["name"] for check in written["checks"]] == ["speed"] and written["not_run"] == ["links"]
    (tmp_path / "doctor.json").unlink()
    (tmp_path / "doctor.json").mkdir()  # as a full disk
    report.add(_summary(_rank(Reading("copy", 13.0, "GB/s"))))
    with pytest.raises(UserError, match=r"^--out .*doctor.json: cannot be written \(Is a directory\)$"):
        report.finish()
    assert "copy: 13.0 GB/s" in capsys.readouterr().out
