"""CViT: two convolutional stages and a transformer stage; dense for fine-tuning, masked for pre-training.

Shape legend: B images, H x W their pixels, L tokens of the final grid, K visible tokens, C3 the last stage's width.
The architecture is that of MCMAE's public code, and parameter names are those of its released files. The interface is
that of a timm model (timm_registry.py registers it).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers import global_pool_nlc
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan, run_blocks
from mrmae_ds.models.layers import ConvBlock, PatchEmbed
from mrmae_ds.models.masking import VisibleFeatures, VisibleSet
from mrmae_ds.models.pos_embed import resize_pos_embed, sincos_pos_embed
from mrmae_ds.models.sizes import CViTSpec, ImageSize, height_width, token_grid

POOLS = ("avg", "max", "avgmax", "token", "")
NORM = partial(nn.LayerNorm, eps=1e-6)
# Modules and parameters of each stage, which pruning the stage removes.
STAGES = (
    ("patch_embed1", "blocks1"),
    ("patch_embed2", "blocks2"),
    ("patch_embed3", "patch_embed4", "pos_embed", "blocks3"),
)


class CViT(nn.Module):
    """The encoder of MCMAE and MR-MAE.

    Args:
        spec: widths, depths, heads, MLP ratios and patches.
        img_size: input size in pixels, one side of a square or (height, width); the patches must tile it.
        num_classes: outputs of the head; 0 returns features.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all blocks of all stages.
        global_pool: pooling of the tokens: ``avg`` (the authors'), ``max`` or ``avgmax``, each followed by ``fc_norm``;
            ``token``, a class token that joins the patches in the transformer stage, followed by ``norm``; or ``""``
            for no pooling. ``""`` without classes builds the bare encoder for pre-training: no parameters after the
            blocks, and a frozen position embedding.
        drop_rate: dropout before the head.
        in_chans: channels of the input.
        class_token: whether the transformer stage has a class token; None is for ``token`` pooling only. A model keeps
            its token when ``reset_classifier`` changes the pooling.

    Raises:
        UserError: if the patches do not tile ``img_size``, or for an unknown pooling.
    """

    cls_token: nn.Parameter | None

    def __init__(
        self,
        spec: CViTSpec,
        img_size: ImageSize,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        in_chans: int = 3,
        class_token: bool | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.in_chans, self.stride = spec, in_chans, spec.stride
        self.img_size, self.grid = height_width(img_size), token_grid(spec, img_size)
        self.embed_dim = self.num_features = self.head_hidden_size = spec.embed_dim
        self.checkpointing = CheckpointPlan()
        total = sum(spec.depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        c1, c2, c3 = spec.dims
        p1, p2, p3 = spec.patches
        self.patch_embed1 = PatchEmbed(in_chans, c1, p1)
        self.patch_embed2 = PatchEmbed(c1, c2, p2)
        self.patch_embed3 = PatchEmbed(c2, c3, p3)
        self.patch_embed4 = nn.Linear(c3, c3)
        bare = num_classes == 0 and not global_pool
        self.num_prefix_tokens = int(global_pool == "token" if class_token is None else class_token)
        token = nn.Parameter(torch.zeros(1, 1, c3)) if self.num_prefix_tokens else None
        self.register_parameter("cls_token", token)
        positions = sincos_pos_embed(c3, self.grid, self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(positions, requires_grad=not bare)
        conv = [
            nn.ModuleList(ConvBlock(dim, ratio, next(rates)) for _ in range(depth))
            for dim, depth, ratio in zip(spec.dims[:2], spec.depths[:2], spec.mlp_ratios[:2], strict=True)
        ]
        self.blocks1, self.blocks2 = conv
        self.blocks3 = nn.ModuleList(
            Block(c3, spec.num_heads, spec.mlp_ratios[2], qkv_bias=True, drop_path=next(rates), norm_layer=NORM)
            for _ in range(spec.depths[2])
        )
        self.num_stages = len(STAGES)
        self.feature_info = [
            {"num_chs": spec.dims[i], "reduction": stride, "module": f"blocks{i + 1}.{spec.depths[i] - 1}"}
            for i, stride in enumerate((p1, p1 * p2, p1 * p2 * p3))
        ]
        self.global_pool = ""
        self.fc_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """Return the blocks of the transformer stage, first to last."""
        return self.blocks3

    @property
    def token_projection(self) -> nn.Conv2d:
        """Return the convolution that makes the tokens of the transformer stage."""
        return self.patch_embed3.proj

    @property
    def fusable_stages(self) -> tuple[tuple[int, int], ...]:
        """Return (channels, cells per token side) of each convolutional stage, for multi-layer fusion."""
        _, p2, p3 = self.spec.patches
        return (self.spec.dims[0], p2 * p3), (self.spec.dims[1], p3)

    def forward(
        self, images: Tensor, visible: VisibleSet | None = None, taps: tuple[int, ...] = ()
    ) -> Tensor | VisibleFeatures:
        """Classify images, or encode visible tokens for pre-training.

        Both use one ``forward``, because ZeRO-3 gathers a module's parameters when the module is called.

        Args:
            images: normalized images [B, 3, H, W].
            visible: visible set, the only tokens that are computed; None classifies.
            taps: 0-based indices of transformer blocks whose outputs are also returned.

        Returns:
            Logits [B, classes], or features of the visible tokens: ``tokens`` [B, K, C3] before any norm, ``stages``
            [B, K, s, s, C] of each convolutional stage, ``blocks`` [B, K, C3] of each tap.

        Raises:
            UserError: for images of another size than the model's.
        """
        # By type: torch.fx passes a stand-in that is not None for an argument that is left out.
        if isinstance(visible, VisibleSet):
            return self._forward_visible(images, visible, taps)
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute all tokens after the last block, [B, P + L, C3], of [B, 3, H, W]; P is 1 with a class token."""
        maps = self._maps(images, min(self.num_stages, 2))
        return self._tokens(maps[-1]) if self.num_stages == len(STAGES) else maps[-1].flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply pooling, norm, dropout and the linear layer.

        Args:
            x: tokens [B, P + L, C3].
            pre_logits: leave out the linear layer.

        Returns:
            Logits [B, classes], or features [B, C3]; without pooling [B, L, ...].
        """
        x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(self.norm(self.fc_norm(x)))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the outputs of stages (timm's interface).

        Args:
            x: normalized images [B, 3, H, W].
            indices: stages 0 to 2, negative from the end; an int selects the last n, None all.
            norm: must be False, because no norm follows a stage.
            stop_early: do not compute stages after the last selected one.
            output_fmt: ``NCHW``, ``NHWC`` or ``NLC``.
            intermediates_only: leave out the final tokens.

        Returns:
            Tokens [B, L, C] of the last computed stage (those of :meth:`forward_features` if all are computed), and
            the maps of the selected stages in ascending order, [B, C, h, w] or as ``output_fmt`` specifies.

        Raises:
            UserError: for ``norm``, an unknown format, or images of another size than the model's.
        """
        if norm or output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise UserError(f"norm: {norm}, output_fmt: {output_fmt!r}; CViT has norm=False and NCHW, NHWC or NLC")
        selected, last = feature_take_indices(self.num_stages, indices)
        stages = last + 1 if stop_early else self.num_stages
        maps = self._maps(x, min(stages, 2))
        tokens = maps[-1].flatten(1, 2)
        if stages == len(STAGES):
            tokens = self._tokens(maps[-1])
            maps.append(tokens[:, self.num_prefix_tokens :].unflatten(1, self.grid))
        intermediates = [m for i, m in enumerate(maps) if i in selected]
        if output_fmt == "NCHW":
            intermediates = [m.permute(0, 3, 1, 2).contiguous() for m in intermediates]
        elif output_fmt == "NLC":
            intermediates = [m.flatten(1, 2) for m in intermediates]
        return intermediates if intermediates_only else (tokens, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last selected one, and the head (timm's interface).

        Args:
            indices: stages to keep, as in :meth:`forward_intermediates`.
            prune_norm: no effect, because no norm follows a stage.
            prune_head: remove the head; it is also removed if its stage is.

        Returns:
            Absolute indices of the selected stages.
        """
        selected, last = feature_take_indices(self.num_stages, indices)
        for part in (part for stage in STAGES[last + 1 : self.num_stages] for part in stage):
            delattr(self, part)
        if last + 1 < len(STAGES):
            self.cls_token, self.num_prefix_tokens = None, 0
        if prune_head or last + 1 < self.num_stages:
            self.num_features = self.head_hidden_size = self.spec.dims[last]
            self.reset_classifier(0, "")
        self.num_stages = last + 1
        return selected

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, and the norm before it if pooling is added, removed, or moved to the class token.

        Args:
            num_classes: outputs of the new head; 0 removes it.
            global_pool: pooling, as for the constructor; None keeps the current one.

        Raises:
            UserError: for an unknown pooling, or the class token of a model that was built without it.
        """
        like = next(self.parameters())
        width, device, dtype = self.head_hidden_size, like.device, like.dtype
        if global_pool is not None:
            if global_pool not in POOLS:
                raise UserError(f"global_pool: {global_pool!r} is unknown; CViT has {', '.join(map(repr, POOLS))}")
            if global_pool == "token" and self.cls_token is None:
                raise UserError("global_pool: 'token' needs a class token; build the model with global_pool='token'")
            for name, needed in (("fc_norm", global_pool not in ("", "token")), ("norm", global_pool == "token")):
                if needed != isinstance(getattr(self, name), nn.LayerNorm):
                    norm = NORM(width, device=device, dtype=dtype) if needed else nn.Identity()
                    setattr(self, name, norm.train(self.training))
            self.global_pool = global_pool
            if self.cls_token is not None:
                # timm stores the settings that rebuild an exported model here, the present pooling among them.
                self._model_args = {**getattr(self, "_model_args", {}), "class_token": True}
        self.num_classes = num_classes
        head = nn.Linear(width, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()
        self.head = head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of all blocks in backward, or of none; ``checkpointing`` selects by stage."""
        self.checkpointing = CheckpointPlan(conv_stages=int(enable), transformer=int(enable))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay besides the one-dimensional ones."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the name patterns of layers for timm's layer decay; a name without a match is in the last layer.

        Args:
            coarse: one layer per stage. Otherwise layer 0 is everything before the transformer blocks (MCMAE's
                fine-tuning), and each transformer block is one layer.
        """
        if coarse:
            return {f"stage{i}": rf"^(?:{'|'.join(parts)})(?:\.|$)" for i, parts in enumerate(STAGES, 1)}
        return {"stem": r"^(?:cls_token|pos_embed|patch_embed|blocks[12]\.)", "blocks": r"^blocks3\.(\d+)\."}

    def set_input_size(self, img_size: ImageSize) -> None:
        """Change the input size; the position embedding is resized into a new parameter.

        Args:
            img_size: pixels, one side of a square or (height, width).

        Raises:
            UserError: if the patches do not tile ``img_size``.
        """
        grid, old = token_grid(self.spec, img_size), self.grid
        self.img_size, self.grid = height_width(img_size), grid
        if self.num_stages == len(STAGES) and grid != old:
            resized = resize_pos_embed(self.pos_embed.detach(), old, grid, self.num_prefix_tokens)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        # timm stores the size that it built the model for here.
        traits: dict[str, Any] = getattr(self, "_traits", {})
        self._traits = {**traits, "img_size": self.img_size}

    def _maps(self, images: Tensor, stages: int) -> list[Tensor]:
        """Compute the outputs of the first one or two stages, [B, h, w, C] each."""
        self._check_size(images)
        x, maps = images.permute(0, 2, 3, 1), []
        for stage in range(stages):
            x = self._stage(stage, x)
            maps.append(x)
        return maps

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Run a convolutional stage: [B, h, w, C] of the previous stage to [B, h', w', C']."""
        if stage == 0:
            return run_blocks(self.blocks1, self.patch_embed1(x), self.checkpointing.conv_stages)
        return run_blocks(self.blocks2, self.patch_embed2(x), self.checkpointing.conv_stages)

    def _tokens(self, x: Tensor) -> Tensor:
        """Run the transformer stage: [B, h, w, C2] of the stage before it to [B, P + L, C3]."""
        x = self.patch_embed4(self.patch_embed3(x).flatten(1, 2))
        if self.cls_token is None:
            x = x + self.pos_embed
        else:
            token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat([token, x + self.pos_embed[:, 1:]], dim=1)
        return run_blocks(self.blocks3, x, self.checkpointing.transformer)

    def _forward_visible(self, images: Tensor, visible: VisibleSet, taps: tuple[int, ...]) -> VisibleFeatures:
        """Encode visible tokens, as :meth:`forward` does with a visible set."""
        self._check_size(images)
        cells = visible.cells()
        x = cells.take(images.permute(0, 2, 3, 1))
        x1 = run_blocks(self.blocks1, self.patch_embed1(x), self.checkpointing.conv_stages, cells)
        x2 = run_blocks(self.blocks2, self.patch_embed2(x1), self.checkpointing.conv_stages, cells)
        x = self.patch_embed4(self.patch_embed3(x2).flatten(2).reshape(*x2.shape[:2], -1))
        x = x + visible.take(self.pos_embed)
        outputs: list[Tensor] = []
        x = run_blocks(self.blocks3, x, self.checkpointing.transformer, collect=outputs)
        return {"tokens": x, "stages": [x1, x2], "blocks": [outputs[i] for i in taps]}

    def _check_size(self, images: Tensor) -> None:
        """Raise UserError unless images are [B, C, H, W] of the model's H and W."""
        check_image_size(images, self.img_size)


@torch.fx.wrap  # one node of a traced graph, whose images have no size yet
def check_image_size(images: Tensor, size: tuple[int, int]) -> None:
    """Check the size of images [B, C, H, W].

    Args:
        images: input of a model.
        size: height and width that the model was built for.

    Raises:
        UserError: if they differ.
    """
    if tuple(images.shape[2:]) != size:
        raise UserError(
            f"images: {tuple(images.shape[2:])} pixels, but the model was built for {size}; "
            "build it with that img_size, or call set_input_size"
        )
