"""The base of every section of a recipe: strict, immutable."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from mrmae_ds.errors import ConfigError


class Section(BaseModel):
    """A part of a recipe: an unknown key or a wrong type is an error.

    Numbers may be written as strings, because YAML 1.1 reads ``1e-3`` (no dot) as one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """pydantic takes true for 1.0; where a key is not a boolean, one is a mistake."""
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and not (field and bool in (field.annotation, *get_args(field.annotation))):
                raise ConfigError(key, f"expected a value, got {str(value).lower()}")
        return values
