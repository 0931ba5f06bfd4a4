"""``mrmae migrate`` on runs that commit d00ec3c made; tests/legacy uses them afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mrmae_ds.cli.main import main
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.renamed import RENAMED
from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RunRecord
from mrmae_ds.training.callbacks.nonfinite_capture import read_capture
from mrmae_ds.training.checkpoint.manifest import RunIdentity, read_manifest
from mrmae_ds.training.checkpoint.run_dir import decide_start
from mrmae_ds.training.migrate import migrate
from mrmae_ds.weights.export import export_run
from mrmae_ds.weights.finished_run import FinishedRun
from mrmae_ds.weights.model_file import read_metadata
from tests.legacy.make import unpack_runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's recipes and runs; the interrupted fine-tuning is a copy of the pre-training's checkpoint."""
    unpack_runs(tmp_path)
    return tmp_path


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _identity(recipe: Recipe, stage: str, record: RunRecord) -> RunIdentity:
    return RunIdentity(
        recipe_hash=recipe.hash(stage),
        seed=recipe.seed,
        train=record.data.sha256,
        val="",
        teachers={name: teacher.sha256 for name, teacher in record.teachers.items()},
        recipe=recipe.counted(stage),
    )


def test_recipes_records_and_captures_have_the_present_keys(folder: Path) -> None:
    (folder / "runs/mrmae/pretrain/pictures").mkdir()
    (folder / "runs/mrmae/pretrain/pictures/a.png").write_bytes(b"png")
    weights = {name: data for name, data in _contents(folder).items() if not name.endswith(("yaml", "json"))}
    done, problems = migrate([folder])
    assert not problems
    assert f"rewritten: {folder}/recipes/mrmae.yaml" in done and f"rewritten: {folder}/recipes/mae.yaml" not in done
    for path in [*folder.glob("recipes/*.yaml"), *folder.glob("runs/*/*/recipe.yaml")]:
        recipe = load_recipe(path)
    for path in folder.glob("runs/*/*/record.json"):
        recipe, record = load_recipe(path.with_name("recipe.yaml")), RunRecord.load(path.parent)
        assert record.recipe_hash == recipe.hash(path.parent.name)
    finetuned = RunRecord.load(folder / "runs/mrmae/finetune")
    (member,) = RunRecord.load(folder / "runs/mrmae/evaluate").members
    assert member.finetune is not None and member.finetune.recipe_hash == finetuned.recipe_hash
    assert (folder / "runs/mrmae/pretrain/images/a.png").read_bytes() == b"png"
    after = _contents(folder)
    weights["runs/mrmae/pretrain/images/a.png"] = weights.pop("runs/mrmae/pretrain/pictures/a.png")
    assert {name: after[name] for name in weights} == weights
    captured = read_capture(folder / "runs/skipped/pretrain/captures/step_000000004")[1]
    assert captured.recipe_hash == RunRecord.load(folder / "runs/skipped/pretrain").recipe_hash


def test_a_second_call_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", str(folder / "recipes"), str(folder / "runs")]) == 0
    before = _contents(folder)
    capsys.readouterr()
    assert main(["migrate", str(folder)]) == 0
    assert capsys.readouterr().out == "nothing to change\n" and _contents(folder) == before


def test_a_dry_run_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _contents(folder)
    assert main(["migrate", "--dry-run", str(folder / "recipes/mrmae.yaml")]) == 0
    assert capsys.readouterr().out == f"would rewrite: {folder}/recipes/mrmae.yaml\n"
    assert _contents(folder) == before


def test_finetuning_is_refused_before_and_accepted_after(folder: Path) -> None:
    stage_dir = folder / "runs/mrmae/finetune"
    raw = yaml.safe_load((stage_dir / "recipe.yaml").read_text())
    migrate([folder / "recipes"])
    recipe, record = load_recipe(folder / "recipes/mrmae.yaml"), RunRecord.load(stage_dir)
    identity = _identity(recipe, "finetune", record)
    with pytest.raises(UserError) as caught:
        decide_start(stage_dir, "finetune", identity, "auto")
    for old in ("loader.workers", "stages.finetune.smoothing"):
        assert f"{old} is now {RENAMED[old]}" in str(caught.value)
    assert f"`mrmae migrate {stage_dir}` rewrites" in str(caught.value)
    (stage_dir / "recipe.yaml").write_text(yaml.safe_dump(raw))
    migrate([stage_dir])
    assert decide_start(stage_dir, "finetune", identity, "auto").action == "done"


def test_a_checkpoint_of_a_finetuning_is_refused_before_and_resumed_after(folder: Path) -> None:
    """Make a manifest as a fine-tuning of that commit wrote it."""
    checkpoint = folder / "runs/interrupted/pretrain/checkpoints/step_000000006"
    manifest = read_manifest(checkpoint)
    migrate([folder / "recipes"])
    recipe = load_recipe(folder / "recipes/mrmae.yaml")
    now = manifest.identity.model_copy(
        update={"recipe": recipe.counted("finetune"), "recipe_hash": recipe.hash("finetune")}
    )
    former = json.loads(
        json.dumps(now.recipe).replace("label_smoothing", "smoothing").replace("random_erasing", "erasing")
    )
    old = now.model_copy(update={"recipe": former, "recipe_hash": "10313a478866"})
    manifest.model_copy(update={"identity": old}).write(checkpoint)
    with pytest.raises(UserError, match=r"stages\.finetune\.erasing is now stages\.finetune\.random_erasing"):
        decide_start(folder / "resumed", "finetune", now, str(checkpoint))
    assert migrate([checkpoint])[0] == [f"rewritten: {checkpoint}/manifest.json"]
    assert read_manifest(checkpoint).identity == now
    assert decide_start(folder / "resumed", "finetune", now, str(checkpoint)).action == "resume"


