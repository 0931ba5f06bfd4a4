"""The pre-training model: encoder, multi-layer fusion, decoder, one linear head an objective.

Shape legend: B images, P prefix tokens, K visible tokens, L tokens of the grid, C encoder width, D target width.
"""

from __future__ import annotations

import torch
from pydantic import field_validator
from torch import Tensor, nn

from mrmae_ds.errors import ConfigError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.decoder import Decoder, DecoderSpec
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.models.layers import PatchConv
from mrmae_ds.models.masking import VisibleFeatures, VisibleSet
from mrmae_ds.models.objectives import PIXELS, Objective, objective_loss, patchify, total_loss
from mrmae_ds.schema import Section


class FusionSpec(Section):
    """Which layers are added to the last one before the final norm.

    Attributes:
        stages: convolutional stages, 1-based (each through a strided convolution to the encoder's width).
        blocks: transformer blocks, 0-based; the last one is always there and is not listed.
    """

    stages: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    @field_validator("stages", "blocks")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"each layer is added once, {list(value)} names one twice")
        return value


def check_fusion(spec: FusionSpec, num_stages: int, depth: int) -> None:
    """Raise ConfigError for a layer that an encoder of this many conv stages and transformer blocks does not have."""
    wrong_stages = [s for s in spec.stages if not 1 <= s <= num_stages]
    if wrong_stages:
        has = f"1 to {num_stages}" if num_stages else "none"
        raise ConfigError("fusion.stages", f"{wrong_stages} do not exist; this encoder's conv stages are {has}")
    wrong_blocks = [b for b in spec.blocks if not 0 <= b < depth - 1]
    if wrong_blocks:
        has = f"0 to {depth - 2}" if depth > 1 else "none"
        raise ConfigError(
            "fusion.blocks",
            f"{wrong_blocks} cannot be listed; this encoder's blocks below its last, which is always there, are {has}",
        )


class Fusion(nn.Module):
    """Multi-layer fusion: ``norm(last + sum of listed layers)`` on the visible tokens.

    Raises:
        ConfigError: for a stage or block that the encoder does not have.
    """

    def __init__(self, spec: FusionSpec, encoder: Encoder) -> None:
        super().__init__()
        self.spec = spec
        depth, stages = len(encoder.transformer_blocks), encoder.fusable_stages
        check_fusion(spec, len(stages), depth)
        self.stage_convs = nn.ModuleDict(
            {str(s): PatchConv(stages[s - 1][0], encoder.embed_dim, stages[s - 1][1]) for s in spec.stages}
        )
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)

    def forward(self, features: VisibleFeatures) -> Tensor:
        """The encoder's output for visible tokens (see :meth:`CViT.forward`) to the latent [B, P + K, C]."""
        x = features["tokens"]
        for stage in self.spec.stages:
            # [B, K, s, s, c] to [B, K, 1, 1, C]: the convolution's kernel is one token's block.
            x = x + self.stage_convs[str(stage)](features["stages"][stage - 1])[:, :, 0, 0]
        for tokens in features["blocks"]:
            x = x + tokens
        return self.norm(x)


