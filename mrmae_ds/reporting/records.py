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
from pathlib import Path, PurePath
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text

RECORD_FILE = "record.json"
SCHEMA_VERSION = 1
FROM_SCRATCH = "From scratch"

Status = Literal["running", "finished", "failed", "stopped"]


def utc_now() -> datetime:
    """Return the present time in UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(timezone.utc)


def _last_component(value: object) -> object:
    return PurePath(value).name if isinstance(value, (str, PurePath)) else value


def _hide_folders(value: object) -> object:
    """Shorten a path to its last component; leave a model's name such as `openai/clip-vit` alone."""
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~", "."))):
        return PurePath(value).name
    return value


UtcTime = Annotated[AwareDatetime, AfterValidator(_to_utc)]
FileName = Annotated[str, BeforeValidator(_last_component)]
Source = Annotated[str, BeforeValidator(_hide_folders)]
Count = Annotated[int, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class GitState(_Part):
    """The code's commit, and whether the working tree differed from it (untracked files count)."""

    commit: str
    dirty: bool


class Hardware(_Part):
    """`count` is the node's accelerators, or its logical CPU cores; `world_size` the ranks of the job."""

    device: str
    count: Count
    world_size: Annotated[int, Field(ge=1)]


class Parameters(_Part):
    """Parameter counts: the whole model, its trainable part, and the encoder alone."""

    total: Count
    trainable: Count
    encoder: Count


class DataInfo(_Part):
    """The training data. `dataset` is the name a table shows; `file` a name without folders; `samples` one
    epoch's.

    `classes` is None where the stage reads no labels.
    """

    dataset: str
    file: FileName
    sha256: str | None = None
    samples: Count
    classes: Annotated[int, Field(ge=1)] | None = None


class TeacherInfo(_Part):
    """A frozen teacher: its kind (`clip`, `timm`, ...), where its weights come from, and their SHA-256."""

    kind: str
    source: Source
    sha256: str | None = None


class Schedule(_Part):
    """This stage's schedule. `epochs` and `steps` are planned; `steps_done` counts what really ran."""

    epochs: Annotated[float, Field(ge=0)]
    global_batch: Annotated[int, Field(ge=1)]
    steps: Count
    steps_done: Count = 0

    @property
    def epochs_done(self) -> float:
        """Epochs that really ran; all of them once every step was taken."""
        return self.epochs * self.steps_done / self.steps if self.steps else 0.0


class PretrainSummary(_Part):
    """The pre-training that made a run's initial weights, copied from its record so that it outlives that
    folder."""

    method: str
    epochs: Annotated[float, Field(ge=0)] | None = None
    dataset: str | None = None
    seed: int | None = None
    recipe_hash: str | None = None
    teachers: dict[str, TeacherInfo] = {}

    @classmethod
    def of(cls, record: RunRecord) -> PretrainSummary:
        """Summarise a pre-training's record. Epochs are those that really ran, planned or not."""
        return cls(
            method=record.method,
            epochs=record.schedule.epochs_done,
            dataset=record.data.dataset,
            seed=record.seed,
            recipe_hash=record.recipe_hash,
            teachers=record.teachers,
        )


class Init(_Part):
    """The weights a run started from. `pretrain` is None when nothing is known of how they were made."""

    file: FileName
    sha256: str | None = None
    pretrain: PretrainSummary | None = None


class Results(BaseModel):
    """What a run measured. `top1` and `top5` in percent, 0 to 100. Other numbers may be added under any name.

    A number that is not finite is stored as null.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | int | None] = Field(init=False)

    top1: Percent | None = None
    top5: Percent | None = None
    loss: float | None = None
    eval_samples: Count | None = None

    @model_validator(mode="after")
    def _accuracy_needs_its_samples(self) -> Results:
        if self.top1 is not None and not self.eval_samples:
            raise ValueError("results.top1 needs results.eval_samples, the number of pictures it was measured on")
        return self


class RunRecord(_Part):
    """One stage of one recipe, as it ran.

    `method` and `size` are the row and the column of the scaling table ("MR-MAE", "Huge-448"). `recipe_hash`
    is that of the resolved recipe without its seed, so that runs which differ in nothing else share it.
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
    versions: dict[str, str] = {}
    hardware: Hardware
    parameters: Parameters
    data: DataInfo
    teachers: dict[str, TeacherInfo] = {}
    schedule: Schedule
    init: Init | None = None
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
    def pretrain_epochs(self) -> float | None:
        """Epochs of pre-training behind the initial weights: 0 from scratch, None when unknown."""
        if self.init is None:
            return 0.0
        return self.init.pretrain.epochs if self.init.pretrain else None

    @property
    def pretrain_method(self) -> str:
        """How the initial weights were really made; `FROM_SCRATCH` if there were none, whatever `method`
        says."""
        if self.init is None:
            return FROM_SCRATCH
        return self.init.pretrain.method if self.init.pretrain else self.method

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