def test_weights_are_read_as_they_were_written(folder: Path) -> None:
    recipe = FinishedRun.open(folder / "runs/mrmae/finetune").recipe
    assert recipe.stages.finetune is not None and recipe.stages.finetune.random_erasing == 0.3


def test_check_and_exports_have_the_hash_of_the_migrated_record(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate([folder])
    stage_dir = folder / "runs/mrmae/finetune"
    record = RunRecord.load(stage_dir)
    assert main(["check", str(stage_dir)]) == 0
    out = capsys.readouterr().out
    assert f"hash {record.recipe_hash}" in out and "10313a478866" not in out
    metadata = read_metadata(export_run(stage_dir, "safetensors", out=folder / "exported.safetensors").path)
    assert metadata["recipe_hash"] == record.recipe_hash
    assert Recipe.model_validate(metadata["recipe"]) == load_recipe(stage_dir / "recipe.yaml")


def test_an_evaluation_alone_has_the_hash_of_its_own_recipes_finetuning(folder: Path) -> None:
    evaluate = folder / "runs/mrmae/evaluate"
    assert migrate([evaluate])[1] == []
    (member,) = RunRecord.load(evaluate).members
    recipe = load_recipe(evaluate / "recipe.yaml")
    assert member.finetune is not None and member.finetune.recipe_hash == recipe.hash("finetune") != "10313a478866"


def test_a_member_of_another_recipe_is_reported(folder: Path) -> None:
    record = folder / "runs/mrmae/evaluate/record.json"
    record.write_text(record.read_text().replace("10313a478866", "0123456789ab"))
    done, (problem,) = migrate([record.parent])
    assert problem.startswith(f"{record}: keeps the hash 0123456789ab of its member mrmae") and len(done) == 1
    assert migrate([record.parent]) == ([], [])


def test_unreadable_files_are_reported_after_the_others_are_rewritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "recipes/alias.yaml").write_text("data: &x {pictures: 1}\nrecord: *x\n")
    (folder / "recipes/other.yaml").write_text("image: x\nloader: {workers: 1}\n")
    manifest = folder / "runs/interrupted/pretrain/checkpoints/step_000000006/manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 5', '"seed": 6'))
    assert main(["migrate", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert f"{folder}/recipes/alias.yaml: its old keys cannot be renamed" in err and f"{manifest}: no readable" in err
    assert f"rewritten: {folder}/recipes/mrmae.yaml" in out and "other.yaml" not in out + err
    with pytest.raises(UserError, match="no such file or folder"):
        migrate([folder / "nowhere"])
    with pytest.raises(UserError, match="neither YAML nor a file of a run"):
        raise UserError(migrate([folder / "recipes/mrmae.json"])[1][0])


def test_links_stay_links_and_their_targets_are_rewritten_once(folder: Path) -> None:
    elsewhere, finetune = folder / "elsewhere", folder / "runs/mrmae/finetune"
    elsewhere.mkdir()
    (folder / "runs/mae").rename(elsewhere / "mae")
    (folder / "runs/mae").symlink_to(elsewhere / "mae")
    (folder / "runs/loop").symlink_to(folder / "runs")
    (finetune / "recipe.yaml").rename(elsewhere / "finetune.yaml")
    (finetune / "recipe.yaml").symlink_to(elsewhere / "finetune.yaml")
    (elsewhere / "finetune.yaml").chmod(0o640)
    done, problems = migrate([folder / "runs", folder / "runs"])
    assert not problems and len(done) == len(set(done)) and f"rewritten: {folder}/runs/mae/pretrain/recipe.yaml" in done
    assert (finetune / "recipe.yaml").is_symlink() and load_recipe(elsewhere / "finetune.yaml")
    assert (elsewhere / "finetune.yaml").stat().st_mode & 0o777 == 0o640


def test_files_of_other_programs_are_left_alone(folder: Path) -> None:
    """Check names that runs use too, templates, and bytes that are not text."""
    migrate([folder])
    other = folder / "other"
    (other / "pictures").mkdir(parents=True)
    (other / "record.json").write_text("[1]")
    (other / "manifest.json").write_text('{"manifest_version": 3}')
    (other / "template.yaml").write_text("{{ name }}\n")
    (other / "compose.yaml").write_text("services: {record: {log_every: 1}}\n")
    (other / "bytes.yaml").write_bytes(b"\xff\xfe")
    before = _contents(folder)
    assert migrate([folder]) == ([], [])
    assert _contents(folder) == before and (other / "pictures").is_dir()
    problems = migrate([other / name for name in ("template.yaml", "bytes.yaml")])[1]
    assert len(problems) == 2 and "unhashable" in problems[0] and "cannot be read" in problems[1]
    torn = folder / "runs/mae/pretrain/record.json"
    torn.write_text("{")
    assert str(torn) in migrate([folder])[1][0]
