"""Weights that a run started from, learned from or evaluated, and that were made over since."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mrmae_ds.errors import UserError
from mrmae_ds.files import split_choice
from mrmae_ds.records.record import RECIPE_FILE, RunRecord
from mrmae_ds.weights.paths import find_weights, weights_files, weights_sha256


def changed_weights(folder: Path, record: RunRecord) -> list[Path]:
    """Return the weights files that the run's recipe names and that are not those it read.

    Only a file that was written, moved or copied after the run began is read. A file that is gone, or a recipe that is,
    is no finding.

    Args:
        folder: of the stage, with its recipe.yaml.
        record: of the stage.
    """
    changed = []
    for source, sha256 in _sources(folder, record):
        try:
            path = find_weights(source)
            # mv and cp -p keep the time of the content, so the time of the entry counts too.
            stats = [file.stat() for file in weights_files(split_choice(path)[0])]
            written = max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
            newer = written > record.started.timestamp() * 1e9
            if sha256 and newer and _sha256(path, written) != sha256:
                changed.append(path)
        except (UserError, OSError, ValueError, KeyError):
            continue
    return changed


def _sources(folder: Path, record: RunRecord) -> Iterator[tuple[Path, str | None]]:
    try:
        path = folder / RECIPE_FILE
        recipe = _recipe(path, path.stat().st_mtime_ns)
        stage = recipe["stages"][record.stage]
        names = stage.get("members") or [folder.parent / "finetune"]
        if record.members:
            yield from zip(map(Path, names), (member.sha256 for member in record.members), strict=False)
        elif record.init is not None:
            init = stage["init"]
            yield folder.parent / "pretrain" if init == "pretrain" else Path(init), record.init.sha256
        for name, teacher in record.teachers.items():
            settings = recipe["teachers"][name]
            source = settings["source" if settings["kind"] == "checkpoint" else "weights"]
            if source is not None:  # the tag of a library's own weights is no file
                yield Path(source), teacher.sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return


@functools.cache
def _recipe(path: Path, written: int) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@functools.cache
def _sha256(path: Path, written: int) -> str:
    return weights_sha256(path)
