from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from mrmae_ds.config.engine import accumulation_steps, load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import FinetuneConfig
from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.config import load_pipeline, to_overrides
from mrmae_ds.pipeline.costs import stage_flops
from mrmae_ds.pipeline.graph import _sources, build_jobs, refuse_absent_sources
from mrmae_ds.tables.ablations import OWN_METHODS
from mrmae_ds.tables.paper import TABLE_1
from tests.support.pipelines import KEYS, make_jobs, write_pipeline
from tests.support.processes import REPOSITORY


def test_jobs_are_sorted_after_their_dependencies(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, tmp_path / "r")
    assert list(jobs) == KEYS
    assert {key: job.dependencies for key, job in jobs.items() if job.dependencies} == {
        "tiny/pretrain": ("mae_tiny/pretrain",),  # its teacher
        "tiny/finetune": ("tiny/pretrain",),
        "mcmae_tiny/finetune": ("mcmae_tiny/pretrain",),
        "mae_tiny/finetune": ("mae_tiny/pretrain",),
        "mae_tiny/evaluate": ("mae_tiny/finetune",),
    }
    assert [jobs[key].nodes for key in ("tiny/pretrain", "mcmae_tiny/finetune", "mae_tiny/evaluate")] == [None, 3, 1]


def test_arguments_of_train_py_hold_recipe_folder_and_overrides(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, tmp_path / "r")
    job = jobs["tiny/pretrain"]
    assert job.stage_dir == tmp_path / "r/tiny/pretrain" and job.config == Path("ds_configs/tiny.json")
    assert job.arguments == [
        *("--recipe", "ds_configs/tiny.yaml", "--stage", "pretrain", "--run", f"{tmp_path}/r/tiny"),
        *("stages.pretrain.epochs=3", f"teachers.mae.source={tmp_path}/r/mae_tiny/pretrain"),
    ]
    again = load_recipe(job.recipe_path, list(job.overrides))
    assert again == job.recipe and again.stages.pretrain is not None and again.stages.pretrain.epochs == 3


def test_each_seed_has_its_own_runs_and_initial_weights(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, tmp_path / "r", [0, 5])
    assert len(jobs) == 2 * len(KEYS)
    five = {key for key, job in jobs.items() if job.recipe.seed == 5}
    assert five == {key.replace("/", "-seed5/") for key in KEYS}
    assert jobs["tiny-seed5/pretrain"].dependencies == ("mae_tiny-seed5/pretrain",)
    assert jobs["tiny-seed5/pretrain"].recipe.teachers["mae"].source == f"{tmp_path}/r/mae_tiny-seed5/pretrain"
    assert "seed=5" in jobs["tiny-seed5/finetune"].overrides


@pytest.mark.parametrize(
    ("keys", "sources"), [({}, []), ({"init": "scratch"}, []), ({"init": "pretrain"}, ["pretrain"])]
)
def test_stage_of_any_name_depends_on_its_init_alone(keys: dict[str, str], sources: list[str]) -> None:
    recipe = cast(Recipe, SimpleNamespace(stage=lambda name: SimpleNamespace(**keys)))
    found = list(_sources(recipe, "probe"))
    assert found == [("stages.probe.init", source) for source in sources]


def test_table6_pipeline_has_every_cell(tmp_path: Path) -> None:
    jobs = build_jobs(load_pipeline(Path("pipelines/table6.yaml")), seeds=[0, 1])
    tuned = [job for job in jobs if job.stage == "finetune"]
    cells = {(job.recipe.method, job.recipe.size, job.recipe.seed) for job in tuned}
    sizes = ("Small", "Base", "Large", "Huge", "Huge-392", "Huge-448")
    assert cells == {(m, s, n) for m in ("MAE", "MCMAE", "MR-MAE") for s in sizes for n in (0, 1)}
    by_key = {job.key: job for job in jobs}
    for name, source in {"huge392": "huge", "mae_huge448-seed1": "mae_huge-seed1"}.items():
        assert by_key[f"{name}/finetune"].dependencies == (f"{source}/pretrain",)
        stage = by_key[f"{name}/finetune"].recipe.stages.finetune
        assert stage is not None and stage.init == f"runs/{source}/pretrain"
    assert {job.dependencies for job in jobs if job.stage == "evaluate"} == {(job.key,) for job in tuned}


