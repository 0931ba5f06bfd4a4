"""Expectations are shares of the data sheet, and there is none for an unknown GPU."""

from __future__ import annotations

import pytest

from mrmae_ds.doctor import expectations
from mrmae_ds.profiling.gpus import find_gpu


@pytest.mark.parametrize(
    ("key", "memory", "product"), [("h100-80", 2780, 643), ("h200", 3984, 643), ("a100-80", 1692, 203)]
)
def test_ranges_scale_with_the_gpu(key: str, memory: float, product: float) -> None:
    """Data sheets: 3,350, 4,800 and 2,039 GB/s; 989.5 and 312 TFLOP/s."""
    gpu = find_gpu(key)
    found = expectations.memory(gpu), expectations.product(gpu, large=True)
    assert [entry.low if entry else None for entry in found] == pytest.approx([memory, product], rel=0.01)


def test_an_unknown_gpu_has_no_expectations() -> None:
    for expected in (expectations.memory, expectations.host_link, expectations.node_link, expectations.depthwise):
        assert expected(None) is None
    assert expectations.product(None, large=True) is None and expectations.launch(None) is None
