"""A stage's folder: its content decides whether a command starts, resumes, or has nothing left to do."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.renamed import refuse_renamed
from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.records.record import RECIPE_FILE, RECORD_FILE, RunRecord
from mrmae_ds.training.checkpoint.folder import FOLDER, checkpoint_folders, clear_leftovers
from mrmae_ds.training.checkpoint.manifest import RunIdentity, check_sizes, read_manifest

ENGINE_FILE = "engine.json"
FIX = "Name another folder with --run, or start over here with --resume never"


@dataclass(frozen=True)
class RunStart:
    """Decision on how a command starts in a stage's folder.

    Attributes:
        action: ``fresh``, ``resume``, or ``done``.
        candidates: checkpoints to resume from, the newest first; their contents are not yet verified.
        damaged: a message for each newer checkpoint that was passed over.
        named: True if the user named the checkpoint, so that no other one may replace it.
    """

    action: Literal["fresh", "resume", "done"]
    candidates: tuple[Path, ...] = ()
    damaged: tuple[str, ...] = ()
    named: bool = False

    @property
    def checkpoint(self) -> Path | None:
        """The first candidate: the one to load once all ranks have verified it."""
        return self.candidates[0] if self.candidates else None


def decide_start(stage_dir: Path, stage: StageName, identity: RunIdentity, resume: str) -> RunStart:
    """Decide how a command starts. Nothing is changed, and no checkpoint's content is read.

    Args:
        stage_dir: runs/NAME/STAGE.
        stage: of the command.
        identity: of the command's run.
        resume: ``auto`` resumes from the newest checkpoint if there is one; ``never`` starts over; else a
            checkpoint folder.

    Raises:
        UserError: if the folder holds another run (naming every difference), or checkpoints of which none is complete,
            or other files, or has a name that DeepSpeed cannot load from.
    """
    for folder in (str(stage_dir), resume):
        if any(letter in folder for letter in "*?["):
            raise UserError(f"{folder}: DeepSpeed reads * ? [ in a path as a pattern; name a folder without them")
    _check_folder(stage_dir)
    if resume == "never":
        return RunStart("fresh")
    if resume != "auto":
        checkpoint = Path(resume)
        manifest = read_manifest(checkpoint)
        if problems := check_sizes(checkpoint, manifest):
            raise UserError(f"{'; '.join(problems)}; use an older checkpoint: --resume DIR")
        _check_same(manifest.identity, identity, checkpoint)
        return RunStart("resume", (checkpoint,), named=True)
    if (stage_dir / RECORD_FILE).exists():
        record = RunRecord.load(stage_dir)
        _check_same(_recorded(record, stage_dir, stage, identity), identity, stage_dir)
        if record.status == "finished":
            return RunStart("done")
    return _from_checkpoints(stage_dir, identity)


def _check_folder(stage_dir: Path) -> None:
    """Check that the folder is empty or a run's; a fresh start would set any other aside, and later remove it."""
    for path in (stage_dir, *stage_dir.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: a file, not a folder of runs; name another folder with --run")
    if not stage_dir.exists() or any((stage_dir / name).exists() for name in (RECIPE_FILE, RECORD_FILE, FOLDER)):
        return
    if others := sorted(path.name for path in stage_dir.iterdir() if not path.name.startswith(".")):
        raise UserError(f"{stage_dir}: not a run, it has {others[0]} in it; name another folder with --run")


def _from_checkpoints(stage_dir: Path, identity: RunIdentity) -> RunStart:
    folders = checkpoint_folders(stage_dir)
    candidates: list[Path] = []
    damaged: list[str] = []
    for checkpoint in reversed(folders):
        try:
            manifest = read_manifest(checkpoint)
            problems = "; ".join(check_sizes(checkpoint, manifest))
        except UserError as error:
            problems = str(error)
        else:
            _check_same(manifest.identity, identity, checkpoint)
        if not problems:
            candidates.append(checkpoint)
        elif not candidates:
            damaged.append(problems)
    if folders and not candidates:
        raise UserError(no_complete_checkpoint(stage_dir, damaged))
    return RunStart("resume" if candidates else "fresh", tuple(candidates), tuple(damaged))


def no_complete_checkpoint(stage_dir: Path, damaged: list[str]) -> str:
    """Return the message for a run that has checkpoints, but no complete one."""
    return f"{stage_dir / FOLDER}: no complete checkpoint in it; --resume never starts over. {' '.join(damaged)}"


def _recorded(record: RunRecord, stage_dir: Path, stage: StageName, current: RunIdentity) -> RunIdentity:
    """Return the identity of the recorded run; what a record does not hold is taken from ``current``."""
    path = stage_dir / RECIPE_FILE
    recipe: dict[str, Any] = {}
    if path.is_file() and record.recipe_hash != current.recipe_hash:
        try:
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError):
            written = {}
        refuse_renamed(written, stage_dir)
        with contextlib.suppress(ValueError):  # of an earlier version of this project
            recipe = Recipe.model_validate(written).counted(stage)
    trains = stage != "evaluate"
    return RunIdentity(
        recipe_hash=record.recipe_hash,
        seed=record.seed,
        train=(record.data.sha256 or "") if trains else current.train,
        val=current.val if trains else (record.data.sha256 or ""),
        teachers={name: teacher.sha256 or "" for name, teacher in record.teachers.items()},
        init=(record.init.sha256 or "") if record.init else "",
        recipe=recipe,
    )


def _check_same(before: RunIdentity, current: RunIdentity, path: Path) -> None:
    refuse_renamed(before.recipe, path)
    if differences := before.differences(current):
        raise UserError(f"{path}: of another run; changed since: {'; '.join(differences)}. {FIX}")


def prepare_folder(stage_dir: Path, recipe: Recipe, engine_config: str, fresh: bool) -> None:
    """Make the folder and write the resolved recipe and engine config into it.

    Half-written files of killed processes are removed. A fresh start renames an earlier run's folder to
    ``.STAGE.previous`` (replacing one that is already there), so that starting over by mistake loses nothing.

    Args:
        stage_dir: runs/NAME/STAGE.
        recipe: resolved.
        engine_config: as used, JSON.
        fresh: True to start over, False to resume.
    """
    if fresh and stage_dir.exists():
        previous = stage_dir.with_name(f".{stage_dir.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        stage_dir.rename(previous)
    stage_dir.mkdir(parents=True, exist_ok=True)
    clear_leftovers(stage_dir)
    write_text(stage_dir / RECIPE_FILE, recipe.to_yaml())
    write_text(stage_dir / ENGINE_FILE, engine_config)
