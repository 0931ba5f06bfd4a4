"""What a stage computes on a batch. The loop knows a task only by this; it knows nothing of CLIP or pixels.

Shape legend: B images of a micro-batch, L tokens of the student's grid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import FinetuneConfig, PretrainConfig
from mrmae_ds.data.loaders.augment import SampleErasing
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.imagenet import Rgb
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.teachers import PlacedTeacher, Teacher, place_teacher
from mrmae_ds.training.param_groups import finetune_groups, pretrain_groups


@dataclass(frozen=True)
class MicroBatchKey:
    """Which micro-batch this is. All randomness of a step is a function of it, so a resumed run repeats it.

    Attributes:
        seed: the run's. step: optimizer steps done before. micro: micro-batch of the step.
        rank, world_size, micro_batch: which part of the global batch this process holds.
    """

    seed: int
    step: int
    micro: int
    rank: int
    world_size: int
    micro_batch: int

    @property
    def part(self) -> int:
        """Which part of the global batch this is: on another number of processes the same images have the same."""
        return self.micro * self.world_size + self.rank

    def seed_for(self, purpose: str, per_part: bool = True) -> int:
        """A 63-bit seed, for this part of the global batch; for the whole step if not ``per_part``."""
        where = (self.part,) if per_part else ()
        digest = hashlib.blake2b(repr((self.seed, self.step, where, purpose)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def noise(self, num_tokens: int) -> Tensor:
        """Uniform noise of this part of the global batch, float32 [B, L] on the CPU.

        Drawn for the whole global batch up to this part, so that an image's noise depends on its place in the
        batch and not on the number of processes.
        """
        first = self.part * self.micro_batch
        generator = torch.Generator().manual_seed(self.seed_for("mask", per_part=False))
        noise = torch.rand(first + self.micro_batch, num_tokens, generator=generator)
        return noise[first:]


class Task(Protocol):
    """A stage's model and losses."""

    model: nn.Module
    teachers: dict[str, Teacher]

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; called before the model is wrapped."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what the engine does not own (teachers, statistics); all ranks call it, after the engine was built."""
        ...

    def release(self) -> None:
        """Give back the memory of what the engine does not own. No losses after it; a second call does nothing."""
        ...

    def losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """``loss`` and its parts by name, scalars."""
        ...


class Normalize:
    """Decoded images, uint8 [B, 3, H, W], to pixels in 0 to 1 and to a model's normalized input.

    Args:
        mean, std: a channel each, of pixels in 0 to 1.
    """

    def __init__(self, mean: Rgb, std: Rgb) -> None:
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)

    def to(self, device: torch.device) -> None:
        """Move the statistics to where the images are."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def pixels(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in 0 to 1."""
        return images.float() / 255

    def student(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """What the model takes, [B, 3, H, W]."""
        return ((pixels - self.mean) / self.std).to(dtype)


class PretrainTask:
    """Mimic and reconstruct: teachers give targets and importance, the student predicts them.

    Args:
        model: the student.
        teachers: by the recipe's name, on the CPU; each is asked once a batch, in this order, on every rank.
        config: the recipe's stage.
        data: input statistics.

    Attributes:
        placed: the teachers where the recipe wants their weights, from :meth:`to` on. Until then they are asked where
            they are.
    """

    def __init__(
        self, model: PretrainModel, teachers: dict[str, Teacher], config: PretrainConfig, data: DataConfig
    ) -> None:
        self.model, self.teachers, self.config = model, teachers, config
        self.placed: dict[str, PlacedTeacher] = {}
        self.normalize = Normalize(data.mean, data.std)
        self.grid = model.encoder.grid

    def groups(self) -> list[dict[str, Any]]:
        """See :class:`Task`."""
        return pretrain_groups(self.model, self.config.optimizer.weight_decay)

    def to(self, device: torch.device) -> None:
        """See :class:`Task`."""
        self.normalize.to(device)
        for name, teacher in self.teachers.items():
            self.placed[name] = place_teacher(name, teacher, self.config.placement[name], device)

    def release(self) -> None:
        """See :class:`Task`."""
        for placed in self.placed.values():
            placed.release()

    def losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """See :class:`Task`."""
        pixels = self.normalize.pixels(batch.images)
        outputs = {name: ask(pixels) for name, ask in (self.placed or self.teachers).items()}
        masking = self.config.masking
        importance = None if masking.mode == "random" else outputs[masking.teacher or ""].importance
        noise = key.noise(self.grid[0] * self.grid[1]).to(pixels.device)
        visible = choose_visible(noise, self.grid, masking.keep_ratio, masking.mode, importance)
        targets = {name: output.tokens for name, output in outputs.items()}
        torch.manual_seed(key.seed_for("model"))
        # float32 whatever the model's precision: the pixel targets are made of it.
        return engine(self.normalize.student(pixels, torch.float32), visible, targets)


class FinetuneTask:
    """Classification with timm's mixup, cutmix, label smoothing and random erasing.

    Args:
        model: an encoder with a head.
        config: the recipe's stage.
        data: input statistics.
        num_classes: of the data set.
        dtype: of the student's input.
    """

    def __init__(
        self, model: nn.Module, config: FinetuneConfig, data: DataConfig, num_classes: int, dtype: torch.dtype
    ) -> None:
        self.model, self.config, self.num_classes, self.dtype = model, config, num_classes, dtype
        self.teachers: dict[str, Teacher] = {}
        self.normalize = Normalize(data.mean, data.std)
        self.mix = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )
            if config.pairs
            else None
        )
        self.soft_loss = SoftTargetCrossEntropy()
        self.erasing: SampleErasing | None = None

    def groups(self) -> list[dict[str, Any]]:
        """See :class:`Task`."""
        config = self.config
        return finetune_groups(self.model, config.optimizer.weight_decay, config.layer_decay)

    def to(self, device: torch.device) -> None:
        """See :class:`Task`."""
        self.normalize.to(device)
        if self.config.random_erasing > 0:
            self.erasing = SampleErasing(self.config.random_erasing, device)

    def release(self) -> None:
        """See :class:`Task`; there is nothing to give back."""

    def losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """See :class:`Task`."""
        images = self.normalize.student(self.normalize.pixels(batch.images), torch.float32)
        if self.erasing is not None:
            images = self.erasing(images, batch.keys)
        self._seed(key)
        if self.mix is not None:
            images, targets = self.mix(images, batch.labels)
            loss = self.soft_loss(engine(images.to(self.dtype)).float(), targets)
        else:
            logits = engine(images.to(self.dtype)).float()
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss}

    def logits(self, engine: nn.Module, images: Tensor) -> Tensor:
        """float32 [B, classes] of decoded images, uint8 [B, 3, H, W]."""
        return engine(self.normalize.student(self.normalize.pixels(images), self.dtype)).float()

    def _seed(self, key: MicroBatchKey) -> None:
        seed = key.seed_for("model")
        torch.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # timm's Mixup draws from numpy's global state
