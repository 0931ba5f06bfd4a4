"""Checkpoint manifest ``manifest.json``: contents, layout, and a checksum of every file and of itself.

It is written last, so a folder with a readable manifest was committed: every rank had finished, and everything was on
the disk. :func:`check_sizes` (quick) and :func:`check_contents` (reads every byte) compare the files with it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256, write_text

MANIFEST = "manifest.json"
FORMAT = 2
ResultValues = dict[str, float | int]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Section):
    """A file as it was written.

    Attributes:
        size: in bytes.
        sha256: in hexadecimal.
    """

    size: int
    sha256: str


class RunIdentity(_Section):
    """Properties that must be the same for a run to resume from a checkpoint.

    Attributes:
        recipe_hash: hash of ``recipe``.
        seed: of the run.
        train: SHA-256 of the training set's .beton file.
        val: SHA-256 of the validation set's .beton file.
        teachers: SHA-256 of the weights, by the recipe's names.
        init: SHA-256 of the initial weights; empty without, and in checkpoints of earlier versions.
        recipe: the values that the hash covers.
    """

    recipe_hash: str
    seed: int
    train: str
    val: str
    teachers: dict[str, str] = {}
    init: str = ""
    recipe: dict[str, Any] = {}

    def differences(self, new: RunIdentity) -> list[str]:
        """Return ``key: old -> new`` for everything that differs from ``new``."""
        lines = []
        if self.recipe_hash != new.recipe_hash:
            leaves = leaf_differences(self.recipe, new.recipe) if self.recipe and new.recipe else []
            lines += leaves or [f"recipe: {self.recipe_hash} -> {new.recipe_hash}"]
        if self.seed != new.seed:
            lines.append(f"seed: {self.seed} -> {new.seed}")
        for key in ("train", "val"):
            lines += _checksum_difference(f"data.{key}", getattr(self, key), getattr(new, key))
        if self.init and new.init:  # the recipe says whether there are any
            lines += _checksum_difference("initial weights", self.init, new.init)
        for name in dict.fromkeys([*self.teachers, *new.teachers]):
            lines += _checksum_difference(f"teachers.{name}", self.teachers.get(name), new.teachers.get(name))
        return lines


class EngineLayout(_Section):
    """Distribution of the state over files. Loading into another layout takes a conversion, or is impossible.

    Attributes:
        world_size: number of ranks.
        zero_stage: 0 to 3.
        dtype: of the parameters that the modules see.
        sub_group_size: of ZeRO-3; 0 elsewhere.
    """

    world_size: int
    zero_stage: int
    dtype: str
    sub_group_size: int = 0


class Manifest(_Section):
    """Description of a checkpoint.

    Attributes:
        id: unique to this save.
        step: optimizer steps completed.
        identity: of the run (:class:`RunIdentity`).
        layout: of the engine's state (:class:`EngineLayout`).
        results: evaluation results of the run so far.
        files: by name, relative to the checkpoint's folder.
    """

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    step: int
    identity: RunIdentity
    layout: EngineLayout
    results: ResultValues = {}
    files: dict[str, FileEntry]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def to_text(self) -> str:
        """Return the file's text, with the content's checksum."""
        content = self.model_dump(mode="json")
        return json.dumps({"format": FORMAT, "sha256": _digest(content), "content": content}, indent=1)

    def write(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` and flush it."""
        write_text(folder / MANIFEST, self.to_text())


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint and check it against its own checksum.

    Raises:
        UserError: naming the file that is missing, damaged, or of another version of this project.
    """
    path = checkpoint / MANIFEST
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        version = text.get("format", "1, which has no checksums")
        if version == FORMAT:
            if _digest(text["content"]) != text["sha256"]:
                raise ValueError("its content is not what was written")
            return Manifest.model_validate(text["content"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: no readable checkpoint manifest ({reason}); name a folder checkpoints/step_N"
        ) from None
    raise UserError(f"{path}: a checkpoint of format {version}; this version reads format {FORMAT}")


def check_sizes(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Compare the files' sizes with the manifest; return a message for each missing file or wrong size."""
    problems = []
    for name, entry in manifest.files.items():
        file = checkpoint / name
        try:
            actual = f"{file.stat().st_size} bytes"
        except OSError as error:
            actual = error.strerror or "unreadable"
        if actual != f"{entry.size} bytes":
            problems.append(f"{file}: {actual} instead of {entry.size} bytes")
    return problems


def check_contents(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Read the named files; return a message for each whose content is not what was written."""
    problems = []
    for name in names:
        file = checkpoint / name
        try:
            if file_sha256(file) != manifest.files[name].sha256:
                problems.append(f"{file}: its content is not what was written (SHA-256)")
        except OSError as error:
            problems.append(f"{file}: {error.strerror or error}")
    return problems


def shares(manifest: Manifest, parts: int) -> list[list[str]]:
    """Divide the files into ``parts`` lists of about the same number of bytes, the same on every rank."""
    lists: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        lists[least].append(name)
        loads[least] += entry.size
    return lists


def leaf_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return ``key.path: old -> new`` for every leaf that differs between two nested mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in leaf_differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _checksum_difference(name: str, old: str | None, new: str | None) -> list[str]:
    if old == new:
        return []
    shown = [f"sha256 {value[:12]}" if value else "none" for value in (old, new)]
    return [f"{name}: {shown[0]} -> {shown[1]}"]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
