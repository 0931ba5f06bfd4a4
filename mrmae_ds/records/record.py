"""The record of a run: `record.json` in each run folder, with configuration, environment, inputs and results.

A record names files by their last path component only and never holds a host's or a user's name, so that a run folder
can be published as it is.
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
    Count,
    DataInfo,
    Design,
    DetectionInfo,
    FinetuneSummary,
    GitState,
    Hardware,
    Init,
    Kernels,
    Member,
    ModelInfo,
    Operations,
    Parameters,
    PretrainSummary,
    RecordSection,
    Results,
    Schedule,
    StageCost,
    TeacherInfo,
)
from mrmae_ds.schema import validation_faults

RECORD_FILE = "record.json"
RECIPE_FILE = "recipe.yaml"
SCHEMA_VERSION = 1

T = TypeVar("T")
Status = Literal["running", "finished", "failed", "stopped"]


def utc_now() -> datetime:
    """Return the current time in UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(timezone.utc)


UtcTime = Annotated[AwareDatetime, AfterValidator(_to_utc)]


class RunRecord(RecordSection):
    """One stage of one recipe, as it ran.

    Attributes:
        method: row of the scaling table ("MR-MAE").
        size: column of the scaling table ("Huge-448").
        recipe_hash: hash of the resolved recipe without its seed, shared by runs that differ in nothing else.
        slurm_job: None outside Slurm.
        kernels: None in records of earlier versions.
        model: None for an evaluation.
        design: of a pre-training.
        detection: of a stage `detect`.
        operations: None for an evaluation.
        members: models that an evaluation averaged; empty for a training.
        trackers: ID of the run at each experiment tracker by its name, without the account.
        wall_seconds: duration, restarts included.
        images_seen: images trained on.
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
    kernels: Kernels | None = None
    model: ModelInfo | None = None
    design: Design | None = None
    detection: DetectionInfo | None = None
    parameters: Parameters
    operations: Operations | None = None
    data: DataInfo
    teachers: dict[str, TeacherInfo] = Field(default_factory=dict)
    schedule: Schedule
    init: Init | None = None
    members: tuple[Member, ...] = ()
    results: Results = Results()
    trackers: dict[str, str] = Field(default_factory=dict)
    wall_seconds: Annotated[float, Field(ge=0)] = 0.0
    images_seen: Count = 0

    @model_validator(mode="after")
    def _end_is_consistent(self) -> RunRecord:
        if self.status != "running" and self.ended is None:
            raise ValueError(f"status {self.status!r} needs the time at which the run ended")
        if self.status == "finished" and self.schedule.steps_done < self.schedule.steps:
            raise ValueError(
                f"status 'finished' after {self.schedule.steps_done} of {self.schedule.steps} steps; call it 'stopped'"
            )
        if self.results.top1 is not None and self.data.classes is None:
            raise ValueError("results.top1 needs data.classes, from which the chance accuracy follows")
        return self

    @property
    def finetunings(self) -> tuple[FinetuneSummary | None, ...]:
        """Fine-tunings behind the accuracy: each member's (None if unknown), otherwise this run itself."""
        return tuple(member.finetune for member in self.members) or (summarize_finetuning(self),)

    @property
    def pretrain_epochs(self) -> float | None:
        """Epochs of pre-training behind the initial weights: 0 from scratch, None if unknown or members differ."""
        return _shared([tuning.pretrain_epochs if tuning else None for tuning in self.finetunings])

    @property
    def pretrain_method(self) -> str:
        """Method that made the initial weights (`FROM_SCRATCH` if none); `method` if unknown or members differ."""
        return _shared([tuning.pretrain_method if tuning else None for tuning in self.finetunings]) or self.method

    @property
    def finetune_epochs(self) -> float | None:
        """Epochs of fine-tuning behind the accuracy; None if unknown or members differ."""
        return _shared([tuning.epochs if tuning else None for tuning in self.finetunings])

    @property
    def finetune_data(self) -> DataInfo | None:
        """Fine-tuning data behind the accuracy; None if unknown or members differ."""
        return _shared([tuning.data if tuning else None for tuning in self.finetunings])

    def write(self, folder: str | Path) -> Path:
        """Validate the record again and write `folder/record.json` atomically.

        Returns:
            The path of the file.

        Raises:
            UserError: if the record contradicts itself; an earlier record is then kept.
        """
        path = Path(folder) / RECORD_FILE
        try:
            checked = type(self).model_validate(self.model_dump())
        except ValidationError as error:
            raise UserError(f"{path}: this record cannot be written: {validation_faults(error)}") from None
        write_text(path, checked.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """Read `folder/record.json`.

        Raises:
            UserError: if the file is missing, truncated or not a run record of this schema version.
        """
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
            raise UserError(f"{path}: not a valid run record: {validation_faults(error)}") from None


def stage_cost(record: RunRecord) -> StageCost:
    """Return the cost of a run."""
    counted = record.operations
    return StageCost(
        device=record.hardware.device,
        device_hours=record.wall_seconds * record.hardware.world_size / 3600,
        images_per_s=record.results.images_per_s,
        operations=None if counted is None else float(counted.training * record.images_seen),
    )


def summarize_pretraining(record: RunRecord) -> PretrainSummary:
    """Summarize a pre-training's record, with epochs and cost of the pre-training that it continued, if any."""
    before = record.pretrain_epochs
    spent: StageCost | None = stage_cost(record)
    if record.init is not None:
        earlier = record.init.pretrain.spent if record.init.pretrain else None
        spent = earlier + stage_cost(record) if earlier else None
    return PretrainSummary(
        method=record.method,
        epochs=None if before is None else before + record.schedule.epochs_done,
        dataset=record.data.dataset,
        seed=record.seed,
        recipe_hash=record.recipe_hash,
        teachers=record.teachers,
        model=record.model,
        design=record.design,
        spent=spent,
    )


def summarize_finetuning(record: RunRecord) -> FinetuneSummary:
    """Summarize a fine-tuning's record."""
    return FinetuneSummary(
        name=record.name,
        method=record.method,
        epochs=record.schedule.epochs,
        seed=record.seed,
        recipe_hash=record.recipe_hash,
        data=record.data,
        init=record.init,
        model=record.model,
        forward=record.operations.forward if record.operations else None,
        spent=stage_cost(record),
    )


def _shared(values: Sequence[T]) -> T | None:
    """Return the value that all are equal to, None if there is none."""
    return values[0] if all(value == values[0] for value in values) else None


def find_records(roots: Sequence[str | Path]) -> list[tuple[Path, RunRecord]]:
    """Return every run folder at or below `roots` with its record, sorted by folder, each folder once.

    Raises:
        UserError: for a root that is not a folder and for a record.json that cannot be read.
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
