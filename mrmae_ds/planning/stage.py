"""A training stage, built and traced once, and its memory under any ZeRO settings, micro-batch and placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.stages import PlacementConfig, StageConfig
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.activation_trace import Timeline
from mrmae_ds.planning.fake_step import trace_micro_batch
from mrmae_ds.planning.parameters import ParameterCounts, count_parameters
from mrmae_ds.planning.peak_memory import PhasePeak, step_peak
from mrmae_ds.planning.teacher_memory import TeacherBytes, TeacherWeights
from mrmae_ds.planning.zero_memory import ZeroMemory
from mrmae_ds.profiling.flops import StageFlops
from mrmae_ds.training.tasks.base import Task

Placements = Mapping[str, PlacementConfig]


@dataclass(frozen=True)
class CountedStage:
    """A training stage on fake tensors.

    Attributes:
        task: model and teachers without weights.
        timeline: memory of a micro-batch.
        cost: FLOPs of the stage, which also name it.
        groups: trainable elements of each optimizer group.
        teachers: weights by name.
    """

    task: Task[Any]
    timeline: Timeline
    cost: StageFlops
    groups: tuple[int, ...]
    teachers: Mapping[str, TeacherWeights]

    @property
    def name(self) -> str:
        """``pretrain`` or ``finetune``."""
        return self.cost.stage

    @property
    def config(self) -> StageConfig:
        """The recipe's section."""
        config: StageConfig = self.task.config
        return config

    def count_parameters(self, zero: ZeroSettings) -> ParameterCounts:
        """Count the student's parameters under ZeRO settings."""
        return count_parameters(self.task.model, zero, self.groups)

    def micro_batches(self, gpus: int) -> list[int]:
        """Return the micro-batch sizes that divide the batch on this many GPUs, ascending."""
        each, remainder = divmod(self.config.batch_size, gpus)
        if remainder:
            return []
        step = 2 if self.task.even_micro_batch else 1
        return [size for size in range(step, each + 1, step) if each % size == 0]


def count_stage(task: Task[Any], config: EngineConfig, cost: StageFlops, *, on_cpu: bool = False) -> CountedStage:
    """Trace a micro-batch of a stage on fake tensors.

    Args:
        task: from :func:`~mrmae_ds.planning.fake_step.build_meta_task`; its tensors are replaced by fake ones.
        config: engine config.
        cost: FLOPs of the stage.
        on_cpu: use autocast's dtypes of the CPU instead of CUDA's.
    """
    timeline = trace_micro_batch(task, config, on_cpu=on_cpu)
    return CountedStage(
        task=task,
        timeline=timeline,
        cost=cost,
        groups=tuple(sum(p.numel() for p in group["params"]) for group in task.param_groups()),
        teachers={name: TeacherWeights.of(teacher) for name, teacher in task.teachers.items()},
    )


@dataclass(frozen=True)
class StageMemory:
    """Memory of a stage per rank.

    Attributes:
        zero: memory of the student's engine.
        micro_batch: images per rank and forward pass.
        teachers: weights by name.
        peak: phase of a step with the highest peak.
    """

    zero: ZeroMemory
    micro_batch: int
    teachers: Mapping[str, TeacherBytes]
    peak: PhasePeak

    @property
    def batch(self) -> int:
        """Images per optimizer step, over all ranks."""
        return self.micro_batch * self.zero.accumulation * self.zero.world_size


def stage_memory(
    stage: CountedStage,
    zero: ZeroSettings,
    gpus: int,
    micro_batch: int,
    placements: Placements | None = None,
    on_cpu: bool = False,
) -> StageMemory:
    """Compute the memory of a stage.

    Args:
        stage: the stage.
        zero: ZeRO settings, not necessarily the engine config's.
        gpus: number of ranks.
        micro_batch: with the ranks, it must divide the stage's batch.
        placements: of the teachers; None uses the recipe's.
        on_cpu: memory of a rank on the CPU.
    """
    accumulation = stage.config.batch_size // (micro_batch * gpus)
    memory = ZeroMemory(stage.count_parameters(zero), zero, gpus, accumulation, on_cpu)
    placements = stage.task.placements if placements is None else placements
    teachers = {name: weights.placed(placements[name], gpus) for name, weights in stage.teachers.items()}
    return StageMemory(memory, micro_batch, teachers, step_peak(memory, stage.timeline, teachers, micro_batch))


def with_placement(placements: Placements, kind: str) -> Placements:
    """Return placements of the same teachers, all of one kind."""
    return {name: PlacementConfig.model_validate({"kind": kind}) for name in placements}
