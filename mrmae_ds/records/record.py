"""The record of a run: what ran, on what, from what, and what came of it. One `record.json` in each run
folder.

A record names files by their last path component only and never holds a host's or a user's name, so that a
run folder can be published as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.records.sections import (
    FROM_SCRATCH,
    Count,
    DataInfo,
    Design,
    FinetuneSummary,
    GitState,
    Hardware,
    Init,
    Member,
    ModelInfo,
    ObjectiveInfo,
    Operations,
    Parameters,
    PretrainSummary,
    RecordSection,
    Results,
    Schedule,
    Spent,
    TeacherInfo,
)

__all__ = [
    "FROM_SCRATCH",
    "RECORD_FILE",
    "DataInfo",
    "Design",
    "FinetuneSummary",
    "GitState",
    "Hardware",
    "Init",
    "Member",
    "ModelInfo",
    "ObjectiveInfo",
    "Operations",
    "Parameters",
    "PretrainSummary",
    "Results",
    "RunRecord",
    "Schedule",
    "Spent",
    "Status",
    "TeacherInfo",
    "find_records",
    "utc_now",
]

RECORD_FILE = "record.json"
SCHEMA_VERSION = 1

T = TypeVar("T")
Status = Literal["running", "finished", "failed", "stopped"]


def utc_now() -> datetime:
    """Return the present time in UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(timezone.utc)


UtcTime = Annotated[AwareDatetime, AfterValidator(_to_utc)]


class RunRecord(RecordSection):
    """One stage of one recipe, as it ran.

    `method` and `size` are the row and the column of the scaling table ("MR-MAE", "Huge-448"). `recipe_hash`
    is that of the resolved recipe without its seed, so that runs which differ in nothing else share it.
    `members` are the models that an evaluation averaged; a training has none. `design` is a pre-training's;
    `operations` and `model` are None in the records of an evaluation, and `slurm_job` outside Slurm.
    """

    schema_version: Literal[1] = 1
    name: str
    method: str
    size: str
    stage: str
    status: Status = "running"
    started: UtcTime = Field(default_factory=utc_now)
    ended: UtcTime | None = None
    seed: int
    recipe_hash: str
    git: GitState | None = None
    slurm_job: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: Hardware
    model: ModelInfo | None = None
    design: Design | None = None
    parameters: Parameters
    operations: Operations | None = None
    data: DataInfo
    teachers: dict[str, TeacherInfo] = Field(default_factory=dict)
    schedule: Schedule
    init: Init | None = None
    members: tuple[Member, ...] = ()
    results: Results = Results()
    wall_seconds: Annotated[float, Field(ge=0)] = 0.0
    images_seen: Count = 0

    @model_validator(mode="after")
    def _end_is_told(self) -> RunRecord:
        if self.status != "running" and self.ended is None:
            raise ValueError(f"status {self.status!r} needs the time at which the run ended")
        if self.status == "finished" and self.schedule.steps_done < self.schedule.steps:
            raise ValueError(
                f"status 'finished' after {self.schedule.steps_done} of {self.schedule.steps} steps; call it 'stopped'"
            )
        if self.results.top1 is not None and self.data.classes is None:
            raise ValueError("results.top1 needs data.classes, from which the level of chance follows")
        return self

    @property
    def tunings(self) -> tuple[FinetuneSummary | None, ...]:
        """The fine-tunings behind the accuracy: each member's (None where unknown), else this run itself."""
        return tuple(member.finetune for member in self.members) or (FinetuneSummary.of(self),)

    @property
    def pretrain_epochs(self) -> float | None:
        """Epochs of pre-training behind the initial weights: 0 from scratch, None when unknown or when members
        differ."""
        return _shared([tuning.pretrain_epochs if tuning else None for tuning in self.tunings])

    @property
    def pretrain_method(self) -> str:
        """How the initial weights were really made; `FROM_SCRATCH` if there were none, whatever `method`
        says. `method` where members differ or one is unknown."""
        return _shared([tuning.pretrain_method if tuning else None for tuning in self.tunings]) or self.method

    @property
    def tuning_epochs(self) -> float | None:
        """Epochs of fine-tuning behind the accuracy; None when unknown or when members differ."""
        return _shared([tuning.epochs if tuning else None for tuning in self.tunings])

    @property
    def tuning_data(self) -> DataInfo | None:
        """The data of the fine-tuning behind the accuracy; None when unknown or when members differ."""
        return _shared([tuning.data if tuning else None for tuning in self.tunings])

    def write(self, folder: str | Path) -> Path:
        """Check the record again and write `folder/record.json` in one step; return its path.

        Raises UserError when the record contradicts itself; an earlier record then stays as it is.
        """
        path = Path(folder) / RECORD_FILE
        try:
            checked = type(self).model_validate(self.model_dump())
        except ValidationError as error:
            raise UserError(f"{path}: this record cannot be written: {_reasons(error)}") from None
        write_text(path, checked.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """Read `folder/record.json`. Raises UserError naming the file if it is missing, torn or of another
        make."""
        path = Path(folder) / RECORD_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; name a run folder, runs/<recipe>/<stage>") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: unreadable as JSON ({error}); restore or remove it") from None
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: not a run record of schema version {SCHEMA_VERSION} (found {version!r}); it was "
                "written by another program or another release. Move it away or read it with that release"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: not a valid run record: {_reasons(error)}") from None


def _shared(values: Sequence[T]) -> T | None:
    """The value that all are equal to, None if there is none."""
    return values[0] if all(value == values[0] for value in values) else None


def _reasons(error: ValidationError) -> str:
    """Return pydantic's complaints on one line, each with its key, without the values."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'record'}: {item['msg']}" for item in error.errors()
    )


def find_records(roots: Sequence[str | Path]) -> list[tuple[Path, RunRecord]]:
    """Return every run folder at or below `roots` with its record, sorted by folder, each folder once.

    Raises UserError for a root that is not a folder and for a record.json that cannot be read.
    """
    folders: dict[Path, Path] = {}
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(f"{root}: no such folder; name folders of runs, such as runs/")
        for folder in _folders_with_record(Path(root)):
            folders.setdefault(folder.resolve(), folder)
    return [(folder, RunRecord.load(folder)) for folder in sorted(folders.values())]


def _folders_with_record(root: Path) -> Iterable[Path]:
    for folder, below, files in os.walk(root):
        # Checkpoints can hold tens of thousands of shards, and never a run of their own.
        below[:] = [name for name in below if name not in {"checkpoints", "tensorboard"}]
        if RECORD_FILE in files:
            yield Path(folder)
