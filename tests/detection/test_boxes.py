"""Anchors, pooling and sampling of boxes."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from mrmae_ds.detection.boxes import ExactAnchors, RoIPool, sample_labels
from mrmae_ds.models.pyramid import STRIDES

SIDES = (32.0, 64.0, 128.0, 256.0, 512.0)


def test_anchors_are_exact_and_centered_on_their_cells() -> None:
    anchors = ExactAnchors(SIDES, STRIDES)
    with torch.device("meta"):
        levels = [torch.empty(2, 1, 1024 // stride, 1024 // stride) for stride in STRIDES]
    assert sum(len(level) for level in anchors.on(levels)) == 261_888
    (found,) = ExactAnchors((32.0,), (4,)).on([torch.zeros(1, 1, 2, 3)])
    sides = found[:3, 2:] - found[:3, :2]
    torch.testing.assert_close(sides, torch.tensor([[45.2548, 22.6274], [32, 32], [22.6274, 45.2548]]))
    centers = (found[::3, 2:] + found[::3, :2]) / 2
    assert centers.tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]  # rows of cells first
    rounded = torch.tensor([[-23.0, -11, 23, 11]])  # torchvision's
    assert box_iou(found[:1], rounded).item() == pytest.approx(0.957, abs=1e-2)


def test_anchors_do_not_follow_autocast_or_the_type_of_the_maps() -> None:
    maps = [torch.zeros(1, 1, 256, 256)]
    anchors, expected = ExactAnchors((32.0,), (4,)), ExactAnchors((32.0,), (4,)).on(maps)[0]
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = anchors.on([maps[0].bfloat16()])
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_levels_of_boxes() -> None:
    pool = RoIPool(7, STRIDES[:4])
    sides = torch.tensor([1.0, 111.9, 112.1, 223.9, 224.1, 447.9, 448.1, 2000.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    assert pool.level_of(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pooling_is_exact_for_an_image_in_a_part_of_the_square() -> None:
    """A map whose cells hold their own centers' coordinates is pooled to the centers of a box's cells."""
    levels = []
    for stride in STRIDES[:4]:
        centers = (torch.arange(1024 // stride) + 0.5) * stride
        levels.append(torch.stack(torch.meshgrid(centers, centers, indexing="ij"))[None])
    # Of a 333 x 500 image, levels 1, 0 and 2; of a larger one, level 3.
    box = torch.tensor([[100.0, 60, 310, 270], [40, 20, 110, 90], [20, 100, 314, 394], [30, 50, 520, 540]])
    pool = RoIPool(7, STRIDES[:4])
    assert pool.level_of(box).tolist() == [1, 0, 2, 3]
    pooled, cells = pool(levels, [box]), torch.arange(7) + 0.5
    cell = torch.tensor([30.0, 10, 42, 70])[:, None]
    top, left = box[:, 1, None] + cell * cells, box[:, 0, None] + cell * cells
    torch.testing.assert_close(pooled[:, 0], top[:, :, None].expand(-1, -1, 7), atol=1e-3, rtol=0)
    torch.testing.assert_close(pooled[:, 1], left[:, None].expand(-1, 7, -1), atol=1e-3, rtol=0)


def test_pooling_keeps_the_order_and_every_level_gets_a_gradient() -> None:
    levels = [torch.full((2, 3, 64 // s, 64 // s), float(s), requires_grad=True) for s in STRIDES[:4]]
    boxes = [torch.tensor([[0.0, 0, 250, 250], [0, 0, 8, 8]]), torch.tensor([[0.0, 0, 120, 120]])]
    pooled = RoIPool(7, STRIDES[:4])(levels, boxes)
    assert pooled.shape == (3, 3, 7, 7) and pooled[:, 0, 0, 0].tolist() == [16, 4, 8]
    pooled.sum().backward()
    assert all(level.grad is not None for level in levels) and not levels[3].grad.any()
    nothing = RoIPool(7, STRIDES[:4])(levels, [torch.zeros(0, 4)] * 2)
    assert nothing.shape == (0, 3, 7, 7) and nothing.requires_grad


def test_pooling_of_bfloat16_is_that_of_float32_with_exact_boxes() -> None:
    level = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    levels, boxes = [level] * 4, [torch.tensor([[100.3, 30.7, 180.9, 110.2]])]
    expected = RoIPool(7, STRIDES[:4])([x.float() for x in levels], boxes)
    with torch.autocast("cpu", torch.bfloat16):
        found = RoIPool(7, STRIDES[:4])(levels, boxes)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())


def test_sampling_is_bounded_and_repeats_with_its_seed() -> None:
    labels = torch.tensor([-1.0] * 10 + [1.0] * 20 + [0.0] * 70)

    def draw(seed: int) -> tuple[list[int], list[int]]:
        objects, background = sample_labels(labels, 32, 0.25, torch.Generator().manual_seed(seed))
        return objects.tolist(), background.tolist()

    objects, background = draw(0)
    assert len(set(objects)) == 8 and len(set(background)) == 24
    assert labels[objects].eq(1).all() and labels[background].eq(0).all()
    assert draw(0) == (objects, background) != draw(1)
    few, rest = sample_labels(labels[:15], 32, 0.25, None)
    assert (sorted(few.tolist()), rest.tolist()) == ([10, 11, 12, 13, 14], [])
