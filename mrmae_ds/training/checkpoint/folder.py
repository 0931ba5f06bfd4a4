"""Folder of a stage's checkpoints: names, listing, when one is due, and which are kept.

    checkpoints/step_000001000/      a checkpoint: committed by renaming, with its manifest
    checkpoints/latest               the newest one's name, for DeepSpeed's own tools; nothing here depends on it
    checkpoints/.saving-*            being written; left behind by a save that was killed
    checkpoints/.left-step_*         set aside: damaged, or newer than the checkpoint that a run went back to
    checkpoints/.universal-*         converted for another number of ranks

:mod:`mrmae_ds.training.checkpoint.save` writes them, :mod:`mrmae_ds.training.checkpoint.resume` chooses and loads them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.config.sections import CheckpointConfig
from mrmae_ds.training.checkpoint.manifest import MANIFEST

FOLDER = "checkpoints"
POINTER = "latest"
SAVING, LEFT, UNIVERSAL, REMOVING = ".saving-", ".left-", ".universal-", ".removing-"
_TAG = re.compile(r"step_(\d+)(?:_r(\d+))?")


# ---- policy


@dataclass(frozen=True)
class Retention:
    """Rule for the checkpoints that are kept.

    Attributes:
        keep_last: number of the newest ones.
        keep_every: steps; multiples of any of them are kept for good.
    """

    keep_last: int
    keep_every: tuple[int, ...] = ()

    def kept(self, checkpoints: list[Path]) -> list[Path]:
        """Return those of ``checkpoints``, oldest first, that are kept."""
        newest = checkpoints[-self.keep_last :]
        return [p for p in checkpoints if p in newest or any(step_of(p) % every == 0 for every in self.keep_every)]


@dataclass(frozen=True)
class CheckpointPolicy:
    """The recipe's ``checkpoint`` section in optimizer steps.

    Attributes:
        config: the recipe's section.
        steps_per_epoch: optimizer steps an epoch of the stage.
        total_steps: optimizer steps of the stage.
    """

    config: CheckpointConfig
    steps_per_epoch: int
    total_steps: int

    def due(self, step: int) -> bool:
        """Return True if a checkpoint is due after ``step`` steps, signals and the clock aside."""
        every = [*self.retention().keep_every]
        if self.config.every_epochs is not None:
            every.append(self.config.every_epochs * self.steps_per_epoch)
        if self.config.every_steps is not None:
            every.append(self.config.every_steps)
        return step == self.total_steps or any(step % n == 0 for n in every)

    def retention(self) -> Retention:
        """Return the rule for older checkpoints."""
        epochs = [self.config.keep_every_epochs * self.steps_per_epoch] if self.config.keep_every_epochs else []
        steps = [self.config.keep_every_steps] if self.config.keep_every_steps else []
        return Retention(self.config.keep_last, (*epochs, *steps))


# ---- names


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps completed, from the folder's name."""
    return _order(checkpoint.name)[0]


def _order(name: str) -> tuple[int, int]:
    match = _TAG.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2] or 0)


def checkpoint_folders(stage_dir: Path) -> list[Path]:
    """Return every folder with a checkpoint's name, complete or not, oldest first."""
    folder = stage_dir / FOLDER
    if not folder.is_dir():
        return []
    folders = [path for path in folder.iterdir() if _TAG.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: _order(path.name))


def list_checkpoints(stage_dir: Path) -> list[Path]:
    """Return the committed checkpoints of a stage, oldest first."""
    return [path for path in checkpoint_folders(stage_dir) if (path / MANIFEST).is_file()]


def new_tag(stage_dir: Path, step: int) -> str:
    """Return an unused name for the checkpoint at ``step``.

    It is ``step_000000100``, or ``step_000000100_r1`` if anything in the folder (a checkpoint, one set aside, a
    conversion) belongs to an earlier save of this step.
    """
    folder = stage_dir / FOLDER
    plain = f"step_{step:09d}"
    taken = [path.name for path in folder.iterdir() if plain in path.name] if folder.is_dir() else []
    numbers = [int(match[1] or 0) for name in taken for match in re.finditer(rf"{plain}(?:_r(\d+))?", name)]
    return f"{plain}_r{max(numbers) + 1}" if numbers else plain


# ---- removal


def set_aside(checkpoints: Iterable[Path]) -> None:
    """Rename checkpoints so that none of them is taken for one; the next save removes them."""
    for path in checkpoints:
        remove(path.with_name(LEFT + path.name))
        path.rename(path.with_name(LEFT + path.name))


def clear_leftovers(stage_dir: Path) -> None:
    """Remove what killed processes left behind: half-written checkpoints, half-removed ones, temporary files."""
    for prefix in (SAVING, REMOVING):
        for path in (stage_dir / FOLDER).glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
    for path in torn_files(stage_dir):
        path.unlink(missing_ok=True)


def torn_files(stage_dir: Path) -> list[Path]:
    """Return temporary files of a stage, of its checkpoints and of its images, whose writers were killed."""
    return [*stage_dir.glob(".*.tmp"), *stage_dir.glob("*/.*.tmp")]


def remove(path: Path) -> None:
    """Remove a folder so that no half of it keeps its name. What cannot be removed stays, hidden.

    Raises:
        OSError: if it cannot even be renamed.
    """
    if not path.exists():
        return
    going = path.with_name(REMOVING + path.name)
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def prune(stage_dir: Path, newest: Path, retention: Retention) -> None:
    """After ``newest`` was committed: remove what is not kept, what was set aside, and conversions without a source.

    Folders of later steps belong to a run that was left for an older checkpoint, or are incomplete.

    Raises:
        OSError: if something cannot be removed.
    """
    order = _order(newest.name)
    candidates = [path for path in list_checkpoints(stage_dir) if _order(path.name) <= order]
    kept = {path.name for path in retention.kept(candidates)}
    for path in checkpoint_folders(stage_dir):
        if path.name not in kept:
            remove(path)
    for path in (stage_dir / FOLDER).glob(f"{LEFT}*"):
        remove(path)
    for path in (stage_dir / FOLDER).glob(f"{UNIVERSAL}*"):
        if path.name.removeprefix(UNIVERSAL) not in kept:
            remove(path)
