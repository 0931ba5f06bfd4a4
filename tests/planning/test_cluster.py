"""Times of collectives against formulas, and the transfers of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.planning.estimates.cluster import Cluster, check_cluster
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.traffic import offload_transfers, student_transfers, teacher_transfer
from mrmae_ds.planning.teacher_memory import TeacherBytes
from mrmae_ds.planning.zero_memory import ZeroMemory
from mrmae_ds.profiling.gpus import Gpu
from tests.planning.test_zero_memory import COUNTS, FLOAT32, KEEP

# 100 GB/s in a node, 10 to the host.
GPU = Gpu("test", (), 42.0, 100.0, 100.0, 10.0)
ONE_NODE = Cluster(GPU, gpus=4, gpus_per_node=4, network_gbs=5.0, sustained=1e12)
TWO_NODES = replace(ONE_NODE, gpus=8)


def test_collectives_within_a_node() -> None:
    moved = 3 / 4 * 1e9 / 100e9 / CONSTANTS.link_share
    latency = 2 * (CONSTANTS.call_s + CONSTANTS.node_s)
    assert ONE_NODE.collective_s(1e9, 2) == pytest.approx(moved + latency)
    assert ONE_NODE.collective_s(1e9, 2, reduce=True) == pytest.approx(2 * moved + latency)


def test_collectives_between_nodes_use_all_links() -> None:
    # Half of the data comes from the other node, over four links of 5 GB/s.
    assert TWO_NODES.collective_s(1e9, 0) == pytest.approx(0.5e9 / 20e9 / CONSTANTS.link_share)
    assert TWO_NODES.collective_s(1e9, 0, in_node=True) == pytest.approx(ONE_NODE.collective_s(1e9, 0))


def test_single_gpu_has_no_collectives() -> None:
    assert ONE_NODE.with_gpus(1).collective_s(1e9, 100) == 0
    assert student_transfers(ZeroMemory(COUNTS, FLOAT32, 1), ONE_NODE.with_gpus(1)) == []


def test_usable_memory_is_below_the_total() -> None:
    assert ONE_NODE.usable_memory == pytest.approx((42 - 2) * 2**30 * 0.95)


@pytest.mark.parametrize(
    ("gpus", "per_node", "message"),
    [(0, 8, "--gpus must"), (8, 0, "--gpus-per-node must"), (12, 8, "--gpus 12 .* use 8 or 16")],
)
def test_invalid_nodes_are_refused(gpus: int, per_node: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_cluster(gpus, per_node)


def transfer_sizes(stage: int, accumulation: int = 1, autocast: bool = False, max_live: int = KEEP) -> dict[str, float]:
    zero = replace(FLOAT32, stage=stage, autocast=autocast, overlap=stage == 3, max_live=max_live)
    engine = ZeroMemory(COUNTS, zero, 4, accumulation)
    return {transfer.name: transfer.size for transfer in student_transfers(engine, ONE_NODE)}


def test_bytes_per_step_by_stage() -> None:
    assert transfer_sizes(0) == {"all-reduce of gradients": 4 * 1000}
    assert (
        transfer_sizes(1)
        == transfer_sizes(2)
        == {"all-reduce of gradients": 4 * 1000, "gather of updated parameters": 4 * 1000}
    )
    assert transfer_sizes(3) == {"gather of parameters": 4 * 1024, "reduce-scatter of gradients": 4 * 1000}


def test_stages_2_and_3_communicate_every_micro_batch() -> None:
    assert transfer_sizes(1, 2) == transfer_sizes(1) and transfer_sizes(0, 2) == transfer_sizes(0)
    assert transfer_sizes(2, 2)["all-reduce of gradients"] == 2 * 4 * 1000
    assert transfer_sizes(2, 2)["gather of updated parameters"] == 4 * 1000
    assert transfer_sizes(3, 2)["reduce-scatter of gradients"] == 2 * 4 * 1000
    # Gathered parameters serve all micro-batches of a step, if they may stay.
    assert transfer_sizes(3, 2)["gather of parameters"] == 4 * 1024
    assert transfer_sizes(3, 2, max_live=1000)["gather of parameters"] == 2 * 4 * 1024


def test_autocast_communicates_in_bf16() -> None:
    sent = 2 * 600 + 4 * 400
    assert transfer_sizes(3, autocast=True) == {
        "gather of parameters": sent + 4 * 24,
        "reduce-scatter of gradients": sent,
    }
    # ZeRO-1 gathers its parameters in float32.
    expected = {"all-reduce of gradients": sent, "gather of updated parameters": 4 * 1000}
    assert transfer_sizes(1, autocast=True) == expected


def test_stage_3_overlaps_communication_and_stage_1_does_not() -> None:
    for stage, overlapped in {1: False, 3: True}.items():
        engine = ZeroMemory(COUNTS, replace(FLOAT32, stage=stage, overlap=stage == 3), 4)
        assert {transfer.overlapped for transfer in student_transfers(engine, ONE_NODE)} == {overlapped}


def test_hpz_gathers_once_between_nodes_and_then_within() -> None:
    zero = replace(FLOAT32, max_reuse=0, max_live=0, prefetch_bucket=0, hpz=4)
    sent = student_transfers(ZeroMemory(COUNTS, zero, 8), TWO_NODES)
    assert [transfer.size for transfer in sent] == [4 * 1024, 4 * 1024, 4 * 1000]
    assert sent[1].seconds < sent[0].seconds


def test_offloading_copies_to_the_host_and_back() -> None:
    zero = replace(FLOAT32, offload_param="cpu", offload_optimizer="cpu", max_live=KEEP)
    parameters, states, update = offload_transfers(ZeroMemory(COUNTS, zero, 4), ONE_NODE)
    assert parameters.size == 4 * 1024 / 4
    assert states.size == (4 + 4) * 250
    assert states.seconds == pytest.approx(2000 / 10e9 / CONSTANTS.link_share) and not states.overlapped
    assert update.size == 28 * 250


def test_teacher_copies_overlap_its_computation() -> None:
    placed = TeacherBytes(0, 1e9, copied=7e9)
    copying = 2 * 7e9 / 10e9 / CONSTANTS.link_share
    transfer = teacher_transfer("clip", placed, ONE_NODE, micro_batches=2, compute_s=0.5)
    assert transfer is not None
    assert (transfer.size, transfer.seconds) == (14e9, pytest.approx(copying - 0.5))
    overlapped = teacher_transfer("clip", placed, ONE_NODE, micro_batches=2, compute_s=10)
    assert overlapped is not None and overlapped.seconds == 0
    assert teacher_transfer("clip", TeacherBytes(1e9, 1e9), ONE_NODE, 2, 0.5) is None
