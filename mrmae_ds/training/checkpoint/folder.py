"""The folder of a stage's checkpoints: what is in it, which are whole, which are kept.

    checkpoints/step_000001000/      a checkpoint: committed by renaming, with its manifest
    checkpoints/latest               the newest one's name, as DeepSpeed's own tools read it; nothing here depends on it
    checkpoints/.saving-*            being written; left by a save that was killed
    checkpoints/.left-step_*         set aside: damaged, or of a run that went back to an older checkpoint
    checkpoints/.universal-*         converted for another number of processes

:mod:`mrmae_ds.training.checkpoint.save` writes them, :mod:`mrmae_ds.training.checkpoint.resume` chooses and loads them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.training.checkpoint.manifest import MANIFEST

FOLDER = "checkpoints"
POINTER = "latest"
SAVING, LEFT, UNIVERSAL, REMOVING = ".saving-", ".left-", ".universal-", ".removing-"
_TAG = re.compile(r"step_(\d+)(?:_r(\d+))?")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        keep_last: so many of the newest.
        keep_every: and for good those of steps that are multiples of any of these.
    """

    keep_last: int
    keep_every: tuple[int, ...] = ()

    def kept(self, checkpoints: list[Path]) -> list[Path]:
        """Those of ``checkpoints``, oldest first, that stay."""
        newest = checkpoints[-self.keep_last :]
        return [p for p in checkpoints if p in newest or any(step_of(p) % every == 0 for every in self.keep_every)]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, by the folder's name."""
    return _order(checkpoint.name)[0]


def _order(name: str) -> tuple[int, int]:
    match = _TAG.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2] or 0)


def checkpoint_folders(stage_dir: Path) -> list[Path]:
    """Everything that is called a checkpoint, whole or not, oldest first."""
    folder = stage_dir / FOLDER
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _TAG.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: _order(path.name))


def list_checkpoints(stage_dir: Path) -> list[Path]:
    """The committed checkpoints of a stage, oldest first."""
    return [path for path in checkpoint_folders(stage_dir) if (path / MANIFEST).is_file()]


def new_tag(stage_dir: Path, step: int) -> str:
    """A name for a checkpoint after ``step`` steps that nothing in the folder has or has had a part in."""
    folder = stage_dir / FOLDER
    plain = f"step_{step:09d}"
    taken = [path.name for path in folder.iterdir() if plain in path.name] if folder.is_dir() else []
    numbers = [int(match[1] or 0) for name in taken for match in re.finditer(rf"{plain}(?:_r(\d+))?", name)]
    return f"{plain}_r{max(numbers) + 1}" if numbers else plain


def set_aside(checkpoints: Iterable[Path]) -> None:
    """Rename checkpoints so that none of them is taken for one; they go when the next save is done."""
    for path in checkpoints:
        remove(path.with_name(LEFT + path.name))
        path.rename(path.with_name(LEFT + path.name))


def clear_leftovers(stage_dir: Path) -> None:
    """Remove what ended processes left behind: half-written checkpoints, half-removed ones, temporary files."""
    for prefix in (SAVING, REMOVING):
        for path in (stage_dir / FOLDER).glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
    for path in torn_files(stage_dir):
        path.unlink(missing_ok=True)


def torn_files(stage_dir: Path) -> list[Path]:
    """Temporary files of a stage, of its checkpoints and of its images, whose writers were killed."""
    return [*stage_dir.glob(".*.tmp"), *stage_dir.glob("*/.*.tmp")]


def remove(path: Path) -> None:
    """Remove a folder in a way that leaves no half of it under its name. What cannot be removed stays, hidden.

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

    Folders of later steps are of a run that was left for an older checkpoint, or are not whole.

    Raises:
        OSError: if something cannot be removed.
    """
    order = _order(newest.name)
    line = [path for path in list_checkpoints(stage_dir) if _order(path.name) <= order]
    kept = {path.name for path in retention.kept(line)}
    for path in checkpoint_folders(stage_dir):
        if path.name not in kept:
            remove(path)
    for path in (stage_dir / FOLDER).glob(f"{LEFT}*"):
        remove(path)
    for path in (stage_dir / FOLDER).glob(f"{UNIVERSAL}*"):
        if path.name.removeprefix(UNIVERSAL) not in kept:
            remove(path)
