"""Other runs that a recipe names: to start from, to learn from, to evaluate."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, get_args

from mrmae_ds.config.stages import StageName


def shorten_sources(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with every run that it names shortened to RUN/STAGE (see :func:`run_and_stage`).

    Runs with different seeds, each going on from a run with its own, then have the same values. What these files hold
    is on record by checksum.
    """
    teachers = {
        name: teacher | {"source": run_and_stage(teacher["source"])} if teacher["kind"] == "checkpoint" else teacher
        for name, teacher in recipe["teachers"].items()
    }
    stages = {name: stage and _shortened(stage) for name, stage in recipe["stages"].items()}
    return recipe | {"teachers": teachers, "stages": stages}


def _shortened(stage: dict[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    if stage.get("init"):
        named["init"] = run_and_stage(stage["init"])
    if stage.get("members"):
        named["members"] = [run_and_stage(member) for member in stage["members"]]
    return stage | named


def run_and_stage(source: str) -> str:
    """``runs/huge-seed1/pretrain`` to ``huge/pretrain``; anything that is no stage of a run stays as it is."""
    parts = PurePath(source).parts
    if len(parts) < 2 or parts[-1] not in get_args(StageName):
        return source
    return f"{re.sub(r'-seed[0-9]+$', '', parts[-2])}/{parts[-1]}"
