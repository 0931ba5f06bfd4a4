"""Keys of recipes and pipeline files that were renamed: the table, the error that names the new key, the rewriting.

Everything that `mrmae migrate` changes in a configuration follows from :data:`RENAMED`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mrmae_ds.errors import UserError

logger = logging.getLogger(__name__)

# Old key of a recipe: its present key.
RENAMED = {
    "loader.workers": "loader.num_workers",
    "loader.stage_to": "loader.cache_dir",
    "record.log_every": "logging.every_steps",
    "record.pictures": "logging.num_images",
    "record.save_every_epochs": "checkpoint.every_epochs",
    "record.save_every_steps": "checkpoint.every_steps",
    "record.save_every_minutes": "checkpoint.every_minutes",
    "record.keep_checkpoints": "checkpoint.keep_last",
    "record.keep_every_epochs": "checkpoint.keep_every_epochs",
    "record.keep_every_steps": "checkpoint.keep_every_steps",
    "record.save_in_background": "checkpoint.async_save",
    "record.hang_minutes": "watchdog.timeout_minutes",
    "stages.finetune.smoothing": "stages.finetune.label_smoothing",
    "stages.finetune.erasing": "stages.finetune.random_erasing",
}
# The old section whose keys are divided among these.
_DIVIDED, _SECTIONS = "record", ("logging", "checkpoint", "watchdog")


def refuse_renamed(raw: Any, path: Path, source: str = "") -> None:
    """Check that a recipe, an overlay or a pipeline file has no old key.

    Args:
        raw: the parsed content.
        path: of the file that `mrmae migrate` would rewrite.
        source: an override that gave the key; empty if the file did.

    Raises:
        UserError: naming every old key, its present one, and the command that rewrites the file.
    """
    lines = [
        f"{above}{old} is now {above}{new}" for above, recipe in _recipes(raw) for old, new in _old_keys(recipe).items()
    ]
    if lines:
        fix = "write the new key" if source else f"`mrmae migrate {path}` rewrites the file"
        raise UserError(f"{source or path}: {'; '.join(lines)}; {fix}")


def rename_overrides(overrides: Iterable[str]) -> list[str]:
    """Return ``key.path=value`` strings with old keys renamed, and print a warning of each.

    Overrides stand in scripts, which `mrmae migrate` does not rewrite. Old keys inside their values are left.
    """
    renamed = []
    for text in overrides:
        old, sign, value = text.partition("=")
        if sign and old in RENAMED:
            logger.warning("%s is now %s; the old name will be refused", old, RENAMED[old])
            text = f"{RENAMED[old]}={value}"
        renamed.append(text)
    return renamed


def rename_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a recipe, an overlay or a pipeline file with its old keys renamed.

    Raises:
        UserError: if an old key and its present one are both given.
    """
    result = copy.deepcopy(raw)
    for _, recipe in _recipes(result):
        _rename(recipe, RENAMED)
        if _is_empty_section(recipe):
            value = recipe.pop(_DIVIDED)
            recipe |= {name: value for name in _SECTIONS if name not in recipe}
    return result


def former_hash(counted: dict[str, Any]) -> str:
    """Return the hash that a recipe had under its old keys.

    Args:
        counted: :meth:`~mrmae_ds.config.recipe.Recipe.counted` of the recipe, under its present keys.
    """
    former = copy.deepcopy(counted)
    _rename(former, {new: old for old, new in RENAMED.items()})
    return values_hash(former)


