"""RandAugment on the device that trains, for nodes with few cores per GPU.

Pillow's operations as torch's, each a launch of its own: nothing is fused, so that the pixels equal those of
``augment.Augment`` to the last bit on every device. The host never waits for the device.

Shapes: n images of one operation, S image size, P = S * S pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mrmae_ds.data.loaders.augment import AugmentSettings, Change, PolicyDraws
from mrmae_ds.data.loaders.base import Batch, Loader, to_device
from mrmae_ds.data.types import UIntArray
from mrmae_ds.errors import UserError


class DeviceAugmentLoader:
    """Loader that augments another loader's batches where they are.

    Args:
        inner: yields batches without augmentation.
        settings: policy, fill color and jitter.
        size: S, pixels.
        device: of the batches.

    Raises:
        UserError: if the policy has an operation that exists on the CPU only.
    """

    def __init__(self, inner: Loader[Batch], settings: AugmentSettings, size: int, device: torch.device) -> None:
        self.inner, self.augment = inner, DeviceAugment(settings, size, device)
        self.num_samples, self.batches_per_epoch = inner.num_samples, inner.batches_per_epoch

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch; see ``Loader.epoch``."""
        return self._deliver(self.inner.epoch(epoch, start_batch))

    def _deliver(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield replace(batch, images=self.augment(batch.images, batch.keys))

    def close(self) -> None:
        """Close the other loader."""
        self.inner.close()


class DeviceAugment:
    """Color jitter and RandAugment of batches on a device; see ``DeviceAugmentLoader``."""

    def __init__(self, settings: AugmentSettings, size: int, device: torch.device) -> None:
        self._draws, self._device = PolicyDraws(settings, size), device
        if not self._draws.complete:
            raise UserError(
                f"loader.augment_on: device lacks timm's blur, which rand_augment: {settings.policy!r} has; use cpu"
            )
        self._fill = to_device(torch.tensor(settings.fill, dtype=torch.uint8), device)

    def __call__(self, images: Tensor, keys: UIntArray) -> Tensor:
        """Augment a batch, in its memory.

        Args:
            images: uint8 [B, 3, S, S], a view of channels-last memory, on the device.
            keys: uint64 [B], of the samples.

        Returns:
            The augmented batch, of the same shape and layout.
        """
        pixels = images.permute(0, 2, 3, 1).contiguous().flatten(1, 2)  # [B, P, 3]
        codes, arguments = self._draws(keys)
        steps = [
            (Change(int(code)), layer, np.flatnonzero(codes[:, layer] == code))
            for layer in range(codes.shape[1])
            for code in np.unique(codes[:, layer])
            if code != Change.NONE
        ]
        if not steps:
            return images
        chosen = np.concatenate([rows for _, _, rows in steps])
        drawn = np.concatenate([arguments[rows, layer] for _, layer, rows in steps])
        rows_there, drawn_there = (to_device(torch.from_numpy(array), self._device) for array in (chosen, drawn))
        start = 0
        for change, _, rows in steps:
            here = slice(start, start + len(rows))
            index, values = rows_there[here], drawn_there[here]
            pixels.index_copy_(0, index, self._change(change, pixels.index_select(0, index), values))
            start += len(rows)
        return pixels.unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)

    def _change(self, change: Change, pixels: Tensor, values: Tensor) -> Tensor:
        if change is Change.AFFINE:
            return _transform(pixels, values, self._fill)
        return _CHANGES[change](pixels, values[:, :1, None])


def _look_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """Replace values, uint8 [n, P, 3], by tables of each image and color, [n, 256, 3]."""
    return tables.clamp(0, 255).to(torch.uint8).gather(1, pixels.long())


def _stretch(pixels: Tensor, _: Tensor) -> Tensor:
    """Apply ``ImageOps.autocontrast``."""
    low, high = (bound.double() for bound in (pixels.amin(1, True), pixels.amax(1, True)))
    values = torch.arange(256, dtype=torch.float64, device=pixels.device)[None, :, None]
    span = (high - low).clamp(min=1)
    scale = torch.full_like(span, 255) / span  # torch divides numbers and tensors by way of the inverse
    return _look_up(pixels, torch.where(high > low, (values * scale + -low * scale).clamp(0, 255), values))


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    """Apply ``ImageOps.equalize``."""
    count, size, _colors = pixels.shape
    tables = torch.arange(3 * count, device=pixels.device).view(count, 1, 3) * 256
    counts = torch.zeros(768 * count, dtype=torch.int64, device=pixels.device)
    where = (pixels.long() + tables).flatten()
    counts = counts.scatter_add_(0, where, torch.ones_like(where)).view(count, 3, 256).transpose(1, 2)
    step = (size - counts.gather(1, pixels.amax(1, True).long())).div(255, rounding_mode="floor")
    before = counts.cumsum(1) - counts + step.div(2, rounding_mode="floor")
    values = torch.arange(256, device=pixels.device)[None, :, None]
    return _look_up(pixels, torch.where(step > 0, before.div(step.clamp(min=1), rounding_mode="floor"), values))


