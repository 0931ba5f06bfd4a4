"""Times of collectives by hand, and what travels in a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.planning.cluster import CALL_S, LINK_SHARE, NODE_S, Cluster, check_cluster
from mrmae_ds.planning.teacher_memory import Placed
from mrmae_ds.planning.traffic import offload_flows, student_flows, teacher_flow
from mrmae_ds.planning.zero_memory import ZeroMemory
from mrmae_ds.profiling.gpus import Gpu
from tests.planning.test_zero_memory import CENSUS, FLOAT32, KEEP

# 100 GB/s in a node, 10 to the host.
GPU = Gpu("made up", (), 42.0, 100.0, 100.0, 10.0)
ONE_NODE = Cluster(GPU, gpus=4, per_node=4, network_gbs=5.0, sustained=1e12)
TWO_NODES = replace(ONE_NODE, gpus=8)


def test_in_a_node_each_gpu_gets_what_the_others_have() -> None:
    moved = 3 / 4 * 1e9 / 100e9 / LINK_SHARE
    latency = 2 * (CALL_S + NODE_S)
    assert ONE_NODE.collective_s(1e9, 2) == pytest.approx(moved + latency)
    assert ONE_NODE.collective_s(1e9, 2, reduce=True) == pytest.approx(2 * moved + latency)


def test_between_nodes_their_links_are_used_together() -> None:
    # Half of it comes from the other node, over four links of 5 GB/s.
    assert TWO_NODES.collective_s(1e9, 0) == pytest.approx(0.5e9 / 20e9 / LINK_SHARE)
    assert TWO_NODES.collective_s(1e9, 0, in_node=True) == pytest.approx(ONE_NODE.collective_s(1e9, 0))


def test_one_gpu_waits_for_nobody() -> None:
    assert ONE_NODE.of(1).collective_s(1e9, 100) == 0
    assert student_flows(ZeroMemory(CENSUS, FLOAT32, 1), ONE_NODE.of(1)) == []


def test_what_fits_is_less_than_what_a_card_has() -> None:
    assert ONE_NODE.usable == pytest.approx((42 - 2) * 2**30 * 0.95)


@pytest.mark.parametrize(
    ("gpus", "per_node", "message"),
    [(0, 8, "--gpus must"), (8, 0, "--gpus-per-node must"), (12, 8, "--gpus 12 .* take 8 or 16")],
)
def test_nodes_that_cannot_be(gpus: int, per_node: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_cluster(gpus, per_node)


def flows(stage: int, accumulation: int = 1, autocast: bool = False) -> dict[str, float]:
    zero = replace(FLOAT32, stage=stage, autocast=autocast, overlap=stage == 3)
    engine = ZeroMemory(CENSUS, zero, 4, accumulation)
    return {flow.name: flow.size for flow in student_flows(engine, ONE_NODE)}


def test_bytes_of_a_step_by_stage() -> None:
    assert flows(0) == {"gradients, all-reduced": 4 * 1000}
    assert flows(1) == flows(2) == {"gradients, all-reduced": 4 * 1000, "updated parameters, gathered": 4 * 1000}
    assert flows(3) == {"parameters, gathered": 4 * 1024, "gradients, reduce-scattered": 4 * 1000}


def test_stages_2_and_3_send_with_every_micro_batch() -> None:
    assert flows(1, 2) == flows(1) and flows(0, 2) == flows(0)
    assert flows(2, 2)["gradients, all-reduced"] == 2 * 4 * 1000
    assert flows(2, 2)["updated parameters, gathered"] == 4 * 1000
    assert flows(3, 2) == {name: 2 * size for name, size in flows(3).items()}


def test_autocast_sends_most_in_bf16() -> None:
    sent = 2 * 600 + 4 * 400
    assert flows(3, autocast=True) == {
        "parameters, gathered": sent + 4 * 24,
        "gradients, reduce-scattered": sent,
    }
    # ZeRO-1's parameters are float32, and so they are gathered.
    assert flows(1, autocast=True) == {"gradients, all-reduced": sent, "updated parameters, gathered": 4 * 1000}


def test_stage_3_hides_what_it_sends_and_stage_1_does_not() -> None:
    for stage, hidden in {1: False, 3: True}.items():
        engine = ZeroMemory(CENSUS, replace(FLOAT32, stage=stage, overlap=stage == 3), 4)
        assert {flow.hidden for flow in student_flows(engine, ONE_NODE)} == {hidden}


def test_hpz_gathers_once_between_nodes_and_then_in_each() -> None:
    zero = replace(FLOAT32, max_reuse=0, max_live=0, prefetch_bucket=0, hpz=4)
    sent = student_flows(ZeroMemory(CENSUS, zero, 8), TWO_NODES)
    assert [flow.size for flow in sent] == [4 * 1024, 4 * 1024, 4 * 1000]
    assert sent[1].seconds < sent[0].seconds


def test_offloading_goes_over_the_bus_and_back() -> None:
    zero = replace(FLOAT32, offload_param="cpu", offload_optimizer="cpu", max_live=KEEP)
    parameters, states, update = offload_flows(ZeroMemory(CENSUS, zero, 4), ONE_NODE)
    assert parameters.size == 4 * 1024 / 4
    assert states.size == (4 + 4) * 250
    assert states.seconds == pytest.approx(2000 / 10e9 / LINK_SHARE) and not states.hidden
    assert update.size == 28 * 250


def test_a_teachers_copies_run_beside_its_computing() -> None:
    placed = Placed(0, 1e9, copied=7e9)
    copying = 2 * 7e9 / 10e9 / LINK_SHARE
    flow = teacher_flow("clip", placed, ONE_NODE, batches=2, computing_s=0.5)
    assert flow is not None
    assert (flow.size, flow.seconds) == (14e9, pytest.approx(copying - 0.5))
    hidden = teacher_flow("clip", placed, ONE_NODE, batches=2, computing_s=10)
    assert hidden is not None and hidden.seconds == 0
    assert teacher_flow("clip", Placed(1e9, 1e9), ONE_NODE, 2, 0.5) is None
