"""CViT: two convolutional stages and a transformer stage; dense for fine-tuning, masked for pre-training.

Shape legend: B images, H x W their pixels, L tokens of the final grid, K visible tokens, C3 the last stage's width.
Source of the architecture: MCMAE's public code; parameter names are those of its released files. The interface is a
timm model's, see timm_registry.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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

POOLS = ("avg", "max", "avgmax", "")
NORM = partial(nn.LayerNorm, eps=1e-6)
# What each stage owns; pruning a stage removes all of it.
STAGES = (
    ("patch_embed1", "blocks1"),
    ("patch_embed2", "blocks2"),
    ("patch_embed3", "patch_embed4", "pos_embed", "blocks3"),
)


class CViT(nn.Module):
    """The encoder of MCMAE and MR-MAE.

    Args:
        spec: widths, depths, heads, ratios and patches.
        img_size: pixels, one side of a square or (height, width); the patches must tile it.
        num_classes: outputs of the head; 0 gives features.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all blocks of all stages.
        global_pool: over the tokens: ``avg`` (the authors'), ``max`` or ``avgmax``, each followed by ``fc_norm``, or
            ``""`` for the tokens themselves. The last with no classes is the bare encoder of pre-training: no
            parameter after the blocks, and a frozen position embedding.
        drop_rate: dropout before the head.
        in_chans: channels of the input.

    Raises:
        UserError: if the patches do not tile ``img_size``, or for an unknown pooling.
    """

    num_prefix_tokens = 0
    cls_token: Tensor | None = None

    def __init__(
        self,
        spec: CViTSpec,
        img_size: ImageSize,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        in_chans: int = 3,
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
        self.pos_embed = nn.Parameter(sincos_pos_embed(c3, self.grid), requires_grad=not bare)
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
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """The transformer stage's blocks, first to last."""
        return self.blocks3

    @property
    def token_projection(self) -> nn.Conv2d:
        """Return the convolution that makes the tokens of the transformer stage."""
        return self.patch_embed3.proj

    @property
    def fusable_stages(self) -> tuple[tuple[int, int], ...]:
        """(channels, cells per token side) of each convolutional stage that multi-layer fusion can take."""
        _, p2, p3 = self.spec.patches
        return (self.spec.dims[0], p2 * p3), (self.spec.dims[1], p3)

    def forward(
        self, images: Tensor, visible: VisibleSet | None = None, taps: tuple[int, ...] = ()
    ) -> Tensor | VisibleFeatures:
        """Classify [B, 3, H, W] (logits [B, classes]), or encode visible tokens for pre-training.

        Both go through one ``forward`` because ZeRO-3 gathers a module's parameters when it is called.

        Args:
            images: normalized images.
            visible: if given, only these tokens are computed and a dictionary is returned: ``tokens`` [B, K, C3]
                before any norm, ``stages`` a list of [B, K, s, s, C], ``blocks`` the outputs of ``taps``.
            taps: 0-based numbers of transformer blocks whose output [B, K, C3] is wanted too.

        Raises:
            UserError: for images of another size than the model's.
        """
        if visible is None:
            return self.forward_head(self.forward_features(images))
        return self._forward_visible(images, visible, taps)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the last block, [B, 3, H, W] to [B, L, C3]."""
        return self._maps(images, self.num_stages)[-1].flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, norm, dropout, linear: [B, L, C3] to [B, classes], or [B, C3] before the linear layer.

        With ``global_pool`` ``""`` the tokens stay: [B, L, ...].
        """
        x = self.head_drop(self.fc_norm(global_pool_nlc(x, self.global_pool, num_prefix_tokens=0)))
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
        """The outputs of stages, timm's interface.

        Args:
            x: normalized images [B, 3, H, W].
            indices: stages, 0 to 2, negative from the end; an int is the last n, None all.
            norm: must be False: no norm follows a stage.
            stop_early: compute no stage after the last wanted one.
            output_fmt: ``NCHW``, ``NHWC`` or ``NLC``.
            intermediates_only: leave out the final tokens.

        Returns:
            The last computed stage's tokens [B, L, C] (after all stages: those of :meth:`forward_features`), and the
            wanted stages' maps [B, C, h, w] (or as ``output_fmt`` says) in ascending order.

        Raises:
            UserError: for ``norm``, an unknown format, or images of another size than the model's.
        """
        if norm or output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise UserError(f"norm: {norm}, output_fmt: {output_fmt!r}; CViT has norm=False and NCHW, NHWC or NLC")
        wanted, last = feature_take_indices(self.num_stages, indices)
        maps = self._maps(x, last + 1 if stop_early else self.num_stages)
        intermediates = [m for i, m in enumerate(maps) if i in wanted]
        if output_fmt == "NCHW":
            intermediates = [m.permute(0, 3, 1, 2).contiguous() for m in intermediates]
        elif output_fmt == "NLC":
            intermediates = [m.flatten(1, 2) for m in intermediates]
        return intermediates if intermediates_only else (maps[-1].flatten(1, 2), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last wanted one, and the head; the absolute numbers of the wanted ones.

        ``prune_norm`` is timm's and has no effect: no norm follows a stage. The head also goes if its stage does.
        """
        wanted, last = feature_take_indices(self.num_stages, indices)
        for part in (part for stage in STAGES[last + 1 : self.num_stages] for part in stage):
            delattr(self, part)
        if prune_head or last + 1 < self.num_stages:
            self.num_features = self.head_hidden_size = self.spec.dims[last]
            self.reset_classifier(0, "")
        self.num_stages = last + 1
        return wanted

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, and a new ``fc_norm`` if pooling comes or goes; None keeps the pooling.

        Raises:
            UserError: for an unknown pooling.
        """
        like = next(self.parameters())
        width, device, dtype = self.head_hidden_size, like.device, like.dtype
        if global_pool is not None:
            if global_pool not in POOLS:
                raise UserError(f"global_pool: {global_pool!r} is unknown; CViT has {', '.join(map(repr, POOLS))}")
            if bool(global_pool) != isinstance(self.fc_norm, nn.LayerNorm):
                self.fc_norm = (NORM(width, device=device, dtype=dtype) if global_pool else nn.Identity()).train(
                    self.training
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(width, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()
        self.head = head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in backward, or none; ``checkpointing`` sets it by stage."""
        self.checkpointing = CheckpointPlan(conv_stages=int(enable), transformer=int(enable))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides the one-dimensional ones."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers as patterns of names, for timm's layer decay; what matches none is the last layer.

        Fine: everything before the transformer's blocks is layer 0 (MCMAE's fine-tuning), each of these blocks is one.
        Coarse: stages.
        """
        if coarse:
            return {f"stage{i}": rf"^(?:{'|'.join(parts)})(?:\.|$)" for i, parts in enumerate(STAGES, 1)}
        return {"stem": r"^(?:pos_embed|patch_embed|blocks[12]\.)", "blocks": r"^blocks3\.(\d+)\."}

    def set_input_size(self, img_size: ImageSize) -> None:
        """Another input size, pixels or (height, width); the position embedding is resized into a new parameter.

        Raises:
            UserError: if the patches do not tile it.
        """
        grid, old = token_grid(self.spec, img_size), self.grid
        self.img_size, self.grid = height_width(img_size), grid
        if self.num_stages == len(STAGES) and grid != old:
            resized = resize_pos_embed(self.pos_embed.detach(), old, grid)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        # Where timm keeps the size that it built the model for.
        traits: dict[str, Any] = getattr(self, "_traits", {})
        self._traits = {**traits, "img_size": self.img_size}

    def _maps(self, images: Tensor, stages: int) -> list[Tensor]:
        """The outputs of the first stages, [B, h, w, C] each."""
        self._check_size(images)
        x, maps = images.permute(0, 2, 3, 1), []
        for stage in range(stages):
            x = self._stage(stage, x)
            maps.append(x)
        return maps

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """One stage, [B, h, w, C] of the stage before to [B, h', w', C']."""
        if stage == 0:
            return run_blocks(self.blocks1, self.patch_embed1(x), self.checkpointing.conv_stages)
        if stage == 1:
            return run_blocks(self.blocks2, self.patch_embed2(x), self.checkpointing.conv_stages)
        x = self.patch_embed4(self.patch_embed3(x).flatten(1, 2)) + self.pos_embed
        x = run_blocks(self.blocks3, x, self.checkpointing.transformer)
        return x.unflatten(1, self.grid)

    def _forward_visible(self, images: Tensor, visible: VisibleSet, taps: tuple[int, ...]) -> VisibleFeatures:
        """The encoding half of :meth:`forward`: [B, 3, H, W] to ``tokens`` [B, K, C3] and what lies below them."""
        self._check_size(images)
        x = visible.take_blocks(images.permute(0, 2, 3, 1))
        x1 = run_blocks(self.blocks1, self.patch_embed1(x), self.checkpointing.conv_stages, visible)
        x2 = run_blocks(self.blocks2, self.patch_embed2(x1), self.checkpointing.conv_stages, visible)
        x = self.patch_embed4(self.patch_embed3(x2).flatten(2).reshape(*x2.shape[:2], -1))
        x = x + visible.take(self.pos_embed)
        outputs: list[Tensor] = []
        x = run_blocks(self.blocks3, x, self.checkpointing.transformer, collect=outputs)
        return {"tokens": x, "stages": [x1, x2], "blocks": [outputs[i] for i in taps]}

    def _check_size(self, images: Tensor) -> None:
        """Raises UserError unless images are [B, C, H, W] of the model's H and W."""
        if tuple(images.shape[2:]) != self.img_size:
            raise UserError(
                f"images: {tuple(images.shape[2:])} pixels, but the model was built for {self.img_size}; "
                "build it with that img_size, or call set_input_size"
            )
