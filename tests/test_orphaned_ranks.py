"""Ranks that lose their launcher or their terminal save, stop and release the run."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.errors import StopRequested
from tests.support.chaos import newest_complete_step
from tests.support.processes import environment, free_port, run
from tests.support.small_runs import SmallRuns

pytestmark = [pytest.mark.timeout(600), pytest.mark.multi_process]
LIMIT_S = 240
LAUNCHERS = {
    "deepspeed": ("deepspeed", "--num_gpus", "2"),
    "torchrun": ("torchrun", "--nproc_per_node", "2", "--"),  # the job's store ends with it
}
LONG = ("stages.pretrain.epochs=3000", "checkpoint.every_steps=100000")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    return SmallRuns(tmp_path_factory.mktemp("orphans"))


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ranks_whose_launcher_was_killed_save_and_stop(launcher: str, runs: SmallRuns) -> None:
    """Until they have, the run is theirs: the same command is refused. Then it resumes."""
    name, log = f"killed {launcher}", runs.folder / f"{launcher}.log"
    program, *options = LAUNCHERS[launcher]
    command = [program, "--master_port", str(free_port()), *options, "train.py"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *map(str, runs.arguments(name, *LONG))],
            env=environment(), stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    lock = runs.folder / name / ".pretrain.lock"
    try:
        _wait_until(lambda: (runs.stage(name) / "metrics.jsonl").exists(), log)
        assert lock.exists()
        if launcher == "deepspeed":
            second = run([sys.executable, "train.py", *runs.arguments(name, *LONG)], LIMIT_S)
            assert second.status == 2 and re.search(r"process \d+ on .* trains here", second.stderr), second
        process.kill()
        process.wait()
        # Rank 0 releases the lock before it prints why it stops.
        _wait_until(lambda: not lock.exists() and "stopped by SIGTERM after step" in log.read_text(), log)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the session's other processes
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text(errors="replace")
    assert "has ended without ending its ranks" in text, text
    assert _record(runs, name)["status"] == "stopped"
    assert newest_complete_step(runs.stage(name)) == _record(runs, name)["schedule"]["steps_done"] > 0


def _wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)


def test_a_closed_terminal_saves_and_stops(runs: SmallRuns) -> None:
    """SIGHUP comes with a terminal on which nothing can be written any longer."""
    terminal, slave = pty.openpty()
    command = [sys.executable, "train.py", *map(str, runs.arguments("hung up", *LONG))]
    process = subprocess.Popen(
        ["setsid", "--ctty", *command], env=environment(), stdin=slave, stdout=slave, stderr=slave
    )  # the terminal's session leader, as a shell's job is after `exec`
    os.close(slave)
    try:
        with contextlib.suppress(OSError):  # a terminal's output must be read
            while not (runs.stage("hung up") / "metrics.jsonl").exists() and os.read(terminal, 4096):
                continue
        os.close(terminal)
        assert process.wait(LIMIT_S) == StopRequested.exit_status
    finally:
        process.kill()
    assert _record(runs, "hung up")["status"] == "stopped"
    assert newest_complete_step(runs.stage("hung up")) > 0


def _record(runs: SmallRuns, name: str) -> dict[str, Any]:
    return json.loads((runs.stage(name) / "record.json").read_text())