def _blend(one: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Apply Pillow's ``blend`` to values, int32."""
    return (one.float() + (other - one).float() * factor.float()).clamp(0, 255).to(torch.uint8)


def _gray(pixels: Tensor) -> Tensor:
    """Return Pillow's luma, int32 [n, P, 1]."""
    red, green, blue = pixels.int().unbind(2)
    return ((red * 19595 + green * 38470 + blue * 7471 + (1 << 15)) >> 16)[..., None]


def _change_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Apply ``ImageEnhance.Contrast``."""
    total, count = _gray(pixels).sum(1, keepdim=True), pixels.shape[1]
    mean = (2 * total + count).div(2 * count, rounding_mode="floor")
    return _blend(mean.int(), pixels.int(), factor)


def _sharpen(pixels: Tensor, factor: Tensor) -> Tensor:
    """Apply ``ImageEnhance.Sharpness``, which keeps the outermost pixels."""
    size = round(pixels.shape[1] ** 0.5)
    square = pixels.int().view(-1, size, size, 3)
    total, inner = 4 * square[:, 1:-1, 1:-1], slice(1, -1)
    for y in range(3):
        for x in range(3):
            total = total + square[:, y : size - 2 + y, x : size - 2 + x]
    smooth = square.clone()
    smooth[:, inner, inner] = (2 * total + 13).div(26, rounding_mode="floor")
    return _blend(smooth, square, factor[..., None]).view_as(pixels)


def _cubic(one: Tensor, two: Tensor, three: Tensor, four: Tensor, d: Tensor) -> Tensor:
    """Interpolate between the second and the third of four values, float64, as Pillow does."""
    slope, square, cube = three - one, 2.0 * (one - two) + three - four, two - one - three + four
    return two + d * (slope + d * (square + d * cube))


def _transform(pixels: Tensor, matrix: Tensor, filling: Tensor) -> Tensor:
    """Apply ``Image.transform`` by matrices, float64 [n, 6], bicubic."""
    size = round(pixels.shape[1] ** 0.5)
    middles = torch.arange(size, dtype=torch.float64, device=pixels.device) + 0.5
    x, y = middles.repeat(size), middles.repeat_interleave(size)
    a, b, c, d, e, f = matrix[..., None].unbind(1)
    left, top = a * x + b * y + c, d * x + e * y + f
    inside = (left >= 0) & (left < size) & (top >= 0) & (top < size)
    left, top = (torch.where(inside, place - 0.5, 0.0) for place in (left, top))
    column, row = left.floor(), top.floor()
    across, down = (left - column)[..., None], (top - row)[..., None]
    rows = [(row.long() + near).clamp(0, size - 1) * size for near in range(-1, 3)]
    columns = [(column.long() + near).clamp(0, size - 1) for near in range(-1, 3)]

    lines = []
    for start in rows:
        p, q, r, s = (pixels.gather(1, (start + place)[..., None].expand_as(pixels)).double() for place in columns)
        lines.append(_cubic(p, q, r, s, across))
    p, q, r, s = lines
    result = _cubic(p, q, r, s, down)
    return torch.where(inside[..., None], result.clamp(0, 255).to(torch.uint8), filling)


_CHANGES: dict[Change, Callable[[Tensor, Tensor], Tensor]] = {
    Change.AUTO_CONTRAST: _stretch,
    Change.EQUALIZE: _equalize,
    Change.INVERT: lambda pixels, _: 255 - pixels,
    Change.POSTERIZE: lambda pixels, bits: pixels & (256 - (1 << (8 - bits.long()))).to(torch.uint8),
    Change.SOLARIZE: lambda pixels, bound: torch.where(pixels < bound, pixels, 255 - pixels),
    Change.SOLARIZE_ADD: lambda pixels, add: torch.where(
        pixels < 128, (pixels.int() + add.int()).clamp(max=255).to(torch.uint8), pixels
    ),
    Change.COLOR: lambda pixels, factor: _blend(_gray(pixels), pixels.int(), factor),
    Change.CONTRAST: _change_contrast,
    Change.BRIGHTNESS: lambda pixels, factor: _blend(torch.zeros_like(pixels).int(), pixels.int(), factor),
    Change.SHARPNESS: _sharpen,
}
