"""Augmentation, of fine-tuning by timm's code, with all randomness derived from each sample's key.

Generators are seeded by the sample's key before each image, so the result does not depend on threads, processes, ranks
or restarts. ``Augment`` applies color jitter and RandAugment by Pillow; ``PolicyDraws`` draws the same for other code.

Shapes: B samples, S image size, L operations of a sample.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mrmae_ds.data.loaders.crop import splitmix64
from mrmae_ds.data.types import FloatArray, IntArray, UIntArray
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import Rgb

_POLICY_FORM = re.compile(r"rand(-((m|n|inc|mmax)\d+|(p|mstd)\d+(\.\d+)?|t(weights|3aw?)))*")
# Uses of a sample's key besides its box and flip.
_POLICY, _JITTER = 0x706F6C69, 0x6A697474


@dataclass(frozen=True)
class AugmentSettings:
    """Settings of RandAugment and color jitter.

    Attributes:
        mean: color, 0 to 1, of the area that a shift or rotation uncovers.
        policy: timm's configuration string (``rand-m9-mstd0.5-inc1``); None is no RandAugment.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 is none.
    """

    mean: Rgb
    policy: str | None = None
    color_jitter: float = 0.0

    @property
    def fill(self) -> tuple[int, ...]:
        """``mean``, 0 to 255."""
        return tuple(min(255, round(255 * value)) for value in self.mean)


class Change(IntEnum):
    """Operations of color jitter and RandAugment; those of several names in timm that compute the same are one."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    AFFINE = 11


_CHANGES = {
    "AutoContrast": Change.AUTO_CONTRAST,
    "Equalize": Change.EQUALIZE,
    "Invert": Change.INVERT,
    "Posterize": Change.POSTERIZE,
    "Solarize": Change.SOLARIZE,
    "SolarizeAdd": Change.SOLARIZE_ADD,
    "Color": Change.COLOR,
    "Contrast": Change.CONTRAST,
    "Brightness": Change.BRIGHTNESS,
    "Sharpness": Change.SHARPNESS,
}
_GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_VARIANT = re.compile(r"Increasing$|Original$")  # timm's names differ in how magnitudes become arguments


class _Policy:
    """Color jitter and timm's RandAugment with generators of their own; see ``Augment``."""

    def __init__(self, settings: AugmentSettings, size: int) -> None:
        self._built_from, self._jitter, self._transform = (settings, size), settings.color_jitter, None
        self._random, self._choices = random.Random(), np.random.RandomState()
        if settings.policy is None:
            return
        if not _POLICY_FORM.fullmatch(settings.policy):  # timm ignores unknown parts
            raise UserError(
                f"rand_augment: {settings.policy!r} is not a RandAugment policy of timm; expected a form like "
                "rand-m9-mstd0.5-inc1, of parts m, n, p, mstd, mmax, inc (each with a number), tweights, t3a, t3aw"
            )
        parameters = {
            "translate_const": int(size * 0.45),
            "img_mean": settings.fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        timm = _auto_augment()
        self._transform = timm.rand_augment_transform(settings.policy, parameters)
        timm.random, timm.np = self._random, SimpleNamespace(random=self._choices)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[type[_Policy], tuple[AugmentSettings, int]]:
        """Build it again where it is unpickled."""
        return type(self), self._built_from

    def _operations(self) -> list[Any]:
        return self._transform.ops if self._transform is not None else []

    def _draw_jitter(self, seed: int) -> list[tuple[Change, float]]:
        """Draw brightness, contrast and saturation in random order, as torchvision's ColorJitter does."""
        if not self._jitter:
            return []
        self._random.seed(seed)
        changes = [Change.BRIGHTNESS, Change.CONTRAST, Change.COLOR]
        self._random.shuffle(changes)
        return [(change, self._random.uniform(1 - self._jitter, 1 + self._jitter)) for change in changes]

    def _seed(self, seed: int) -> None:
        self._random.seed(seed)
        self._choices.seed(seed & 0xFFFFFFFF)


class Augment(_Policy):
    """Color jitter and RandAugment of single images by Pillow; not for several threads at a time.

    Args:
        settings: policy, fill color and jitter.
        size: S, pixels.

    Raises:
        UserError: if the policy is invalid.
    """

    def __init__(self, settings: AugmentSettings, size: int) -> None:
        super().__init__(settings, size)
        for operation in self._operations():
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, key: int) -> Image.Image:
        """Augment one RGB image; its size stays."""
        keys = np.array([key], dtype=np.uint64)
        for change, factor in self._draw_jitter(sample_seeds(keys, _JITTER)[0]):
            image = _ENHANCERS[change](image).enhance(factor)
        if self._transform is None:
            return image
        self._seed(sample_seeds(keys, _POLICY)[0])
        return self._transform(image)


