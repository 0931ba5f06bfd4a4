"""Linear probing: how good features are for a linear classifier that alone is trained.

After MAE's and MCMAE's public code: features are the mean of the patches after ``fc_norm``, a BatchNorm without
parameters, one linear layer, LARS. The DeepSpeed engine holds the classifier alone, on ZeRO stage 0 and in float32: it
is a matrix of width times classes, and LARS takes the norms of whole parameters, which ZeRO cuts into pieces. The
encoder stands beside the engine, whole on every device, as a teacher does.

Shape legend: B images of a micro-batch, C the encoder's width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import ProbeConfig
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.models.pretrain import Encoder
from mrmae_ds.teachers import Teacher
from mrmae_ds.training.tasks.base import MicroBatchKey, Normalize

_EPS = 1e-6  # of the BatchNorm, as in MAE's linear probing
_STD = 0.01  # of the first weights


class LinearClassifier(nn.Module):
    """BatchNorm without parameters, then one linear layer.

    Args:
        width: C. num_classes: outputs.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=_EPS, affine=False)
        self.linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, C], which need no gradient, to logits [B, classes].

        In training the statistics are of all processes' features together, so that they depend on the images of a
        micro-step and not on how many processes share them. All processes must call it, with as many images.
        """
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return self.linear(self.norm(features))
        shares = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, features.contiguous())
        return self.linear(self.norm(torch.cat(shares)).chunk(len(shares))[dist.get_rank()])


class ProbeTask:
    """A linear classifier on a frozen encoder's features.

    Args:
        encoder: an encoder with a head, weights loaded, whose head is not used; frozen here.
        config: the recipe's stage.
        data: input statistics.
        num_classes: of the data set.
        engine_config: whose precision the encoder has.
    """

    def __init__(
        self, encoder: Encoder, config: ProbeConfig, data: DataConfig, num_classes: int, engine_config: EngineConfig
    ) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.model = LinearClassifier(encoder.embed_dim, num_classes)
        self.config, self.num_classes, self.engine_config = config, num_classes, engine_config
        self.teachers: dict[str, Teacher] = {}
        self.normalize = Normalize(data.mean, data.std)
        self.device = torch.device("cpu")
        self.weights: dict[str, Tensor] = {}  # float32, on the CPU: what is exported

    def groups(self) -> list[dict[str, Any]]:
        """See :class:`Task`: the weight, whose rate LARS adapts, and the bias, whose rate it does not."""
        linear = self.model.linear
        weight = {"name": "weight", "params": [linear.weight], "weight_decay": self.config.optimizer.weight_decay}
        bias = {"name": "bias", "params": [linear.bias], "weight_decay": 0.0}
        return [group | {"lr_scale": 1.0, "always_adapt": group is weight} for group in (weight, bias)]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """LARS; the rate is written before every step."""
        return Lars(groups, lr=0.0, momentum=self.config.optimizer.momentum)

    def to(self, device: torch.device) -> None:
        """See :class:`Task`."""
        self.device = device
        self.normalize.to(device)
        self.weights = {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}
        self.encoder.to(device, self.engine_config.model_dtype)

    def release(self) -> None:
        """See :class:`Task`."""
        self.encoder.to("cpu")

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """float32 [B, C] of decoded images, uint8 [B, 3, H, W]."""
        inputs = self.normalize.student(self.normalize.pixels(images), self.engine_config.model_dtype)
        with self.engine_config.autocast(self.device):
            features = self.encoder.forward_head(self.encoder.forward_features(inputs), pre_logits=True)
        return features.float()

    def losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """See :class:`Task`."""
        return {"loss": F.cross_entropy(engine(self.features(batch.images)).float(), batch.labels)}

    def logits(self, engine: nn.Module, images: Tensor) -> Tensor:
        """float32 [B, classes] of decoded images, uint8 [B, 3, H, W]."""
        return engine(self.features(images)).float()

    def classifier(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole as a fine-tuned model's tensors: the BatchNorm, a fixed scale and shift by now, goes into the head.

        Args:
            trained: the state of the linear classifier, float32 on the CPU.
        """
        scale = (trained["norm.running_var"] + _EPS).rsqrt()
        weight = trained["linear.weight"] * scale
        bias = trained["linear.bias"] - weight @ trained["norm.running_mean"]
        return self.weights | {"head.weight": weight, "head.bias": bias}
