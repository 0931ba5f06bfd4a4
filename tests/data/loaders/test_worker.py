"""Processes that prepare images: they outlive a signal to stop, and not the process that began them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrmae_ds.data.loaders.worker import STOP_SIGNALS, become_worker
from tests.support.processes import REPOSITORY


def _gone(pid: int) -> bool:
    """Ended, or ended and not yet asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _wait_for_gone(pid: int, limit_s: float = 10) -> bool:
    deadline = time.monotonic() + limit_s
    while not _gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return _gone(pid)


def _fork_worker() -> tuple[int, int]:
    """A worker that waits, and a pipe that it has written to when it is one."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        become_worker()
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    os.close(told)
    return pid, ready


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_stop_does_not_end_it(number: int) -> None:
    pid, ready = _fork_worker()
    try:
        assert os.read(ready, 1) == b"x"
        os.kill(pid, number)
        time.sleep(0.2)
        assert not _gone(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)


def test_it_ends_with_the_process_that_began_it() -> None:
    """Killed without a chance to tell."""
    told, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        pid, ready = _fork_worker()
        os.read(ready, 1)
        os.write(tell, str(pid).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(told, 20))
    assert not _gone(worker)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert _wait_for_gone(worker)
    os.close(told)
    os.close(tell)


_TRAINING = """
import os, sys, time
from pathlib import Path
from tests.data.loaders.test_augment import _loader

if __name__ == "__main__":
    loader = _loader(Path(sys.argv[1]), num_workers=4)
    next(loader.epoch(0))
    print(*loader._pool._processes, flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(300, method="thread")
def test_augmentation_ends_with_its_training_process(betons: tuple[Path, Path], tmp_path: Path) -> None:
    """Its processes are children of a fork server, which would live on with them."""
    script = tmp_path / "training.py"
    script.write_text(_TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NUMBA_NUM_THREADS": "4"}
    training = subprocess.Popen(
        [sys.executable, str(script), str(betons[0])], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert training.stdout is not None
        workers = [int(pid) for pid in training.stdout.readline().split()]
        assert len(workers) == 2 and not any(_gone(pid) for pid in workers)
    finally:
        training.kill()
        training.wait()
    assert all(_wait_for_gone(pid) for pid in workers)
