from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.stages import FinetuneConfig
from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.config import assignments, load_pipeline
from mrmae_ds.pipeline.graph import build_jobs
from tests.support.pipelines import KEYS, make_links, write_pipeline


def test_a_link_comes_after_those_that_it_needs(tmp_path: Path) -> None:
    links = make_links(tmp_path, tmp_path / "r")
    assert list(links) == KEYS
    assert {key: link.needs for key, link in links.items() if link.needs} == {
        "tiny/pretrain": ("mae_tiny/pretrain",),  # its teacher
        "tiny/finetune": ("tiny/pretrain",),
        "mcmae_tiny/finetune": ("mcmae_tiny/pretrain",),
        "mae_tiny/finetune": ("mae_tiny/pretrain",),
        "mae_tiny/evaluate": ("mae_tiny/finetune",),
    }
    assert [links[key].nodes for key in ("tiny/pretrain", "mcmae_tiny/finetune", "mae_tiny/evaluate")] == [None, 3, 1]


def test_train_py_is_told_the_recipe_the_folder_and_the_changes(tmp_path: Path) -> None:
    links = make_links(tmp_path, tmp_path / "r")
    link = links["tiny/pretrain"]
    assert link.folder == tmp_path / "r/tiny/pretrain" and link.config == Path("ds_configs/tiny.json")
    assert link.arguments == [
        *("--recipe", "ds_configs/tiny.yaml", "--stage", "pretrain", "--run", f"{tmp_path}/r/tiny"),
        *("stages.pretrain.epochs=3", f"teachers.mae.source={tmp_path}/r/mae_tiny/pretrain"),
    ]
    again = load_recipe(link.recipe_path, list(link.overrides))
    assert again == link.recipe and again.stages.pretrain is not None and again.stages.pretrain.epochs == 3


def test_each_seed_has_its_own_runs_and_starts_from_its_own(tmp_path: Path) -> None:
    links = make_links(tmp_path, tmp_path / "r", [0, 5])
    assert len(links) == 2 * len(KEYS)
    five = {key for key, link in links.items() if link.recipe.seed == 5}
    assert five == {key.replace("/", "-seed5/") for key in KEYS}
    assert links["tiny-seed5/pretrain"].needs == ("mae_tiny-seed5/pretrain",)
    assert links["tiny-seed5/pretrain"].recipe.teachers["mae"].source == f"{tmp_path}/r/mae_tiny-seed5/pretrain"
    assert "seed=5" in links["tiny-seed5/finetune"].overrides


def test_the_papers_chain_has_every_cell_of_table_6(tmp_path: Path) -> None:
    links = build_jobs(load_pipeline(Path("slurm/table6.yaml")), seeds=[0, 1])
    tuned = [link for link in links if link.stage == "finetune"]
    cells = {(link.recipe.method, link.recipe.size, link.recipe.seed) for link in tuned}
    sizes = ("Small", "Base", "Large", "Huge", "Huge-392", "Huge-448")
    assert cells == {(m, s, n) for m in ("MAE", "MCMAE", "MR-MAE") for s in sizes for n in (0, 1)}
    by_key = {link.key: link for link in links}
    for name, source in {"huge392": "huge", "mae_huge448-seed1": "mae_huge-seed1"}.items():
        assert by_key[f"{name}/finetune"].needs == (f"{source}/pretrain",)
        stage = by_key[f"{name}/finetune"].recipe.stages.finetune
        assert stage is not None and stage.init == f"runs/{source}/pretrain"
    assert {link.needs for link in links if link.stage == "evaluate"} == {(link.key,) for link in tuned}


def test_the_chain_of_the_ablations_has_every_row_of_tables_3_to_5(tmp_path: Path) -> None:
    links = {link.key: link for link in build_jobs(load_pipeline(Path("slurm/ablations.yaml")), seeds=[1])}
    methods = {link.recipe.method for link in links.values()}
    assert {method[-5:] for method in methods if "Table 3" in method} == {f"row {n}" for n in range(1, 7)}
    separate = links["table4_separate-seed1/evaluate"]
    assert separate.needs == ("table4_dino-seed1/finetune", "base-seed1/finetune")
    assert separate.recipe.stages.evaluate.members == tuple(f"runs/{need}" for need in separate.needs)


