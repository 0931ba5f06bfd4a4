"""Sections of a run record: strict data classes for code, hardware, data, teachers, weights, cost and results."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

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
    """Base class of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class GitState(RecordSection):
    """Commit of the code, and whether the working tree differed from it (untracked files count)."""

    commit: str
    dirty: bool


class Hardware(RecordSection):
    """Devices of a run.

    Attributes:
        device: name of the accelerator or the CPU.
        count: accelerators of the node, or its logical CPU cores.
        world_size: number of ranks.
    """

    device: str
    count: Count
    world_size: Annotated[int, Field(ge=1)]


class Kernels(RecordSection):
    """Torch's choice of kernels, as it was in effect.

    Attributes:
        attention: kernels of scaled dot-product attention that torch could choose from; None on a CPU.
        deterministic: torch was confined to deterministic kernels.
        float32_matmul_precision: of products of float32 tensors on a GPU.
        cudnn_benchmark: cuDNN tried its algorithms and took the fastest one.
        threads: of torch on the host.
    """

    attention: tuple[str, ...] | None
    deterministic: bool
    float32_matmul_precision: str
    cudnn_benchmark: bool
    threads: Count


class Parameters(RecordSection):
    """Parameter counts: the whole model, its trainable part, and the encoder alone."""

    total: Count
    trainable: Count
    encoder: Count


class DataInfo(RecordSection):
    """Training data of a stage, or the data that it evaluated on.

    Attributes:
        dataset: name shown in tables.
        file: file name without folders.
        sha256: of the file.
        samples: images in one epoch.
        classes: number of classes; None if the stage reads no labels.
        val_copies: validation images that are exact copies of training images; None if unknown.
    """

    dataset: str
    file: FileName
    sha256: str | None = None
    samples: Count
    classes: Annotated[int, Field(ge=1)] | None = None
    val_copies: Count | None = None


class TeacherInfo(RecordSection):
    """A frozen teacher.

    Attributes:
        kind: `clip`, `timm` or `checkpoint`.
        source: name or file of the weights.
        sha256: of the weights.
        facts: decisions made when it was built, by topic: its GELU, position embedding, importance.
    """

    kind: str
    source: Source
    sha256: str | None = None
    facts: dict[str, str] = {}


class Schedule(RecordSection):
    """Schedule of a stage.

    Attributes:
        epochs: planned epochs.
        global_batch: images per optimizer step, over all ranks.
        steps: planned optimizer steps.
        steps_done: completed optimizer steps.
    """

    epochs: Annotated[float, Field(ge=0)]
    global_batch: Annotated[int, Field(ge=1)]
    steps: Count
    steps_done: Count = 0

    @property
    def epochs_done(self) -> float:
        """Completed epochs."""
        return self.epochs * self.steps_done / self.steps if self.steps else 0.0


class ModelInfo(RecordSection):
    """The encoder.

    Attributes:
        arch: name in `models/sizes.py`.
        overridden: True if the recipe changed its sizes.
        image_size: side of its input in pixels.
    """

    arch: str
    overridden: bool = False
    image_size: Annotated[int, Field(gt=0)]

    @property
    def convolutional(self) -> bool:
        """True for a CViT (masked convolution stages), False for a plain ViT."""
        return self.arch.startswith("cvit")


class ObjectiveInfo(RecordSection):
    """A pre-training loss, with the fields of `models.objectives.Objective`.

    Attributes:
        average: its target is a moving average of the encoder.
    """

    target: str
    tap: Literal["encoder", "decoder"]
    tokens: Literal["visible", "masked", "all"]
    weight: float
    # None or False in records from before the field existed.
    loss: str | None = None
    block: int | None = None
    class_token: bool = False
    average: bool = False


class Design(RecordSection):
    """Configuration of a pre-training, as in the columns of the paper's Table 3.

    Attributes:
        keep_ratio: share of the patches that are not removed.
        masking: mode by which these are chosen; ``none`` if nothing is removed.
        encoder_input: ``visible`` if the encoder computes these patches alone, ``mask_tokens`` or ``full``.
        fusion: layers that are fused with the last one.
        objectives: losses by name.
        decoder: kind of the decoder.
    """

    keep_ratio: float
    masking: str
    encoder_input: str = "visible"  # of records from before the field existed
    fusion: tuple[str, ...] = ()
    objectives: dict[str, ObjectiveInfo]
    decoder: str = "mae"


class CocoInfo(RecordSection):
    """A set of images in COCO's format.

    Attributes:
        images: number that is used.
        annotations: of these images, crowds among them.
        sha256: of the annotations' file.
    """

    images: Count
    annotations: Count
    sha256: str


