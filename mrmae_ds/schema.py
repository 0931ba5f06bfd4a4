"""The base of every section of a recipe: strict, immutable."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of a recipe: an unknown key or a wrong type is an error.

    Numbers may be written as strings, because YAML 1.1 reads ``1e-3`` (no dot) as one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """pydantic takes true for 1.0; no key of a recipe is a boolean, so one is always a mistake."""
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool):
                raise ValueError(f".{key}: expected a value, got {str(value).lower()}")
        return values
