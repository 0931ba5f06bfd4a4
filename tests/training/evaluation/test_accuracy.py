from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.training.evaluation.accuracy import measure_accuracy
from tests.support.jobs import FakeEngine, FakeLoader, make_batch

pytestmark = pytest.mark.usefixtures("alone")


def _expected(logits: list[np.ndarray], labels: list[np.ndarray], valid: list[np.ndarray]) -> dict[str, float]:
    """Top-1 and top-5 in percent and mean cross-entropy of the valid rows, in float64."""
    rows, wanted = np.concatenate(logits)[np.concatenate(valid)], np.concatenate(labels)[np.concatenate(valid)]
    rows = rows.astype(np.float64)
    losses = np.log(np.exp(rows).sum(1)) - rows[np.arange(len(rows)), wanted]
    above = (rows > rows[np.arange(len(rows)), wanted][:, None]).sum(1)  # classes rated higher than the right one
    return {"top1": 100 * float((above < 1).mean()), "top5": 100 * float((above < 5).mean()), "loss": losses.mean()}


def test_evaluation_counts_each_image_once() -> None:
    valid = [[True] * 4, [True] * 4, [True, True, False, False]]
    batches = [make_batch(4, side=4, seed=i, valid=marks) for i, marks in enumerate(valid)]
    outputs = [torch.randn(4, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    outputs[2][2:] = 0.0
    # The two repeats are confident, one correct and one wrong: counting them would change both numbers.
    right, wrong = int(batches[2].labels[2]), (int(batches[2].labels[3]) + 1) % 10
    outputs[2][2, right] = outputs[2][3, wrong] = 50.0
    by_image = {batch.images.data_ptr(): output for batch, output in zip(batches, outputs, strict=True)}
    engine = FakeEngine(nn.Linear(3, 1), 1)
    engine.train()

    def logits(_: nn.Module, images: Tensor) -> Tensor:
        assert not engine.training and not torch.is_grad_enabled()
        return by_image[images.data_ptr()]

    result = measure_accuracy(engine, logits, FakeLoader(batches, num_samples=10))
    expected = _expected(
        [output.numpy() for output in outputs],
        [batch.labels.numpy() for batch in batches],
        [batch.valid.numpy() for batch in batches],
    )
    assert result == pytest.approx(expected | {"eval_samples": 10}, rel=1e-6)
    assert expected["top1"] < expected["top5"] < 100
    assert isinstance(result["eval_samples"], int)


@pytest.mark.parametrize("claimed", [9, 11, 12])
def test_wrong_image_count_is_an_error(claimed: int) -> None:
    batches = [make_batch(4, side=4), make_batch(4, side=4), make_batch(4, side=4, valid=[True, True, False, False])]
    engine = FakeEngine(nn.Linear(3, 1), 1)
    with pytest.raises(RuntimeError, match=rf"evaluated 10 images of {claimed}"):
        measure_accuracy(engine, lambda _, images: torch.zeros(4, 10), FakeLoader(batches, claimed))


def test_top1_is_100_if_all_predictions_are_correct() -> None:
    batch = make_batch(6, side=4)
    logits = 20 * torch.eye(10)[batch.labels]
    engine = FakeEngine(nn.Linear(3, 1), 1)
    result = measure_accuracy(engine, lambda _, images: logits, FakeLoader([batch]))
    assert result["top1"] == 100.0 and result["loss"] < 1e-6


@pytest.mark.parametrize(("classes", "reported"), [(5, False), (6, True)])
def test_reports_top5_above_five_classes(classes: int, reported: bool) -> None:
    batch = make_batch(6, side=4, classes=classes)
    result = measure_accuracy(
        FakeEngine(nn.Linear(3, 1), 1), lambda _, images: torch.rand(6, classes), FakeLoader([batch])
    )
    assert ("top5" in result) == reported