def test_table1_pipeline_has_every_method_that_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(Path("pipelines/table1.yaml"))
    monkeypatch.chdir(tmp_path)
    source = Path("weights/mae_pretrain_vit_large.pth")
    (absent,) = [job for job in build_jobs(pipeline) if job.absent]
    recipe = REPOSITORY / "ds_configs/methods/dmae_base.yaml"
    fix = "get the file as the recipe's header says, or name a stage folder (runs/NAME/STAGE) or a model file"
    assert absent.absent == (f"{recipe}: teachers.mae.source: {source} does not exist; {fix}",)
    source.parent.mkdir()
    source.touch()
    jobs = build_jobs(pipeline)
    assert not any(job.absent for job in jobs)
    epochs = {job.recipe.method: job.recipe.stages.pretrain.epochs for job in jobs}
    assert epochs == {row.method: row.epochs for row in TABLE_1.rows if row.method in OWN_METHODS}


def test_ablations_pipeline_has_every_row_of_tables_3_to_5(tmp_path: Path) -> None:
    jobs = {job.key: job for job in build_jobs(load_pipeline(Path("pipelines/ablations.yaml")), seeds=[1])}
    methods = {job.recipe.method for job in jobs.values()}
    assert {method[-5:] for method in methods if "Table 3" in method} == {f"row {n}" for n in range(1, 7)}
    separate = jobs["table4_separate-seed1/evaluate"]
    assert separate.dependencies == ("table4_dino-seed1/finetune", "base-seed1/finetune")
    assert separate.recipe.stages.evaluate.members == tuple(f"runs/{key}" for key in separate.dependencies)


def test_detectors_start_from_the_encoders_of_the_other_tables() -> None:
    jobs = {job.key: job for job in build_jobs(load_pipeline(Path("pipelines/table2.yaml")), seeds=[1])}
    detectors = [job for job in jobs.values() if job.stage == "detect"]
    assert len(detectors) == len(list(Path("ds_configs/detection").glob("*.yaml"))) - 1  # without the demo
    for job in detectors:
        (source,) = job.dependencies
        pretrain, wanted = jobs[source].recipe, load_recipe(job.recipe_path)
        assert job.recipe.stages.detect.init == f"runs/{source}"
        assert pretrain.hash("pretrain") == wanted.hash("pretrain"), job.key


def test_a_detectors_compute_is_that_of_its_header() -> None:
    jobs = {job.key: job for job in build_jobs(load_pipeline(Path("pipelines/table2.yaml")))}
    assert stage_flops(jobs["coco_mr_mae_base/detect"]) == pytest.approx(15.9e18, rel=0.005)


@pytest.mark.parametrize("name", ["table6", "ablations", "table2"])
def test_nodes_of_eight_gpus_divide_the_batch(name: str) -> None:
    for job in build_jobs(load_pipeline(Path(f"pipelines/{name}.yaml")), seeds=[0]):
        if job.stage != "evaluate":
            assert job.nodes is not None
            batch, config = job.recipe.stage(job.stage).batch_size, load_engine_config(job.config)
            assert accumulation_steps(config, batch, 8 * job.nodes, job.key) >= 1


