"""Supervised fine-tuning of the whole encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.optim import Optimizer

from mrmae_ds.config.engine import EngineConfig, check_paired
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import FinetuneConfig
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.data.loaders.erasing import SampleErasing
from mrmae_ds.factory import TeacherBuilder
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.teachers import build_teacher
from mrmae_ds.training.param_groups import ParamGroups, adamw, finetune_groups
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.classifier import ClassifierTask, build_classifier_encoder


class FinetuneTask(ClassifierTask[FinetuneConfig]):
    """Classification with timm's mixup, cutmix, label smoothing and random erasing.

    Args:
        model: an encoder with a classification head.
        config: the recipe's stage.
        data: the recipe's data section, for the input statistics.
        dtype: dtype of the model's input.
    """

    stage_name = "finetune"
    model: Encoder

    def __init__(self, model: Encoder, config: FinetuneConfig, data: DataConfig, dtype: torch.dtype) -> None:
        super().__init__(model, config, data)
        self.dtype = dtype
        self.mix = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=model.num_classes,
            )
            if config.pairs
            else None
        )
        self.soft_loss = SoftTargetCrossEntropy()
        self.erasing: SampleErasing | None = None

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        config: FinetuneConfig,
        engine_config: EngineConfig,
        num_classes: int,
        run_dir: Path | None,
        teacher_builder: TeacherBuilder = build_teacher,
    ) -> FinetuneTask:
        """Build the model; see :func:`mrmae_ds.training.tasks.build.build_task`."""
        check_paired(engine_config, config.pairs)
        model, init, report = build_classifier_encoder(
            recipe, "finetune", config, num_classes, run_dir, config.drop_path, config.pool
        )
        task = cls(model, config, recipe.data, engine_config.model_dtype)
        task.init, task.init_report = init, report
        return task

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained or probed."""
        return self.model

    @property
    def augment(self) -> AugmentSettings | None:
        """RandAugment; None if the recipe has no policy."""
        policy = self.config.rand_augment
        return AugmentSettings(self.data.mean, policy) if policy else None

    @property
    def even_micro_batch(self) -> bool:
        """True if mixup or cutmix is on."""
        return self.config.pairs

    def param_groups(self) -> ParamGroups:
        """Return groups by layer and decay."""
        return finetune_groups(self.model, self.config.optimizer.weight_decay, self.config.layer_decay)

    def adapt_engine_config(self, config: EngineConfig) -> EngineConfig:
        """Return the engine config with the recipe's clipping."""
        return config.with_clipping(self.config.optimizer.clip_grad)

    def make_optimizer(self, groups: ParamGroups, fused: bool) -> Optimizer:
        """Return AdamW."""
        return adamw(self.config.optimizer.betas)(groups, fused)

    def to(self, device: torch.device) -> None:
        """Move the statistics and prepare random erasing."""
        super().to(device)
        if self.config.random_erasing > 0:
            self.erasing = SampleErasing(self.config.random_erasing, device)

    def losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """Compute the cross-entropy of a micro-batch after erasing, mixup and cutmix."""
        images = self.normalize.student(self.normalize.pixels(batch.images), torch.float32)
        if self.erasing is not None:
            images = self.erasing(images, batch.keys)
        seed = key.seed_for("model")
        torch.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # timm's Mixup draws from numpy's global state
        if self.mix is not None:
            images, targets = self.mix(images, batch.labels)
            loss = self.soft_loss(engine(images.to(self.dtype)).float(), targets)
        else:
            logits = engine(images.to(self.dtype)).float()
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss}

    def logits(self, engine: nn.Module, images: Tensor) -> Tensor:
        """Return the logits, float32 [B, classes]."""
        return engine(self.normalize.student(self.normalize.pixels(images), self.dtype)).float()
