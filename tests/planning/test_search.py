"""``mrmae plan --search``: order, memory savers only where memory is short, and configs that training accepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.config.engine import EngineConfig, load_engine_config, validate_sections
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning.estimates.cluster import Cluster
from mrmae_ds.planning.fake_step import build_meta_task
from mrmae_ds.planning.search import ENGINES, PLANS, engine_json, search
from mrmae_ds.planning.stage import CountedStage, count_stage
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.profiling.gpus import Gpu, find_gpu
from mrmae_ds.training.job import TrainArgs, load_configs

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# CViT-Small with one block per stage and pre-training only, which is fast to trace.
SHORT = ["model.overrides={depths: [1, 1, 1]}", "model.decoder={depth: 1}", "stages.finetune=null"]
CONFIG = load_engine_config(CONFIGS / "small.json")
CLUSTER = Cluster(find_gpu("h100-80"), gpus=8, gpus_per_node=8, network_gbs=50.0)
Traced = dict[tuple[int, ...], list[CountedStage]]


@pytest.fixture(scope="module")
def traced() -> Traced:
    """The stage without recomputation and with all of it, by the values of the plan."""
    recipe, stages = load_recipe(CONFIGS / "small.yaml", SHORT), {}
    for plan in (PLANS[0], PLANS[-1]):
        config = replace(CONFIG, checkpointing=plan)
        (cost,) = recipe_cost(recipe, plan, 1000)
        stages[tuple(vars(plan).values())] = [
            count_stage(build_meta_task(recipe, "pretrain", config, 1000), config, cost)
        ]
    return stages


class Trace:
    """Trace for :func:`search` that notes the plans; those between none and all cost as much as all."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.plans: list[CheckpointPlan] = []

    def __call__(self, plan: CheckpointPlan) -> Sequence[CountedStage]:
        self.plans.append(plan)
        return self.traced[(0, 0, 0) if plan == CheckpointPlan() else (1, 1, 1)]


def with_memory(gib: float) -> Cluster:
    return replace(CLUSTER, gpu=Gpu("small", (), gib / 0.95 + 2, 989.5, 450.0, 64.0))


def test_plentiful_memory_needs_no_recomputation_and_no_other_placement(traced: Traced) -> None:
    trace = Trace(traced)
    found = search(CONFIG, trace, CLUSTER, 1_281_167)
    assert trace.plans == [CheckpointPlan()] and {candidate.placement for candidate in found} == {"device"}
    hours = [candidate.hours for candidate in found]
    assert hours == sorted(hours) and all(candidate.fits for candidate in found)
    best = found[0]
    assert (best.config.zero.stage, best.config.micro_batch, best.config.offloads_optimizer) == (1, 128, False)
    assert best.hours == best.steps[0].hours(1_281_167, 200)
    assert len(found) == len(ENGINES) * 8  # micro-batches 1, 2, ... 128


def test_short_memory_is_saved_by_placement_and_recomputation(traced: Traced) -> None:
    trace = Trace(traced)
    found = search(CONFIG, trace, with_memory(1.0), 1000)
    assert trace.plans == list(PLANS)
    assert {"device", "step"} <= {candidate.placement for candidate in found}
    assert any(candidate.config.checkpointing != CheckpointPlan() for candidate in found)
    assert max(step.memory.peak.total for candidate in found for step in candidate.steps) <= 1.0 * 2**30
    with pytest.raises(UserError, match="nothing fits 8 x small, not even offloaded"):
        search(CONFIG, Trace(traced), with_memory(0.01), 1000)


def test_unknown_throughput_and_indivisible_batches_are_refused(traced: Traced) -> None:
    with pytest.raises(UserError, match=r"the bf16 peak of v100-32 is unknown; pass --tflops"):
        search(CONFIG, Trace(traced), replace(CLUSTER, gpu=find_gpu("v100-32")), 1000)
    with pytest.raises(UserError, match=r"--gpus 3: no micro-batch divides the batch of 1,024"):
        search(CONFIG, Trace(traced), CLUSTER.with_gpus(3), 1000)


@pytest.mark.parametrize(("stage", "offloaded"), ENGINES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_engine_of_the_search_is_valid(
    stage: int, offloaded: tuple[str, ...], plan: CheckpointPlan, tmp_path: Path
) -> None:
    path = tmp_path / "engine.json"
    raw = CONFIG.as_written() | {"gradient_accumulation_steps": 3}
    path.write_text(json.dumps(engine_json(raw, stage, offloaded, plan, 32)))
    config = load_engine_config(path)
    validate_sections(config)
    assert (config.micro_batch, config.declared_accumulation, config.checkpointing) == (32, None, plan)
    assert config.zero.stage == stage and config.zero.autocast and config.zero.overlap
    assert config.zero.reduce_bucket == CONFIG.zero.reduce_bucket
    assert {f"offload_{name}" for name in ("optimizer", "param") if getattr(config.zero, f"offload_{name}")} == set(
        offloaded
    )


def test_engines_are_those_of_the_shipped_configs() -> None:
    shipped = {"small-zero1": ENGINES[0], "small": ENGINES[2], "small-offload": ENGINES[-1]}
    for name, (stage, offloaded) in shipped.items():
        config: EngineConfig = load_engine_config(CONFIGS / f"{name}.json")
        raw = config.as_written()
        made = engine_json(raw, stage, offloaded, config.checkpointing, config.micro_batch)
        assert made == raw, name


def test_command_writes_a_config_for_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "found.json"
    arguments = ["plan", "--ds_config", str(CONFIGS / "small.json"), "--gpus", "16", "--gpu", "h100-80", *SHORT]
    assert main([*arguments, "--write", str(path)]) == 2
    assert "--write takes the engine config that a search finds" in capsys.readouterr().err
    assert main([*arguments, "--search", "--write", str(path)]) == 0
    out = capsys.readouterr().out
    assert "fastest config of each engine, estimated" in out and "recomputation was not tried" in out
    recipe = CONFIGS / "small.yaml"
    assert f"deepspeed train.py --ds_config {path} --recipe {recipe}\n" in out
    loaded, config = load_configs(TrainArgs(path, recipe=recipe))
    assert (loaded.name, config.zero.stage, config.micro_batch) == ("small", 1, 64)
    assert main([*arguments, "--search", "--write", str(path)]) == 2
    assert "the file exists" in capsys.readouterr().err
    monkeypatch.setattr("mrmae_ds.planning.plan.search", lambda *_: pytest.fail("searched first"))
    assert main([*arguments, "--search", "--write", str(tmp_path)]) == 2
    assert f"{tmp_path}: is a folder; name a file" in capsys.readouterr().err