@pytest.mark.parametrize("path", sorted(Path("pipelines").glob("*.yaml")), ids=str)
def test_pipeline_files_state_their_command_and_name(path: Path) -> None:
    assert f"mrmae submit {path}" in path.read_text() and load_pipeline(path).name == path.stem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "runs: "),
        ({"nods": 1}, "nods: unknown key; did you mean 'nodes'?"),
        ({"runs": [{"use": ["smal"]}], "sets": {"small": {}}}, "runs.0.use: no set 'smal'; did you mean 'small'?"),
        ({"config": None}, "runs.0.config: required"),
        ({"tables": [7]}, "tables: 7 is none of 1, 2, 3, 4, 5, 6"),
        ({"runs": [{}, {}]}, "two runs would write to "),
        ({"runs": [{"set": {"modle": {}}}]}, "ds_configs/tiny.yaml: modle: unknown key; did you mean 'model'?"),
    ],
)
def test_invalid_pipelines_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        make_jobs(tmp_path, tmp_path / "r", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


MAE = "ds_configs/baselines/mae_tiny.yaml"


@pytest.mark.parametrize(
    ("run", "key", "problem"),
    [
        ({}, "tiny/pretrain", "ds_configs/tiny.yaml: teachers.mae.source: runs/mae_tiny/pretrain does not exist; run"),
        (
            {"recipe": MAE, "stages": ["finetune"]},
            "mae_tiny/finetune",
            f"{MAE}: stages.finetune.init: {{runs}}/mae_tiny/pretrain does not exist; run that stage first",
        ),
        (
            {"recipe": MAE, "set": {"stages": {"pretrain": {"init": "x.pth"}}}},
            "mae_tiny/pretrain",
            f"{MAE}: stages.pretrain.init: x.pth does not exist; get the file as the recipe's header says",
        ),
        (
            {"recipe": MAE, "stages": ["evaluate"], "set": {"stages": {"evaluate": {"members": ["one", "two"]}}}},
            "mae_tiny/evaluate",
            f"{MAE}: stages.evaluate.members.0: one does not exist; run that stage first",
        ),
    ],
)
def test_sources_that_do_not_exist_are_refused_for_the_jobs_that_start(
    run: dict[str, Any], key: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no demo has left runs
    jobs = make_jobs(tmp_path, tmp_path / "r", runs=[run])
    with pytest.raises(UserError) as error:
        refuse_absent_sources(jobs.values())
    assert str(error.value).startswith(f"{key}: {REPOSITORY}/{problem.format(runs=tmp_path / 'r')}")
    assert str(error.value).endswith("; other runs of the pipeline: --only RUN")
    refuse_absent_sources(job for job in jobs.values() if job.key != key)


@pytest.mark.parametrize("source", ["weights.pth#model", "shards", "hf:org/name"])
def test_sources_may_be_whatever_a_stage_takes(source: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/model.safetensors.index.json").touch()
    init = source if source.startswith("hf:") else str(tmp_path / source)
    run = {"recipe": MAE, "stages": ["finetune"], "set": {"stages": {"finetune": {"init": init}}}}
    (job,) = make_jobs(tmp_path, tmp_path / "r", runs=[run]).values()
    assert not job.absent


def test_dependency_cycles_are_refused(tmp_path: Path) -> None:
    def started_from(name: str, source: str) -> dict[str, Any]:
        init = {"stages": {"pretrain": {"init": f"runs/{source}/pretrain"}}}
        return {"recipe": "ds_configs/baselines/mae_tiny.yaml", "set": {"name": name, **init}}

    with pytest.raises(UserError, match=r"pipeline demo: jobs depend on each other: (\w/pretrain -> ){2}\w/pretrain"):
        make_jobs(tmp_path, tmp_path, runs=[started_from("a", "b"), started_from("b", "a")])


def test_existing_weights_are_no_dependency(tmp_path: Path) -> None:
    weights = tmp_path / "released.pth"
    weights.write_bytes(b"")
    init = {"stages": {"finetune": {"init": str(weights)}}}
    jobs = make_jobs(tmp_path, tmp_path, runs=[{"stages": ["finetune"], "set": init}])
    assert [job.dependencies for job in jobs.values()] == [()]


def test_sets_are_applied_in_order_and_null_removes_keys(tmp_path: Path) -> None:
    small = {"model": {"decoder": {"depth": 1}}, "size": "A"}
    run = {
        "use": ["small", "plain"],
        "set": {"size": "C", "stages": {"finetune": {"epochs": 7}}},
        "stages": ["finetune"],
    }
    plain = {"size": "B", "stages": {"pretrain": None, "finetune": {"init": "scratch"}}, "teachers": None}
    (job,) = make_jobs(tmp_path, tmp_path, sets={"small": small, "plain": plain}, runs=[run], set={}).values()
    recipe = job.recipe
    assert (recipe.size, recipe.model.decoder.depth, recipe.teachers) == ("C", 1, {})
    assert isinstance(recipe.stages.finetune, FinetuneConfig) and recipe.stages.finetune.epochs == 7


def test_pipelines_extend_others(tmp_path: Path) -> None:
    write_pipeline(tmp_path, sets={"long": {"stages": {"finetune": {"epochs": 9}}}})
    run = {"recipe": "ds_configs/baselines/mae_tiny.yaml", "use": ["long"]}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"extends": "pipeline.yaml", "name": "more", "runs": [run]}))
    pipeline = load_pipeline(tmp_path / "more.yaml")
    assert (pipeline.name, len(pipeline.runs), pipeline.config) == ("more", 1, Path("ds_configs/tiny.json"))
    stages = [job.recipe.stages for job in build_jobs(pipeline, tmp_path)]
    assert [s.finetune.epochs for s in stages if s.finetune] == [9, 9]
    assert [s.pretrain.epochs for s in stages if s.pretrain] == [3, 3]
    (tmp_path / "pipeline.yaml").write_text("extends: more.yaml")
    with pytest.raises(UserError, match="extends itself through"):
        load_pipeline(tmp_path / "more.yaml")


