"""Construction of a pre-training's modules from a recipe, on the CPU, for training and planning."""

from __future__ import annotations

from collections.abc import Callable

from mrmae_ds.config.recipe import DataConfig, Recipe, TeacherConfig
from mrmae_ds.config.stages import PretrainConfig
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.moving_average import MovingAverage
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.teachers import Teacher, build_teacher

TeacherBuilder = Callable[[str, TeacherConfig, DataConfig, int, tuple[int, int]], Teacher]


def build_pretraining(
    recipe: Recipe, stage: PretrainConfig, teacher_builder: TeacherBuilder = build_teacher
) -> tuple[PretrainModel, dict[str, Teacher]]:
    """Build the student, freshly initialized, and its teachers by name; moving averages are part of the student.

    Args:
        recipe: model, teachers and data statistics.
        stage: the recipe's pre-training stage.
        teacher_builder: called as :func:`~mrmae_ds.teachers.build_teacher`, for example to build teachers without
            weights.

    Raises:
        UserError: if the patches do not tile the image, a fused layer does not exist, or a teacher cannot be loaded or
            does not fit.
    """
    size = recipe.model.image_size
    encoder = build_encoder(
        recipe.model.spec(),
        size,
        drop_path_rate=stage.drop_path,
        attn_drop_rate=stage.attention_dropout,
        mask_token=stage.encoder_input == "mask_tokens",
    )
    configs = {name: recipe.teachers[name] for name in stage.teachers}
    teachers = {
        name: teacher_builder(name, config, recipe.data, size, encoder.grid)
        for name, config in configs.items()
        if config.kind != "ema"
    }
    widths = {
        target: teachers[name].width if name in teachers else encoder.embed_dim
        for name, config in configs.items()
        for target in config.targets(name)
    }
    for name, objective in stage.objectives.items():
        teacher = objective.target.partition(".")[0]
        if objective.class_token and teacher in teachers and not teachers[teacher].has_class_token:
            raise UserError(
                f"stages.pretrain.objectives.{name}.class_token: teachers.{teacher} has no class token; remove the key"
            )
    model = PretrainModel(encoder, recipe.model.fusion, recipe.model.decoder, stage.objectives, widths)
    for name, config in configs.items():
        if config.kind == "ema":
            each = config.layer_norm == "each"
            model.averages[name] = MovingAverage(encoder, config.decay_at, config.layers or (), each)
    return model, teachers
