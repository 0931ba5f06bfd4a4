"""Sections of the recipe that all stages share: model, data, teachers, loader, logging, checkpoint, watchdog."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from mrmae_ds.errors import ConfigError
from mrmae_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD, Rgb
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.pretrain import FusionSpec, check_fusion
from mrmae_ds.models.sizes import ARCHITECTURES, CViTSpec, EncoderSpec, encoder_spec, token_grid
from mrmae_ds.schema import Section

Backend = Literal["ffcv", "pillow"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _ascends(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(one >= other for one, other in pairwise(values)):
        raise ValueError("must ascend")
    return values


Ascending = AfterValidator(_ascends)  # of a tuple, each value once
_MAX_STD = 0.5  # of pixels in 0 to 1: half of them 0, half of them 1


class ModelConfig(Section):
    """The student's architecture.

    Attributes:
        arch: name in models/sizes.py.
        image_size: side of the input in pixels.
        overrides: fields of the architecture to replace.
        fusion: multi-layer fusion; for a CViT, ``stages`` defaults to both convolutional stages, as in MCMAE.
        decoder: size of the decoder.
    """

    arch: str
    image_size: int = Field(gt=0)
    overrides: dict[str, Any] = Field({})
    fusion: FusionSpec = FusionSpec()
    decoder: DecoderSpec = DecoderSpec()

    @model_validator(mode="before")
    @classmethod
    def _conv_stages_are_fused(cls, values: Any) -> Any:
        """Fill in ``fusion.stages`` of a CViT; a fusion that is not a mapping is left to its own validation."""
        fusion = values.get("fusion", {}) if isinstance(values, dict) else None
        if not isinstance(fusion, dict) or not isinstance(ARCHITECTURES.get(str(values.get("arch"))), CViTSpec):
            return values
        return {**values, "fusion": {"stages": (1, 2), **fusion}}

    @model_validator(mode="after")
    def _can_be_built(self) -> ModelConfig:
        spec = self.spec()
        check_fusion(self.fusion, 2 if isinstance(spec, CViTSpec) else 0, spec.num_blocks)
        token_grid(spec, self.image_size)
        return self

    def spec(self) -> EncoderSpec:
        """Return the encoder's size."""
        return encoder_spec(self.arch, self.overrides)


class CocoFilesConfig(Section):
    """A data set with instance annotations in COCO's format.

    Attributes:
        images: folder of the image files.
        annotations: JSON file.
        first: only the first images, in the order of their ids; null is all.
    """

    images: Path
    annotations: Path
    first: int | None = Field(None, ge=1)


class DetectionDataConfig(Section):
    """Data of the stage ``detect``: ``data.detection``.

    Attributes:
        train: images to train on; those without an object are left out.
        val: images to evaluate on, of the same categories.
    """

    train: CocoFilesConfig
    val: CocoFilesConfig


class DataConfig(Section):
    """Data sets, decoding backends and normalization.

    Attributes:
        train: .beton file of the training set (docs/data.md).
        val: .beton file of the validation set.
        backend: ``ffcv`` or ``pillow``, which is slower and computes the same crops with the same filter.
        eval_backend: backend of the validation set; null is ``backend``. Published accuracies follow ``pillow``.
        mean: the student's input mean per channel, of pixels in 0 to 1.
        std: the student's input standard deviation per channel.
        detection: data of the stage ``detect``.
    """

    train: Path
    val: Path
    backend: Backend = "ffcv"
    eval_backend: Backend | None = None
    mean: Rgb = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    detection: DetectionDataConfig | None = None

    @model_validator(mode="after")
    def _statistics_are_of_pixels(self) -> DataConfig:
        _check_statistics(self.mean, self.std)
        return self

    @property
    def val_backend(self) -> Backend:
        """Backend that reads the validation set."""
        return self.eval_backend or self.backend


def _check_statistics(mean: Rgb, std: tuple[float, float, float]) -> None:
    """Refuse a mean and a standard deviation that pixels in 0 to 1 cannot have, such as those of pixels in 0 to 255."""
    for key, values, highest in (("mean", mean, 1.0), ("std", std, _MAX_STD)):
        if not all(0 <= value <= highest for value in values):
            divided = [round(value / 255, 4) for value in values]
            hint = f"; divided by 255 it is {divided}" if max(values) > 1 else ""
            raise ConfigError(
                key, f"{list(values)} is not a {key} of pixels in 0 to 1, which is in 0 to {highest:g}{hint}"
            )


