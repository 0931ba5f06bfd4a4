"""A stage's folder: what is in it decides whether a command starts, goes on, or has nothing left to do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mrmae_ds.errors import UserError
from mrmae_ds.recipe import Recipe
from mrmae_ds.recipe_stages import StageName
from mrmae_ds.reporting.records import RECORD_FILE, RunRecord
from mrmae_ds.training.checkpoint import FOLDER, list_checkpoints, read_manifest

RECIPE_FILE = "recipe.yaml"
ENGINE_FILE = "engine.json"


@dataclass(frozen=True)
class Start:
    """What a command is to do in a stage's folder: ``fresh``, ``resume`` from ``checkpoint``, or ``done``.

    ``damaged`` says what is wrong with newer checkpoints that were passed over.
    """

    action: Literal["fresh", "resume", "done"]
    checkpoint: Path | None = None
    damaged: tuple[str, ...] = ()


def decide_start(stage_dir: Path, recipe: Recipe, stage: StageName, data_sha256: str, resume: str) -> Start:
    """Look before anything is started; nothing is changed.

    Args:
        stage_dir: runs/NAME/STAGE.
        recipe, stage: that the command is for.
        data_sha256: of its training data.
        resume: ``auto`` goes on from the newest checkpoint if there is one; ``never`` starts anew; else a
            checkpoint folder.

    Raises:
        UserError: if the folder holds another recipe's run, or checkpoints of which none is whole.
    """
    if resume == "never":
        return Start("fresh")
    if resume != "auto":
        checkpoint = Path(resume)
        manifest = read_manifest(checkpoint)
        _check_same(manifest.recipe_hash, manifest.seed, recipe, stage, checkpoint.parent.parent)
        return Start("resume", checkpoint)
    if not (stage_dir / RECORD_FILE).exists():
        return Start("fresh")
    record = RunRecord.load(stage_dir)
    _check_same(record.recipe_hash, record.seed, recipe, stage, stage_dir)
    if record.data.sha256 != data_sha256:
        raise UserError(
            f"{stage_dir}: holds a run on other data ({record.data.dataset}, {record.data.samples} samples, "
            f"sha256 {(record.data.sha256 or '')[:12]}); name another folder with --run, or start anew here with "
            "--resume never"
        )
    if record.status == "finished":
        return Start("done")
    damaged = []
    for checkpoint in reversed(list_checkpoints(stage_dir)):
        try:
            read_manifest(checkpoint)
        except UserError as error:
            damaged.append(str(error))
            continue
        return Start("resume", checkpoint, tuple(damaged))
    if any((stage_dir / FOLDER).glob("step_*")):
        raise UserError(
            f"{stage_dir / FOLDER}: no whole checkpoint in it; --resume never starts anew. {' '.join(damaged)}"
        )
    return Start("fresh")


def _check_same(recipe_hash: str, seed: int, recipe: Recipe, stage: StageName, stage_dir: Path) -> None:
    mend = "Name another folder with --run, or start anew here with --resume never"
    if recipe_hash == recipe.hash(stage):
        if seed != recipe.seed:
            raise UserError(f"{stage_dir}: holds a run with seed {seed}, this is seed {recipe.seed}. {mend}")
        return
    path = stage_dir / RECIPE_FILE
    old = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = differences(old, yaml.safe_load(recipe.to_yaml()))
    raise UserError(
        f"{stage_dir}: holds a run of another recipe; changed since: {'; '.join(changed) or 'not known'}. {mend}"
    )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``key.path: old -> new`` for every leaf that differs between two nested mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def prepare_folder(stage_dir: Path, recipe: Recipe, engine_config: str, fresh: bool) -> None:
    """Make the folder and write what was resolved; a fresh start sets an earlier run's folder aside.

    It is renamed to ``.STAGE.previous`` (replacing one that is already there), so that starting anew by mistake
    loses nothing.
    """
    if fresh and stage_dir.exists():
        previous = stage_dir.with_name(f".{stage_dir.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        stage_dir.rename(previous)
    stage_dir.mkdir(parents=True, exist_ok=True)
    (stage_dir / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    (stage_dir / ENGINE_FILE).write_text(engine_config, encoding="utf-8")
