"""Task: what a stage trains and how its losses are computed. The training loop uses this interface alone.

Shape legend: B images of a micro-batch, L tokens of the student's grid.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import PlacementConfig, StageConfig, TrainStageName
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.base import Batch, Loader, LoaderRequest, TrainTransform
from mrmae_ds.factory import TeacherBuilder
from mrmae_ds.imagenet import Rgb
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.records.sections import Design, DetectionInfo, Operations, Parameters
from mrmae_ds.teachers import Teacher, build_teacher
from mrmae_ds.training.evaluation.base import DataSet, EvalContext, Evaluator
from mrmae_ds.training.param_groups import ParamGroups

ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class MicroBatchKey:
    """Identity of a micro-batch. All randomness of a step is a function of it, so a resumed run repeats it.

    Attributes:
        seed: seed of the run.
        step: optimizer steps completed before this one.
        index: number of the micro-batch in its step, from 0.
        rank: rank that holds the micro-batch.
        world_size: number of ranks.
        micro_batch: images per micro-batch, B.
    """

    seed: int
    step: int
    index: int
    rank: int
    world_size: int
    micro_batch: int

    @property
    def part(self) -> int:
        """Position in the global batch, in micro-batches; the same images have the same on any number of ranks."""
        return self.index * self.world_size + self.rank

    def seed_for(self, purpose: str, per_part: bool = True) -> int:
        """Return a 63-bit seed.

        Args:
            purpose: name of the draw; different names give independent seeds.
            per_part: False gives all parts of the global batch the same seed.
        """
        where = (self.part,) if per_part else ()
        digest = hashlib.blake2b(repr((self.seed, self.step, where, purpose)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def image_seeds(self, purpose: str) -> list[int]:
        """Return a seed for each image, of its place in the global batch and not of the number of ranks.

        Args:
            purpose: name of the draw.
        """
        first, seed = self.part * self.micro_batch, self.seed_for(purpose, per_part=False)
        return [seed + place for place in range(first, first + self.micro_batch)]

    def noise(self, num_tokens: int) -> Tensor:
        """Return uniform noise for masking, float32 [B, L] on the CPU.

        It is drawn for the whole global batch up to this part, so that an image's noise depends on its place in the
        batch and not on the number of ranks.

        Args:
            num_tokens: L.
        """
        first = self.part * self.micro_batch
        generator = torch.Generator().manual_seed(self.seed_for("mask", per_part=False))
        noise = torch.rand(first + self.micro_batch, num_tokens, generator=generator)
        return noise[first:]


class Normalize:
    """Conversion of decoded images, uint8 [B, 3, H, W], to pixels in [0, 1] and to a model's normalized input.

    Args:
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """

    def __init__(self, mean: Rgb, std: Rgb) -> None:
        self._statistics = mean, std
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Put the statistics on a device."""
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in self._statistics)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the pixels in [0, 1], float32 [B, 3, H, W]."""
        return images.float() / 255

    def student(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the model's input, [B, 3, H, W] of ``dtype``."""
        return ((pixels - self.mean) / self.std).to(dtype)


