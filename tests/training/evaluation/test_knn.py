"""Nearest-neighbor votes against plain loops in float64; each image counts once on any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.config.stages import KnnConfig
from mrmae_ds.models.encoders import build_encoder, dense_features
from mrmae_ds.models.sizes import encoder_spec
from mrmae_ds.training.evaluation.knn import Bank, gather_bank, knn_accuracy, votes
from tests.support.jobs import FakeLoader, make_batch


def plain_votes(query: list[float], bank: list[list[float]], labels: list[int], k: int, t: float) -> dict[int, float]:
    """One query's votes by class, sorted by hand."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    near = sorted(((cosine(query, row), label) for row, label in zip(bank, labels, strict=True)), reverse=True)[:k]
    found: dict[int, float] = {}
    for closeness, label in near:
        found[label] = found.get(label, 0.0) + math.exp(closeness / t)
    return found


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (1000, 1.0)])
def test_votes_are_those_of_a_plain_loop(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(k)
    features = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (40,), generator=generator)
    queries = 3 * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    found = votes(queries, Bank(F.normalize(features, dim=1), labels), k, temperature, 5)
    assert found.shape == (9, 5)
    for query, ours in zip(queries.tolist(), found.tolist(), strict=True):
        wanted = plain_votes(query, features.tolist(), labels.tolist(), k, temperature)
        assert ours == pytest.approx([wanted.get(label, 0.0) for label in range(5)], rel=1e-9)


@pytest.mark.parametrize("arch", ["cvit_tiny", "vit_tiny"])
def test_features_are_the_mean_of_all_patches(arch: str) -> None:
    """The features equal those of the classifier that fine-tuning and probing build from the same weights."""
    torch.manual_seed(0)
    bare = build_encoder(encoder_spec(arch), 32)
    classifier = build_encoder(encoder_spec(arch), 32, 10)
    classifier.load_state_dict(bare.state_dict(), strict=False)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ours = dense_features(bare.eval(), images)
        wanted = classifier.eval().forward_head(classifier.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours, wanted)


def _colors(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3)) - 127


def test_every_image_counts_once(alone: None) -> None:
    """Repeats that fill up a batch neither vote nor are counted."""
    train = FakeLoader([make_batch(4, seed=1), make_batch(4, seed=2, valid=[True, True, False, False])], 6)
    bank = gather_bank(_colors, train)
    assert bank.features.shape == (6, 3)
    torch.testing.assert_close(bank.features.norm(dim=1), torch.ones(6))
    val = FakeLoader([make_batch(4, seed=3), make_batch(4, seed=4, valid=[True, False, False, False])], 5)
    config = KnnConfig(k=3, temperature=0.1)
    found = knn_accuracy(_colors, train, val, config, 10)
    right = 0
    for batch in val.batches:
        for image, label, counts in zip(_colors(batch.images), batch.labels, batch.valid, strict=True):
            rows, labels = bank.features.tolist(), bank.labels.tolist()
            vote = plain_votes(image.tolist(), rows, labels, 3, 0.1)
            right += bool(counts) and max(vote, key=lambda label: vote[label]) == int(label)
    assert found == {"knn/top1": pytest.approx(100 * right / 5)}
    val.num_samples = 6
    with pytest.raises(RuntimeError, match="evaluated 5 images of 6"):
        knn_accuracy(_colors, train, val, config, 10)


def test_computes_no_gradient(alone: None) -> None:
    layer = nn.Linear(3, 3)
    reader = FakeLoader([make_batch(4)])
    knn_accuracy(lambda images: layer(_colors(images)), reader, reader, KnnConfig(), 10)
    assert layer.weight.grad is None
