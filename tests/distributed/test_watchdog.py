"""Who tells of a failure, who follows, and in which order they speak: two monitors in two processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mrmae_ds.distributed.local_ranks import _born
from tests.support.processes import free_port
from tests.support.ranks import fork_server

LIMIT_S = 60


def _rank(rank: int, port: int, log: Path, act: Callable[[int], None], limit_s: float) -> None:
    """A process of two, watched while it acts."""
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
        with Watchdog(Launch(rank, rank, 2, 2), limit_s) as monitor:
            monitor.on_failure = lambda: print("the record is closed", flush=True)
            monitor.beat("acting")
            act(rank)
        dist.barrier()
    except Exception as error:
        print(f"raised: {error}", flush=True)
        status = 3
    os._exit(status)


def _run(act: Callable[[int], None], tmp_path: Path, limit_s: float = 100) -> tuple[list[int | None], list[str]]:
    """Exit statuses and what was printed, by rank."""
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


def _fail_because_the_other_died(rank: int) -> None:
    """As a broken connection would be told, at once."""
    if rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.3)
    raise RuntimeError("Connection closed by peer")


def _fail_on_1_while_the_disk_hangs(rank: int) -> None:
    """Closing the record never comes back: neither process waits for it."""
    from mrmae_ds.distributed.watchdog import Watchdog

    Watchdog._try_to_close = lambda self: time.sleep(100)  # type: ignore[method-assign]
    _fail_on_1(rank)


def _raise_together(rank: int) -> None:
    from mrmae_ds.errors import CollectiveError

    raise CollectiveError("all of us")


def _stuck_on_0(rank: int) -> None:
    time.sleep(100)


def test_nothing_happens(tmp_path: Path) -> None:
    assert _run(_nothing, tmp_path) == ([0, 0], ["", ""])


def test_the_first_to_fail_raises_when_the_other_is_silent(tmp_path: Path) -> None:
    statuses, texts = _run(_fail_on_1, tmp_path)
    assert statuses == [1, 3]
    assert texts == [
        "rank 0: ending, because rank 1 failed\nthe record is closed\n",
        "the record is closed\nraised: the first cause\n",
    ]


def test_a_record_that_cannot_be_closed_keeps_nobody(tmp_path: Path) -> None:
    statuses, texts = _run(_fail_on_1_while_the_disk_hangs, tmp_path)
    assert statuses == [1, 3] and texts[1] == "raised: the first cause\n"


def test_a_killed_process_is_missed_by_one_that_does_not_talk_to_it(tmp_path: Path) -> None:
    statuses, (text, _) = _run(_killed_on_1, tmp_path)
    assert statuses == [1, -signal.SIGKILL]
    assert text.rstrip().splitlines()[-1].startswith("error: rank 1 (process ")


def test_a_broken_connection_is_not_the_first_cause(tmp_path: Path) -> None:
    statuses, (_, text) = _run(_fail_because_the_other_died, tmp_path)
    assert statuses == [-signal.SIGKILL, 1]
    assert "raised: " not in text
    assert text.rstrip().splitlines()[-1].startswith("error: rank 0 (process ")
    assert "ended without a word: killed, or out of memory" in text


def test_what_all_raise_needs_nobody_to_be_told(tmp_path: Path) -> None:
    began = time.monotonic()
    assert _run(_raise_together, tmp_path) == ([3, 3], ["raised: all of us\n"] * 2)
    assert time.monotonic() - began < LIMIT_S


def test_who_gets_no_further_is_told_with_the_stacks_of_all(tmp_path: Path) -> None:
    statuses, texts = _run(_stuck_on_0, tmp_path, limit_s=2)
    together = "".join(texts)
    assert statuses == [1, 1]
    assert together.count("in _stuck_on_0") == 2 and together.count("---- rank") == 2
    assert together.count("error: rank ") == 1 and "got no further for 2 s, at: acting" in together


def test_a_process_is_known_by_its_birth() -> None:
    own = _born(os.getpid())
    assert own is not None and _born(os.getpid()) == own
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    time.sleep(0.2)
    assert _born(pid) is None, "a process that has ended, though nobody has asked how"
    os.waitpid(pid, 0)
    assert _born(pid) is None
    assert sys.platform == "linux"


@pytest.mark.parametrize("torchrun", [False, True])
def test_the_store_ends_with_rank_0_unless_a_launcher_has_it(torchrun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrmae_ds.distributed.failure_store import FailureStore

    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    board = FailureStore.__new__(FailureStore)
    board.lost = False
    board.note_end(1)
    assert not board.lost
    board.note_end(0)
    assert board.lost != torchrun
