"""Failure reports between two ranks: who reports, who follows, and in which order they print."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mrmae_ds.distributed.processes import start_time
from tests.support.processes import free_port
from tests.support.ranks import fork_server

pytestmark = pytest.mark.multi_process

LIMIT_S = 60


def _rank(rank: int, port: int, log: Path, act: Callable[[int], None], limit_s: float) -> None:
    """One of two ranks, watched while it acts."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch.distributed as dist

    from mrmae_ds.distributed.launch import Launch
    from mrmae_ds.distributed.watchdog import Watchdog

    dist.init_process_group("gloo", rank=rank, world_size=2)
    status = 0
    try:
        with Watchdog(Launch(rank, rank, 2, 2), limit_s) as watchdog:
            watchdog.on_failure = lambda: print("the record is closed", flush=True)
            watchdog.heartbeat("acting")
            act(rank)
        dist.barrier()
    except Exception as error:
        print(f"raised: {error}", flush=True)
        status = 3
    os._exit(status)


def _run(act: Callable[[int], None], tmp_path: Path, limit_s: float = 100) -> tuple[list[int | None], list[str]]:
    """Run both ranks; return exit statuses and output, by rank."""
    context = fork_server()
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = [context.Process(target=_rank, args=(rank, port, logs[rank], act, limit_s)) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    texts = [log.read_text() for log in logs]
    assert not late, texts
    return [process.exitcode for process in processes], texts


def _nothing(rank: int) -> None:
    time.sleep(0.2 * rank)


def _fail_on_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("the first cause")
    time.sleep(100)


def _killed_on_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def _fail_because_the_other_rank_died(rank: int) -> None:
    """Raise what a broken connection raises, at once, on a machine too loaded for the threads to check anything."""
    import torch.distributed as dist

    from mrmae_ds.distributed import watchdog

    watchdog.POLL_S = 100.0
    time.sleep(1)  # until the threads have taken it
    first = [os.getpid()]
    dist.broadcast_object_list(first)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    while start_time(first[0]) is not None:
        time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")


def _fail_on_1_while_the_disk_hangs(rank: int) -> None:
    """Closing the record never returns; no rank waits for it."""
    from mrmae_ds.distributed.watchdog import Watchdog

    Watchdog._try_to_close = lambda self: time.sleep(100)  # type: ignore[method-assign]
    _fail_on_1(rank)


def _raise_on_both(rank: int) -> None:
    from mrmae_ds.errors import CollectiveError

    raise CollectiveError("on all ranks")


def _hang(rank: int) -> None:
    """Hang; rank 1 writes its stacks late, as on a loaded machine."""
    if rank == 1:
        own = os.getpid()
        subprocess.Popen(["sh", "-c", f"kill -STOP {own}; sleep 5; kill -CONT {own}"])
    time.sleep(100)


def test_prints_nothing_without_a_failure(tmp_path: Path) -> None:
    assert _run(_nothing, tmp_path) == ([0, 0], ["", ""])


def test_first_failed_rank_raises_after_the_others_stop(tmp_path: Path) -> None:
    statuses, texts = _run(_fail_on_1, tmp_path)
    assert statuses == [1, 3]
    assert texts == [
        "warning: exiting because rank 1 failed\nthe record is closed\n",
        "the record is closed\nraised: the first cause\n",
    ]


def test_waits_for_no_record_that_cannot_be_closed(tmp_path: Path) -> None:
    statuses, texts = _run(_fail_on_1_while_the_disk_hangs, tmp_path)
    assert statuses == [1, 3] and texts[1] == "raised: the first cause\n"


def test_reports_a_killed_rank_outside_of_collective_operations(tmp_path: Path) -> None:
    statuses, (text, _) = _run(_killed_on_1, tmp_path)
    assert statuses == [1, -signal.SIGKILL]
    assert text.rstrip().splitlines()[-1].startswith("error: rank 1 (process ")


def test_reports_the_death_behind_a_broken_connection(tmp_path: Path) -> None:
    statuses, (_, text) = _run(_fail_because_the_other_rank_died, tmp_path)
    assert statuses == [-signal.SIGKILL, 1]
    assert "raised: " not in text
    assert text.rstrip().splitlines()[-1].startswith("[rank 1] error: rank 0 (process ")
    assert "died without reporting an error: killed, or out of memory" in text


def test_does_not_delay_collective_errors(tmp_path: Path) -> None:
    began = time.monotonic()
    assert _run(_raise_on_both, tmp_path) == ([3, 3], ["raised: on all ranks\n"] * 2)
    assert time.monotonic() - began < LIMIT_S


def test_reports_a_hang_with_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    statuses, texts = _run(_hang, tmp_path, limit_s=2)
    together = "".join(texts)
    assert statuses == [1, 1]
    assert together.count("in _hang\n") == 2 and together.count("---- rank") == 2
    assert together.count("error: rank ") == 1
    assert re.search(r"made no progress for \d+ s, at: acting", together)  # no less than 2 s


def test_identifies_a_process_by_its_start_time() -> None:
    own = start_time(os.getpid())
    assert own is not None and start_time(os.getpid()) == own
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert start_time(pid) is None, "a zombie: it has ended, but is not reaped"
    os.waitpid(pid, 0)
    assert start_time(pid) is None
    assert sys.platform == "linux"


def test_no_rank_exits_before_all_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends all ranks once one has exited, and the first to fail prints when all are quiet."""
    from torch.distributed import HashStore

    from mrmae_ds.distributed import failure_store
    from mrmae_ds.distributed.launch import Launch

    monkeypatch.setattr(failure_store, "broadcast_object", lambda key: key)
    own = failure_store.FailureStore(Launch(1, 1, 1, 1))
    own.launch, own._store, slept = Launch(1, 1, 3, 3), HashStore(), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            own._store.add(own._quiet, 1)  # the third rank; the first is the one that failed

    monkeypatch.setattr(failure_store.time, "sleep", sleep)
    own.keep_quiet()
    assert slept == [0.1, 0.1, 0.1, failure_store.LINGER_S]


@pytest.mark.parametrize("torchrun", [False, True])
def test_loses_the_store_with_rank_0_unless_torchrun_has_it(torchrun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrmae_ds.distributed.failure_store import FailureStore

    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = FailureStore.__new__(FailureStore)
    store.lost = False
    store.note_death(1)
    assert not store.lost
    store.note_death(0)
    assert store.lost != torchrun
