"""One micro-batch of a stage, as the real task runs it, on modules without weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import FinetuneConfig, PretrainConfig
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.factory import TeacherBuilder, build_pretraining
from mrmae_ds.models.pretrain import PretrainModel, set_checkpointing
from mrmae_ds.planning.activation_trace import CudaPolicy, TensorRecorder, Timeline, trace
from mrmae_ds.profiling.meta_teachers import build_meta_teacher
from mrmae_ds.teachers import Teacher
from mrmae_ds.training.tasks.base import FinetuneTask, MicroBatchKey, PretrainTask
from mrmae_ds.weights.load import build_encoder


@dataclass(frozen=True)
class Simulation:
    """A stage's modules, without weights, and the memory of one micro-batch.

    Attributes:
        model: the student. teachers: by name.
        image_size: of the student's images.
        timeline: its phases are ``teacher NAME``, ``targets``, ``forward`` and ``backward``.
    """

    model: nn.Module
    teachers: dict[str, Teacher]
    image_size: int
    timeline: Timeline


def simulate(
    recipe: Recipe,
    stage: PretrainConfig | FinetuneConfig,
    config: EngineConfig,
    num_classes: int,
    *,
    on_cpu: bool = False,
    teacher_builder: TeacherBuilder = build_meta_teacher,
) -> Simulation:
    """Build a stage and run a micro-batch of it.

    Args:
        recipe: no file that it names is read, but for a teacher that is a run of this project.
        stage: one of its stages.
        config: whose precision and checkpointing hold.
        num_classes: of the data set.
        on_cpu: types are those of autocast on the CPU, not on CUDA.
        teacher_builder: gives teachers on the meta device.

    Raises:
        UserError: as :func:`~mrmae_ds.factory.build_pretraining`.
    """
    with torch.device("meta"):
        modules, teachers, size = _outline(recipe, stage, num_classes, teacher_builder)
    with FakeTensorMode():
        make_fake(modules, config.model_dtype)
        for teacher in teachers.values():
            make_fake(teacher)
        task: PretrainTask | FinetuneTask
        if isinstance(modules, PretrainModel):
            assert isinstance(stage, PretrainConfig)
            task = PretrainTask(modules, teachers, stage, recipe.data)
        else:
            assert isinstance(stage, FinetuneConfig)
            task = FinetuneTask(modules, stage, recipe.data, num_classes, config.model_dtype)
        set_checkpointing(modules, config.checkpointing)
        timeline = trace(lambda num_images: _run(task, config, size, num_images, on_cpu))
    return Simulation(modules, teachers, size, timeline)


def _outline(
    recipe: Recipe, stage: PretrainConfig | FinetuneConfig, num_classes: int, teacher_builder: TeacherBuilder
) -> tuple[nn.Module, dict[str, Teacher], int]:
    """Student, teachers and image size of a stage; on the meta device."""
    size = recipe.model.image_size
    if isinstance(stage, FinetuneConfig):
        size = stage.image_size or size
        return build_encoder(recipe.model.spec(), size, num_classes, stage.drop_path), {}, size
    return *build_pretraining(recipe, stage, teacher_builder), size


def make_fake(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace parameters and buffers of the meta device by fake ones of the CPU, on which autocast works.

    Args:
        dtype: of floating-point parameters and buffers; None keeps them.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: fake(tensor) for name, tensor in held.items() if tensor is not None})


class _Engine:
    """What a task calls in DeepSpeed's engine's place: the model, under the config's autocast."""

    def __init__(self, model: nn.Module, autocast: bool, recorder: TensorRecorder) -> None:
        self.model, self.autocast, self.recorder = model, autocast, recorder

    def __call__(self, *inputs: Any) -> Any:
        self.recorder.phase = "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(*inputs)


def _run(
    task: PretrainTask | FinetuneTask,
    config: EngineConfig,
    size: int,
    num_images: int,
    on_cpu: bool,
) -> TensorRecorder:
    """One micro-batch, forward and backward."""
    recorder = TensorRecorder([task.model, *task.teachers.values()])
    engine: Any = _Engine(task.model, config.zero.autocast, recorder)
    key = MicroBatchKey(seed=0, step=0, micro=0, rank=0, world_size=1, micro_batch=num_images)
    with ExitStack() as stack:
        for name, teacher in task.teachers.items():
            stack.callback(teacher.register_forward_pre_hook(_enter(recorder, f"teacher {name}")).remove)
            stack.callback(teacher.register_forward_hook(_enter(recorder, "targets")).remove)
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(recorder.take_gradient).remove)
        if not on_cpu:
            stack.enter_context(CudaPolicy())
        stack.enter_context(recorder)
        recorder.phase = "targets"
        losses = task.losses(engine, _batch(size, num_images), key)
        recorder.phase = "backward"
        losses["loss"].backward()
    return recorder


def _enter(recorder: TensorRecorder, phase: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        recorder.phase = phase

    return hook


def _batch(size: int, num_images: int) -> Batch:
    images = torch.empty(num_images, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    numbers = torch.zeros(num_images, dtype=torch.int64)
    valid = torch.ones(num_images, dtype=torch.bool)
    return Batch(images, numbers, numbers, valid, np.zeros(num_images, dtype=np.uint64))
