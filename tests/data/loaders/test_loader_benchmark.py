"""benchmarks/loader.py and loader_limits.py: ratios of readers by hand, and readers that did not run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.loader import Contender, Results, ratios, table


def _rounds(*rates: float) -> list[dict[str, float]]:
    return [{"cpu_s_per_1000": 1.0, "images_per_s": rate, "first_batch_s": 1.0, "load": 0.0} for rate in rates]


def test_ratios_are_taken_within_each_round_and_absent_readers_have_a_reason() -> None:
    results: Results = {
        "mrmae_ds, ffcv backend": _rounds(100, 400, 210),
        "stock FFCV": _rounds(50, 100, 100),
        "DALI, CPU": "ModuleNotFoundError: No module named 'nvidia.dali'",
    }
    lines = ratios(results).splitlines()
    assert "| mrmae_ds, ffcv backend | stock FFCV | 2.10 | 2.00 to 4.00 | 2 |" in lines
    assert "| mrmae_ds, ffcv backend | DALI, CPU |  |  | 3 |" in lines
    assert "No module named 'nvidia.dali'" in table(results)


def test_a_contender_runs_a_round_on_each_request() -> None:
    program = """
import sys
print(1.5, flush=True)
for _, rate in zip(sys.stdin, (200.0, 100.0)):
    print(f'{{"images_per_s": {rate}}}', flush=True)
raise ValueError("the third")
"""
    contender = Contender([sys.executable, "-c", program])
    rounds = [contender.run_round() for _ in range(2)]
    assert [(one["first_batch_s"], one["images_per_s"]) for one in rounds] == [(1.5, 200), (1.5, 100)]
    for _ in range(2):  # while it ends, and after that
        with pytest.raises(RuntimeError, match=r"^ValueError: the third$"):
            contender.run_round()


@pytest.mark.ffcv
def test_limits_are_the_ratios_without_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 ms, libjpeg-turbo takes 0.5: without the rest, the reader has twice its images/s."""
    monkeypatch.syspath_prepend(str(Path(next(iter(benchmarks.__path__)))))
    limits = importlib.import_module("loader_limits").limits
    ms = {"weigh": 0.05, "cut": 0.15, "huffman": 0.4, "planes": 0.5, "kernel": 0.8, "loader": 1.0}
    rounds: Results = {"mrmae_ds, ffcv backend": _rounds(300, 310), "stock FFCV": _rounds(100, 100), "DALI, CPU": ""}
    lines = [line.split("|")[1:-1] for line in limits(ms, {"rounds": rounds}).splitlines()]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert table["if this cost nothing"] == ["stock FFCV"]
    assert table["as it is"] == ["3.05"]
    assert table["check and copy of the segments"] == ["3.39"]
    assert table["weights of the filters"] == ["3.21"]
    assert table["resizing, colors, mirror"] == ["3.59"]
    assert table["order, threads, copy of the batch"] == ["3.81"]
    assert table["all of these"] == ["6.10"]
