"""The constants that ``mrmae doctor`` measured: written, read, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.profiling.measured_node import MEASURED_KEY, MeasuredNode, read_measured


def test_reads_what_was_written(tmp_path: Path) -> None:
    measured = MeasuredNode(device="NVIDIA H200", op_us=5.5, memory_gb_s=4000, zero3_param_us=0)
    path = tmp_path / "doctor.json"
    path.write_text(json.dumps({"versions": {"torch": "2"}, MEASURED_KEY: measured.known()}))
    assert read_measured(path) == measured
    assert measured.known() == {"device": "NVIDIA H200", "op_us": 5.5, "memory_gb_s": 4000, "zero3_param_us": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"No such file.*mrmae doctor"),
        ("{", r"not a doctor's JSON file"),
        ("[]", r"not a doctor's JSON file"),
        ("{}", r"not a doctor's JSON file"),
        ('{"measured": {"op_ms": 1}}', r"op_ms: Extra inputs"),
        ('{"measured": {"op_us": 0}}', r"op_us: .*greater than 0"),
        ('{"measured": {"op_us": NaN}}', r"op_us: .*"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "doctor.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"doctor.json: .*{message}"):
        read_measured(path)
