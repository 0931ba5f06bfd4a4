"""Base class of the sections of recipes and pipeline files, strict and immutable, and the text of pydantic's errors."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.files import expand_home


class Section(BaseModel):
    """Section of a configuration; an unknown key or a wrong type is an error.

    Numbers may be written as strings, because YAML 1.1 parses ``1e-3`` (without a dot) as a string.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """Refuse true and false for keys that are not boolean, which pydantic would convert to 1 and 0."""
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            annotation = field.annotation if field else None
            kinds = (annotation, *get_args(annotation))
            if isinstance(value, bool) and bool not in kinds:
                section = get_origin(annotation) is not dict and any(
                    isinstance(kind, type) and issubclass(kind, Section) for kind in kinds
                )
                expected = "a section, {} for its defaults" if section else "a value"
                raise ConfigError(key, f"expected {expected}, got {str(value).lower()}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _tilde_is_home(cls, values: Any) -> Any:
        """Expand the leading tilde of paths: no other value begins with one."""
        if not isinstance(values, dict):
            return values
        expanded = {}
        for key, value in values.items():
            try:
                expanded[key] = _expanded(value)
            except UserError as error:
                raise ConfigError(key, str(error)) from None
        return expanded


def _expanded(value: Any) -> Any:
    """Return a path, or a list of paths, with tildes expanded; other values unchanged."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    return expand_home(value) if isinstance(value, str) else value


def validation_faults(error: ValidationError) -> str:
    """Return pydantic's errors on one line, each with its key, without the values."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'content'}: {item['msg']}" for item in error.errors()
    )