@pytest.mark.parametrize("path", sorted(Path("slurm").glob("*.yaml")), ids=str)
def test_every_chain_says_how_it_is_run(path: Path) -> None:
    assert f"mrmae submit {path}" in path.read_text() and load_pipeline(path).name == path.stem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "runs: "),
        ({"nods": 1}, "nods: unknown key; did you mean 'nodes'?"),
        ({"runs": [{"use": ["smal"]}], "sets": {"small": {}}}, "runs.0.use: no set 'smal'; did you mean 'small'?"),
        ({"config": None}, "runs.0.config: this key is required"),
        ({"tables": [2]}, "tables: 2 is none of 1, 3, 4, 5, 6"),
        ({"runs": [{}, {}]}, "two runs would be "),
        ({"runs": [{"set": {"modle": {}}}]}, "ds_configs/tiny.yaml: modle: unknown key; did you mean 'model'?"),
        (
            {"runs": [{}]},
            "teachers.mae.source: runs/mae_tiny/pretrain is neither a run of this chain nor there already",
        ),
        (
            {"runs": [{"recipe": "ds_configs/baselines/mae_tiny.yaml", "stages": ["finetune"]}]},
            "mae_tiny/pretrain is neither a run of this chain nor there already",
        ),
        (
            {
                "runs": [
                    {"recipe": "ds_configs/baselines/mae_tiny.yaml", "set": {"stages": {"pretrain": {"init": "x"}}}}
                ]
            },
            "stages.pretrain.init: x is neither a run of this chain nor there already",
        ),
    ],
)
def test_a_wrong_chain_is_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_links(tmp_path, tmp_path / "r", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_runs_that_wait_for_each_other_are_told(tmp_path: Path) -> None:
    def started_from(name: str, source: str) -> dict[str, Any]:
        init = {"stages": {"pretrain": {"init": f"runs/{source}/pretrain"}}}
        return {"recipe": "ds_configs/baselines/mae_tiny.yaml", "set": {"name": name, **init}}

    with pytest.raises(UserError, match="a/pretrain waits for b/pretrain waits for a/pretrain"):
        make_links(tmp_path, tmp_path, runs=[started_from("a", "b"), started_from("b", "a")])


def test_what_is_there_already_need_not_be_in_the_chain(tmp_path: Path) -> None:
    weights = tmp_path / "released.pth"
    weights.write_bytes(b"")
    init = {"stages": {"finetune": {"init": str(weights)}}}
    links = make_links(tmp_path, tmp_path, runs=[{"stages": ["finetune"], "set": init}])
    assert [link.needs for link in links.values()] == [()]


def test_sets_are_applied_in_order_and_null_removes(tmp_path: Path) -> None:
    small = {"model": {"decoder": {"depth": 1}}, "size": "A"}
    run = {
        "use": ["small", "plain"],
        "set": {"size": "C", "stages": {"finetune": {"epochs": 7}}},
        "stages": ["finetune"],
    }
    plain = {"size": "B", "stages": {"pretrain": None, "finetune": {"init": "scratch"}}, "teachers": None}
    (link,) = make_links(tmp_path, tmp_path, sets={"small": small, "plain": plain}, runs=[run], set={}).values()
    recipe = link.recipe
    assert (recipe.size, recipe.model.decoder.depth, recipe.teachers) == ("C", 1, {})
    assert isinstance(recipe.stages.finetune, FinetuneConfig) and recipe.stages.finetune.epochs == 7


def test_a_chain_may_extend_another(tmp_path: Path) -> None:
    write_pipeline(tmp_path, sets={"long": {"stages": {"finetune": {"epochs": 9}}}})
    run = {"recipe": "ds_configs/baselines/mae_tiny.yaml", "use": ["long"]}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"extends": "chain.yaml", "name": "more", "runs": [run]}))
    chain = load_pipeline(tmp_path / "more.yaml")
    assert (chain.name, len(chain.runs), chain.config) == ("more", 1, Path("ds_configs/tiny.json"))
    stages = [link.recipe.stages for link in build_jobs(chain, tmp_path)]
    assert [s.finetune.epochs for s in stages if s.finetune] == [9, 9]
    assert [s.pretrain.epochs for s in stages if s.pretrain] == [3, 3]
    (tmp_path / "chain.yaml").write_text("extends: more.yaml")
    with pytest.raises(UserError, match="extends itself through"):
        load_pipeline(tmp_path / "more.yaml")


def test_common_changes_are_for_recipes_that_have_what_they_change(tmp_path: Path) -> None:
    chain = load_pipeline(write_pipeline(tmp_path))
    links = {link.key: link for link in build_jobs(chain, tmp_path, overrides=["teachers.mae.precision=bf16"])}
    assert links["tiny/pretrain"].recipe.teachers["mae"].precision == "bf16"
    assert links["mae_tiny/pretrain"].recipe.teachers == {}
    assert links["scratch_tiny/finetune"].recipe.stages.pretrain is None
    with pytest.raises(UserError, match=r"chain demo: no recipe has what teachers\.clip\.precision=bf16 changes"):
        build_jobs(chain, tmp_path, overrides=["teachers.clip.precision=bf16"])
    with pytest.raises(UserError, match=r"stages\.pretran: unknown key; did you mean 'pretrain'"):
        build_jobs(chain, tmp_path, overrides=["stages.pretran.epochs=2"])


def test_changes_are_written_as_train_py_reads_them() -> None:
    changes = {"a": {"b": 1e-6, "c": None}, "d": [1, "x y"], "e": {}, "f": True}
    texts = list(assignments(changes))
    assert texts == ["a.b=1e-06", "a.c=null", 'd=[1, "x y"]', "e={}", "f=true"]
    values = [yaml.safe_load(text.partition("=")[2]) for text in texts]
    assert values == ["1e-06", None, [1, "x y"], {}, True]  # a recipe takes the first for a number
