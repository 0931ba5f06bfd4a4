"""Masked pre-training: frozen teachers give targets and importance, the student predicts the targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mrmae_ds.config.engine import EngineConfig, check_compiled_teachers
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import PlacementConfig, PretrainConfig
from mrmae_ds.config.zero import check_averages
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.base import Batch, to_device
from mrmae_ds.factory import TeacherBuilder, build_pretraining
from mrmae_ds.models.encoders import Encoder, dense_features
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.models.pretrain import AVERAGES, PretrainModel
from mrmae_ds.models.sizes import token_grid
from mrmae_ds.profiling.step_ranges import step_range
from mrmae_ds.records.sections import Design, ObjectiveInfo, Parameters
from mrmae_ds.teachers import PlacedTeacher, Teacher, build_teacher, place_teacher
from mrmae_ds.teachers.base import draw_visible, targets_of
from mrmae_ds.training.evaluation.base import EvalContext, Evaluator
from mrmae_ds.training.evaluation.knn import KnnEvaluator
from mrmae_ds.training.param_groups import ParamGroups, adamw, pretrain_groups
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.crops import CropTask
from mrmae_ds.weights.load import load_pretrained
from mrmae_ds.weights.paths import find_weights


class PretrainTask(CropTask[PretrainConfig]):
    """Mimicking of teachers' features and reconstruction of pixels, at masked or visible tokens.

    Args:
        model: the student.
        teachers: by the recipe's names, on the CPU; each is called once per micro-batch, in this order, on every rank.
        config: the recipe's stage.
        data: the recipe's data section, for the input statistics.

    Attributes:
        placed: the teachers where the recipe places their weights, filled by :meth:`to`. Until then the teachers are
            called where they are.
        compile_teachers: compile their blocks when they are placed.
    """

    stage_name = "pretrain"
    weights_kind = "pretrain"
    model: PretrainModel

    def __init__(
        self, model: PretrainModel, teachers: Mapping[str, Teacher], config: PretrainConfig, data: DataConfig
    ) -> None:
        super().__init__(model, config, data, teachers)
        self.placed: dict[str, PlacedTeacher] = {}
        self.compile_teachers = False
        self.grid = model.encoder.grid

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        config: PretrainConfig,
        engine_config: EngineConfig,
        num_classes: int,
        run_dir: Path | None,
        teacher_builder: TeacherBuilder = build_teacher,
    ) -> PretrainTask:
        """Build student and teachers; see :func:`mrmae_ds.training.tasks.build.build_task`."""
        check_compiled_teachers(engine_config, config.placement)
        init = None
        if run_dir is not None and config.init is not None:
            init = find_weights(Path(config.init), "stages.pretrain.init")
        model, teachers = build_pretraining(recipe, config, teacher_builder)
        check_averages(engine_config.path, engine_config.zero, model.averages.keys())
        task = cls(model, teachers, config, recipe.data)
        task.compile_teachers = engine_config.compile_teachers
        if init is not None:
            task.init = init
            task.init_report = f"{init}: {load_pretrained(model, init, 'stages.pretrain.init')}"
        return task

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained or probed."""
        return self.model.encoder

    @property
    def placements(self) -> Mapping[str, PlacementConfig]:
        """Placement of each teacher's weights, by the teacher's name."""
        return self.config.placement

    @property
    def reads_val_data(self) -> bool:
        """True if k-NN evaluation is on."""
        return self.config.knn is not None

    @property
    def augment(self) -> AugmentSettings | None:
        """Color jitter; None if the recipe has none."""
        jitter = self.config.color_jitter
        return AugmentSettings(self.data.mean, color_jitter=jitter) if jitter else None

    def param_groups(self) -> ParamGroups:
        """Return the decayed and the other parameters."""
        return pretrain_groups(self.model, self.config.optimizer.weight_decay)

    def adapt_engine_config(self, config: EngineConfig) -> EngineConfig:
        """Return the engine config with the recipe's clipping."""
        return config.with_clipping(self.config.optimizer.clip_grad)

    def make_optimizer(self, groups: ParamGroups, fused: bool) -> Optimizer:
        """Return AdamW."""
        return adamw(self.config.optimizer.betas)(groups, fused)

    def to(self, device: torch.device) -> None:
        """Move the statistics and place the teachers."""
        super().to(device)
        for name, teacher in self.teachers.items():
            placement = self.config.placement[name]
            self.placed[name] = place_teacher(name, teacher, placement, device, self.compile_teachers)

    def release(self) -> None:
        """Release the teachers."""
        for placed in self.placed.values():
            placed.release()

    def losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """Compute targets with the teachers, choose the visible tokens, and compute every objective."""
        # Before the teachers: a copy after them would have to wait for what they compute.
        noise = to_device(self._noise(key), batch.images.device)
        pixels = self.normalize.pixels(batch.images)
        with step_range("teachers"):
            placed = self.placed or self.teachers
            of_visible = [name for name, teacher in self.teachers.items() if teacher.sees_visible]
            outputs = {name: teacher(pixels) for name, teacher in placed.items() if name not in of_visible}
            visible = draw_visible(self.config, outputs, noise, self.grid, self.encoder.stride)
            if isinstance(visible, VisibleSet):
                outputs |= {name: placed[name](pixels, visible) for name in of_visible}
        targets = targets_of(self.config.objectives, self.teachers, outputs, pixels, self.encoder.stride)
        torch.manual_seed(key.seed_for("model"))
        # float32 whatever the model's precision: the pixel targets are computed from it.
        with step_range("student"):
            return engine(self.normalize.student(pixels, torch.float32), visible, targets)

    def _noise(self, key: MicroBatchKey) -> Tensor:
        """Return the noise that :func:`draw_visible` takes, of no tokens without masking; of blocks, their masks."""
        masking = self.config.masking
        if masking is not None and masking.mode == "block":
            return masking.draw_blocks(key.image_seeds("mask"), self.grid)
        return key.noise(0 if masking is None else math.prod(masking.grid(self.grid, self.encoder.stride)))

    def after_step(self, epoch: float) -> None:
        """Update the moving averages of the encoder."""
        self.model.update_averages(epoch)

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the student's tensors: moving averages are teachers, and are not exported."""
        return {name: tensor for name, tensor in state.items() if not name.startswith(AVERAGES)}

    def count_parameters(self) -> Parameters:
        """Count the student's parameters, without moving averages, as without other teachers."""
        counts = super().count_parameters()
        return counts.model_copy(
            update={"total": counts.total - sum(p.numel() for p in self.model.averages.parameters())}
        )

    def build_evaluator(self, context: EvalContext) -> Evaluator | None:
        """Return the k-NN evaluation; None if it is off."""
        if self.config.knn is None:
            return None

        def features(engine: nn.Module, images: Tensor) -> Tensor:
            inputs = self.normalize.student(self.normalize.pixels(images), context.engine_config.model_dtype)
            with context.engine_config.autocast(context.device):
                return dense_features(cast(PretrainModel, engine.module).encoder, inputs)

        return KnnEvaluator(context, features, self.image_size, self.config.knn, self.config.epochs)

    def describe_design(self, recipe: Recipe) -> Design:
        """Return masking, fusion and objectives."""
        return describe_design(recipe, self.config)


def describe_design(recipe: Recipe, config: PretrainConfig) -> Design:
    """Return the design choices of a pre-training that the ablation tables compare.

    Args:
        recipe: recipe of the run.
        config: its pre-training stage.
    """
    fusion = recipe.model.fusion
    averages = {name for name in config.teachers if recipe.teachers[name].kind == "ema"}
    rows, columns = token_grid(recipe.model.spec(), recipe.model.image_size)
    return Design(
        keep_ratio=config.visible_share(rows * columns),
        masking="none" if config.masking is None else config.masking.mode,
        encoder_input=config.encoder_input,
        fusion=(*(f"stage {n}" for n in fusion.stages), *(f"block {n}" for n in fusion.blocks)),
        objectives={
            name: ObjectiveInfo(
                target=item.target,
                tap=item.tap,
                tokens=item.tokens,
                weight=item.weight,
                loss=item.loss,
                block=item.block,
                class_token=item.class_token,
                average=item.target in averages,
            )
            for name, item in config.objectives.items()
        },
        decoder=recipe.model.decoder.kind,
    )
