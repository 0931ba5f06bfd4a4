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
from mrmae_ds.config.stages import TrainStageName
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.factory import TeacherBuilder
from mrmae_ds.models.pretrain import set_checkpointing
from mrmae_ds.planning.activation_trace import CudaPolicy, TensorRecorder, Timeline, trace
from mrmae_ds.profiling.meta_teachers import build_meta_teacher
from mrmae_ds.training.tasks.base import MicroBatchKey, Task
from mrmae_ds.training.tasks.build import build_task


@dataclass(frozen=True)
class Simulation:
    """A stage's task, its modules without weights, and the memory of one micro-batch.

    Attributes:
        task: model and teachers.
        timeline: memory over the phases ``teacher NAME``, ``targets``, ``forward`` and ``backward``.
    """

    task: Task[Any]
    timeline: Timeline


def simulate(
    recipe: Recipe,
    stage_name: TrainStageName,
    config: EngineConfig,
    num_classes: int,
    *,
    on_cpu: bool = False,
    teacher_builder: TeacherBuilder = build_meta_teacher,
) -> Simulation:
    """Build a stage and run a micro-batch of it.

    Args:
        recipe: no file that it names is read, but for a teacher that is a run of this project.
        stage_name: one of its training stages.
        config: whose precision and checkpointing hold.
        num_classes: of the data set.
        on_cpu: types are those of autocast on the CPU, not on CUDA.
        teacher_builder: gives teachers on the meta device.

    Raises:
        UserError: as :func:`~mrmae_ds.factory.build_pretraining`.
    """
    with torch.device("meta"):
        task = build_task(recipe, stage_name, config, num_classes, teacher_builder=teacher_builder)
    with FakeTensorMode():
        make_fake(task.model, config.model_dtype)
        for teacher in task.teachers.values():
            make_fake(teacher)
        task.normalize.to(torch.device("cpu"))
        set_checkpointing(task.model, config.checkpointing)
        timeline = trace(lambda num_images: _run(task, config, num_images, on_cpu))
    return Simulation(task, timeline)


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
    task: Task[Any],
    config: EngineConfig,
    num_images: int,
    on_cpu: bool,
) -> TensorRecorder:
    """One micro-batch, forward and backward."""
    recorder = TensorRecorder([task.model, *task.teachers.values()])
    engine: Any = _Engine(task.model, config.zero.autocast, recorder)
    key = MicroBatchKey(seed=0, step=0, index=0, rank=0, world_size=1, micro_batch=num_images)
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
        losses = task.losses(engine, _batch(task.image_size, num_images), key)
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
