"""Run a micro-batch of a stage's real task on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import TrainStageName
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.factory import TeacherBuilder
from mrmae_ds.models.pretrain import set_checkpointing
from mrmae_ds.planning.activation_trace import CudaPolicy, TensorRecorder, Timeline, trace_timeline
from mrmae_ds.teachers import build_meta_teacher
from mrmae_ds.training.tasks.base import MicroBatchKey, Task
from mrmae_ds.training.tasks.build import build_task

RecorderMaker = Callable[[Iterable[nn.Module]], TensorRecorder]


def build_meta_task(
    recipe: Recipe,
    stage_name: TrainStageName,
    config: EngineConfig,
    num_classes: int,
    teacher_builder: TeacherBuilder = build_meta_teacher,
) -> Task[Any]:
    """Build the task of a stage on the meta device.

    Args:
        recipe: the files that it names are not read, except a teacher that is a run of this project.
        stage_name: one of its training stages.
        config: engine config.
        num_classes: number of classes of the data set.
        teacher_builder: builds teachers on the meta device.

    Raises:
        UserError: as :func:`~mrmae_ds.training.tasks.build.build_task`.
    """
    with torch.device("meta"):
        return build_task(recipe, stage_name, config, num_classes, teacher_builder=teacher_builder)


def trace_micro_batch(
    task: Task[Any], config: EngineConfig, *, on_cpu: bool = False, make_recorder: RecorderMaker = TensorRecorder
) -> Timeline:
    """Run a micro-batch of a task on fake tensors.

    Args:
        task: on the meta device; its tensors are replaced by fake ones.
        config: engine config; its precision and activation checkpointing are applied.
        on_cpu: use autocast's dtypes of the CPU instead of CUDA's.
        make_recorder: makes the recorder of each run, from the modules whose tensors it does not count.

    Returns:
        Memory over the phases ``teacher NAME``, ``targets``, ``forward`` and ``backward``.
    """
    with FakeTensorMode():
        make_fake(task.model, config.model_dtype)
        for teacher in task.teachers.values():
            make_fake(teacher)
        task.normalize.to(torch.device("cpu"))
        set_checkpointing(task.model, config.checkpointing)
        return trace_timeline(lambda num_images: _run(task, config, make_recorder, num_images, on_cpu))


def make_fake(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU, which support autocast.

    Args:
        module: modified in place.
        dtype: dtype of floating-point parameters and buffers; None keeps theirs.
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
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else cast(nn.Parameter, fake(parameter))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else fake(buffer)


class _Engine:
    """Replacement of DeepSpeed's engine: calls the model under the config's autocast."""

    def __init__(self, model: Callable[..., Any], autocast: bool, recorder: TensorRecorder) -> None:
        self.model, self.autocast, self.recorder = model, autocast, recorder

    def __call__(self, *inputs: Any) -> Any:
        self.recorder.phase = "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(*inputs)


def _run(
    task: Task[Any], config: EngineConfig, make_recorder: RecorderMaker, num_images: int, on_cpu: bool
) -> TensorRecorder:
    """Run forward and backward of a micro-batch."""
    recorder = make_recorder([task.model, *task.teachers.values()])
    engine: Any = _Engine(task.traced_model, config.zero.autocast, recorder)
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
        losses = task.traced_losses(engine, _batch(task.image_size, num_images), key)
        recorder.phase = "backward"
        # Backward of a tensor would suspend CudaPolicy, also where blocks are recomputed.
        torch.autograd.backward(get_gradient_edge(losses["loss"]))
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