_ENHANCERS = {
    Change.BRIGHTNESS: ImageEnhance.Brightness,
    Change.CONTRAST: ImageEnhance.Contrast,
    Change.COLOR: ImageEnhance.Color,
}


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Apply timm's posterize, which keeps 0 bits at its highest magnitude: black before Pillow 12, which refuses it."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class PolicyDraws(_Policy):
    """Draws of ``Augment`` as numbers: the operations of each sample, for code that applies them to whole batches.

    Args:
        settings: policy and jitter.
        size: S, pixels.

    Attributes:
        complete: False if the policy has an operation that is not a ``Change``: timm's blur, of ``t3a`` and ``t3aw``.
    """

    def __init__(self, settings: AugmentSettings, size: int) -> None:
        super().__init__(settings, size)
        self.complete = True
        self._recorder = _Recorder(size)
        for operation in self._operations():
            name = _VARIANT.sub("", operation.name)
            if name in _CHANGES:
                operation.aug_fn = partial(_record, _CHANGES[name])
            elif name == "Desaturate":
                operation.aug_fn = _desaturate
            elif name not in _GEOMETRY:
                self.complete = False

    def __call__(self, keys: UIntArray) -> tuple[IntArray, FloatArray]:
        """Draw for B samples.

        Args:
            keys: uint64 [B], of the samples.

        Returns:
            Each sample's L operations, a ``Change`` each, int64 [B, L], and their arguments, float64 [B, L, 6]: the
            matrix of an affine change, or one number.
        """
        layers = (3 if self._jitter else 0) + (self._transform.num_layers if self._transform is not None else 0)
        codes, arguments = np.zeros((len(keys), layers), dtype=np.int64), np.zeros((len(keys), layers, 6))
        for b, (seed, jitter_seed) in enumerate(
            zip(sample_seeds(keys, _POLICY), sample_seeds(keys, _JITTER), strict=True)
        ):
            changes = self._recorder.changes
            changes[:] = [(change, (factor,)) for change, factor in self._draw_jitter(jitter_seed)]
            if self._transform is not None:
                self._seed(seed)
                self._transform(self._recorder)
            for layer, (change, values) in enumerate(changes):
                codes[b, layer] = change
                arguments[b, layer, : len(values)] = values
        return codes, arguments


class _Recorder(Image.Image):
    """Stands in for an image, and keeps the operations that are applied to it.

    Args:
        side: S, pixels.

    Attributes:
        changes: the operations and their arguments.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.changes: list[tuple[Change, Sequence[float]]] = []
        self._side = side

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self._side, self._side

    def rotate(self, angle: float, *_: Any, **options: Any) -> Image.Image:
        """Record a rotation; with a center, so that Pillow computes a matrix for right angles too."""
        return super().rotate(angle, center=(self._side / 2, self._side / 2), **options)

    def transform(self, size: tuple[int, int], method: Any, data: Any = None, *_: Any, **__: Any) -> Image.Image:
        """Record an affine change."""
        self.changes.append((Change.AFFINE, data))
        return self


def _record(change: Change, recorder: _Recorder, *arguments: float, **_: Any) -> _Recorder:
    if change is Change.POSTERIZE:
        arguments = (min(max(arguments[0], 0), 8),)
    recorder.changes.append((change, arguments))
    return recorder


def _desaturate(recorder: _Recorder, factor: float, **_: Any) -> _Recorder:
    """Record timm's ``desaturate``."""
    return _record(Change.COLOR, recorder, min(1.0, max(0.0, 1.0 - factor)))


def _auto_augment() -> ModuleType:
    """Return a copy of timm's ``auto_augment``.

    The module draws from the global generators, which other threads use: each copy can have others. It is loaded by its
    path, because worker processes would import all of timm's models with its package: seconds, and 600 MB.
    """
    package = importlib.util.find_spec("timm")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "data", "auto_augment.py")
    specification = importlib.util.spec_from_file_location("timm.data.auto_augment", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def sample_seeds(keys: UIntArray, purpose: int) -> list[int]:
    """Return seeds of 63 bits.

    Args:
        keys: uint64 [B], of the samples.
        purpose: number of a use of the keys: different uses get independent seeds.
    """
    return (splitmix64(keys ^ np.uint64(purpose)) >> np.uint64(1)).tolist()