def values_hash(counted: dict[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of nested values."""
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]


def rename_in_text(text: str) -> str:
    """Rename old keys in the text of a YAML file; comments, order, layout and line ends are kept.

    Comments inside a ``record`` section move with the key that follows them; those inside braces move above it.

    Raises:
        UserError: if the text cannot be rewritten (an alias or a merge key in place of a renamed section, or a present
            section beside the old one).
        yaml.YAMLError: if it is not YAML.
    """
    before = yaml.safe_load(text)
    if not isinstance(before, dict):
        return text
    expected = rename_keys(before)
    if expected == before:
        return text
    if "\r\n" in text:
        return rename_in_text(text.replace("\r\n", "\n")).replace("\n", "\r\n")
    # A set: an alias yields the edits of its anchor again.
    edits = {edit for recipe in _recipe_nodes(yaml.compose(text)) for edit in _edits(text, recipe)}
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    if not _is_rewriting(text, expected):
        raise UserError(
            "its old keys cannot be renamed in the text (aliases, merge keys, or a present section beside an old one); "
            "rename them by hand"
        )
    return text


def _is_rewriting(text: str, expected: dict[str, Any]) -> bool:
    """Return True if a text is YAML with the expected values and no duplicate key in a recipe."""
    try:
        recipes = _recipe_nodes(yaml.compose(text))
        return yaml.safe_load(text) == expected and all(len(_children(node)) == len(node.value) for node in recipes)
    except yaml.YAMLError:
        return False


def _recipes(raw: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipe itself, or the changes to recipes that a pipeline file makes, each with the path above it."""
    if not isinstance(raw, dict):
        return
    if not isinstance(raw.get("runs"), list):
        yield "", raw
        return
    sections = {"set": raw.get("set")}
    sets = raw.get("sets")
    sections |= {f"sets.{name}": changes for name, changes in (sets.items() if isinstance(sets, dict) else ())}
    sections |= {f"runs.{i}.set": run.get("set") for i, run in enumerate(raw["runs"]) if isinstance(run, dict)}
    yield from ((f"{above}.", changes) for above, changes in sections.items() if isinstance(changes, dict))


def _old_keys(recipe: dict[str, Any]) -> dict[str, str]:
    found = {old: new for old, new in RENAMED.items() if _holds(recipe, old)}
    if _is_empty_section(recipe):
        found[_DIVIDED] = " and ".join(_SECTIONS)
    return found


def _is_empty_section(recipe: dict[str, Any]) -> bool:
    return recipe.get(_DIVIDED, _DIVIDED) in (None, {})


def _holds(recipe: dict[str, Any], key: str) -> bool:
    *parents, last = key.split(".")
    node: Any = recipe
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    return isinstance(node, dict) and last in node


def _rename(recipe: dict[str, Any], keys: dict[str, str]) -> None:
    for old, new in keys.items():
        if not _holds(recipe, old):
            continue
        if _holds(recipe, new):
            raise UserError(f"both {old} and {new}, its present name, are given; remove one")
        *parents, last = old.split(".")
        node = recipe
        for part in parents:
            node = node[part]
        value = node.pop(last)
        if not node and parents == [_DIVIDED]:
            del recipe[_DIVIDED]
        *parents, last = new.split(".")
        node = recipe
        for part in parents:
            node[part] = node.get(part) or {}
            node = node[part]
        node[last] = value


def _recipe_nodes(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """The nodes of :func:`_recipes`."""
    if not isinstance(root, yaml.MappingNode):
        return
    top = _children(root)
    runs = top.get("runs")
    if runs is None or not isinstance(runs[1], yaml.SequenceNode):
        yield root
        return
    found = [top.get("set"), *(_children(top["sets"][1]).values() if "sets" in top else ())]
    found += [_children(run).get("set") for run in runs[1].value]
    yield from (pair[1] for pair in found if pair is not None and isinstance(pair[1], yaml.MappingNode))


def _children(node: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes of a mapping, by key; empty for other nodes."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {str(key.value): (key, value) for key, value in node.value}


def _edits(text: str, recipe: yaml.MappingNode) -> Iterator[tuple[int, int, str]]:
    """Replacements (start, end, new text) that rename the keys of one recipe."""
    for old, new in RENAMED.items():
        *parents, last = old.split(".")
        if parents == [_DIVIDED]:
            continue
        children = _children(recipe)
        for part in parents:
            children = _children(children[part][1]) if part in children else {}
        if last in children:
            key = children[last][0]
            yield key.start_mark.index, key.end_mark.index, _like(key, new.rpartition(".")[2])
    if pair := _children(recipe).get(_DIVIDED):
        yield _divide(text, recipe, *pair)


def _like(key: yaml.Node, name: str) -> str:
    """Return a key's new name in the quotes of the old one, which JSON needs."""
    quote = key.style if isinstance(key, yaml.ScalarNode) and key.style in ("'", '"') else ""
    return f"{quote}{name}{quote}"


def _divide(text: str, recipe: yaml.MappingNode, key: yaml.Node, section: yaml.Node) -> tuple[int, int, str]:
    """The replacement of a ``record`` section by those among which its keys are divided."""
    indent = " " * key.start_mark.column
    between = ", " if recipe.flow_style else f"\n{indent}"
    start, end = key.start_mark.index, section.end_mark.index
    if not section.value or not isinstance(section, yaml.MappingNode):
        value = "{}" if isinstance(section, yaml.MappingNode) else "null"
        empty = [f"{_like(key, name)}: {value}" for name in _SECTIONS if name not in _children(recipe)]
        return start, max(end, key.end_mark.index), between.join(empty)
    moved: dict[str, list[str]] = {name: [] for name in (*_SECTIONS, _DIVIDED)}
    targets = [RENAMED.get(f"{_DIVIDED}.{name.value}", f"{_DIVIDED}.{name.value}") for name, _ in section.value]
    position = section.start_mark.index
    if section.flow_style:
        comments = []
        for (name, value), (target, _, new) in zip(
            section.value, (path.partition(".") for path in targets), strict=True
        ):
            comments += re.findall("#.*", text[position : name.start_mark.index])
            moved[target].append(f"{_like(name, new)}: {text[value.start_mark.index : value.end_mark.index]}")
            position = value.end_mark.index
        comments += re.findall("#.*", text[position:end])
        above = "".join(f"{comment}\n{indent}" for comment in comments)
        flow = (f"{_like(key, name)}: {{{', '.join(entries)}}}" for name, entries in moved.items() if entries)
        return start, end, above + between.join(flow)
    # Block style: each key with the lines above it that no key before it took, whole lines to the section's end.
    position = text.index("\n", key.end_mark.index) + 1
    head = text[key.end_mark.index : position].strip().removeprefix(":").strip()
    for (name, value), (target, _, new) in zip(section.value, (path.partition(".") for path in targets), strict=True):
        line_end = text.find("\n", max(value.end_mark.index - 1, name.end_mark.index))
        if isinstance(value, yaml.ScalarNode) and not value.value and value.style is None:
            line_end = text.find("\n", name.end_mark.index)
        line_end = len(text) if line_end < 0 else line_end + 1
        kept = text[name.end_mark.index : line_end]
        moved[target].append(text[position : name.start_mark.index] + _like(name, new) + kept)
        position = line_end
    comment = f"  {head}" if head else ""
    parts = []
    for name, entries in moved.items():
        if entries:
            parts.append(f"{_like(key, name)}:{comment}\n{''.join(entries)}".rstrip("\n"))
            comment = ""
    tail = "\n" if text[position - 1 : position] == "\n" else ""
    return start, position, f"\n{indent}".join(parts) + tail
