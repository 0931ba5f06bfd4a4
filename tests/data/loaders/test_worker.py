"""Data-loading workers ignore stop signals and end with their parent; their shared memory is checked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrmae_ds.data.loaders.worker import STOP_SIGNALS, become_worker, check_shared_memory
from mrmae_ds.errors import UserError
from tests.support.processes import REPOSITORY


def _has_ended(pid: int) -> bool:
    """Return True if a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _wait_for_end(pid: int, limit_s: float = 60) -> bool:
    deadline = time.monotonic() + limit_s
    while not _has_ended(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return _has_ended(pid)


def _fork_worker() -> tuple[int, int]:
    """Fork a waiting worker; return it and a pipe that it writes to after its set-up."""
    ready, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        become_worker()
        os.write(ready_write, b"x")
        time.sleep(60)
        os._exit(0)
    os.close(ready_write)
    return pid, ready


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_worker_ignores_stop_signals(number: int) -> None:
    pid, ready = _fork_worker()
    try:
        assert os.read(ready, 1) == b"x"
        os.kill(pid, number)
        time.sleep(0.2)
        assert not _has_ended(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)


def test_worker_ends_with_its_parent() -> None:
    """Kill the parent, which cannot notify the worker."""
    read_end, write_end = os.pipe()
    parent = os.fork()
    if parent == 0:
        pid, ready = _fork_worker()
        os.read(ready, 1)
        os.write(write_end, str(pid).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(read_end, 20))
    assert not _has_ended(worker)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert _wait_for_end(worker)
    os.close(read_end)
    os.close(write_end)


def _start(code: str, beton: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a training process, the first of a session of its own."""
    (folder / "training.py").write_text(code)
    (folder / "imported.py").write_text("open('imports', 'a').write('x')")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NUMBA_NUM_THREADS": "4"}
    command = [sys.executable, "-m", "training", str(beton)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder, start_new_session=True
    )


_IMPORTS = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from mrmae_ds.data.loaders.worker import STOP_SIGNALS
from tests.data.loaders.test_rand_augment import _loader
"""
_TRAINING = f"""
{_IMPORTS}
import imported
if __name__ == "__main__":
    loader = _loader(Path(sys.argv[1]), "pillow")
    list(loader.epoch(0))
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(300, method="thread")
def test_workers_of_a_fork_server_end_with_their_training_process(betons: tuple[Path, Path], tmp_path: Path) -> None:
    """The server would keep running with them."""
    training = _start(_TRAINING, betons[0], tmp_path)
    try:
        assert training.stdout is not None
        workers = [int(pid) for pid in training.stdout.readline().split()]
        assert len(workers) == 2 and not any(_has_ended(pid) for pid in workers)
        assert (tmp_path / "imports").read_text() == "xx"  # by the program and the server, not by each worker
    finally:
        training.kill()
        training.wait()
    assert all(_wait_for_end(pid) for pid in workers)


_SIGNALED = f"""
{_IMPORTS}
if __name__ == "__main__":
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)
    loader = _loader(Path(sys.argv[1]), "pillow")
    batches = loader.epoch(0)
    next(batches)
    for number in STOP_SIGNALS:
        os.killpg(0, number)
    print(1 + len(list(batches)), flush=True)
    next(loader.epoch(1))
"""


@pytest.mark.multi_process
@pytest.mark.timeout(300, method="thread")
def test_workers_survive_a_signal_to_every_process(betons: tuple[Path, Path], tmp_path: Path) -> None:
    """As Slurm and terminals send it. The fork server is not one of the workers, and they end with it.

    The program ends in the middle of an epoch. Python ends its child processes by a signal, which workers ignore, and
    waits for them.
    """
    training = _start(_SIGNALED, betons[0], tmp_path)
    try:
        stdout, _ = training.communicate(timeout=200)
    finally:
        training.kill()
    assert (stdout, training.returncode) == ("18\n", 0)


@pytest.mark.parametrize(
    ("total", "free", "ranks", "fits"), [(64, 64, 1, True), (64, 64, 2, False), (256, 20, 2, False), (256, 58, 4, True)]
)
def test_shared_memory_is_checked_for_all_ranks_of_a_node(
    total: int, free: int, ranks: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 1 << 20
    usage = shutil._ntuple_diskusage(total * mib, (total - free) * mib, free * mib)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if fits:
        check_shared_memory("the reader", 57 * mib, processes=15)
        return
    message = (
        rf"the reader needs 58.0 MiB for each of {ranks} ranks .* has {total}[.\d]* MiB, {free}.0 MiB .*--shm-size"
    )
    with pytest.raises(UserError, match=message):
        check_shared_memory("the reader", 57 * mib, processes=15)