class Task(ABC, Generic[ConfigT]):
    """A stage's model and losses, its needs from the data pipeline, and its entries in the run record.

    A subclass per training stage; :data:`mrmae_ds.training.tasks.build.TASKS` lists them. Everything that stages do
    differently is a method here.

    Args:
        model: module that the engine wraps, on the CPU.
        config: the recipe's section of the stage.
        data: the recipe's data section, for the input statistics.
        teachers: frozen teachers by the recipe's names, on the CPU.

    Attributes:
        stage_name: stage that the task trains.
        weights_kind: ``kind`` of the exported weights file.
        init: weights file that training starts from; None for random weights.
        init_report: summary of what was loaded from it.
        init_whole: True if the whole model was loaded from it, with its heads.
    """

    stage_name: ClassVar[TrainStageName]
    weights_kind: ClassVar[str]

    model: nn.Module

    def __init__(
        self, model: nn.Module, config: ConfigT, data: DataConfig, teachers: Mapping[str, Teacher] | None = None
    ) -> None:
        self.model, self.config = model, config
        self.teachers = dict(teachers or {})
        self.normalize = Normalize(data.mean, data.std)
        self.data = data
        self.init: Path | None = None
        self.init_report = ""
        self.init_whole = False

    @classmethod
    @abstractmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        config: ConfigT,
        engine_config: EngineConfig,
        num_classes: int,
        run_dir: Path | None,
        teacher_builder: TeacherBuilder = build_teacher,
    ) -> Task[ConfigT]:
        """Build the task; see :func:`mrmae_ds.training.tasks.build.build_task`."""

    # ---- model

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """The encoder that is trained or probed."""

    @property
    def full_model(self) -> nn.Module:
        """The module that is exported: the trained one and whatever frozen part belongs to it."""
        return self.model

    @property
    def image_size(self) -> int:
        """Side of the input images, pixels."""
        return self.encoder.grid[0] * self.encoder.stride

    @property
    def num_classes(self) -> int:
        """Number of classes that the model predicts; 0 if none."""
        return self.encoder.num_classes

    @property
    def placements(self) -> Mapping[str, PlacementConfig]:
        """Placement of each teacher's weights, by the teacher's name."""
        return {}

    def to(self, device: torch.device) -> None:
        """Move what the engine does not own (teachers, statistics). All ranks call it, after the engine was built."""
        self.normalize.to(device)

    def release(self) -> None:
        """Free the memory of what the engine does not own.

        No losses can be computed afterwards. A second call has no effect.
        """

    # ---- optimization

    @abstractmethod
    def param_groups(self) -> ParamGroups:
        """Return the optimizer's parameter groups, each with ``lr_scale``. Called before the model is wrapped."""

    @abstractmethod
    def make_optimizer(self, groups: ParamGroups, fused: bool) -> Optimizer:
        """Return the optimizer; its learning rate is set before every step.

        Args:
            groups: parameter groups.
            fused: use the fused implementation where the optimizer has one.
        """

    def adapt_engine_config(self, config: EngineConfig) -> EngineConfig:
        """Return the engine config from which this task's engine is built."""
        return config

    @abstractmethod
    def losses(self, engine: nn.Module, batch: Any, key: MicroBatchKey) -> dict[str, Tensor]:
        """Compute the losses of a micro-batch.

        Args:
            engine: wraps :attr:`model`.
            batch: of the stage's :meth:`train_loader`.
            key: identity of the micro-batch, source of all randomness.

        Returns:
            ``loss``, which is minimized, its parts by name, and statistics under names with a slash; scalars.
        """

    @property
    def traced_model(self) -> Callable[..., Any]:
        """The engine's model for :meth:`traced_losses`."""
        return self.model

    def traced_losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """Compute the losses on tensors without values, for plans; the operations must not depend on the batch size.

        Args:
            engine: calls :attr:`traced_model`.
            batch: images of the stage's size.
            key: as for :meth:`losses`.
        """
        return self.losses(engine, batch, key)

    def after_step(self, epoch: float) -> None:
        """Update state that follows the weights (a moving average). Called after every applied optimizer step.

        Args:
            epoch: epochs completed.
        """

    # ---- data

    @staticmethod
    @abstractmethod
    def open_data(recipe: Recipe) -> tuple[DataSet, DataSet]:
        """Open and check training and validation set, before the task is built.

        Raises:
            UserError: if a file is missing or damaged, or the sets have different classes.
        """

    @abstractmethod
    def prepare_data(self, recipe: Recipe, request: LoaderRequest) -> None:
        """Prepare this node for the loaders, before the process group starts.

        Args:
            recipe: recipe of the run.
            request: this rank's batches of the training set.

        Raises:
            UserError: if memory or disk is too small.
        """

    @abstractmethod
    def train_loader(self, recipe: Recipe, data: Any, request: LoaderRequest, device: torch.device) -> Loader[Any]:
        """Open this rank's share of the training set.

        Args:
            recipe: recipe of the run.
            data: training set, of :meth:`open_data`.
            request: this rank's batches.
            device: device of the batches.
        """

    def count_copies(self, train: Any, val: Any) -> int | None:
        """Count validation images that are exact copies of training images; None if unknown."""
        return None

    @property
    def augment(self) -> AugmentSettings | None:
        """Augmentation of the cropped training images; None for none."""
        return None

    @property
    def transform(self) -> TrainTransform | None:
        """Crops and augmentation of the training images; None if the stage has other ones."""
        return None

    @property
    def even_micro_batch(self) -> bool:
        """True if the micro-batch must be even because its images are mixed in pairs."""
        return False

    # ---- evaluation and export

    @abstractmethod
    def build_evaluator(self, context: EvalContext) -> Evaluator | None:
        """Return the periodic evaluation of the stage; None if it has none."""

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the weights file.

        Args:
            state: the trained model's state, float32 on the CPU.
        """
        return state

    def export_metadata(self, data: Any) -> dict[str, Any]:
        """Return the stage's own metadata of the weights file.

        Args:
            data: training set, of :meth:`open_data`.
        """
        return {}

    # ---- run record

    def count_parameters(self) -> Parameters:
        """Count parameters. Called before the model is partitioned."""
        return Parameters(
            total=sum(p.numel() for p in self.full_model.parameters()),
            trainable=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            encoder=sum(p.numel() for p in self.encoder.parameters()),
        )

    def count_operations(self, recipe: Recipe, checkpointing: CheckpointPlan, num_classes: int) -> Operations:
        """Count the operations of the stage for one image.

        Args:
            recipe: recipe of the run.
            checkpointing: activation checkpointing of the engine config.
            num_classes: classes of the training data.

        Raises:
            UserError: if a teacher cannot be built.
        """
        (cost,) = recipe_cost(recipe, checkpointing, num_classes, only=self.stage_name)
        forward = cost.parts["classifier"].forward if "classifier" in cost.parts else None
        again = sum(part.recomputed for part in cost.parts.values())
        return Operations(training=cost.per_image, recomputed=again, forward=forward)

    def describe_detection(self, train: Any, val: Any) -> DetectionInfo | None:
        """Return a detector's configuration and data; None for another model."""
        return None

    def describe_design(self, recipe: Recipe) -> Design | None:
        """Return the design choices that the ablation tables compare; None if the stage has none."""
        return None
