"""The pre-training model: encoder, multi-layer fusion, decoder, and one linear head per objective.

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
    """Layers that are added to the last one before the final norm.

    Attributes:
        stages: convolutional stages, 1-based, each mapped by a strided convolution to the encoder's width.
        blocks: transformer blocks, 0-based; the last one is always included and not listed.
    """

    stages: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    @field_validator("stages", "blocks")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"each layer can be added only once, but {list(value)} repeats one")
        return value


def check_fusion(spec: FusionSpec, num_stages: int, depth: int) -> None:
    """Check that all layers of a fusion exist.

    Args:
        spec: the fusion.
        num_stages: number of convolutional stages of the encoder.
        depth: number of its transformer blocks.

    Raises:
        ConfigError: for a stage or block that the encoder does not have.
    """
    wrong_stages = [s for s in spec.stages if not 1 <= s <= num_stages]
    if wrong_stages:
        has = f"1 to {num_stages}" if num_stages else "none"
        raise ConfigError("fusion.stages", f"{wrong_stages} do not exist; this encoder's conv stages are {has}")
    wrong_blocks = [b for b in spec.blocks if not 0 <= b < depth - 1]
    if wrong_blocks:
        has = f"0 to {depth - 2}" if depth > 1 else "none"
        raise ConfigError(
            "fusion.blocks",
            f"{wrong_blocks} cannot be listed; the last block is always included, and the blocks before it are {has}",
        )


class Fusion(nn.Module):
    """Multi-layer fusion of visible tokens, ``norm(last + sum of listed layers)`` (MCMAE's public code).

    Args:
        spec: the layers.
        encoder: the encoder that the layers belong to.

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
        """Fuse the encoder's features of visible tokens into the latent [B, P + K, C]."""
        x = features["tokens"]
        for stage in self.spec.stages:
            # [B, K, s, s, c] to [B, K, 1, 1, C]: the convolution's kernel is one token's block.
            x = x + self.stage_convs[str(stage)](features["stages"][stage - 1])[:, :, 0, 0]
        for tokens in features["blocks"]:
            x = x + tokens
        return self.norm(x)


class PretrainModel(nn.Module):
    """All modules trained in pre-training; one forward computes all losses.

    Args:
        encoder: encoder built with ``num_classes=0``.
        fusion: layers to fuse into the latent.
        decoder: size of the decoder, which is built only if an objective taps it.
        objectives: objectives by name.
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
        """Rebuild a saved model; no teacher is needed, because its width is that of its head.

        Args:
            encoder: encoder built with ``num_classes=0``.
            fusion: layers to fuse into the latent.
            decoder: size of the decoder.
            objectives: objectives by name.
            tensors: state dict of the saved model.

        Raises:
            KeyError: if the head of an objective is missing from ``tensors``.
            RuntimeError: if other tensors are missing, unexpected, or of another shape.
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
        """Initialize as MAE does: Xavier uniform for linear layers and the token projection, N(0, 0.02) for tokens.

        Other convolutions keep torch's default (MCMAE's public code).
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
        """Compute all losses of a batch.

        Args:
            images: normalized images [B, 3, H, W] in full precision, because pixel targets are computed from them.
            visible: visible set of the batch.
            targets: features [B, L, D] of each teacher, by name.

        Returns:
            ``loss`` (the weighted total) and the loss of each objective by name, scalars: float32, or float64 if model
            and input are float64.
        """
        predictions = self.predict(images, visible)
        targets = {PIXELS: patchify(images, self.encoder.stride), **targets}
        losses = {
            name: objective_loss(spec, predictions[name], targets[spec.target], visible)
            for name, spec in self.objectives.items()
        }
        return {"loss": total_loss(self.objectives, losses), **losses}

    def predict(self, images: Tensor, visible: VisibleSet) -> dict[str, Tensor]:
        """Compute each objective's prediction: [B, K, D] at the encoder, [B, L, D] at the decoder.

        Args:
            images: normalized images [B, 3, H, W].
            visible: visible set of the batch.

        Returns:
            Predictions by the objectives' names.
        """
        return self.predict_from(self.latent(images, visible), visible)

    def predict_from(self, latent: Tensor, visible: VisibleSet) -> dict[str, Tensor]:
        """Compute the predictions of :meth:`predict` from the latent [B, P + K, C]."""
        taps = {"encoder": latent[:, self.encoder.num_prefix_tokens :]}
        if self.decoder is not None:
            taps["decoder"] = self.decoder(latent, visible)
        return {name: self.heads[name](taps[spec.tap]) for name, spec in self.objectives.items()}

    def latent(self, images: Tensor, visible: VisibleSet) -> Tensor:
        """Compute the fused, normalized visible tokens of images [B, 3, H, W], prefix tokens first: [B, P + K, C]."""
        images = images.to(self.fusion.norm.weight.dtype)
        return self.fusion(self.encoder(images, visible, self.fusion.spec.blocks))


def set_checkpointing(model: nn.Module, plan: CheckpointPlan) -> None:
    """Set the activation checkpointing of a model.

    Args:
        model: pre-training model or classifier (an encoder).
        plan: blocks to checkpoint.
    """
    encoder = model.encoder if isinstance(model, PretrainModel) else model
    encoder.checkpointing = plan
    if isinstance(model, PretrainModel) and model.decoder is not None:
        model.decoder.checkpoint_every = plan.decoder


def masked_pixels(images: Tensor, visible: VisibleSet, stride: int, fill: float = 0.0) -> Tensor:
    """Overwrite the pixels of removed tokens.

    Args:
        images: [B, 3, H, W].
        visible: visible set of the batch.
        stride: side of a token in pixels.
        fill: value of the removed pixels.

    Returns:
        Images [B, 3, H, W].
    """
    rows, columns = visible.grid
    removed = visible.mask.reshape(-1, 1, rows, columns)
    removed = torch.nn.functional.interpolate(removed, scale_factor=stride, mode="nearest")
    return images * (1 - removed) + fill * removed