class TeacherConfig(Section):
    """A frozen teacher; ``stages.pretrain.placement`` places its weights.

    Attributes:
        kind: ``checkpoint`` (a run of this project), ``clip`` (an open_clip vision tower), ``timm`` (any timm model
            with tokens or feature maps: DINO, DINOv2, a convolutional network) or ``ema`` (a moving average of the
            encoder that is trained: data2vec).
        source: a run's stage folder or model file; for clip and timm the model's name (``hf-hub:`` and ``local-dir:``
            too); for clip ``file``, a tower of the sizes of the file in ``weights``.
        weights: for clip and timm, a tag or a local file; null is the source's own.
        image_size: side of the teacher's input in pixels; null is the student's.
        features: output of the last block (``raw``), after the final norm (``ln_post``), or also projected (``proj``,
            clip only).
        stage: stage of a network with feature maps, 0-based; null is the deepest one with the student's grid.
        position_resize: interpolation of a timm ViT's position embedding: ``library`` as in timm, ``dino`` as in the
            code of DINO and DINOv2; null is ``dino`` for these two (without registers), else ``library``.
        quickgelu: CLIP weights were trained with QuickGELU; only for files and names that do not state it.
        statistics: normalize the input by the teacher's or the student's mean and standard deviation.
        mean: mean of the weights' training per channel, of pixels in 0 to 1, if the library's is another, or the origin
            of a local file is unknown.
        std: standard deviation of the weights' training per channel, if the library's is another.
        precision: of weights and arithmetic.
        layers: transformer blocks, 0-based, whose raw outputs are the targets (each is one of its own, NAME.LAYER, if
            there are several); null is the last block. Of kind ema, the target is their mean.
        sees: the ``image``, or the student's ``visible`` tokens alone (checkpoint only; DMAE); then blocks after the
            deepest of ``layers`` are not computed, and no importance.
        decay: for ema, share of the old average in the update after each optimizer step.
        decay_start: for ema, decay at the start, from which it rises linearly to ``decay``; null is constant.
        decay_epochs: for ema, epochs of this rise.
        layer_norm: for ema, ``each`` normalizes each token of every layer before their mean (data2vec); null does not.
    """

    kind: Literal["checkpoint", "clip", "timm", "ema"]
    source: str = ""
    weights: str | None = None
    image_size: int | None = Field(None, gt=0)
    features: Literal["raw", "ln_post", "proj"] = "raw"
    stage: int | None = Field(None, ge=0)
    position_resize: Literal["library", "dino"] | None = None
    quickgelu: bool | None = None
    statistics: Literal["teacher", "student"] = "teacher"
    mean: Rgb | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    # Left out of records and hashes at their defaults, so that runs from before they existed keep their hash.
    layers: tuple[int, ...] | None = Field(None, min_length=1, exclude_if=lambda value: value is None)
    sees: Literal["image", "visible"] = Field("image", exclude_if=lambda value: value == "image")
    decay: float | None = Field(None, gt=0, lt=1, exclude_if=lambda value: value is None)
    decay_start: float | None = Field(None, ge=0, lt=1, exclude_if=lambda value: value is None)
    decay_epochs: Positive | None = Field(None, exclude_if=lambda value: value is None)
    layer_norm: Literal["each"] | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _source_or_average(self) -> TeacherConfig:
        average = {"decay", "decay_start", "decay_epochs", "layer_norm"}
        ours = {"kind", "layers", *average} if self.kind == "ema" else type(self).model_fields.keys() - average
        for key, field in type(self).model_fields.items():
            if key not in ours and getattr(self, key) != field.default:
                raise ConfigError(key, f"has no effect on kind {self.kind}; remove it")
        required = "decay" if self.kind == "ema" else "source"
        if not getattr(self, required):
            raise ConfigError(required, "this key is required")
        if (self.decay_start is None) != (self.decay_epochs is None):
            raise ValueError("give both decay_start and decay_epochs, or neither")
        return self

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> TeacherConfig:
        used_by = {"weights": "clip, timm", "stage": "clip, timm", "position_resize": "timm", "quickgelu": "clip, timm"}
        for key, kinds in used_by.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ConfigError(key, f"has no effect on kind {self.kind} (only on {kinds}); remove it")
        if self.layers is not None and self.features != "raw":
            raise ConfigError("features", f"{self.features} is of the last block; use raw with layers")
        if self.layers is not None and (min(self.layers) < 0 or list(self.layers) != sorted(set(self.layers))):
            raise ConfigError("layers", f"{list(self.layers)} must be blocks counted from 0, in order, each once")
        if self.sees == "visible" and self.kind != "checkpoint":
            raise ConfigError(
                "sees", f"kind {self.kind} sees the image; only a checkpoint can see the visible tokens alone"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both mean and std, or neither")
        if self.mean is not None and self.statistics == "student":
            raise ConfigError("mean", "statistics: student takes the student's; remove one of the two")
        if self.mean is not None and self.std is not None:
            _check_statistics(self.mean, self.std)
        return self

    def targets(self, name: str) -> tuple[str, ...]:
        """Return the names of its targets: the teacher's own ``name``, or NAME.LAYER of several layers."""
        layers = self.layers or ()
        several = len(layers) > 1 and self.kind != "ema"
        return tuple(f"{name}.{layer}" for layer in layers) if several else (name,)

    def decay_at(self, epoch: float) -> float:
        """Return the decay of a moving average after this many epochs, which may be fractional."""
        assert self.decay is not None
        if self.decay_start is None or self.decay_epochs is None:
            return self.decay
        return self.decay_start + (self.decay - self.decay_start) * min(epoch / self.decay_epochs, 1)


class LoaderConfig(Section):
    """Data loading on a node; no influence on results.

    Attributes:
        num_workers: decoding threads per rank; null chooses from the available cores.
        cache_dir: folder on each node (``/dev/shm/NAME``, ``$TMPDIR``) to which the .beton files are copied before
            training; null reads them in place.
        augment_on: place of RandAugment and color jitter, ``cpu`` (the loader's workers) or ``device`` (beside the
            model, for few cores per GPU); the pixels are the same.
    """

    num_workers: int | None = Field(None, ge=1)
    cache_dir: Path | None = None
    augment_on: Literal["cpu", "device"] = "cpu"


class LoggingConfig(Section):
    """Metrics and figures; no influence on results.

    Attributes:
        every_steps: optimizer steps between two metrics lines.
        num_images: validation images in the figures drawn after pre-training; 0 draws none.
        draw_score: least score of the detections in the figures of the stage ``detect``.
    """

    every_steps: int = Field(20, ge=1)
    num_images: int = Field(8, ge=0)
    draw_score: Fraction = 0.5


class CheckpointConfig(Section):
    """Saving and retention of checkpoints; no influence on results. A signal and the end of the stage save too.

    Attributes:
        every_epochs: epochs between two checkpoints; null disables this interval.
        every_steps: optimizer steps between two checkpoints; null disables this interval.
        every_minutes: minutes between two checkpoints; null disables this interval.
        keep_last: number of most recent checkpoints to keep.
        keep_every_epochs: checkpoints at multiples of this epoch are saved and kept for good; null keeps none.
        keep_every_steps: checkpoints at multiples of this step are saved and kept for good; null keeps none.
        async_save: write from a copy in memory while training continues; training waits only for the copy.
    """

    every_epochs: int | None = Field(1, ge=1)
    every_steps: int | None = Field(None, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    keep_last: int = Field(2, ge=1)
    keep_every_epochs: int | None = Field(None, ge=1)
    keep_every_steps: int | None = Field(None, ge=1)
    async_save: bool = False


class WatchdogConfig(Section):
    """Detection of hung jobs; no influence on results.

    Attributes:
        timeout_minutes: time without an optimizer step, an evaluated batch or a saved file after which every rank
            prints its stack and the job fails.
    """

    timeout_minutes: float = Field(20.0, gt=0)


class ProfilerConfig(Section):
    """torch.profiler over a window of steps on rank 0; no influence on results.

    The Chrome trace is written to ``profile/`` in the stage's folder.

    Attributes:
        start_step: optimizer steps completed when the window opens. A run that is resumed after it has no window.
        num_steps: optimizer steps in the window.
    """

    start_step: int = Field(10, ge=0)
    num_steps: int = Field(3, ge=1)


class NvtxConfig(Section):
    """NVTX ranges of the stages of a step over a window of steps, on every rank; no influence on results.

    The window is also the range that ``nsys profile --capture-range=cudaProfilerApi`` records.

    Attributes:
        start_step: optimizer steps completed when the window opens. A run that is resumed after it has no window.
        num_steps: optimizer steps in the window.
    """

    start_step: int = Field(20, ge=0)
    num_steps: int = Field(10, ge=1)


class MemorySnapshotConfig(Section):
    """History of the CUDA allocator over a window of steps on rank 0; no influence on results.

    The snapshot, for https://pytorch.org/memory_viz, is written to ``profile/`` in the stage's folder, also if training
    runs out of memory inside the window. Without a GPU nothing is recorded.

    Attributes:
        start_step: optimizer steps completed when the window opens.
        num_steps: optimizer steps in the window.
        max_entries: number of most recent allocator events to keep.
    """

    start_step: int = Field(0, ge=0)
    num_steps: int = Field(3, ge=1)
    max_entries: int = Field(100_000, ge=1)


class GarbageCollectionConfig(Section):
    """Python garbage collection at fixed steps, on all ranks at once, instead of at any time; no influence on results.

    Attributes:
        every_steps: optimizer steps between two collections.
    """

    every_steps: int = Field(100, ge=1)


class WandbConfig(Section):
    """Logging of metrics to Weights & Biases by rank 0 (``pip install wandb``); no influence on results.

    If W&B fails, a warning says so, and training continues without it.

    Attributes:
        project: W&B project.
        entity: user or team; null is the account's default.
        group: group of runs.
        tags: tags of the run.
        mode: ``online``, ``offline`` (written to the stage's folder, for ``wandb sync``) or ``disabled``.
    """

    project: str = "mrmae"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] = "online"


class MlflowConfig(Section):
    """Logging of metrics to MLflow by rank 0 (``pip install mlflow-skinny``); no influence on results.

    If MLflow fails, a warning says so, and training continues without it.

    Attributes:
        tracking_uri: address of the server, or of a folder, ``file:///absolute/path``; null is the variable
            ``MLFLOW_TRACKING_URI``.
        experiment: MLflow experiment, created if it does not exist.
        tags: tags of the run.
    """

    tracking_uri: str | None = None
    experiment: str = "mrmae"
    tags: dict[str, str] = Field({})
