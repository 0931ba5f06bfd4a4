"""The constants that ``mrmae doctor`` measured: written, read, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.profiling.measured_node import FORMAT, MEASURED_KEY, MeasuredNode, read_measured


def test_reads_what_was_written(tmp_path: Path) -> None:
    measured = MeasuredNode(device="NVIDIA H200", op_us=5.5, memory_gb_s=4000, zero3_param_us=0)
    path = tmp_path / "doctor.json"
    path.write_text(json.dumps({"format": FORMAT, "versions": {"torch": "2"}, MEASURED_KEY: measured.known()}))
    assert read_measured(path) == measured
    assert measured.known() == {"device": "NVIDIA H200", "op_us": 5.5, "memory_gb_s": 4000, "zero3_param_us": 0}


def _report(measured: str, *checks: dict[str, str]) -> str:
    return f'{{"format": {FORMAT}, "checks": {json.dumps(checks)}, "measured": {measured}}}'


def test_a_failed_check_and_those_that_were_not_run_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, failed = tmp_path / "doctor.json", {"name": "host", "status": "failed", "message": "RuntimeError: broken"}
    content = json.loads(_report('{"device": "x", "op_us": 1}', failed)) | {"not_run": ["links", "resume"]}
    path.write_text(json.dumps(content))
    assert read_measured(path).op_us == 1
    first, second = caplog.messages
    assert first.endswith("failed there, the check host: RuntimeError: broken") and "links, resume" in second


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"No such file.*mrmae doctor"),
        ("{", r"not a doctor's JSON file"),
        ("[]", r"not a doctor's JSON file"),
        ("{}", r"not a doctor's JSON file"),
        ('{"measured": {"device": "x", "op_us": 1}}', r"format null, expected 1"),
        ('{"format": 99, "measured": {"device": "x", "op_us": 1}}', r"format 99, expected 1"),
        (_report("null"), r"section 'measured' must be an object, got null"),
        (_report("{}"), r"names no device"),
        (_report('{"op_us": 1}'), r"names no device"),
        (_report('{"device": "x"}'), r"has no constant"),
        (_report('{"op_ms": 1}'), r"op_ms: Extra inputs"),
        (_report('{"op_us": 0}'), r"op_us: .*greater than 0"),
        (_report('{"op_us": NaN}'), r"op_us: .*"),
        (_report('{"op_us": "7"}'), r"op_us: .*valid number"),
        (_report('{"operator_gb_s": {"gelu": true}}'), r"operator_gb_s.gelu: .*valid number"),
        (
            _report('{"device": "x", "op_us": 1}', {"name": "parity", "status": "stop", "message": "loss: 0.5"}),
            r"stopped by the check parity: loss: 0.5\.",
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "doctor.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"doctor.json: .*{message}"):
        read_measured(path)
