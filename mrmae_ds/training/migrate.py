"""Rewrite recipes, pipeline files and run folders of earlier versions with the present keys (``mrmae migrate``).

Rewritten are YAML files, and of run folders ``record.json``, ``captures/*/capture.json`` and the checkpoints'
``manifest.json``; ``pictures/`` becomes ``images/``. Weights are left as they are: records, teachers and checkpoints
identify a model.safetensors by its SHA-256, and whatever reads the recipe or its hash in the metadata renames the keys
itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from mrmae_ds.config.files import describe_errors, parse_problem, read_json, read_yaml
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.renamed import former_hash, rename_in_text, rename_keys, values_hash
from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.records.record import RECIPE_FILE, RECORD_FILE, RunRecord
from mrmae_ds.training.callbacks.nonfinite_capture import CAPTURE_FILE
from mrmae_ds.training.checkpoint.manifest import MANIFEST, read_manifest

_YAML = (".yaml", ".yml")
_OLD_IMAGES, _IMAGES = "pictures", "images"
# Indentation of the JSON files that hold hashes of recipes.
_INDENTS = {RECORD_FILE: 2, CAPTURE_FILE: 1}
# A key by which the JSON files of runs differ from others of the same name.
_MARKS = {RECORD_FILE: "recipe_hash", CAPTURE_FILE: "recipe_hash", MANIFEST: "content"}


def migrate(paths: Iterable[Path], dry_run: bool = False) -> tuple[list[str], list[str]]:
    """Rewrite files and run folders, each file in one step; a second call changes nothing.

    Args:
        paths: YAML files, run folders, or folders that hold them at any depth.
        dry_run: report the changes only.

    Returns:
        A line for each change, and a message for each file that could not be read or rewritten.

    Raises:
        UserError: for a path that does not exist.
    """
    files = list(_files(paths))
    hashes: dict[str, str] = {}
    texts: dict[Path, tuple[str, str]] = {}
    problems = []
    for path in files:
        if path.name == RECORD_FILE and (path.parent / RECIPE_FILE).is_file():
            try:
                hashes |= _present_hashes(path)
            except UserError as error:
                problems.append(str(error))
    for path in files:
        try:
            text = _text(path)
            texts[path] = text, _rewritten(path, text, hashes)
        except UserError as error:
            problems.append(str(error))
    problems += _unknown_members(texts, {*hashes, *hashes.values()})
    done = []
    for path, (before, text) in texts.items():
        if text != before:
            try:
                if not dry_run:
                    write_text(path.resolve(), text)  # a link stays one
                done.append(f"{'would rewrite' if dry_run else 'rewritten'}: {path}")
            except OSError as error:
                problems.append(f"{path}: cannot be written: {error.strerror}")
    for folder in (path.parent for path in texts if path.name == RECORD_FILE):
        old, new = folder / _OLD_IMAGES, folder / _IMAGES
        if old.is_dir() and not new.exists():
            try:
                if not dry_run:
                    old.rename(new)
                done.append(f"{'would rename' if dry_run else 'renamed'}: {old} -> {new}")
            except OSError as error:
                problems.append(f"{old}: cannot be renamed: {error.strerror}")
    return done, problems


def _text(path: Path) -> str:
    """Return a file's text with its own line ends."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files to rewrite, each once; links are followed, as of checkpoints on another disk."""
    paths, visited = list(paths), set[Path]()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    for path in paths:
        for file in [path] if path.is_file() else _files_below(path, visited):
            if file.resolve() not in visited:
                visited.add(file.resolve())
                yield file


def _files_below(root: Path, visited: set[Path]) -> Iterator[Path]:
    for folder, below, names in os.walk(root, followlinks=True):
        if Path(folder).resolve() in visited:
            below.clear()
            continue
        visited.add(Path(folder).resolve())
        # Hidden folders are not the user's, but for an earlier run that a fresh start set aside.
        below[:] = sorted(name for name in below if not name.startswith(".") or name.endswith(".previous"))
        yield from (Path(folder, name) for name in sorted(names) if _is_ours(Path(folder, name)))


