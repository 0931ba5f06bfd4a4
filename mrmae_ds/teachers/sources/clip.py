"""CLIP image towers as teachers, loaded by open_clip."""

from __future__ import annotations

from pathlib import Path

import open_clip
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import split_choice
from mrmae_ds.teachers.base import (
    LastBlockInput,
    LibraryTeacher,
    MetaTeacher,
    TeacherOutput,
    class_attention,
    describe_importance,
    join_layers,
    tensors_sha256,
)
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.clip_loading import NO_TEXT, ClipTower, load_clip_tower, recipe_config
from mrmae_ds.teachers.sources.timm_readers import TimmReader, timm_reader
from mrmae_ds.weights.paths import weights_sha256


class ClipTeacher(LibraryTeacher):
    """A CLIP image tower: patch tokens of its last block, and that block's attention.

    The source is open_clip's model name, with or without ``-quickgelu``: the weights decide which GELU is computed. The
    weights are a pretrained tag (``openai``) or a local file, including OpenAI's archives; a source that names its
    files itself (``hf-hub:``, ``local-dir:``) takes none. The source ``file`` stands for a tower of the weights file's
    own sizes. Features are ``raw``, ``ln_post``, or ``proj`` (ln_post, then the projection to the joint space).
    open_clip resizes the position embedding if the input size differs from the tower's.

    Raises:
        UserError: for an unknown name, unreadable weights, an undetermined GELU, or features that the tower does not
            have.
    """

    def __init__(self, options: TeacherOptions) -> None:
        tower = load_clip_tower(options)
        weights = Path(options.weights) if options.weights else None
        is_file = weights is not None and split_choice(weights)[0].is_file()
        sha256 = weights_sha256(weights) if weights and is_file else tensors_sha256(tower.visual)
        reader = tower_reader(tower.visual, options)
        network = tower.visual.trunk if isinstance(tower.visual, TimmModel) else tower.visual
        super().__init__(network, reader, options, tower.statistics, sha256, _details(tower, options))


class TowerReader:
    """Reader of the tokens and attention of open_clip's own vision transformer.

    Raises:
        UserError: for features that it does not have, or an attention layer that is not supported.
    """

    def __init__(self, visual: VisionTransformer, options: TeacherOptions) -> None:
        self.features, self.layers = options.features, options.layers
        options.check_layers(len(visual.transformer.resblocks))
        if visual.attn_pool is not None and self.features != "raw":
            raise UserError(
                f"{options.key}.features: {options.source} pools by attention before its final norm, so its tokens "
                f"have no {self.features}; use raw"
            )
        if getattr(visual.transformer.resblocks[-1].attn, "logit_scale", None) is not None:
            raise UserError(f"{options.key}.source: {options.source} has cosine attention, which is not supported")
        options.check_tiles(visual.patch_size[0])
        # If the tower does not output its class token, that token's attention was not trained.
        self.has_class = visual.pool_type == "tok" and visual.attn_pool is None
        self.has_class_token = self.has_class
        self.importance = describe_importance(self.has_class)
        self.grid: tuple[int, int] = visual.grid_size
        self.width: int = visual.output_dim if self.features == "proj" else visual.conv1.out_channels

    def __call__(self, visual: VisionTransformer, images: Tensor) -> TeacherOutput:
        """Return the output of normalized images [B, 3, H, W]."""
        last = len(visual.transformer.resblocks) - 1
        block = visual.transformer.resblocks[last]
        with LastBlockInput(block) as captured:
            features = visual.forward_intermediates(
                images,
                indices=list(self.layers) or [last],
                intermediates_only=True,
                normalize_intermediates=self.features != "raw",
                output_fmt="NLC",
                output_extra_tokens=True,
            )
        tokens, class_token = join_layers(features["image_intermediates"], features["image_intermediates_prefix"])
        if self.features == "proj":
            tokens, class_token = tokens @ visual.proj, class_token @ visual.proj
        attn = block.attn
        importance = class_attention(
            block.ln_1(captured.x),
            attn.in_proj_weight,
            attn.in_proj_bias,
            attn.num_heads,
            prefix=1,
            from_class=self.has_class,
            q_norm=getattr(attn, "ln_q", None),
            k_norm=getattr(attn, "ln_k", None),
        )
        return TeacherOutput(tokens, importance, class_token if self.has_class_token else None)


def tower_reader(visual: nn.Module, options: TeacherOptions) -> TowerReader | TimmReader:
    """Return the reader of an image tower; that of a :class:`TimmModel` reads its ``trunk``.

    Raises:
        UserError: naming the recipe key, if the tower or the features are not supported.
    """
    if isinstance(visual, TimmModel):
        if options.features == "proj":
            raise UserError(
                f"{options.key}.features: {options.source} projects only its pooled output; use raw or ln_post"
            )
        return timm_reader(visual.trunk, options)
    if not isinstance(visual, VisionTransformer):
        raise UserError(f"{options.key}.source: the image tower of {options.source} is not a ViT; choose a ViT-* model")
    if options.stage is not None:
        raise UserError(f"{options.key}.stage: {options.source} is a ViT, whose last block is used; remove the key")
    return TowerReader(visual, options)


def build_meta(options: TeacherOptions) -> MetaTeacher:
    """Build the image tower without weights; see :class:`~mrmae_ds.teachers.build.TeacherSource`."""
    config = recipe_config(options)
    vision = {**config["vision_cfg"], "image_size": options.image_size, "timm_model_pretrained": False}
    visual = open_clip.CLIP(config["embed_dim"], vision, NO_TEXT).visual
    if isinstance(visual, TimmModel):
        visual.set_input_size(options.image_size)
        return MetaTeacher(visual.trunk, timm_reader(visual.trunk, options), options)
    if not isinstance(visual, VisionTransformer):
        raise UserError(f"{options.key}.source: the image tower of {options.source} is not a ViT; choose a ViT-* model")
    return MetaTeacher(visual, TowerReader(visual, options), options)


build = ClipTeacher


def _details(tower: ClipTower, options: TeacherOptions) -> dict[str, str]:
    details = {"GELU": tower.gelu_origin, **tower.heads}
    if options.statistics is None:
        details["statistics"] = tower.statistics_origin
    return details
