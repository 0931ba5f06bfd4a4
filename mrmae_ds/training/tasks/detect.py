"""Fine-tuning of the encoder in Mask R-CNN on COCO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mrmae_ds.config.detection import DetectConfig
from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.data.loaders.base import Batch, LoaderRequest
from mrmae_ds.data.loaders.build import num_workers_of
from mrmae_ds.data.loaders.pillow import check_pillow_memory
from mrmae_ds.detection.coco import CocoSplit, check_same_categories, open_split
from mrmae_ds.detection.detector import LOSSES, Detector, build_detector
from mrmae_ds.detection.flops import detector_cost, detector_flops, loss_on_fixed_boxes, meta_detector
from mrmae_ds.detection.jitter import JitterSettings
from mrmae_ds.detection.loader import DetectionBatch, DetectionLoader
from mrmae_ds.factory import TeacherBuilder
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.records.sections import CocoInfo, DetectionInfo, Operations
from mrmae_ds.teachers import build_teacher
from mrmae_ds.training.evaluation.base import EvalContext
from mrmae_ds.training.evaluation.coco import CocoEvaluator
from mrmae_ds.training.param_groups import ParamGroups, adamw, detection_groups
from mrmae_ds.training.tasks.base import MicroBatchKey, Task
from mrmae_ds.weights.detectors import detector_of, load_detector_file
from mrmae_ds.weights.load import LoadReport, load_encoder_weights
from mrmae_ds.weights.paths import find_weights
from mrmae_ds.weights.resolve import resolve


class DetectTask(Task[DetectConfig]):
    """Detection and instance segmentation.

    Args:
        model: encoder, pyramid and heads.
        config: the recipe's stage.
        data: the recipe's data section, for the input statistics.
        dtype: dtype of the model's input.
    """

    stage_name = "detect"
    weights_kind = "detector"
    model: Detector

    def __init__(self, model: Detector, config: DetectConfig, data: DataConfig, dtype: torch.dtype) -> None:
        super().__init__(model, config, data)
        self.dtype = dtype

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        config: DetectConfig,
        engine_config: EngineConfig,
        num_classes: int,
        run_dir: Path | None,
        teacher_builder: TeacherBuilder = build_teacher,
    ) -> DetectTask:
        """Build the model; see :func:`mrmae_ds.training.tasks.build.build_task`."""
        key, init = "stages.detect.init", None
        if run_dir is not None and config.init != "scratch":
            init = find_weights(run_dir / "pretrain" if config.init == "pretrain" else Path(config.init), key)
        model = build_detector(recipe.model, config, num_classes)
        task = cls(model, config, recipe.data, engine_config.model_dtype)
        task.init = init
        task.init_report = f"{init}: {task._load(init, key)}" if init else "random weights"
        return task

    def _load(self, init: Path, key: str) -> LoadReport:
        """Load a whole detector, or the encoder of any other file."""
        weights = resolve(init, key)
        if detector := detector_of(weights):
            self.init_whole = True
            return load_detector_file(self.model, detector)
        return load_encoder_weights(self.encoder, weights)

    @property
    def encoder(self) -> Encoder:
        """The encoder below the pyramid."""
        return self.model.encoder

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return self.config.image_size

    @property
    def num_classes(self) -> int:
        """Number of classes without the background."""
        return self.model.num_classes

    def param_groups(self) -> ParamGroups:
        """Return groups by layer and decay."""
        return detection_groups(self.model, self.config.optimizer, self.config.layer_decay)

    def make_optimizer(self, groups: ParamGroups, fused: bool) -> Optimizer:
        """Return AdamW."""
        return adamw(self.config.optimizer.betas)(groups, fused)

    def losses(self, engine: nn.Module, batch: DetectionBatch, key: MicroBatchKey) -> dict[str, Tensor]:
        """Compute the five losses of a micro-batch, their sum, and statistics of the boxes.

        The boxes that are drawn for the losses depend on an image's place in the global batch, not on the ranks.
        """
        torch.manual_seed(key.seed_for("model"))  # drop path
        first = key.part * key.micro_batch
        seeds = [key.seed_for(f"boxes {first + i}", per_part=False) for i in range(len(batch.sizes))]
        losses = engine(self._inputs(batch), batch.sizes, batch.targets, seeds)
        parts = {name.removeprefix("loss_"): losses[name] for name in LOSSES}
        return {"loss": losses["loss"], **parts, **{f"boxes/{name}": losses[name] for name in ("positives", "recall")}}

    @property
    def traced_model(self) -> Callable[..., Any]:
        """The detector on a fixed number of boxes, because values decide which boxes are drawn."""
        return partial(loss_on_fixed_boxes, self.model)

    def traced_losses(self, engine: nn.Module, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        """Compute a loss that depends on all that training computes, except on the selection of boxes."""
        return {"loss": engine(self.normalize.student(self.normalize.pixels(batch.images), self.dtype))}

    def detect(self, engine: nn.Module, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """Return the detections of each image of an evaluation batch, in pixels of the square input."""
        return engine(self._inputs(batch), batch.sizes)

    def _inputs(self, batch: DetectionBatch) -> Tensor:
        return batch.normalized(self.normalize.mean, self.normalize.std).to(self.dtype)

    @staticmethod
    def open_data(recipe: Recipe) -> tuple[CocoSplit, CocoSplit]:
        """Open and check both sets."""
        data = recipe.data.detection
        assert data is not None  # Recipe checks it
        train, val = (
            open_split(
                files.annotations,
                files.images,
                training=training,
                first=files.first,
                index_folder=recipe.loader.cache_dir,
            )
            for files, training in ((data.train, True), (data.val, False))
        )
        check_same_categories(train.index, val.index)
        return train, val

    def prepare_data(self, recipe: Recipe, request: LoaderRequest) -> None:
        """Check the memory that the loader's processes share."""
        check_pillow_memory(request, num_workers_of(recipe.loader))

    def train_loader(
        self, recipe: Recipe, data: CocoSplit, request: LoaderRequest, device: torch.device
    ) -> DetectionLoader:
        """Open this rank's share of the training set."""
        jitter = JitterSettings(self.image_size, self.config.jitter, self.config.flip)
        workers = num_workers_of(recipe.loader)
        return DetectionLoader(data, request, jitter, workers, device)

    def build_evaluator(self, context: EvalContext) -> CocoEvaluator:
        """Return the evaluation by COCO's scores."""
        config, val = self.config, context.val_data
        assert isinstance(val, CocoSplit)  # of open_data
        return CocoEvaluator(context, self.detect, val, self.image_size, config.eval_every_epochs, config.epochs)

    def export_metadata(self, data: CocoSplit) -> dict[str, Any]:
        """Return the ids of the classes, for results in COCO's format."""
        return {"category_ids": data.index.category_ids.tolist()}

    def count_operations(self, recipe: Recipe, checkpointing: CheckpointPlan, num_classes: int) -> Operations:
        """Count the operations of the stage for one image."""
        detector = meta_detector(recipe.model, self.config, num_classes)
        forward = sum(detector_flops(detector, self.config).values())
        training = detector_cost(detector, self.config, checkpointing)
        again = sum(part.recomputed for part in training.parts.values())
        return Operations(training=training.per_image, recomputed=again, forward=forward)

    def describe_detection(self, train: CocoSplit, val: CocoSplit) -> DetectionInfo:
        """Return settings and data for the run record."""
        sets = (CocoInfo(images=s.num_samples, annotations=s.num_annotations, sha256=s.sha256) for s in (train, val))
        settings = self.config.detector.model_dump(mode="json")
        return DetectionInfo(image_size=self.image_size, detector=settings, train=next(sets), val=next(sets))