def _is_ours(path: Path) -> bool:
    if path.name in _MARKS:
        try:
            return _MARKS[path.name] in read_json(path)
        except UserError:  # some other program's, unless it is of a run
            return (path.parent / RECIPE_FILE).is_file() or path.parent.name.startswith("step_")
    if path.suffix not in _YAML:
        return False
    try:
        raw = read_yaml(path)
    except UserError:  # some other project's YAML, unless it is of a run
        return path.name == RECIPE_FILE and (path.parent / RECORD_FILE).is_file()
    return raw.keys() <= {*Recipe.model_fields, "extends", "record"} or isinstance(raw.get("runs"), list)


def _present_hashes(record: Path) -> dict[str, str]:
    """Return the present hash of each stage of a run's recipe by the former one, which is often the same.

    The stages beside the record's own are those whose hashes it repeats, as an evaluation those of its members.
    """
    path = record.parent / RECIPE_FILE
    stage = read_json(record).get("stage")
    try:
        recipe = Recipe.model_validate(rename_keys(read_yaml(path)))
    except ValidationError as error:
        raise UserError(describe_errors(error, Recipe, path)) from None
    stages = [name for name in get_args(StageName) if getattr(recipe.stages, name) is not None]
    if stage not in stages:
        raise UserError(f"{record}: no such stage: {stage!r}")
    return {former_hash(recipe.counted(name)): recipe.hash(name) for name in stages}


def _unknown_members(texts: dict[Path, tuple[str, str]], known: set[str]) -> Iterator[str]:
    """Report the members of evaluations of earlier versions whose recipes are not among the files.

    Args:
        texts: former and present text of each file.
        known: hashes of all recipes among the files.
    """
    for path in texts:
        before, text = texts.get(path.with_name(RECIPE_FILE), ("", ""))
        if path.name != RECORD_FILE or before == text:
            continue
        try:
            members = RunRecord.load(path.parent).members
        except UserError as error:
            yield str(error)
            continue
        for tuning in (member.finetune for member in members or ()):
            if tuning is not None and tuning.recipe_hash not in known:
                yield (
                    f"{path}: keeps the hash {tuning.recipe_hash} of its member {tuning.name}, which may be a former "
                    "one; name the folder of that fine-tuning too"
                )


def _rewritten(path: Path, text: str, hashes: dict[str, str]) -> str:
    """Return the present form of a file's text."""
    if path.name == MANIFEST:
        return _manifest_text(path, text)
    if path.name in _INDENTS:
        content = read_json(path)
        renamed = _with_hashes(content, hashes)
        if renamed == content:
            return text
        ending = "\n" if text.endswith("\n") else ""
        return json.dumps(renamed, indent=_INDENTS[path.name], ensure_ascii=False) + ending
    if path.suffix not in _YAML:
        raise UserError(f"{path}: neither YAML nor a file of a run; name a recipe, a pipeline file or a folder")
    try:
        return rename_in_text(text)
    except (UserError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {parse_problem(error)}") from None


def _with_hashes(value: Any, hashes: dict[str, str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _with_hashes(below, hashes, name) for name, below in value.items()}
    if isinstance(value, list):
        return [_with_hashes(below, hashes) for below in value]
    return hashes.get(value, value) if key == "recipe_hash" else value


def _manifest_text(path: Path, text: str) -> str:
    manifest = read_manifest(path.parent)
    identity = manifest.identity
    recipe = rename_keys(identity.recipe)
    if recipe == identity.recipe:
        return text
    if values_hash(identity.recipe) != identity.recipe_hash:
        raise UserError(f"{path}: its recipe is not the one of its hash {identity.recipe_hash}")
    identity = identity.model_copy(update={"recipe": recipe, "recipe_hash": values_hash(recipe)})
    return manifest.model_copy(update={"identity": identity}).to_text()
