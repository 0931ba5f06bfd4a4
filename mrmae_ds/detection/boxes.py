"""Anchors, sampling and pooling of boxes, as Detectron2 computes them.

Boxes are float32 [..., 4]: left, top, right, bottom in pixels of the input. Shape legend: B images, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Generator, Tensor, nn
from torchvision.ops import roi_align

from mrmae_ds.data.loaders.base import to_device

Size = tuple[int, int]  # height and width


def float32_island(x: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast on the device of ``x``: bfloat16 moves boxes by up to 4 pixels."""
    return torch.autocast(x.device.type, enabled=False)


class ExactAnchors:
    """Anchors of all cells of a pyramid, centered at cell index * stride, with unrounded sides.

    They are no buffers of a module, because an engine casts buffers to bfloat16.

    Args:
        sides: side of the square anchor of each level in pixels.
        strides: of the levels.
        ratios: height by width of the anchors of a cell; all have the square's area.
    """

    def __init__(
        self, sides: Sequence[float], strides: Sequence[int], ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        self.sides, self.strides, self.ratios = tuple(sides), tuple(strides), tuple(ratios)
        self._made: dict[tuple[tuple[Size, ...], torch.device], list[Tensor]] = {}

    def on(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of maps [B, C, h, w]: of each level [h * w * ratios, 4], rows of cells first."""
        sizes, device = tuple((x.shape[2], x.shape[3]) for x in levels), levels[0].device
        if (sizes, device) not in self._made:
            levels_of = zip(self.sides, self.strides, sizes, strict=True)
            self._made = {(sizes, device): [self._level(*level).to(device) for level in levels_of]}
        return self._made[sizes, device]

    def _level(self, side: float, stride: int, size: Size) -> Tensor:
        widths = [side / math.sqrt(ratio) for ratio in self.ratios]
        halves = torch.tensor([(w / 2, w * ratio / 2) for w, ratio in zip(widths, self.ratios, strict=True)])
        y, x = torch.meshgrid(*(torch.arange(count) * float(stride) for count in size), indexing="ij")
        centers = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
        return torch.cat([centers - halves, centers + halves], dim=-1).reshape(-1, 4)


class RoIPool(nn.Module):
    """Pool boxes from the level of the pyramid that fits their area: RoIAlign, aligned, with adaptive sampling.

    torchvision's pooler guesses the levels' scales from the first images, and is half a cell off.

    Args:
        output_size: side of the result in cells.
        strides: of the levels, powers of two, ascending.
    """

    def __init__(self, output_size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.output_size, self.strides = output_size, tuple(strides)

    def level_of(self, boxes: Tensor) -> Tensor:
        """Return the index of the level of boxes [n, 4]: int64 [n]. Sides of 224 pixels belong to stride 16."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        first, last = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        return torch.floor(4 + torch.log2(sides / 224 + 1e-8)).clamp(first, last).long() - first

    def forward(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool boxes of images; every level takes part, also without a box, and so gets a gradient.

        Args:
            levels: maps [B, C, h, w], one for each stride.
            boxes: of each image, [n, 4]; n may be 0.

        Returns:
            [sum of n, C, output_size, output_size], of the type of the maps.
        """
        with float32_island(levels[0]):
            numbered = [torch.cat([torch.full_like(b[:, :1], i), b], dim=1) for i, b in enumerate(boxes)]
            rois = torch.cat(numbered)
            level_of = self.level_of(rois[:, 1:])
            # One wait for the device, for all levels.
            counts = torch.stack([(level_of == i).sum() for i in range(len(levels))]).tolist()
            return self.pool(levels, rois, level_of.argsort(stable=True).split(counts))

    def pool(self, levels: Sequence[Tensor], rois: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Pool boxes whose levels are known; arguments and result are those of :meth:`forward`, in float32.

        Args:
            levels: maps.
            rois: index of the image and box, [r, 5].
            rows: of each level the boxes that belong to it, int64; r in all.
        """
        cells = [
            roi_align(x.float(), rois[chosen], self.output_size, 1 / stride, 0, aligned=True)
            for x, stride, chosen in zip(levels, self.strides, rows, strict=True)
        ]
        return torch.cat(cells)[torch.cat(list(rows)).argsort()].to(levels[0].dtype)


def sample_labels(labels: Tensor, count: int, fraction: float, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Draw boxes for the losses of an image.

    Args:
        labels: above 0 for objects, 0 for background, below 0 for neither, [n].
        count: boxes to draw, fewer if there are not enough.
        fraction: largest share of objects.
        generator: of this image, on the CPU: no device, rank or other image changes the draw. None is torch's global.

    Returns:
        Indices of the drawn objects, and of the drawn background.
    """
    objects, background = torch.where(labels > 0)[0], torch.where(labels == 0)[0]
    drawn = _draw(objects, int(count * fraction), generator)
    return drawn, _draw(background, count - len(drawn), generator)


def _draw(indices: Tensor, count: int, generator: Generator | None) -> Tensor:
    order = torch.randperm(len(indices), generator=generator)[:count]
    return indices[to_device(order, indices.device)]
