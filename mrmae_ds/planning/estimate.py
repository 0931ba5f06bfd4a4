"""A stage of a recipe, counted once, and what it would take under one setting or another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import PlacementConfig, StageConfig
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.cluster import Cluster
from mrmae_ds.planning.fake_step import Simulation, simulate
from mrmae_ds.planning.parameters import ParameterCounts, parameter_counts
from mrmae_ds.planning.peak_memory import Moment, fullest
from mrmae_ds.planning.teacher_memory import Placed, TeacherWeights
from mrmae_ds.planning.traffic import Flow, offload_flows, student_flows, teacher_flow
from mrmae_ds.planning.zero_memory import ZeroMemory
from mrmae_ds.profiling.flops import StageCost

Placements = Mapping[str, PlacementConfig]


@dataclass(frozen=True)
class CountedStage:
    """What a stage is made of.

    Attributes:
        name: ``pretrain`` or ``finetune``. config: the recipe's section.
        simulation: of a micro-batch. cost: its operations.
        groups: trainable elements of each of the optimizer's groups.
        teachers: weights, by name.
    """

    name: str
    config: StageConfig
    simulation: Simulation
    cost: StageCost
    groups: tuple[int, ...]
    teachers: Mapping[str, TeacherWeights]

    @property
    def placements(self) -> Placements:
        """The recipe's, by teacher."""
        return self.simulation.task.placements

    @property
    def pairs(self) -> bool:
        """Whether mixup pairs images, so that a micro-batch must be even."""
        return self.simulation.task.even_micro_batch

    def census(self, zero: ZeroSettings) -> ParameterCounts:
        """Its parameters under some settings."""
        return parameter_counts(self.simulation.task.model, zero, self.groups)


def count_stage(
    recipe: Recipe, config: EngineConfig, cost: StageCost, num_classes: int, *, on_cpu: bool = False
) -> CountedStage:
    """Build a stage without weights and run a micro-batch of it.

    Args:
        recipe, config: as for :func:`~mrmae_ds.planning.fake_step.simulate`.
        cost: of the stage, which it names.
        num_classes: of the data set.
        on_cpu: see :func:`~mrmae_ds.planning.fake_step.simulate`.

    Raises:
        UserError: as :func:`~mrmae_ds.factory.build_pretraining`.
    """
    simulation = simulate(recipe, cost.stage, config, num_classes, on_cpu=on_cpu)
    task = simulation.task
    return CountedStage(
        name=cost.stage,
        config=task.config,
        simulation=simulation,
        cost=cost,
        groups=tuple(sum(p.numel() for p in group["params"]) for group in task.param_groups()),
        teachers={name: TeacherWeights.of(teacher) for name, teacher in task.teachers.items()},
    )


@dataclass(frozen=True)
class Estimate:
    """A stage under one setting on one cluster.

    Attributes:
        engine: the student in its engine.
        cluster: where.
        micro_batch: images of a process at a time.
        placed: the teachers' weights.
        fullest: the fullest moment of a GPU.
        flows: what travels in a step.
        computing_s: that the counted operations of a step take; None if no rate is known.
    """

    engine: ZeroMemory
    cluster: Cluster
    micro_batch: int
    placed: Mapping[str, Placed]
    fullest: Moment
    flows: tuple[Flow, ...]
    computing_s: float | None

    @property
    def fits(self) -> bool:
        """Whether the fullest moment fits a GPU."""
        return self.fullest.total <= self.cluster.usable

    @property
    def batch(self) -> int:
        """Images of an optimizer step, of all processes."""
        return self.micro_batch * self.engine.accumulation * self.engine.world

    @property
    def waiting_s(self) -> float | None:
        """Of a step, that nothing computes while something travels."""
        if self.computing_s is None:
            return None
        hidden = sum(flow.seconds for flow in self.flows if flow.hidden)
        shown = sum(flow.seconds for flow in self.flows if not flow.hidden)
        return max(hidden - self.computing_s, 0.0) + shown

    @property
    def step_s(self) -> float | None:
        """Seconds of an optimizer step, images being there in time."""
        waiting = self.waiting_s
        return None if waiting is None or self.computing_s is None else self.computing_s + waiting

    @property
    def images_per_s(self) -> float | None:
        """Of the whole job."""
        step = self.step_s
        return None if step is None else self.batch / step

    def hours(self, images: int, epochs: int) -> float | None:
        """Of so many epochs, whole batches only, as training has them."""
        step = self.step_s
        return None if step is None else images // self.batch * epochs * step / 3600


def estimate(
    stage: CountedStage,
    zero: ZeroSettings,
    cluster: Cluster,
    micro_batch: int,
    placements: Placements | None = None,
    on_cpu: bool = False,
) -> Estimate:
    """What a stage takes.

    Args:
        stage: counted.
        zero: settings, not necessarily the engine config's.
        cluster: where.
        micro_batch: which with the processes divides the stage's batch.
        placements: of the teachers; None is the recipe's.
        on_cpu: memory of a process of a CPU.
    """
    accumulation = stage.config.batch_size // (micro_batch * cluster.gpus)
    engine = ZeroMemory(stage.census(zero), zero, cluster.gpus, accumulation, on_cpu)
    placements = stage.placements if placements is None else placements
    placed = {name: weights.placed(placements[name], cluster.gpus) for name, weights in stage.teachers.items()}
    flows = [*student_flows(engine, cluster), *offload_flows(engine, cluster)]
    images = micro_batch * accumulation
    rate = cluster.sustained
    for name, weights in placed.items():
        computing = stage.cost.parts[f"teacher {name}"].total * images / rate if rate else 0.0
        if flow := teacher_flow(name, weights, cluster, accumulation, computing):
            flows.append(flow)
    return Estimate(
        engine=engine,
        cluster=cluster,
        micro_batch=micro_batch,
        placed=placed,
        fullest=fullest(engine, stage.simulation.timeline, placed, micro_batch),
        flows=tuple(flows),
        computing_s=stage.cost.per_image * images / rate if rate else None,
    )


def micro_batches(stage: CountedStage, gpus: int) -> list[int]:
    """Those that the stage's batch can be made of on so many GPUs, ascending; even ones where images are paired."""
    each, uneven = divmod(stage.config.batch_size, gpus)
    if uneven:
        return []
    return [size for size in range(1, each + 1) if each % size == 0 and not (stage.pairs and size % 2)]


def largest_fitting(
    stage: CountedStage, zero: ZeroSettings, cluster: Cluster, placements: Placements | None = None
) -> Estimate | None:
    """The estimate with the largest micro-batch that fits; None if none does. Arguments as for :func:`estimate`."""
    fitting: Estimate | None = None
    for size in micro_batches(stage, cluster.gpus):
        tried = estimate(stage, zero, cluster, size, placements)
        if not tried.fits:
            break
        fitting = tried
    return fitting


def with_placement(placements: Placements, kind: str) -> Placements:
    """The same teachers, all placed one way."""
    return {name: PlacementConfig.model_validate({"kind": kind}) for name in placements}
