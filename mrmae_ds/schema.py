"""The base of every section of a recipe: strict, immutable."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: an unknown key or a wrong type is an error.

    Numbers may be written as strings, because YAML 1.1 reads ``1e-3`` (no dot) as one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
