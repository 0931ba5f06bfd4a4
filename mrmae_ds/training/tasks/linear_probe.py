"""Linear probing: a linear classifier trained on the features of a frozen encoder.

After MAE's and MCMAE's public code: features are the mean of the patches after ``fc_norm``, a BatchNorm without
parameters, one linear layer, LARS. The DeepSpeed engine holds the classifier alone, on ZeRO stage 0 and in float32: it
is a matrix of width times classes, and LARS takes the norms of whole parameters, which ZeRO cuts into pieces. The
encoder is kept beside the engine, whole on every device, as a teacher is.

Shape legend: B images of a micro-batch, C the encoder's width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn
from torch.optim import Optimizer

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import ProbeConfig
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.factory import TeacherBuilder
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.profiling.flops import count_forward
from mrmae_ds.records.sections import Operations
from mrmae_ds.teachers import build_teacher
from mrmae_ds.training.param_groups import ParamGroups
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.classifier import ClassifierTask, build_classifier_encoder
from mrmae_ds.weights.names import PROBE_EPS, fold_batch_norm

_STD = 0.01  # of the initial weights


class LinearClassifier(nn.Module):
    """BatchNorm without parameters, then one linear layer.

    Args:
        width: C.
        num_classes: number of outputs.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=PROBE_EPS, affine=False)
        self.linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits, [B, classes].

        In training, the BatchNorm's statistics are those of all ranks' features together, so that they depend on the
        images of a micro-step and not on the number of ranks. All ranks must call it, with equal B.

        Args:
            features: [B, C], without gradient.
        """
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return self.linear(self.norm(features))
        shares = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, features.contiguous())
        return self.linear(self.norm(torch.cat(shares)).chunk(len(shares))[dist.get_rank()])


class ProbeTask(ClassifierTask[ProbeConfig]):
    """A linear classifier on a frozen encoder's features.

    Args:
        encoder: an encoder with a classification head, weights loaded; the head is not used. Frozen here.
        config: the recipe's stage.
        data: the recipe's data section, for the input statistics.
        engine_config: engine config that sets the encoder's precision.
    """

    stage_name = "probe"
    model: LinearClassifier

    def __init__(self, encoder: Encoder, config: ProbeConfig, data: DataConfig, engine_config: EngineConfig) -> None:
        super().__init__(LinearClassifier(encoder.embed_dim, encoder.num_classes), config, data)
        self._encoder: Encoder = encoder.eval().requires_grad_(False)
        self.engine_config = engine_config
        self.device = torch.device("cpu")
        self.weights: dict[str, Tensor] = {}  # of the encoder, float32 on the CPU: what is exported

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        config: ProbeConfig,
        engine_config: EngineConfig,
        num_classes: int,
        run_dir: Path | None,
        teacher_builder: TeacherBuilder = build_teacher,
    ) -> ProbeTask:
        """Build encoder and classifier; see :func:`mrmae_ds.training.tasks.build.build_task`."""
        encoder, init, report = build_classifier_encoder(recipe, "probe", config, num_classes, run_dir)
        task = cls(encoder, config, recipe.data, engine_config)
        task.init, task.init_report = init, report
        return task

    @property
    def encoder(self) -> Encoder:
        """The frozen encoder."""
        return self._encoder

    @property
    def full_model(self) -> nn.Module:
        """The frozen encoder, whose head is replaced by the trained one at export."""
        return self._encoder

    def param_groups(self) -> ParamGroups:
        """Return the weight, whose learning rate LARS adapts, and the bias, whose learning rate it does not."""
        linear = self.model.linear
        weight: dict[str, Any] = {
            "name": "weight",
            "params": [linear.weight],
            "weight_decay": self.config.optimizer.weight_decay,
        }
        bias: dict[str, Any] = {"name": "bias", "params": [linear.bias], "weight_decay": 0.0}
        return [group | {"lr_scale": 1.0, "always_adapt": group is weight} for group in (weight, bias)]

    def make_optimizer(self, groups: ParamGroups, fused: bool = False) -> Optimizer:
        """Return LARS."""
        return Lars(groups, lr=0.0, momentum=self.config.optimizer.momentum)

    def adapt_engine_config(self, config: EngineConfig) -> EngineConfig:
        """Return the classifier's engine config: the same micro-batch, ZeRO stage 0, float32."""
        return config.for_probe()

    def to(self, device: torch.device) -> None:
        """Move statistics and encoder, and keep a copy of its weights for the export."""
        super().to(device)
        self.device = device
        self.weights = {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}
        self.encoder.to(device, self.engine_config.model_dtype)

    def release(self) -> None:
        """Move the encoder back to the CPU."""
        self.encoder.to("cpu")

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the frozen encoder's features, float32 [B, C].

        Args:
            images: decoded images, uint8 [B, 3, H, W].
        """
        inputs = self.normalize.student(self.normalize.pixels(images), self.engine_config.model_dtype)
        with self.engine_config.autocast(self.device):
            features = self.encoder.forward_head(self.encoder.forward_features(inputs), pre_logits=True)
        return features.float()

    def losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """Compute the cross-entropy of a micro-batch."""
        return {"loss": F.cross_entropy(engine(self.features(batch.images)).float(), batch.labels)}

    def logits(self, engine: nn.Module, images: Tensor) -> Tensor:
        """Return the logits, float32 [B, classes]."""
        return engine(self.features(images)).float()

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return encoder and classifier as the tensors of a fine-tuned model.

        The BatchNorm, a fixed scale and shift after training, is folded into the head.

        Args:
            state: the linear classifier's state, float32 on the CPU.
        """
        parts = ("norm.running_mean", "norm.running_var", "linear.weight", "linear.bias")
        weight, bias = fold_batch_norm(*(state[name] for name in parts))
        return self.weights | {"head.weight": weight, "head.bias": bias}

    def count_operations(self, recipe: Recipe, checkpointing: CheckpointPlan, num_classes: int) -> Operations:
        """Count the frozen encoder's forward pass; the classifier's training is negligible beside it."""
        forward = count_forward(self.encoder.spec, self.image_size, self.num_classes)
        return Operations(training=forward, forward=forward)
