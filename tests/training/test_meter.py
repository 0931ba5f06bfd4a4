from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.training.distributed import sum_over_ranks
from mrmae_ds.training.launch import Launch
from mrmae_ds.training.loop import Meter, evaluate

from .builders import ALONE, FakeEngine, FakeReader, make_batch

pytestmark = pytest.mark.usefixtures("alone")
NAN, INF = float("nan"), float("inf")


def _meter(*rows: tuple[float, float]) -> Meter:
    meter = Meter()
    for loss, part in rows:
        meter.add({"loss": torch.tensor(loss, requires_grad=True), "part": torch.tensor(part)})
    return meter


def test_means_of_what_was_added() -> None:
    means, speeds, bad = _meter((1.0, 10.0), (2.0, 20.0), (6.0, 0.0)).read(ALONE, 4)
    assert means == {"loss": pytest.approx(3.0), "part": pytest.approx(10.0)}
    assert bad == 0
    assert speeds["images_per_s"] > 0 and speeds["data_wait"] == 0


@pytest.mark.parametrize("strange", [NAN, INF, -INF])
def test_a_micro_batch_that_is_not_finite_counts_for_nothing_but_its_count(strange: float) -> None:
    means, _, bad = _meter((1.0, 10.0), (strange, 99.0), (2.0, 20.0), (strange, strange)).read(ALONE, 4)
    assert means == {"loss": pytest.approx(1.5), "part": pytest.approx(15.0)}
    assert bad == 2


def test_nothing_finite_has_no_mean() -> None:
    means, _, bad = _meter((NAN, 1.0), (INF, 1.0)).read(ALONE, 4)
    assert all(math.isnan(value) for value in means.values()) and means.keys() == {"loss", "part"}
    assert bad == 2


def test_reading_forgets() -> None:
    meter = _meter((1.0, 2.0), (NAN, 2.0))
    meter.waited = 5.0
    meter.read(ALONE, 4)
    assert (meter.sums, meter.nonfinite, meter.batches, meter.waited) == ({}, None, 0, 0.0)
    meter.add({"loss": torch.tensor(7.0)})
    means, _, bad = meter.read(ALONE, 4)
    assert (means, bad) == ({"loss": 7.0}, 0)


def test_it_keeps_no_graph_and_takes_any_precision() -> None:
    meter = _meter((1.0, 2.0))
    meter.add({"loss": torch.tensor(3.0, dtype=torch.bfloat16), "part": torch.tensor(4.0, dtype=torch.float64)})
    assert all(not value.requires_grad and value.dtype == torch.float32 for value in meter.sums.values())
    assert meter.read(ALONE, 4)[0] == {"loss": 2.0, "part": 3.0}


def test_the_mean_is_over_the_batches_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same losses, one batch of each not finite."""
    monkeypatch.setattr("mrmae_ds.training.loop.sum_over_ranks", lambda values: 2 * values)
    means, _, bad = _meter((1.0, 10.0), (NAN, 0.0), (2.0, 20.0)).read(Launch(0, 0, 2, 2), 4)
    assert means == {"loss": pytest.approx(1.5), "part": pytest.approx(15.0)}
    assert bad == 2


def test_the_sum_over_one_rank_is_a_copy() -> None:
    values = torch.tensor([1.0, 2.0])
    total = sum_over_ranks(values)
    assert total.tolist() == [1.0, 2.0] and total.data_ptr() != values.data_ptr()


# ---- evaluation


def _expected(logits: list[np.ndarray], labels: list[np.ndarray], valid: list[np.ndarray]) -> tuple[float, float]:
    """Top-1 in percent and mean cross-entropy of the valid rows, in float64."""
    rows, wanted = np.concatenate(logits)[np.concatenate(valid)], np.concatenate(labels)[np.concatenate(valid)]
    rows = rows.astype(np.float64)
    losses = np.log(np.exp(rows).sum(1)) - rows[np.arange(len(rows)), wanted]
    return 100 * float((rows.argmax(1) == wanted).mean()), float(losses.mean())


def test_evaluation_counts_each_picture_once() -> None:
    valid = [[True] * 4, [True] * 4, [True, True, False, False]]
    batches = [make_batch(4, side=4, seed=i, valid=marks) for i, marks in enumerate(valid)]
    outputs = [torch.randn(4, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    outputs[2][2:] = 0.0
    # The two repeats are certain, one right and one wrong: they would be seen in both numbers.
    right, wrong = int(batches[2].labels[2]), (int(batches[2].labels[3]) + 1) % 10
    outputs[2][2, right] = outputs[2][3, wrong] = 50.0
    by_picture = {batch.images.data_ptr(): output for batch, output in zip(batches, outputs, strict=True)}
    engine = FakeEngine(nn.Linear(3, 1), 1)
    engine.train()

    def logits(images: Tensor) -> Tensor:
        assert not engine.training and not torch.is_grad_enabled()
        return by_picture[images.data_ptr()]

    result = evaluate(engine, logits, FakeReader(batches, num_samples=10))
    top1, loss = _expected(
        [output.numpy() for output in outputs],
        [batch.labels.numpy() for batch in batches],
        [batch.valid.numpy() for batch in batches],
    )
    assert result == {"top1": pytest.approx(top1), "loss": pytest.approx(loss, rel=1e-6), "eval_samples": 10}
    assert isinstance(result["eval_samples"], int)


@pytest.mark.parametrize("claimed", [9, 11, 12])
def test_a_count_that_is_not_the_data_sets_is_an_error(claimed: int) -> None:
    batches = [make_batch(4, side=4), make_batch(4, side=4), make_batch(4, side=4, valid=[True, True, False, False])]
    engine = FakeEngine(nn.Linear(3, 1), 1)
    with pytest.raises(RuntimeError, match=rf"evaluated 10 pictures of {claimed}"):
        evaluate(engine, lambda images: torch.zeros(4, 10), FakeReader(batches, claimed))


def test_all_right_is_a_hundred_percent() -> None:
    batch = make_batch(6, side=4)
    logits = 20 * torch.eye(10)[batch.labels]
    engine = FakeEngine(nn.Linear(3, 1), 1)
    result = evaluate(engine, lambda images: logits, FakeReader([batch]))
    assert result["top1"] == 100.0 and result["loss"] < 1e-6
