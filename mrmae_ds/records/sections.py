"""The parts of a run's record (see `records`): code, hardware, data, teachers, where weights came from, results."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from mrmae_ds.records.record import RunRecord

FROM_SCRATCH = "From scratch"


def _last_component(value: object) -> object:
    return PurePath(value).name if isinstance(value, (str, PurePath)) else value


def _hide_folders(value: object) -> object:
    """Shorten a path to its last component; leave a model's name such as `openai/clip-vit` alone."""
    if isinstance(value, PurePath) or (isinstance(value, str) and value.startswith(("/", "~", "."))):
        return PurePath(value).name
    return value


FileName = Annotated[str, BeforeValidator(_last_component)]
Source = Annotated[str, BeforeValidator(_hide_folders)]
Count = Annotated[int, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class RecordSection(BaseModel):
    """A section of a record: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class GitState(RecordSection):
    """The code's commit, and whether the working tree differed from it (untracked files count)."""

    commit: str
    dirty: bool


class Hardware(RecordSection):
    """`count` is the node's accelerators, or its logical CPU cores; `world_size` the ranks of the job."""

    device: str
    count: Count
    world_size: Annotated[int, Field(ge=1)]


class Parameters(RecordSection):
    """Parameter counts: the whole model, its trainable part, and the encoder alone."""

    total: Count
    trainable: Count
    encoder: Count


class DataInfo(RecordSection):
    """The data that a stage read: to train on, or to evaluate.

    `dataset` is the name a table shows; `file` a name without folders; `samples` one epoch's; `classes` is None
    where the stage reads no labels.
    """

    dataset: str
    file: FileName
    sha256: str | None = None
    samples: Count
    classes: Annotated[int, Field(ge=1)] | None = None


class TeacherInfo(RecordSection):
    """A frozen teacher: its kind (`clip`, `timm`, ...), where its weights come from, and their SHA-256.

    `facts` is what was found out or decided when it was built, by topic: its GELU, its positions, its importance.
    """

    kind: str
    source: Source
    sha256: str | None = None
    facts: dict[str, str] = {}


class Schedule(RecordSection):
    """This stage's schedule. `epochs` and `steps` are planned; `steps_done` counts what really ran."""

    epochs: Annotated[float, Field(ge=0)]
    global_batch: Annotated[int, Field(ge=1)]
    steps: Count
    steps_done: Count = 0

    @property
    def epochs_done(self) -> float:
        """Epochs that really ran; all of them once every step was taken."""
        return self.epochs * self.steps_done / self.steps if self.steps else 0.0


class ModelInfo(RecordSection):
    """The encoder: its name in ``models/sizes.py``, whether the recipe changed its sizes, and its input in pixels."""

    arch: str
    overridden: bool = False
    image_size: Annotated[int, Field(gt=0)]

    @property
    def convolutional(self) -> bool:
        """Whether it has masked convolution stages (CViT), or is a plain ViT."""
        return self.arch.startswith("cvit")


class ObjectiveInfo(RecordSection):
    """One loss of a pre-training; see ``objectives.Objective``."""

    target: str
    tap: Literal["encoder", "decoder"]
    tokens: Literal["visible", "masked", "all"]
    weight: float


class Design(RecordSection):
    """What a pre-training learned from: the columns of the paper's Table 3.

    `masking` is how the visible share `keep_ratio` was chosen; `fusion` names the layers that were added to the last.
    """

    keep_ratio: float
    masking: str
    fusion: tuple[str, ...] = ()
    objectives: dict[str, ObjectiveInfo]


class Operations(RecordSection):
    """Operations for one image: one step's share in training (teachers, backward and recomputation included), what
    of it activation checkpointing computes once more, and of a classifier its forward pass alone."""

    training: Count
    recomputed: Count = 0
    forward: Count | None = None


class Spent(RecordSection):
    """What a stage cost as it ran.

    `device_hours` are processes times hours, restarts included; `images_per_s` the whole job's, the median of what it
    logged; `operations` those of all its steps, without evaluation. None is unknown.
    """

    device: str
    device_hours: Annotated[float, Field(ge=0)]
    images_per_s: float | None = None
    operations: float | None = None

    @classmethod
    def of(cls, record: RunRecord) -> Spent:
        """What the run of a record cost."""
        counted = record.operations
        return cls(
            device=record.hardware.device,
            device_hours=record.wall_seconds * record.hardware.world_size / 3600,
            images_per_s=record.results.images_per_s,
            operations=None if counted is None else float(counted.training * record.images_seen),
        )

    def __add__(self, other: Spent) -> Spent:
        """Both together; a speed and a device that differ are not known of the sum."""
        known = self.operations is not None and other.operations is not None
        return Spent(
            device=" and ".join(dict.fromkeys((self.device, other.device))),
            device_hours=self.device_hours + other.device_hours,
            images_per_s=self.images_per_s if self.images_per_s == other.images_per_s else None,
            operations=(self.operations or 0) + (other.operations or 0) if known else None,
        )


class PretrainSummary(RecordSection):
    """The pre-training that made a run's initial weights, copied from its record so that it outlives that
    folder."""

    method: str
    epochs: Annotated[float, Field(ge=0)] | None = None
    dataset: str | None = None
    seed: int | None = None
    recipe_hash: str | None = None
    teachers: dict[str, TeacherInfo] = {}
    model: ModelInfo | None = None
    design: Design | None = None
    spent: Spent | None = None

    @classmethod
    def of(cls, record: RunRecord) -> PretrainSummary:
        """Summarize a pre-training's record. Epochs are those that really ran, planned or not, and those of the
        pre-training that it continued, if any; None if that is unknown."""
        before = record.pretrain_epochs
        spent: Spent | None = Spent.of(record)
        if record.init is not None:
            earlier = record.init.pretrain.spent if record.init.pretrain else None
            spent = earlier + Spent.of(record) if earlier else None
        return cls(
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


class Init(RecordSection):
    """The weights a run started from. `pretrain` is None when nothing is known of how they were made."""

    file: FileName
    sha256: str | None = None
    pretrain: PretrainSummary | None = None


class FinetuneSummary(RecordSection):
    """The fine-tuning that made a model, copied from its record so that it outlives that folder."""

    name: str
    method: str
    epochs: Annotated[float, Field(ge=0)]
    seed: int
    recipe_hash: str
    data: DataInfo
    init: Init | None = None
    model: ModelInfo | None = None
    forward: Count | None = None
    spent: Spent | None = None

    @classmethod
    def of(cls, record: RunRecord) -> FinetuneSummary:
        """Summarize a fine-tuning's record; `forward` are the operations of the model on one image."""
        return cls(
            name=record.name,
            method=record.method,
            epochs=record.schedule.epochs,
            seed=record.seed,
            recipe_hash=record.recipe_hash,
            data=record.data,
            init=record.init,
            model=record.model,
            forward=record.operations.forward if record.operations else None,
            spent=Spent.of(record),
        )

    @property
    def pretrain_epochs(self) -> float | None:
        """Epochs of pre-training behind the initial weights: 0 from scratch, None when unknown."""
        if self.init is None:
            return 0.0
        return self.init.pretrain.epochs if self.init.pretrain else None

    @property
    def pretrain_method(self) -> str:
        """How the initial weights were really made; `FROM_SCRATCH` if there were none, whatever `method` says."""
        if self.init is None:
            return FROM_SCRATCH
        return self.init.pretrain.method if self.init.pretrain else self.method


class Member(RecordSection):
    """A fine-tuned model of an evaluation. `finetune` is None when nothing is known of how it was made."""

    file: FileName
    sha256: str
    finetune: FinetuneSummary | None = None


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
    images_per_s: float | None = None

    @model_validator(mode="after")
    def _accuracy_needs_its_samples(self) -> Results:
        if self.top1 is not None and not self.eval_samples:
            raise ValueError("results.top1 needs results.eval_samples, the number of images it was measured on")
        return self
