"""The pre-training model: encoder, multi-layer fusion, decoder, and one linear head per objective.

Shape legend: B images, P prefix tokens, K visible tokens, L tokens of the grid, C encoder width, D target width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from pydantic import field_validator
from torch import Tensor, nn

from mrmae_ds.errors import ConfigError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.decoder import DECODERS, DecoderSpec
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.models.hog import hog_width
from mrmae_ds.models.initialization import init_pretraining
from mrmae_ds.models.layers import PatchConv
from mrmae_ds.models.masking import TokenMask, VisibleFeatures, VisibleSet
from mrmae_ds.models.moving_average import MovingAverage
from mrmae_ds.models.objectives import COMPUTED, HOG, PIXELS, Objective, objective_loss, patchify, total_loss
from mrmae_ds.schema import Section

AVERAGES = "averages."  # prefix of the moving averages' tensors, which belong to training and not to its result


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


class BlockMix(nn.Module):
    """Learned weighted sum of the outputs of all transformer blocks (MaskAlign, Xue et al. 2023).

    Args:
        depth: number of blocks.
        block: block that it begins with: its weight is 1.01, and that of the others 0.01.
    """

    def __init__(self, depth: int, block: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(depth)[block] + 0.01)

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        """Return the sum, of the shape [B, P + K, C] of each block's output."""
        return torch.stack([weight * tokens for weight, tokens in zip(self.weight, blocks, strict=True)]).sum(0)


def tapped_blocks(objectives: Mapping[str, Objective], depth: int) -> tuple[int, ...]:
    """Return the transformer blocks, in order, whose outputs the objectives tap.

    Args:
        objectives: by name.
        depth: number of the encoder's transformer blocks.
    """
    taps, mix = {spec.block for spec in objectives.values()}, any(spec.mix for spec in objectives.values())
    return tuple(block for block in range(depth) if mix or block in taps)


def check_taps(objectives: Mapping[str, Objective], depth: int, num_prefix_tokens: int) -> None:
    """Check that the tapped blocks and class tokens exist, and that every parameter gets a gradient.

    Args:
        objectives: by name.
        depth: number of the encoder's transformer blocks.
        num_prefix_tokens: number of the encoder's class tokens.

    Raises:
        ConfigError: naming the objective's key.
    """
    for name, spec in objectives.items():
        if spec.block is not None and spec.block >= depth:
            raise ConfigError(f"{name}.block", f"block {spec.block} does not exist; this encoder has 0 to {depth - 1}")
        if spec.class_token and not num_prefix_tokens:
            raise ConfigError(f"{name}.class_token", "this encoder has no class token; remove it")
    if not taps_latent(objectives) and depth - 1 not in tapped_blocks(objectives, depth):
        deepest = max(spec.block or 0 for spec in objectives.values())
        raise ConfigError(
            f"{next(iter(objectives))}.block",
            f"no objective is tapped behind block {deepest}, so blocks {deepest + 1} to {depth - 1} would not be "
            f"trained; tap block {depth - 1}, the latent or the decoder too, or set mix",
        )


