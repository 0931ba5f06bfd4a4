"""Selection, order and errors of checks."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.doctor import run
from mrmae_ds.doctor.checks import CHECKS, START
from mrmae_ds.doctor.context import Check, DoctorContext, DoctorRequest
from mrmae_ds.doctor.reading import HardFailure, NotApplicable, Reading
from mrmae_ds.doctor.run import run_doctor, select_checks
from mrmae_ds.errors import UserError
from mrmae_ds.profiling.measured_node import MeasuredNode

ALONE = Launch(0, 0, 1, 1)


def _names(**settings: Any) -> list[str]:
    return [check.name for check in select_checks(DoctorRequest(**settings))]


def test_all_checks_run_in_order_by_default() -> None:
    assert _names() == [check.name for check in CHECKS] and len(set(_names())) == len(CHECKS)


def test_the_15_minute_order() -> None:
    assert _names(quick=True) == ["driver", "binding", "start", "launch", "parity", "steps", "links"]


def test_only_and_skip_select_and_the_process_group_starts_where_it_is_needed() -> None:
    assert _names(only=("parity", "driver")) == ["driver", "start", "parity"]
    assert _names(only=("driver", "limits")) == ["driver", "limits"]
    assert _names(only=("host",), quick=True) == ["start", "host"]
    assert set(_names()) - set(_names(skip=("steps", "memory"))) == {"steps", "memory"}


@pytest.mark.parametrize("option", ["only", "skip"])
def test_an_unknown_check_is_named_with_the_known_ones(option: str) -> None:
    with pytest.raises(UserError, match=f"--{option} speed: no such check; there are driver, imports"):
        _names(**{option: ("speed",)})


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(UserError, match="--skip driver: no check is left to run"):
        _names(only=("driver",), skip=("driver",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ds_config": Path("none.json")}, r"none\.json: no such file"),
        ({"ds_config": Path("ds_configs/tiny.yaml")}, r"tiny\.yaml: a YAML file, and an engine config is JSON"),
        ({"ds_config": Path("ds_configs/tiny.json"), "recipe": Path("none.yaml")}, r"none\.yaml: no such file"),
        ({"ds_config": Path("ds_configs/huge448.json")}, r"huge448.* has no stage pretrain"),
        ({"recipe": Path("ds_configs/tiny.yaml")}, r"--recipe ds_configs/tiny\.yaml: is used with an engine config"),
    ],
)
def test_wrong_configs_are_refused_whatever_checks_run(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_doctor(DoctorRequest(only=("limits",), out=tmp_path / "doctor.json", **given), ALONE)
    assert not list(tmp_path.iterdir())


def test_every_constant_of_the_plan_exists() -> None:
    """A misspelled constant would raise only after the hour."""
    source = "".join(path.read_text() for path in Path(run.__file__).parent.glob("*.py"))
    found = set(re.findall(r'"(\w+_(?:us|tflops|gb_s|cores|core))"', source))
    assert {"launch_us", "memory_gb_s", "loader_cores"} < found <= set(MeasuredNode.model_fields)


def _check(name: str, error: Exception | None = None) -> Check:
    def check(context: Any) -> list[Reading]:
        if error:
            raise error
        return [Reading("value", 1.0)]

    return Check(name, check, "a key", 30.0)


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, *checks: Check) -> int:
    monkeypatch.setattr(run, "CHECKS", (*checks, START))
    monkeypatch.setattr(run, "select_checks", lambda request: list(checks))
    return run_doctor(DoctorRequest(out=folder / "doctor.json"), ALONE)


def test_an_error_and_a_missing_device_do_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [_check("a", RuntimeError("broken")), _check("b", NotApplicable("needs CUDA")), _check("c")]
    assert _run(monkeypatch, tmp_path, *checks) == 1
    out = capsys.readouterr().out
    assert out.endswith("doctor.json\nfailed: a\n")
    assert "a: failed, RuntimeError: broken" in out and "b: not applicable, needs CUDA" in out and "c: done" in out


def test_a_hard_failure_ends_the_run_with_a_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, tmp_path, _check("a", HardFailure("no GPU")), _check("b")) == 1
    out = capsys.readouterr().out
    assert "a: stop, no GPU" in out and "b:" not in out and (tmp_path / "doctor.json").is_file()


def test_only_files_of_the_doctor_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also in folders that are named like its own."""
    for name in ("doctor-files", "doctor-files-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("x")
    before, seen = sorted(tmp_path.rglob("*")), list[Path]()

    def write(context: DoctorContext) -> list[Reading]:
        (context.folder / "written").touch()
        seen.extend(tmp_path.rglob("written"))
        return []

    assert _run(monkeypatch, tmp_path, Check("a", write, "a key", 30.0)) == 0
    assert len(seen) == 1 and sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "doctor.json"])


def test_a_report_that_cannot_be_written_is_refused_before_the_first_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "doctor.json").mkdir()
    with pytest.raises(UserError, match=r"^--out .*doctor.json: is a folder; name a file$"):
        _run(monkeypatch, tmp_path, _check("a"))
    with pytest.raises(UserError, match=r"^--out /proc/none: cannot be made"):
        _run(monkeypatch, Path("/proc/none"), _check("a"))
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [tmp_path / "doctor.json"]


def test_a_slow_check_on_one_cpu_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(context: DoctorContext) -> list[Reading]:
        with suppress(Exception):
            time.sleep(60)
        return []

    assert _run(monkeypatch, tmp_path, Check("slow", wait, "a key", 0.2), _check("b")) == 1
    out = capsys.readouterr().out
    assert "slow: over its limit of 0.2 s" in out and "b: done" in out and out.endswith("failed: slow\n")


def test_ctrl_c_leaves_the_report_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(context: DoctorContext) -> list[Reading]:
        (context.folder / "kept").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(monkeypatch, tmp_path, _check("a"), Check("b", interrupt, "a key", 30.0), _check("c"))
    assert capsys.readouterr().out.endswith("not run: b, c\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "doctor.json"]
    assert [check["name"] for check in json.loads((tmp_path / "doctor.json").read_text())["checks"]] == ["a"]
