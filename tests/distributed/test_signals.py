"""SIGHUP stops like SIGTERM, unless it is ignored; a closed terminal is no error."""

from __future__ import annotations

import os
import signal
import time

import pytest

from mrmae_ds.distributed.signals import WATCHED, StopSignals


@pytest.mark.parametrize("number", WATCHED)
def test_notes_a_stop_signal(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert f"{signal.Signals(number).name}: saving after this step" in capfd.readouterr().err


def test_leaves_a_hang_up_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_of_a_closed_terminal_is_discarded_and_other_output_kept() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    kept, saved = os.memfd_create("stdout"), [os.dup(1), os.dup(2)]
    try:
        os.dup2(kept, 1)
        os.dup2(write_end, 2)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        os.write(2, b"lost")
        os.write(1, b"kept")
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
    assert signals.received == signal.SIGHUP
    assert os.pread(kept, 10, 0) == b"kept"
