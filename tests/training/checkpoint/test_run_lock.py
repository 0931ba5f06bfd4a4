"""One job at a time in a run's folder; what a dead job left behind stops nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import SoftFileLease

from mrmae_ds.errors import UserError
from mrmae_ds.training.checkpoint import run_lock
from mrmae_ds.training.checkpoint.run_lock import locked
from tests.support.processes import REPOSITORY

pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(120, method="thread")]
LEASE_S, RENEW_S = 60.0, 0.3  # what is found at once takes less than the lease, however slow the machine is
HOLD = f"""
import socket, sys, time
from pathlib import Path
from mrmae_ds.training.checkpoint import run_lock
run_lock.LEASE_S, run_lock.RENEW_S = float(sys.argv[3]), {RENEW_S}
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
with run_lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


class Holder:
    """A process that holds the lock of a stage, on this host or on one of another name."""

    def __init__(self, stage: Path, host: str = "", lease_s: float = LEASE_S) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(stage), host, str(lease_s)],
            cwd=REPOSITORY,
            env={**os.environ, "SLURM_JOB_ID": "4711"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_lock, "LEASE_S", LEASE_S)
    monkeypatch.setattr(run_lock, "RENEW_S", RENEW_S)
    return tmp_path / "runs" / "name" / "pretrain"


@pytest.fixture
def holder(stage: Path) -> Iterator[Holder]:
    held = Holder(stage)
    yield held
    held.kill()


def _seconds_to_take(stage: Path) -> float:
    began = time.monotonic()
    with locked(stage):
        return time.monotonic() - began


def test_a_second_job_is_refused_at_once_and_names_the_holder(stage: Path, holder: Holder) -> None:
    for _ in range(2):
        began = time.monotonic()
        named = rf"{stage}: process {holder.process.pid} on \S+ \(Slurm job 4711\), since 20.*trains here.*--run"
        with pytest.raises(UserError, match=named), locked(stage):
            raise AssertionError("both hold the lock")
        assert time.monotonic() - began < LEASE_S
    with locked(stage.with_name("finetune")):
        assert holder.process.poll() is None, "another stage is another lock"


def test_the_lock_of_a_killed_job_is_taken_over_at_once(stage: Path, holder: Holder) -> None:
    holder.kill()
    for _ in range(2):
        assert _seconds_to_take(stage) < LEASE_S


def test_a_job_that_lives_on_another_host_is_seen_by_its_renewals(stage: Path) -> None:
    held = Holder(stage, "node7")
    try:
        with pytest.raises(UserError, match=rf"process {held.process.pid} on node7"), locked(stage):
            raise AssertionError("both hold the lock")
    finally:
        held.kill()


def test_a_job_that_died_on_another_host_is_waited_for_and_then_replaced(
    stage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process cannot be seen from here; the same command resumes without help.

    Also if this process is stopped for long while it waits: a limit that passed meanwhile does not count.
    """
    lease_s, waited, acquire = 1.5, [], SoftFileLease.acquire

    def slowly(lock: SoftFileLease, **options: Any) -> Any:
        try:
            return acquire(lock, **options)
        finally:
            waited.append(lock)

    monkeypatch.setattr(run_lock, "LEASE_S", lease_s)
    monkeypatch.setattr(SoftFileLease, "acquire", slowly)
    Holder(stage, "node7", lease_s).kill()
    began = time.monotonic()
    monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=lambda: 1000.0 * len(waited)))
    with caplog.at_level("INFO"), locked(stage):
        assert time.monotonic() - began >= lease_s and len(waited) == 2
    assert "waiting for a sign of life of process" in caplog.text and "node7" in caplog.text


def test_a_job_whose_lock_was_taken_ends(stage: Path, holder: Holder) -> None:
    """As after it was suspended: it must not write into what another job has taken over."""
    (stage.parent / ".pretrain.lock").unlink()
    assert holder.process.wait(60) == 1
    assert holder.process.stderr is not None and "the lock of this run was lost" in holder.process.stderr.read()


def test_leaves_nothing_behind(stage: Path) -> None:
    with locked(stage):
        assert sorted(path.name for path in stage.parent.iterdir()) == [".pretrain.holder", ".pretrain.lock"]
    assert not stage.parents[1].exists(), "the folders were made for the lock alone"
    with pytest.raises(ZeroDivisionError), locked(stage):
        stage.mkdir()
        raise ZeroDivisionError
    assert [path.name for path in stage.parent.iterdir()] == ["pretrain"]


@pytest.mark.parametrize("where", ["/proc/x", "{file}", "{file}/below", "{long}"])
def test_a_folder_that_cannot_be_made_is_one_line(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Path(where.format(file=tmp_path / "file", long=tmp_path / ("n" * 300)))
    with pytest.raises(UserError, match=r"cannot be made \(.*\); name another folder"), locked(run / "x"):
        raise AssertionError
