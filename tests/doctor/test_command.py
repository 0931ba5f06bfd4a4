"""``mrmae doctor`` as a launcher starts it: two ranks, planted faults, the stand-in GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.profiling.measured_node import read_measured
from tests.support.fake_gpu.preload import missing_requirement
from tests.support.processes import REPOSITORY, Finished, environment, finish, free_port, run

PROGRAM = "tests/support/doctor_program.py"
LIMIT_S = 240


def _options(folder: Path, names: Sequence[str]) -> list[str]:
    return ["--out", str(folder / "doctor.json"), *(word for name in names for word in ("--only", name))]


def _torchrun(folder: Path, *names: str) -> Finished:
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), PROGRAM]
    return run([*command, *_options(folder, names)], LIMIT_S)


def _with_fault(fault: str, folder: Path, *names: str) -> Finished:
    return run([sys.executable, PROGRAM, "--fault", fault, *_options(folder, names)], LIMIT_S)


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    written = json.loads((folder / "doctor.json").read_text())
    return {check["name"]: {row["name"]: row for row in check["rows"]} for check in written["checks"]}


@pytest.mark.multi_process
def test_two_ranks_agree_and_rank_0_reports(tmp_path: Path) -> None:
    done = _torchrun(tmp_path, "binding", "links")
    assert done.status == 0, done.stderr[-3000:]
    rows = _rows(tmp_path)
    assert list(rows) == ["binding", "start", "links"] and done.stdout.count("written:") == 1
    assert rows["binding"]["LOCAL_RANK"]["value"] == "0; 1"
    reduced = rows["links"]["all-reduce 1 MB within a node"]
    assert 0 < reduced["min"] <= reduced["value"] <= reduced["max"]
    assert read_measured(tmp_path / "doctor.json").collective_us is not None
    assert list(tmp_path.iterdir()) == [tmp_path / "doctor.json"]


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_ranks_with_one_device_exit_with_status_1(tmp_path: Path) -> None:
    port, options = str(free_port()), _options(tmp_path, ["binding", "parity"])
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, *options],
            cwd=REPOSITORY,
            env=environment(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    ended = finish(processes, LIMIT_S)
    assert [process.status for process in ended] == [1, 1], ended[0].stderr[-3000:]
    assert (
        "binding: stop, rank 0: ranks 0, 1 share LOCAL_RANK 0" in ended[0].stdout and "parity:" not in ended[0].stdout
    )


@pytest.mark.multi_process
def test_wrong_gradients_exit_with_status_1(tmp_path: Path) -> None:
    done = run(
        [sys.executable, PROGRAM, "--fault", "wrong gradients", *_options(tmp_path, ["parity", "resume"])], LIMIT_S
    )
    assert done.status == 1, done.stderr[-3000:]
    assert "parity: stop, gradients, largest relative difference: 0.00100, expected at most 1.0e-04" in done.stdout
    assert done.stdout.endswith("failed: parity\nnot run: resume\n")


@pytest.mark.multi_process
def test_a_check_over_its_limit_is_reported_with_stacks(tmp_path: Path) -> None:
    done = _with_fault("hang", tmp_path, "launch", "parity")
    assert done.status == 1
    assert "launch: stop, over its limit of 2 s on rank 0" in done.stdout and "--skip 'launch'" in done.stdout
    assert "in check" in done.stderr and done.stdout.endswith("failed: launch\nnot run: parity\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "doctor.json"]


@pytest.mark.slow
@pytest.mark.multi_process
def test_an_unknown_check_is_bad_input(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "mrmae_ds", "doctor", *_options(tmp_path, ["speed"])], LIMIT_S)
    assert done.status == 2 and done.stderr.splitlines()[-1].startswith("error: --only speed: no such check")


def _stand_in(folder: Path, *names: str) -> Finished:
    if reason := missing_requirement():
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.support.fake_gpu", PROGRAM, "--no-judge", *_options(folder, names)]
    return run(command, 2 * LIMIT_S, {**environment(), "DS_ACCELERATOR": "cuda"})


@pytest.mark.multi_process
def test_the_host_waits_once_a_step_on_the_stand_in_gpu(tmp_path: Path) -> None:
    """The device's kernels do nothing, but waits, devices and dtypes are a GPU's."""
    done = _stand_in(tmp_path, "driver", "binding", "launch", "waits")
    assert done.status == 0, done.stderr[-3000:]
    rows = _rows(tmp_path)
    assert rows["binding"]["device"]["value"].startswith("cuda:0")
    assert rows["launch"]["empty kernel"]["verdict"] == ""
    waits = rows["waits"]["waits per step"]
    assert waits["max"] == waits["expected"]["high"], rows["waits"]["places"]["value"]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    "names",
    [
        ("bandwidth", "products", "convolution", "parity", "host"),
        ("engines",),
        ("placements",),
        ("attention", "resume"),
    ],
    ids=" ".join,
)
def test_checks_run_on_the_stand_in_gpu(tmp_path: Path, names: tuple[str, ...]) -> None:
    done = _stand_in(tmp_path, *names)
    assert done.status == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert {check["name"]: check["status"] for check in written["checks"]} == dict.fromkeys(("start", *names), "done")


@pytest.mark.slow
@pytest.mark.multi_process
def test_everything_that_a_cpu_has_is_as_expected_on_two_ranks(tmp_path: Path) -> None:
    names = ("engines", "placements", "host", "steps", "loader", "resume")
    done = _torchrun(tmp_path, *names)
    assert done.status == 0, done.stderr[-3000:]
    rows = _rows(tmp_path)
    verdicts = {(check, name): row["verdict"] for check in names for name, row in rows[check].items()}
    assert {where: verdict for where, verdict in verdicts.items() if verdict.startswith("OUTSIDE")} == {}
    assert len(rows["engines"]) == 8 and len(rows["steps"]) == 13