def taps_latent(objectives: Mapping[str, Objective]) -> bool:
    """Return True if an objective needs the fused latent, for itself or for the decoder.

    Args:
        objectives: by name.
    """
    return any(spec.block is None for spec in objectives.values())


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
        # Moving averages of the encoder by the recipe's names of these teachers; first, because they run first.
        self.averages = nn.ModuleDict()
        self.encoder = encoder
        self.fusion = Fusion(fusion, encoder)
        # Frozen where no loss uses it: a trained parameter without a gradient stops the training.
        self.fusion.requires_grad_(taps_latent(objectives))
        prefix = encoder.num_prefix_tokens
        check_taps(objectives, len(encoder.transformer_blocks), prefix)
        self.tapped_blocks = tapped_blocks(objectives, len(encoder.transformer_blocks))
        needs_decoder = any(spec.tap == "decoder" for spec in objectives.values())
        self.decoder = (
            DECODERS[decoder.kind](decoder, encoder.embed_dim, encoder.grid, prefix) if needs_decoder else None
        )
        self.mixes = nn.ModuleDict(
            {
                name: BlockMix(len(self.tapped_blocks), spec.block)
                for name, spec in objectives.items()
                if spec.mix and spec.block is not None
            }
        )
        widths = {PIXELS: encoder.stride**2 * 3, HOG: hog_width(encoder.stride), **teacher_dims}
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(encoder.embed_dim if spec.tap == "encoder" else decoder.dim, widths[spec.target])
                for name, spec in objectives.items()
            }
        )
        init_pretraining(self, encoder, self.decoder)

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
            if spec.target not in COMPUTED
        }
        model = cls(encoder, fusion, decoder, objectives, teacher_dims)
        model.load_state_dict(tensors)
        return model

    def reset_averages(self) -> None:
        """Set the moving averages to the encoder's weights."""
        for average in self.averages.values():
            cast(MovingAverage, average).network.load_state_dict(self.encoder.state_dict())

    def update_averages(self, epoch: float) -> None:
        """Update the moving averages after an optimizer step.

        Args:
            epoch: epochs completed.
        """
        for average in self.averages.values():
            cast(MovingAverage, average).update(self.encoder, epoch)

    def forward(self, images: Tensor, visible: VisibleSet | TokenMask, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute all losses of a batch.

        Args:
            images: normalized images [B, 3, H, W] in full precision, because pixel targets are computed from them.
            visible: visible set of the batch.
            targets: features [B, L, D] of each teacher that is no moving average, by name, and under ``hog`` the
                histograms [B, L, D] of the images before they were normalized
                (:func:`~mrmae_ds.models.hog.hog_of_pixels`), if an objective predicts them.

        Returns:
            ``loss`` (the weighted total) and the loss of each objective by name, scalars: float32, or float64 if model
            and input are float64.
        """
        # The averages before the student, so that their activations are freed before its own are kept.
        dtype = self.fusion.norm.weight.dtype
        averages = {name: average(images.to(dtype)) for name, average in self.averages.items()}
        predictions = self.predict(images, visible)
        targets = {PIXELS: patchify(images, self.encoder.stride), **averages, **targets}
        losses = {
            name: objective_loss(spec, predictions[name], targets[spec.target], visible)
            for name, spec in self.objectives.items()
        }
        return {"loss": total_loss(self.objectives, losses), **losses}

    def predict(self, images: Tensor, visible: VisibleSet | TokenMask) -> dict[str, Tensor]:
        """Compute each objective's prediction.

        Args:
            images: normalized images [B, 3, H, W].
            visible: visible set of the batch.

        Returns:
            Predictions by the objectives' names: [B, K, D] at the encoder, [B, L, D] at the decoder; the class token
            comes first if the objective has it.
        """
        return self.predict_from(*self.encode(images, visible), visible)

    def predict_from(
        self, latent: Tensor, blocks: Sequence[Tensor], visible: VisibleSet | TokenMask
    ) -> dict[str, Tensor]:
        """Compute the predictions of :meth:`predict` from the results of :meth:`encode`."""
        taps: dict[str | int, Tensor] = {"encoder": latent, **dict(zip(self.tapped_blocks, blocks, strict=True))}
        if self.decoder is not None:
            taps["decoder"] = self.decoder(latent, visible)
        # Cut once per tap, not once per objective, so that gradients are added in one order.
        patches = {tap: tokens[:, self.encoder.num_prefix_tokens :] for tap, tokens in taps.items()}
        predictions = {}
        for name, spec in self.objectives.items():
            chosen = taps if spec.class_token else patches
            if spec.mix:
                tokens = self.mixes[name]([chosen[block] for block in self.tapped_blocks])
            else:
                tokens = chosen[spec.tap if spec.block is None else spec.block]
            predictions[name] = self.heads[name](tokens)
        return predictions

    def latent(self, images: Tensor, visible: VisibleSet | TokenMask) -> Tensor:
        """Compute the fused, normalized visible tokens of images [B, 3, H, W], prefix tokens first: [B, P + K, C]."""
        return self.encode(images, visible)[0]

    def encode(self, images: Tensor, visible: VisibleSet | TokenMask) -> tuple[Tensor, list[Tensor]]:
        """Compute :meth:`latent` and the output of each of :attr:`tapped_blocks`, all [B, P + K, C]."""
        images = images.to(self.fusion.norm.weight.dtype)
        fused = self.fusion.spec.blocks
        features = self.encoder(images, visible, (*fused, *self.tapped_blocks))
        outputs = features["blocks"]
        to_fuse = VisibleFeatures(tokens=features["tokens"], stages=features["stages"], blocks=outputs[: len(fused)])
        return self.fusion(to_fuse), outputs[len(fused) :]


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


def masked_pixels(images: Tensor, visible: VisibleSet | TokenMask, stride: int, fill: float = 0.0) -> Tensor:
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
