"""The launcher of a process is found among its parents, and its end is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrmae_ds.distributed.processes import WatchedProcess, start_time
from tests.support.processes import REPOSITORY

pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(60, method="thread")]
# A process that starts the next one with the remaining arguments; the last one prints the launcher that it finds.
CHAIN = """
import subprocess, sys
from mrmae_ds.distributed.processes import find_launcher
if len(sys.argv) > 2:
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], *sys.argv[3:]])
else:
    print(*(process.pid for process in find_launcher()), flush=True)
"""


def _launcher_below(*names: str) -> tuple[int, list[int]]:
    """Start a chain of processes of these names; return the first one's id and what its last descendant finds."""
    # The name is an argument, as torchrun's and DeepSpeed's are.
    process = subprocess.Popen(
        [sys.executable, "-c", CHAIN, CHAIN, *names], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=30)
    return process.pid, [int(pid) for pid in output.split()]


@pytest.mark.parametrize("name", ["/usr/bin/torchrun", "torch.distributed.run"])
def test_finds_a_launcher_of_one_process(name: str) -> None:
    pid, found = _launcher_below(name)
    assert found == [pid]


def test_finds_both_processes_of_deepspeed() -> None:
    """``deepspeed`` is not recognized by its name: it is the parent of the inner launcher."""
    pid, found = _launcher_below("anything", "deepspeed.launcher.launch")
    assert len(found) == 2 and found[1] == pid != found[0]


@pytest.mark.parametrize("name", ["bash", "nohup", "slurmstepd", "my_torchrunner"])
def test_no_other_parent_is_a_launcher(name: str) -> None:
    """A shell may end by intention, and Slurm ends what it started."""
    assert _launcher_below(name)[1] == []


def test_an_ended_process_is_noticed_before_it_is_reaped() -> None:
    child = subprocess.Popen(["sleep", "60"])
    watched = WatchedProcess(child.pid, start_time(child.pid) or "")
    assert watched.start and not watched.ended()
    assert WatchedProcess(child.pid, "1").ended(), "another process of the same id"
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not watched.ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert Path(f"/proc/{child.pid}").exists()
    child.wait()
    assert watched.ended()