class DetectionInfo(RecordSection):
    """Configuration of a detector and its data.

    Attributes:
        image_size: side of its square input in pixels.
        detector: the recipe's `stages.detect.detector`.
        train: images that it was trained on.
        val: images that it was evaluated on.
    """

    image_size: Count
    detector: dict[str, JsonValue]
    train: CocoInfo
    val: CocoInfo


class Operations(RecordSection):
    """Floating-point operations for one image.

    Attributes:
        training: its share of a training step, with teachers, backward pass and recomputation.
        recomputed: the part of `training` that activation checkpointing computes a second time.
        forward: forward pass of a classifier or a detector.
    """

    training: Count
    recomputed: Count = 0
    forward: Count | None = None


class StageCost(RecordSection):
    """Measured cost of a stage; None is unknown.

    Attributes:
        device: name of the accelerator or the CPU.
        device_hours: ranks times hours, restarts included; GPU-hours on a GPU.
        images_per_s: median throughput of the whole job.
        operations: floating-point operations of all its steps, without evaluation.
    """

    device: str
    device_hours: Annotated[float, Field(ge=0)]
    images_per_s: float | None = None
    operations: float | None = None

    def __add__(self, other: StageCost) -> StageCost:
        """Add two costs; a throughput that differs is unknown for the sum."""
        known = self.operations is not None and other.operations is not None
        return StageCost(
            device=" and ".join(dict.fromkeys((self.device, other.device))),
            device_hours=self.device_hours + other.device_hours,
            images_per_s=self.images_per_s if self.images_per_s == other.images_per_s else None,
            operations=(self.operations or 0) + (other.operations or 0) if known else None,
        )


class PretrainSummary(RecordSection):
    """Pre-training behind a run's initial weights, copied from its record so that it outlives that folder.

    `epochs` are completed ones, those of an earlier pre-training that it continued included; None is unknown.
    """

    method: str
    epochs: Annotated[float, Field(ge=0)] | None = None
    dataset: str | None = None
    seed: int | None = None
    recipe_hash: str | None = None
    teachers: dict[str, TeacherInfo] = {}
    model: ModelInfo | None = None
    design: Design | None = None
    spent: StageCost | None = None


class Init(RecordSection):
    """Initial weights of a run. `pretrain` is None if their origin is unknown; `whole` those of a trained detector."""

    file: FileName
    sha256: str | None = None
    pretrain: PretrainSummary | None = None
    whole: bool = False


class FinetuneSummary(RecordSection):
    """Fine-tuning that made a model, copied from its record so that it outlives that folder.

    `forward` is the number of operations of the model on one image.
    """

    name: str
    method: str
    epochs: Annotated[float, Field(ge=0)]
    seed: int
    recipe_hash: str
    data: DataInfo
    init: Init | None = None
    model: ModelInfo | None = None
    forward: Count | None = None
    spent: StageCost | None = None

    @property
    def pretrain_epochs(self) -> float | None:
        """Epochs of pre-training behind the initial weights: 0 from scratch, None if unknown."""
        if self.init is None:
            return 0.0
        return self.init.pretrain.epochs if self.init.pretrain else None

    @property
    def pretrain_method(self) -> str:
        """Method that made the initial weights, whatever `method` is; `FROM_SCRATCH` if there were none."""
        if self.init is None:
            return FROM_SCRATCH
        return self.init.pretrain.method if self.init.pretrain else self.method


class Member(RecordSection):
    """A fine-tuned model of an evaluation. `finetune` is None if its origin is unknown.

    `of_classes` is the number of its classes if the data have only some of them, among which it was evaluated.
    """

    file: FileName
    sha256: str
    finetune: FinetuneSummary | None = None
    of_classes: Count | None = None


class Results(BaseModel):
    """Measured results. Other numbers may be added under any name; non-finite ones are stored as null.

    Attributes:
        top1: accuracy in percent, 0 to 100.
        top5: in percent.
        loss: mean over the evaluation samples.
        eval_samples: number of evaluated images.
        images_per_s: median training throughput of the whole job.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | int | None] = Field(init=False)

    top1: Percent | None = None
    top5: Percent | None = None
    loss: float | None = None
    eval_samples: Count | None = None
    images_per_s: float | None = None

    def value(self, name: str) -> float | None:
        """Return a number that was added under its name; None if there is none."""
        return self.__pydantic_extra__.get(name)

    @model_validator(mode="after")
    def _accuracy_needs_its_samples(self) -> Results:
        if self.top1 is not None and not self.eval_samples:
            raise ValueError("results.top1 needs results.eval_samples, the number of images it was measured on")
        return self
