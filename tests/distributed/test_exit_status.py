from __future__ import annotations

import errno
import signal

import pytest

from mrmae_ds.distributed import exit_status
from mrmae_ds.distributed.exit_status import report_exit
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.signals import end_at_interrupt
from mrmae_ds.errors import CollectiveError, StopRequested, TrainingError, UserError

ON_ALL_RANKS = [
    (CollectiveError("the disk is full"), 2),
    (TrainingError("only bad steps"), 1),
    (StopRequested(signal.SIGTERM, 7), 75),
]


def _launch(rank: int) -> Launch:
    return Launch(rank, rank, 2, 2)


@pytest.mark.parametrize(("error", "status"), ON_ALL_RANKS)
def test_rank_0_alone_reports_a_collective_error(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert report_exit(error, _launch(1), started=True) == status
    assert caplog.text == ""
    assert report_exit(error, _launch(0), started=True) == status
    (record,) = caplog.records
    assert record.message == str(error) and record.exc_info is None


@pytest.mark.parametrize(("rank", "started", "waits"), [(0, False, []), (1, True, []), (1, False, [5])])
def test_bad_input_is_reported_first_by_the_first_rank_of_a_node(
    rank: int, started: bool, waits: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(exit_status.time, "sleep", slept.append)
    assert report_exit(UserError("no such file"), _launch(rank), started) == 2
    assert slept == waits and [record.message for record in caplog.records] == ["no such file"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a file that this command writes: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/tiny"), "runs/tiny: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory"),
    ],
)
def test_what_the_file_system_refuses_is_bad_input(
    error: OSError, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert report_exit(error, _launch(0), started=True) == 2
    (record,) = caplog.records
    assert record.message == message and record.exc_info is None
    assert report_exit(OSError(errno.EIO, "Input/output error"), _launch(0), started=True) == 1


def test_an_interrupt_before_training_ends_the_process_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
    try:
        with end_at_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
        with end_at_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_unforeseen_exception_is_reported_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        assert report_exit(error, _launch(1), started=True) == 1
    assert "Traceback" in caplog.text and "KeyError: 'x'" in caplog.text
