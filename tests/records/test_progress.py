from __future__ import annotations

import io
import re
import time

import pytest

from mrmae_ds.records.progress import Progress, progress_bar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_prints_periodic_lines_to_a_log_file() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = Progress("pretrain", 1000, 500, every_seconds=30, stream=stream, clock=clock)
    for step in range(510, 1001, 10):
        clock.now += 10  # one second a step
        progress.update(step, 0.25, 1.5e-4, 1234.4)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == ("pretrain: step 510/1000 (51.0 %), loss 0.2500, lr 1.50e-04, 1,234 images/s, ETA 0:08:10")
    assert lines[1].startswith("pretrain: step 540/1000")
    assert lines[-1].startswith("pretrain: step 1000/1000 (100.0 %)")
    assert lines[-1].endswith("ETA 0:00:00")
    # 510, 540, ..., 990 and the last step.
    assert len(lines) == 18
    assert "\r" not in stream.getvalue()


def test_the_first_step_is_left_out_of_later_estimates() -> None:
    stream, clock = io.StringIO(), _Clock()
    progress = Progress("pretrain", 100, stream=stream, clock=clock)
    for step, seconds in ((1, 60), (11, 40)):  # compilation, then four seconds a step
        clock.now += seconds
        progress.update(step, 1.0, 1.0, 1.0)
    first, later = stream.getvalue().splitlines()
    assert first.endswith("ETA 1:39:00") and later.endswith("ETA 0:05:56")


def test_shows_a_bar_on_a_terminal() -> None:
    stream = _Terminal()
    progress = Progress("finetune", 10, 4, stream=stream)
    progress.update(7, 1.5, 1e-3, 99.6)
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert re.search(r"finetune +70%\|.*7/10 steps.*loss 1\.5000, lr 1\.00e-03, 100 images/s", last)


def test_other_ranks_print_nothing() -> None:
    for stream in (io.StringIO(), _Terminal()):
        progress = Progress("pretrain", 10, enabled=False, stream=stream)
        progress.update(10, 1.0, 1.0, 1.0)
        progress.close()
        assert stream.getvalue() == ""


def test_remaining_time_is_unknown_before_the_first_step() -> None:
    stream = io.StringIO()
    Progress("pretrain", 10, 3, stream=stream).update(3, 1.0, 1.0, 1.0)
    assert stream.getvalue().endswith("ETA ?\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_in_a_log_file_is_updated_seldom(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    for _ in progress_bar(range(15), desc="train", unit="image", delay=0.01):
        time.sleep(0.02)
    updates = stream.getvalue().count("image/s")
    assert updates > 2 if terminal else updates == 2  # the first and the last
    assert "15/15" in stream.getvalue()
