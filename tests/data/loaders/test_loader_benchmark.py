"""benchmarks/loader.py: ratios of readers within a round, by hand, and readers that did not run."""

from __future__ import annotations

from benchmarks.loader import Results, ratios, table


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
