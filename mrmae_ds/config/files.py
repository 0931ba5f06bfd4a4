"""Reading, merging and validating configuration files, with errors that name file and key."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from mrmae_ds.config.renamed import refuse_renamed
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.files import expand_home
from mrmae_ds.units import first_few

Join = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
_YAML = (".yaml", ".yml")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: if the file is missing, is not YAML or is not a mapping.
    """
    return _parsed(path, parse_yaml, _YAML)


def read_extended(
    path: Path, model: type[BaseModel], ancestors: tuple[Path, ...] = (), *, join: Join | None = None
) -> dict[str, Any]:
    """Read a YAML file and merge it into the file that it ``extends``, if any, recursively.

    Args:
        path: the file.
        model: schema of the merged content, for null keys.
        ancestors: files that extend this one.
        join: merges a file, the second argument, into the one that it extends; None is :func:`merge`.

    Raises:
        UserError: as :func:`read_yaml`, for a file that extends itself, for a renamed key, and for an unknown key that
            is null.
    """
    if path.resolve() in ancestors:
        raise UserError(f"{path}: extends itself through {' -> '.join(map(str, ancestors))}")
    raw = read_yaml(path)
    refuse_renamed(raw, path)
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    refuse_unknown_nulls(raw, model, path)
    base = path.parent / expand_home(str(parent))
    if not base.is_file():
        hint = _nearest_file(base, _YAML, besides=path)
        problem = "a folder; name a file in it" if base.is_dir() else f"no such file{hint}"
        raise UserError(f"{path}: extends: {base}: {problem}")
    return (join or merge)(read_extended(base, model, (*ancestors, path.resolve()), join=join), raw)


# Kinds of configuration: a key that every file of the kind has and no other, what takes it, and an example.
_KINDS = {
    "a recipe": ("model", "--recipe", "ds_configs/NAME.yaml"),
    "an engine config": ("train_micro_batch_size_per_gpu", "--ds_config", "ds_configs/NAME.json"),
    "a pipeline file": ("runs", "mrmae submit", "pipelines/NAME.yaml"),
}


