"""benchmarks/roofline.py: ideal fusion of operators between products, against bytes counted by hand."""

from __future__ import annotations

import torch

from benchmarks.roofline import FlowRecorder, fuse
from mrmae_ds.planning.operator_trace import MATMUL_FP32, MEMORY

SIDE = 16
BYTES = SIDE * SIDE * 4.0


def test_what_is_needed_later_is_written_and_nothing_else() -> None:
    x, weight = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    with FlowRecorder([]) as recorder:
        a = x + 1
        b = a * 2
        c = b.t() @ weight
        d = c.relu().sqrt()
        e = d + a
        e.mul_(2)
    assert [cost.kind for cost in recorder.costs if cost.kind != "view"].count(MEMORY) == 6
    fused = fuse(recorder.costs, recorder.flows)
    assert [cost.kind for cost in fused] == [MEMORY, MATMUL_FP32, MEMORY]
    assert fused[0].size == 3 * BYTES  # reads x, writes a and b
    assert fused[2].size == 3 * BYTES  # reads c and a, writes e
    assert torch.equal(e, torch.full_like(e, 2 * (64.0**0.5 + 2)))


def test_operators_that_share_only_an_input_are_kernels_of_their_own() -> None:
    x = torch.ones(SIDE, SIDE)
    with FlowRecorder([]) as recorder:
        kept = [x.bfloat16(), x.exp()]
    fused = fuse(recorder.costs, recorder.flows)
    assert sorted(cost.size for cost in fused) == [1.5 * BYTES, 2 * BYTES] and len(kept) == 2


def test_a_freed_tensor_is_not_taken_for_the_next_at_its_place() -> None:
    with FlowRecorder([]) as recorder:
        for _ in range(50):
            torch.ones(SIDE, SIDE).exp()
    written = [number for _, flow in recorder.flows for number in flow]
    assert len(set(written)) == 100
