"""A stage's folder: what is in it decides whether a command starts, goes on, or has nothing left to do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.records.record import RECORD_FILE, RunRecord
from mrmae_ds.training.checkpoint.folder import FOLDER, checkpoint_folders, clear_leftovers
from mrmae_ds.training.checkpoint.manifest import RunIdentity, check_sizes, read_manifest

RECIPE_FILE = "recipe.yaml"
ENGINE_FILE = "engine.json"
MEND = "Name another folder with --run, or start anew here with --resume never"


@dataclass(frozen=True)
class RunStart:
    """What a command is to do in a stage's folder: ``fresh``, ``resume``, or ``done``.

    Attributes:
        action: see above.
        candidates: checkpoints to go on from, the newest first; their contents are not yet verified.
        damaged: what is wrong with newer ones that were passed over.
        named: the user named the checkpoint, so no other one will do.
    """

    action: Literal["fresh", "resume", "done"]
    candidates: tuple[Path, ...] = ()
    damaged: tuple[str, ...] = ()
    named: bool = False

    @property
    def checkpoint(self) -> Path | None:
        """The first candidate; the one to load once all processes have verified it."""
        return self.candidates[0] if self.candidates else None


def decide_start(stage_dir: Path, stage: StageName, identity: RunIdentity, resume: str) -> RunStart:
    """Look before anything is started; nothing is changed, and no checkpoint's content is read.

    Args:
        stage_dir: runs/NAME/STAGE.
        stage: that the command is for.
        identity: of the run that the command is for.
        resume: ``auto`` goes on from the newest checkpoint if there is one; ``never`` starts anew; else a
            checkpoint folder.

    Raises:
        UserError: if the folder holds another run (naming every difference), or checkpoints of which none is whole, or
            has a name that DeepSpeed cannot load from.
    """
    for folder in (str(stage_dir), resume):
        if any(letter in folder for letter in "*?["):
            raise UserError(f"{folder}: DeepSpeed takes * ? [ in a path for a pattern; name a folder without them")
    if resume == "never":
        return RunStart("fresh")
    if resume != "auto":
        checkpoint = Path(resume)
        manifest = read_manifest(checkpoint)
        if wrong := check_sizes(checkpoint, manifest):
            raise UserError(f"{'; '.join(wrong)}; use an older checkpoint: --resume DIR")
        _check_same(manifest.identity, identity, checkpoint)
        return RunStart("resume", (checkpoint,), named=True)
    if (stage_dir / RECORD_FILE).exists():
        record = RunRecord.load(stage_dir)
        _check_same(_recorded(record, stage_dir, stage, identity), identity, stage_dir)
        if record.status == "finished":
            return RunStart("done")
    return _from_checkpoints(stage_dir, identity)


def _from_checkpoints(stage_dir: Path, identity: RunIdentity) -> RunStart:
    folders = checkpoint_folders(stage_dir)
    candidates: list[Path] = []
    damaged: list[str] = []
    for checkpoint in reversed(folders):
        try:
            manifest = read_manifest(checkpoint)
            wrong = "; ".join(check_sizes(checkpoint, manifest))
        except UserError as error:
            wrong = str(error)
        else:
            _check_same(manifest.identity, identity, checkpoint)
        if not wrong:
            candidates.append(checkpoint)
        elif not candidates:
            damaged.append(wrong)
    if folders and not candidates:
        raise UserError(none_whole(stage_dir, damaged))
    return RunStart("resume" if candidates else "fresh", tuple(candidates), tuple(damaged))


def none_whole(stage_dir: Path, damaged: list[str]) -> str:
    """Why a run with checkpoints does not start from zero."""
    return f"{stage_dir / FOLDER}: no whole checkpoint in it; --resume never starts anew. {' '.join(damaged)}"


def _recorded(record: RunRecord, stage_dir: Path, stage: StageName, now: RunIdentity) -> RunIdentity:
    """The identity of the run in a folder, by its record; what a record does not hold is taken to be as it is now."""
    path = stage_dir / RECIPE_FILE
    recipe = {}
    if path.is_file() and record.recipe_hash != now.recipe_hash:
        try:
            recipe = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).counted(stage)
        except (ValueError, yaml.YAMLError):  # of an earlier version of this project
            recipe = {}
    trains = stage != "evaluate"
    return RunIdentity(
        recipe_hash=record.recipe_hash,
        seed=record.seed,
        train=(record.data.sha256 or "") if trains else now.train,
        val=now.val if trains else (record.data.sha256 or ""),
        teachers={name: teacher.sha256 or "" for name, teacher in record.teachers.items()},
        recipe=recipe,
    )


def _check_same(before: RunIdentity, now: RunIdentity, where: Path) -> None:
    if found := before.differences(now):
        raise UserError(f"{where}: of another run; changed since: {'; '.join(found)}. {MEND}")


def prepare_folder(stage_dir: Path, recipe: Recipe, engine_config: str, fresh: bool) -> None:
    """Make the folder and write what was resolved; a fresh start sets an earlier run's folder aside.

    What killed processes left half-written goes. An earlier run's folder is renamed to ``.STAGE.previous`` (replacing
    one that is already there), so that starting anew by mistake loses nothing.
    """
    if fresh and stage_dir.exists():
        previous = stage_dir.with_name(f".{stage_dir.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        stage_dir.rename(previous)
    stage_dir.mkdir(parents=True, exist_ok=True)
    clear_leftovers(stage_dir)
    write_text(stage_dir / RECIPE_FILE, recipe.to_yaml())
    write_text(stage_dir / ENGINE_FILE, engine_config)