def test_null_in_the_sets_of_an_extending_pipeline_removes_a_recipes_key(tmp_path: Path) -> None:
    """Below them it removes what the extended pipeline has, as in a recipe."""
    stages = {"stages": {"pretrain": {"objectives": {"pixels": {"weight": 0.25}}}}}
    write_pipeline(tmp_path, sets={"light": stages, "unused": {"seed": 1}}, set={"checkpoint": {"every_epochs": 2}})
    run = {"config": "ds_configs/tiny.json", "stages": ["pretrain"], "use": ["light", "own"]}
    own = {"stages": {"pretrain": {"objectives": {"pixels": None}}}}
    sets = {"unused": None, "light": {"stages": {"pretrain": {"flip": 0.0}}}, "own": own}
    more = {"extends": "pipeline.yaml", "runs": [run], "sets": sets, "set": {"checkpoint": {"every_epochs": None}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    pipeline = load_pipeline(tmp_path / "more.yaml")
    assert pipeline.sets.keys() == {"light", "own"}
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.safetensors").touch()
    (job,) = build_jobs(pipeline, tmp_path, overrides=[f"teachers.mae.source={tmp_path / 'teacher'}"])
    stage = job.recipe.stages.pretrain
    assert stage is not None and stage.objectives.keys() == {"mimic"} and stage.flip == 0.0
    assert job.recipe.checkpoint.every_epochs == 1  # the recipe's default again


INIT_SCRATCH = {"stages": {"finetune": {"init": "scratch"}}}


def test_configs_are_found_in_the_repository_from_anywhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = make_jobs(tmp_path, Path("out"))
    assert {job.config for job in jobs.values()} == {REPOSITORY / "ds_configs/tiny.json"}
    job = jobs["tiny/pretrain"]
    assert job.recipe_path == REPOSITORY / "ds_configs/tiny.yaml"
    assert job.stage_dir == Path("out/tiny/pretrain") and job.recipe.teachers["mae"].source == "out/mae_tiny/pretrain"
    assert str(job.recipe.data.train) == "datasets/demo/train.beton"  # as in train.py, of the working directory

    own = tmp_path / "ds_configs"
    own.mkdir()
    for name in ("tiny.json", "tiny.yaml"):
        (own / name).write_text((REPOSITORY / "ds_configs" / name).read_text().replace("seed: 0", "seed: 5"))
    (job, *_) = make_jobs(tmp_path, Path("out"), runs=[{"stages": ["finetune"], "set": INIT_SCRATCH}]).values()
    assert (job.config, job.recipe.seed) == (Path("ds_configs/tiny.json"), 5)
    with pytest.raises(UserError, match=r"^ds_configs/nothing\.json: no such file"):
        make_jobs(tmp_path, Path("out"), config="ds_configs/nothing.json")


def test_common_overrides_apply_to_recipes_with_their_section(tmp_path: Path) -> None:
    pipeline = load_pipeline(write_pipeline(tmp_path))
    jobs = {job.key: job for job in build_jobs(pipeline, tmp_path, overrides=["teachers.mae.precision=bf16"])}
    assert jobs["tiny/pretrain"].recipe.teachers["mae"].precision == "bf16"
    assert jobs["mae_tiny/pretrain"].recipe.teachers == {}
    assert jobs["scratch_tiny/finetune"].recipe.stages.pretrain is None
    with pytest.raises(UserError, match=r"pipeline demo: no recipe has the section of teachers\.clip\.precision=bf16"):
        build_jobs(pipeline, tmp_path, overrides=["teachers.clip.precision=bf16"])
    with pytest.raises(UserError, match=r"stages\.pretran: unknown key; did you mean 'pretrain'"):
        build_jobs(pipeline, tmp_path, overrides=["stages.pretran.epochs=2"])


def test_overrides_round_trip_through_yaml() -> None:
    changes = {"a": {"b": 1e-6, "c": None}, "d": [1, "x y"], "e": {}, "f": True}
    texts = list(to_overrides(changes))
    assert texts == ["a.b=1e-06", "a.c=null", 'd=[1, "x y"]', "e={}", "f=true"]
    values = [yaml.safe_load(text.partition("=")[2]) for text in texts]
    assert values == ["1e-06", None, [1, "x y"], {}, True]  # a recipe parses the first as a number
