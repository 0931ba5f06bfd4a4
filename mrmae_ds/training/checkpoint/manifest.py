"""What a checkpoint says about itself: ``manifest.json``, written last, with a checksum of every file and of itself.

A folder with a readable manifest was committed: every process had finished, and everything was on the disk. Whether it
is still what was written is seen by :func:`check_sizes` (quick) and :func:`check_contents` (reads all of it).
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


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """Size in bytes and SHA-256, in hexadecimal, of a file as it was written."""

    size: int
    sha256: str


class RunIdentity(_Part):
    """What must be the same for a run to go on from a checkpoint.

    Attributes:
        recipe: what counts in its hash. recipe_hash: of it. seed: of the run.
        train, val: SHA-256 of the .beton files.
        teachers: SHA-256 of the weights, by the recipe's names.
    """

    recipe_hash: str
    seed: int
    train: str
    val: str
    teachers: dict[str, str] = {}
    recipe: dict[str, Any] = {}

    def differences(self, now: RunIdentity) -> list[str]:
        """``key: old -> new`` for everything that differs from ``now``."""
        found = []
        if self.recipe_hash != now.recipe_hash:
            known = leaf_differences(self.recipe, now.recipe) if self.recipe and now.recipe else []
            found += known or [f"recipe: {self.recipe_hash} -> {now.recipe_hash}"]
        if self.seed != now.seed:
            found.append(f"seed: {self.seed} -> {now.seed}")
        for key in ("train", "val"):
            found += _checksum_difference(f"data.{key}", getattr(self, key), getattr(now, key))
        for name in dict.fromkeys([*self.teachers, *now.teachers]):
            found += _checksum_difference(f"teachers.{name}", self.teachers.get(name), now.teachers.get(name))
        return found


class EngineLayout(_Part):
    """How the state is spread over files; another one can be read only through a conversion, or not at all.

    Attributes:
        world_size: processes. zero_stage: 0 to 3.
        dtype: of the parameters that the modules see.
        sub_group_size: of ZeRO-3; 0 elsewhere.
    """

    world_size: int
    zero_stage: int
    dtype: str
    sub_group_size: int = 0


class Manifest(_Part):
    """A checkpoint.

    Attributes:
        id: of this very save; no other checkpoint has it.
        step: optimizer steps done.
        identity, layout: see there.
        results: of the run so far.
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

    def write(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` and see it on the disk."""
        content = self.model_dump(mode="json")
        text = {"format": FORMAT, "sha256": _digest(content), "content": content}
        write_text(folder / MANIFEST, json.dumps(text, indent=1))


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, which is what was written.

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
    """What is wrong with the files' presence and sizes: nothing, or a line a file."""
    wrong = []
    for name, entry in manifest.files.items():
        file = checkpoint / name
        try:
            found = f"{file.stat().st_size} bytes"
        except OSError as error:
            found = error.strerror or "unreadable"
        if found != f"{entry.size} bytes":
            wrong.append(f"{file}: {found} instead of {entry.size} bytes")
    return wrong


def check_contents(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Read the named files: which of them are not what was written."""
    wrong = []
    for name in names:
        file = checkpoint / name
        try:
            if file_sha256(file) != manifest.files[name].sha256:
                wrong.append(f"{file}: its content is not what was written (SHA-256)")
        except OSError as error:
            wrong.append(f"{file}: {error.strerror or error}")
    return wrong


def shares(manifest: Manifest, parts: int) -> list[list[str]]:
    """The files divided into ``parts`` lists of about the same number of bytes, the same on every process."""
    lists: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        lists[least].append(name)
        loads[least] += entry.size
    return lists


def leaf_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``key.path: old -> new`` for every leaf that differs between two nested mappings."""
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
