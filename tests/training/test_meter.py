from __future__ import annotations

import math

import pytest
import torch

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import sum_over_ranks
from mrmae_ds.training.meter import Meter
from tests.support.jobs import ALONE

pytestmark = pytest.mark.usefixtures("alone")
NAN, INF = float("nan"), float("inf")


def _meter(*rows: tuple[float, float]) -> Meter:
    meter = Meter()
    for loss, part in rows:
        meter.add({"loss": torch.tensor(loss, requires_grad=True), "part": torch.tensor(part)})
    return meter


def test_reads_the_mean_of_each_loss_since_the_last_reading() -> None:
    means, speeds, bad = _meter((1.0, 10.0), (2.0, 20.0), (6.0, 0.0)).read(ALONE, 4)
    assert means == {"loss": pytest.approx(3.0), "part": pytest.approx(10.0)}
    assert bad == 0
    assert speeds["images_per_s"] > 0 and speeds["data_wait"] == 0


@pytest.mark.parametrize("strange", [NAN, INF, -INF])
def test_nonfinite_micro_batches_are_counted_and_left_out_of_means(strange: float) -> None:
    means, _, bad = _meter((1.0, 10.0), (strange, 99.0), (2.0, 20.0), (strange, strange)).read(ALONE, 4)
    assert means == {"loss": pytest.approx(1.5), "part": pytest.approx(15.0)}
    assert bad == 2


def test_mean_of_no_finite_value_is_nan() -> None:
    means, _, bad = _meter((NAN, 1.0), (INF, 1.0)).read(ALONE, 4)
    assert all(math.isnan(value) for value in means.values()) and means.keys() == {"loss", "part"}
    assert bad == 2


def test_reading_resets_the_meter() -> None:
    meter = _meter((1.0, 2.0), (NAN, 2.0))
    meter.data_wait_s = 5.0
    meter.read(ALONE, 4)
    assert (meter.sums, meter.nonfinite, meter.batches, meter.data_wait_s) == ({}, None, 0, 0.0)
    meter.add({"loss": torch.tensor(7.0)})
    means, _, bad = meter.read(ALONE, 4)
    assert (means, bad) == ({"loss": 7.0}, 0)


def test_keeps_no_graph_and_accepts_any_dtype() -> None:
    meter = _meter((1.0, 2.0))
    meter.add({"loss": torch.tensor(3.0, dtype=torch.bfloat16), "part": torch.tensor(4.0, dtype=torch.float64)})
    assert all(not value.requires_grad and value.dtype == torch.float32 for value in meter.sums.values())
    assert meter.read(ALONE, 4)[0] == {"loss": 2.0, "part": 3.0}


def test_the_mean_is_over_the_batches_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with equal losses, one micro-batch of each non-finite."""
    monkeypatch.setattr("mrmae_ds.training.meter.sum_over_ranks", lambda values: 2 * values)
    means, _, bad = _meter((1.0, 10.0), (NAN, 0.0), (2.0, 20.0)).read(Launch(0, 0, 2, 2), 4)
    assert means == {"loss": pytest.approx(1.5), "part": pytest.approx(15.0)}
    assert bad == 2


def test_the_sum_over_one_rank_is_a_copy() -> None:
    values = torch.tensor([1.0, 2.0])
    total = sum_over_ranks(values)
    assert total.tolist() == [1.0, 2.0] and total.data_ptr() != values.data_ptr()


CPU = torch.device("cpu")


def _states(*meters: Meter, micro_batch: int = 4) -> list[dict[str, object]]:
    return [meter.state() | {"micro_batch": micro_batch} for meter in meters]


def test_restores_each_ranks_sums_bit_by_bit_on_the_same_number_of_ranks() -> None:
    meters = [_meter((0.1, 10.0), (0.2, 1.0)), _meter((0.3, 7.0), (NAN, 1.0))]
    meters[1].data_wait_s = 5.0
    for rank, meter in enumerate(meters):
        back = Meter.restored(_states(*meters), Launch(rank, rank, 2, 2), 4, CPU)
        assert all(torch.equal(back.sums[name], meter.sums[name]) for name in meter.sums)
        assert (back.nonfinite, back.batches, back.data_wait_s) == (meter.nonfinite, 2, meter.data_wait_s)
        assert back.state()["elapsed"] == pytest.approx(meter.state()["elapsed"], abs=1)


@pytest.mark.parametrize(("world_size", "micro_batch", "batches"), [(1, 4, 4), (4, 4, 1), (2, 2, 4), (1, 8, 2)])
def test_restored_means_are_equal_on_another_number_of_ranks(
    world_size: int, micro_batch: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches of four images on two ranks, restored with another division of these sixteen images."""
    states = _states(_meter((1.0, 10.0), (2.0, 20.0)), _meter((6.0, 0.0), (3.0, 2.0)))
    launches = [Launch(rank, rank, world_size, world_size) for rank in range(world_size)]
    restored = [Meter.restored(states, launch, micro_batch, CPU) for launch in launches]
    assert {meter.batches for meter in restored} == {batches}
    packed = sum(torch.stack([*meter.sums.values(), meter.nonfinite]) for meter in restored)
    monkeypatch.setattr("mrmae_ds.training.meter.sum_over_ranks", lambda values: packed)
    means, _, bad = restored[0].read(launches[0], micro_batch)
    assert means == {"loss": pytest.approx(3.0), "part": pytest.approx(8.0)} and bad == 0


def test_restores_an_empty_interval() -> None:
    back = Meter.restored(_states(Meter(), Meter()), Launch(1, 1, 2, 2), 4, CPU)
    assert (back.sums, back.nonfinite, back.batches) == ({}, None, 0)
