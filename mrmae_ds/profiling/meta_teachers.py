"""Teachers on the meta device, without weights: for counting FLOPs and checking recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.teachers import Teacher, check_grid
from mrmae_ds.teachers.base import LibraryTeacher, TokenReader, describe_importance
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.checkpoint import encoder_attention
from mrmae_ds.teachers.sources.clip import TowerReader
from mrmae_ds.teachers.sources.clip_loading import NO_TEXT
from mrmae_ds.teachers.sources.timm import create_network
from mrmae_ds.teachers.sources.timm_readers import timm_reader
from mrmae_ds.weights.model_file import find_weights, read_metadata, spec_from_metadata

# Images on the meta device have no values to normalize.
NO_STATISTICS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def build_meta_teacher(
    name: str, config: TeacherConfig, data: DataConfig, student_size: int, student_grid: tuple[int, int]
) -> Teacher:
    """Build a teacher like :func:`~mrmae_ds.teachers.build_teacher`, without weights and downloads, on the meta device.

    Raises:
        UserError: naming the key, for a model that the library does not have, a run that does not exist, or a grid that
            differs from the student's.
    """
    options = TeacherOptions.from_config(name, config, data, student_size, student_grid)
    builders: dict[str, Callable[[TeacherOptions], tuple[nn.Module, TokenReader]]] = {
        "checkpoint": _checkpoint,
        "clip": _clip,
        "timm": _timm,
    }
    with torch.device("meta"):
        network, reader = builders[config.kind](options)
        teacher = LibraryTeacher(network, reader, options, NO_STATISTICS, "", {})
    check_grid(teacher, options, student_size)
    return teacher


def _clip(options: TeacherOptions) -> tuple[nn.Module, TokenReader]:
    config = open_clip.get_model_config(options.source)
    if config is None:
        raise UserError(f"{options.key}.source: open_clip has no model {options.source!r}; see open_clip.list_models()")
    vision = {**config["vision_cfg"], "image_size": options.image_size, "timm_model_pretrained": False}
    visual = open_clip.CLIP(config["embed_dim"], vision, NO_TEXT).visual
    if isinstance(visual, TimmModel):
        visual.set_input_size(options.image_size)
        return visual.trunk, timm_reader(visual.trunk, options)
    if not isinstance(visual, VisionTransformer):
        raise UserError(f"{options.key}.source: the image tower of {options.source} is not a ViT; choose a ViT-* model")
    return visual, TowerReader(visual, options)


def _timm(options: TeacherOptions) -> tuple[nn.Module, TokenReader]:
    try:
        network = create_network(options.source, options.image_size, pretrained=False)
    except Exception as error:  # timm raises many types
        raise UserError(
            f"{options.key}.source: timm model {options.source!r} could not be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())})"
        ) from None
    return network, timm_reader(network, options)


class _CheckpointReader:
    def __init__(self, encoder: Encoder) -> None:
        self.grid, self.width = encoder.grid, encoder.embed_dim
        self.importance = describe_importance(encoder.num_prefix_tokens > 0)

    def __call__(self, network: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
        return encoder_attention(network, images)


def _checkpoint(options: TeacherOptions) -> tuple[nn.Module, TokenReader]:
    metadata = read_metadata(find_weights(Path(options.source), f"{options.key}.source"))
    encoder = build_encoder(spec_from_metadata(metadata), options.image_size)
    return encoder, _CheckpointReader(encoder)