class PretrainModel(nn.Module):
    """Everything that is trained in pre-training; one forward gives every loss.

    Args:
        encoder: built with ``num_classes=0``.
        fusion: which layers the latent is made of.
        decoder: its size; not built if no objective taps it.
        objectives: by name.
        teacher_dims: width of each teacher's features, by the teacher's name.
    """

    def __init__(
        self,
        encoder: Encoder,
        fusion: FusionSpec,
        decoder: DecoderSpec,
        objectives: dict[str, Objective],
        teacher_dims: dict[str, int],
    ) -> None:
        super().__init__()
        self.objectives = objectives
        self.encoder = encoder
        self.fusion = Fusion(fusion, encoder)
        prefix = encoder.num_prefix_tokens
        needs_decoder = any(spec.tap == "decoder" for spec in objectives.values())
        self.decoder = Decoder(decoder, encoder.embed_dim, encoder.grid, prefix) if needs_decoder else None
        widths = {PIXELS: encoder.stride**2 * 3, **teacher_dims}
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(encoder.embed_dim if spec.tap == "encoder" else decoder.dim, widths[spec.target])
                for name, spec in objectives.items()
            }
        )
        self.reset_parameters()

    @classmethod
    def of_tensors(
        cls,
        encoder: Encoder,
        fusion: FusionSpec,
        decoder: DecoderSpec,
        objectives: dict[str, Objective],
        tensors: dict[str, Tensor],
    ) -> PretrainModel:
        """The model that ``tensors`` were saved of; it needs no teacher, whose width is read off its head's.

        Raises:
            KeyError, RuntimeError: if they are another model's.
        """
        teacher_dims = {
            spec.target: len(tensors[f"heads.{name}.bias"])
            for name, spec in objectives.items()
            if spec.target != PIXELS
        }
        model = cls(encoder, fusion, decoder, objectives, teacher_dims)
        model.load_state_dict(tensors)
        return model

    def reset_parameters(self) -> None:
        """MAE's initialization: xavier for linear layers and patch projections, N(0, 0.02) for tokens.

        Other convolutions keep the framework's default (MCMAE's public code).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight = self.encoder.token_projection.weight.data
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        if self.encoder.cls_token is not None:
            nn.init.normal_(self.encoder.cls_token, std=0.02)
        if self.decoder is not None:
            nn.init.normal_(self.decoder.mask_token, std=0.02)

    def forward(self, images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """All losses of a batch.

        Args:
            images: normalized images [B, 3, H, W], in full precision: pixel targets are made of them.
            visible: the visible set.
            targets: features of each teacher [B, L, D] by name.

        Returns:
            ``loss`` (the weighted total) and each objective's own loss by name, scalars: float32, or float64 where
            model and input are float64.
        """
        predictions = self.predict(images, visible)
        targets = {PIXELS: patchify(images, self.encoder.stride), **targets}
        losses = {
            name: objective_loss(spec, predictions[name], targets[spec.target], visible)
            for name, spec in self.objectives.items()
        }
        return {"loss": total_loss(self.objectives, losses), **losses}

    def predict(self, images: Tensor, visible: VisibleSet) -> dict[str, Tensor]:
        """Each objective's prediction by name: [B, K, D] at the encoder, [B, L, D] at the decoder."""
        return self.predict_from(self.latent(images, visible), visible)

    def predict_from(self, latent: Tensor, visible: VisibleSet) -> dict[str, Tensor]:
        """What :meth:`predict` makes of the latent [B, P + K, C]."""
        taps = {"encoder": latent[:, self.encoder.num_prefix_tokens :]}
        if self.decoder is not None:
            taps["decoder"] = self.decoder(latent, visible)
        return {name: self.heads[name](taps[spec.tap]) for name, spec in self.objectives.items()}

    def latent(self, images: Tensor, visible: VisibleSet) -> Tensor:
        """The fused, normalized visible tokens, prefix tokens first: [B, P + K, C]."""
        images = images.to(self.fusion.norm.weight.dtype)
        return self.fusion(self.encoder(images, visible, self.fusion.spec.blocks))


def set_checkpointing(model: nn.Module, plan: CheckpointPlan) -> None:
    """Hand a plan to a pre-training model's encoder and decoder, or to a classifier, which is an encoder."""
    encoder = model.encoder if isinstance(model, PretrainModel) else model
    encoder.checkpointing = plan
    if isinstance(model, PretrainModel) and model.decoder is not None:
        model.decoder.checkpoint_every = plan.decoder


def masked_pixels(images: Tensor, visible: VisibleSet, stride: int, fill: float = 0.0) -> Tensor:
    """Images [B, 3, H, W] with every removed token's pixels set to ``fill``."""
    rows, columns = visible.grid
    removed = visible.mask.reshape(-1, 1, rows, columns)
    removed = torch.nn.functional.interpolate(removed, scale_factor=stride, mode="nearest")
    return images * (1 - removed) + fill * removed
