"""Histograms of oriented gradients against values of MaskFeat's public code and against their formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mrmae_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.hog import hog_of_pixels, hog_tokens, hog_width
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import Objective, token_loss
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import ViTSpec
from mrmae_ds.models.vit import MaskedViT
from tests.fixtures import load_reference
from tests.support.reference import random_images, random_noise
from tests.support.sample_teachers import normalize

HOG = Objective(target="hog", tap="decoder", tokens="masked", normalize="none", weight=1.0)


@pytest.fixture(scope="module")
def maskfeat() -> dict[str, Tensor]:
    return load_reference("hog")


def test_tokens_are_the_authors_before_and_after_normalization(maskfeat: dict[str, Tensor]) -> None:
    images = maskfeat["images"]
    for given in (images, normalize(images, IMAGENET_MEAN, IMAGENET_STD)):
        torch.testing.assert_close(hog_tokens(given, 16), maskfeat["tokens"], atol=1e-6, rtol=0)


def test_the_loss_is_the_authors(maskfeat: dict[str, Tensor]) -> None:
    per_token = token_loss(maskfeat["prediction"], hog_tokens(maskfeat["images"], 16), "l2")
    assert per_token[maskfeat["mask"].bool()].mean().item() == pytest.approx(maskfeat["loss"].item(), abs=1e-6)


@pytest.mark.parametrize(("patch", "cell"), [(16, 8), (4, 4)])
def test_a_cell_by_hand(patch: int, cell: int) -> None:
    """Pixel by pixel in float64: the cell in the second row and third column, whose neighbors lie in the image."""
    images = random_images(1, 32, seed=4).double()
    row, column, color, histogram = cell, 2 * cell, 1, [0.0] * 9
    pixel = images[0, color].tolist()
    for y in range(row, row + cell):
        for x in range(column, column + cell):
            weights = {-1: 1, 0: 2, 1: 1}
            across = sum(w * (pixel[y + d][x - 1] - pixel[y + d][x + 1]) for d, w in weights.items())
            down = sum(w * (pixel[y - 1][x + d] - pixel[y + 1][x + d]) for d, w in weights.items())
            angle = math.degrees(math.atan2(across, down)) % 180
            histogram[int(angle // 20)] += math.hypot(across, down)
    length = math.sqrt(sum(value**2 for value in histogram))
    tokens, side = hog_tokens(images, patch), patch // cell
    grid = 32 // patch
    token = tokens[0, (row // patch) * grid + column // patch].reshape(3, 9, side, side)
    found = token[color, :, row % patch // cell, column % patch // cell]
    torch.testing.assert_close(found, torch.tensor(histogram, dtype=torch.float64) / length)
    assert tokens.shape == (1, grid**2, hog_width(patch))


def test_images_between_two_levels_are_not_rounded_to_them() -> None:
    """Floats of the Python API: a ramp of 1/8 of a level a pixel, whose gradients all have one direction."""
    ramp = (100 + torch.arange(32) / 8).expand(1, 3, 32, 32) / 255
    for pixels, direction in ((ramp, 4), (ramp.mT, 0)):
        cells = hog_of_pixels(pixels, 8).reshape(4, 4, 3, 9)[1:-1, 1:-1]
        torch.testing.assert_close(cells, torch.eye(9)[direction].expand(2, 2, 3, 9), atol=1e-6, rtol=0)


def test_a_flat_image_is_zero() -> None:
    assert (hog_tokens(torch.full((1, 3, 32, 32), 0.7), 16) == 0).all()


def test_a_model_predicts_them() -> None:
    torch.manual_seed(0)
    encoder, decoder = MaskedViT(ViTSpec(16, 2, 2, patch=8), 32), DecoderSpec(dim=8, depth=1, num_heads=2)
    model = PretrainModel(encoder, FusionSpec(), decoder, {"a": HOG}, {})
    visible, images = choose_visible(random_noise(2, 16, seed=2), (4, 4), 0.25), random_images(2, 32, seed=3)
    prediction, target = model.predict(images, visible)["a"], hog_tokens(images, 8)
    expected = ((prediction - target) ** 2).mean(-1)[visible.mask.bool()].mean()
    torch.testing.assert_close(model(images, visible, {"hog": target})["loss"], expected)