def refuse_other_kind(raw: dict[str, Any], expected: str, path: Path) -> None:
    """Check that a file is not a configuration of another kind, all of whose keys would be unknown.

    Args:
        raw: its content.
        expected: "a recipe", "an engine config" or "a pipeline file".
        path: of the file.

    Raises:
        UserError: naming the kind and what takes it.
    """
    own, _, example = _KINDS[expected]
    for kind, (key, taker, _) in _KINDS.items():
        if key in raw and own not in raw:
            raise UserError(f"{path}: is {kind}, for {taker}; expected {expected}, {example}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises as :func:`read_yaml`."""
    return _parsed(path, lambda text: json.loads(text, object_pairs_hook=_unique), (".json",))


def parse_yaml(text: str) -> Any:
    """Parse YAML without duplicate keys; raises ValueError or yaml.YAMLError."""
    return yaml.load(text, Loader=_UniqueKeys)


class _UniqueKeys(yaml.SafeLoader):
    """Loader that refuses duplicate keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        mapping = super().construct_mapping(node, deep)  # refuses keys that are mappings, as of {{ template }}
        _unique([(key, None) for key in keys])
        return mapping


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise ValueError(f"duplicate key {twice!r}")
    return dict(pairs)


def _parsed(path: Path, parse: Callable[[str], Any], suffixes: Sequence[str]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_nearest_file(path, suffixes)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: cannot be read: it is a folder; name a file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be parsed: {parse_problem(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def parse_problem(error: Exception) -> str:
    """Return a parser's error as one line, without the name that PyYAML gives to every text."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split()).replace(' in "<unicode string>"', "")


def json_text(value: Any) -> str:
    """Return a value for a message as configuration files write it: null and true, not None and True."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def merge(base: dict[str, Any], over: dict[str, Any], keep_null: bool = False) -> dict[str, Any]:
    """Merge ``over`` into a copy of ``base``: mappings are merged, other values replaced, None removes a key.

    Args:
        base: below.
        over: above.
        keep_null: keep a key that is None instead.
    """
    result = dict(base)
    for key, value in over.items():
        if value is None and not keep_null:
            result.pop(key, None)
        elif isinstance(value, dict):
            below = result.get(key)
            result[key] = merge(below if isinstance(below, dict) else {}, value, keep_null)
        else:
            result[key] = value
    return result


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str], path: Path) -> dict[str, Any]:
    """Apply ``key.path=value`` strings to a mapping read from ``path``; values are YAML, ``null`` removes a key.

    Raises:
        UserError: for a string that is not an assignment, or a key path through a value that is not a mapping.
    """
    for text in overrides:
        over, node = _parse_override(text), raw
        for part in text.partition("=")[0].split(".")[:-1]:
            node = node.get(part, {}) if isinstance(node, dict) else node
            if node is not None and not isinstance(node, dict):
                raise UserError(f"override {text!r}: {part} of {path} is a value, not a section")
        raw = merge(raw, over)
    return raw


def join_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``key.path=value`` strings as one mapping, in which keys that they remove are None.

    Raises:
        UserError: for a string that is not an assignment.
    """
    joined: dict[str, Any] = {}
    for text in overrides:
        joined = merge(joined, _parse_override(text), keep_null=True)
    return joined


def _parse_override(text: str) -> dict[str, Any]:
    key, sign, value_text = text.partition("=")
    if not sign or not all(key.split(".")):
        raise UserError(f"{text!r} is not an override; write key.path=value, for example seed=1")
    try:
        value = parse_yaml(value_text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override {text!r}: the value is not YAML: {parse_problem(error)}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def refuse_unknown_nulls(
    over: dict[str, Any],
    model: type[BaseModel],
    path: Path,
    above: tuple[str, ...] = (),
    overrides: Sequence[str] = (),
) -> None:
    """Check that null removes only keys of the schema: after merging, no validation sees the others.

    Args:
        over: an overlay or overrides, before merging.
        model: schema of the merged content.
        path: file to name in the error.
        above: path of ``over`` in the content.
        overrides: ``key.path=value`` strings that ``over`` was joined from, if it was.

    Raises:
        UserError: naming the key and the nearest known key.
    """
    known = _fields_at(model, above)
    for key, value in over.items():
        if isinstance(value, dict):
            refuse_unknown_nulls(value, model, path, (*above, key), overrides)
        elif value is None and known and key not in known:
            where = ".".join((*above, key))
            raise UserError(f"{_origin(where, path, overrides)}: {where}: unknown key{_nearest(key, known)}")


def describe_errors(error: ValidationError, model: type[BaseModel], path: Path, overrides: Sequence[str] = ()) -> str:
    """Return all problems of a validation, one per line: file or override, key path, problem, nearest known key.

    Args:
        error: raised by the validation.
        model: schema of the content.
        path: of the file.
        overrides: ``key.path=value`` strings that were applied to its content.
    """
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        unknown = item["type"] == "extra_forbidden"
        if unknown:
            known = _fields_at(model, item["loc"][:-1])
            problem = f"unknown key{_nearest(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            problem = "this key is required"
        else:
            given = item.get("input")
            shown = f" (got {json_text(given)})" if not isinstance(given, dict | list | BaseModel) else ""
            reason = item["msg"].removeprefix("Value error, ")
            cause = item.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):  # raised by a section for a key below it
                where, reason = (f"{where}.{cause.key}" if where else cause.key), cause.reason
            problem = f"{reason}{shown}"
        lines.append(": ".join(part for part in (_origin(where, path, overrides, unknown), where, problem) if part))
    return "\n".join(lines)


def _origin(where: str, path: Path, overrides: Sequence[str], below: bool = False) -> str:
    """Return the last override that gave a key or its section, or with ``below`` a key below it; else the file."""
    keys, own = [f"{text.partition('=')[0]}." for text in overrides], f"{where}."
    given = [
        text
        for text, key in zip(overrides, keys, strict=True)
        if own.startswith(key) or (below and key.startswith(own))
    ]
    return f"override {given[-1]!r} of {path}" if given else str(path)


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown key: the closest known one if there is one, else all of them."""
    return _nearest(key, list(known))


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(sorted(known))}" if known else ""


def _nearest_file(path: Path, suffixes: Sequence[str], besides: Path | None = None) -> str:
    """Return the hint for a missing file: the one of the closest name beside it, else some that are there.

    Args:
        path: the missing file, of any suffix or none.
        suffixes: of its kind of file.
        besides: a file that is no answer.
    """
    files = sorted(p for p in path.parent.glob("*") if p.suffix in suffixes and p.is_file() and p != besides)
    names = {p.stem: p.name for p in files}
    # Names alone and a high cutoff: the suffix that all share would make any two of them similar.
    if close := difflib.get_close_matches(path.stem, names, n=1, cutoff=0.75):
        return f"; did you mean {names[close[0]]!r}?"
    return f"; there are {first_few(list(names.values()), 12)}" if names and path.suffix else ""


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the section at a path, through optional sections and mappings of sections."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = _unwrapped(field.annotation) if field else None
        elif get_origin(current) in (dict, list, tuple):
            # The part is an entry's own name or index, not a field of its section.
            current = _unwrapped([arg for arg in get_args(current) if arg is not Ellipsis][-1])
        else:
            return []
    return list(getattr(current, "model_fields", {}))


def _unwrapped(annotation: Any) -> Any:
    """Return X for ``X | None``; other annotations unchanged."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((_unwrapped(arg) for arg in get_args(annotation) if arg is not type(None)), None)
    return annotation
