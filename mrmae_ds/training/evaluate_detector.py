"""The ``evaluate`` stage of a trained or released detector: COCO's scores on the recipe's ``data.detection.val``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mrmae_ds.detection.coco import CocoSplit, open_split
from mrmae_ds.detection.loader import DetectionBatch
from mrmae_ds.detection.saved import SavedDetector, saved_detector
from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import Member, Parameters, Schedule
from mrmae_ds.training.evaluation.base import EvalContext, Scores
from mrmae_ds.training.evaluation.classes import match_classes, restricted_from
from mrmae_ds.training.evaluation.coco import CocoEvaluator
from mrmae_ds.training.evaluation.job import EvaluationJob, member_key
from mrmae_ds.training.run_logger import describe_data, describe_run
from mrmae_ds.training.tasks.base import Normalize
from mrmae_ds.weights.detectors import DetectorFile
from mrmae_ds.weights.paths import weights_sha256


@dataclass(frozen=True)
class PreparedDetector(EvaluationJob):
    """The evaluation of a detector on the CPU of this rank, ready to run.

    Attributes:
        source: its name in the recipe.
        detector: the file.
        member: its entry in the run record.
        val_data: validation set.
        classes: output of each class of the validation set, in its order; None if they are all of them.
        image_size: side of the square input, pixels.
        done: True if the folder already has the result.
    """

    source: str
    detector: SavedDetector
    member: Member
    val_data: CocoSplit
    classes: tuple[int, ...] | None
    image_size: int
    done: bool


def prepare_detector(job: EvaluationJob, file: DetectorFile) -> PreparedDetector:
    """Check the stage and the detector.

    Args:
        job: what is evaluated.
        file: of its first member, a whole detector.

    Raises:
        UserError: for several members, a file that is not usable, a recipe without annotations, or classes that the
            detector does not have.
    """
    recipe, stage = job.recipe, job.recipe.stages.evaluate
    if len(job.sources) != 1:
        raise UserError(
            "stages.evaluate.members: detectors are evaluated one by one, and not beside other models; name one"
        )
    if recipe.data.detection is None:
        raise UserError("data.detection: evaluating a detector needs COCO's val; name its images and annotations")
    files = recipe.data.detection.val
    val_data = open_split(
        files.annotations, files.images, training=False, first=files.first, index_folder=recipe.loader.cache_dir
    )
    detector, path = saved_detector(file), file.weights.raw.path
    metadata = detector.metadata
    classes = match_classes(metadata["class_names"], metadata["num_classes"], val_data, f"{member_key(0)}: {path}")
    restricted = restricted_from(metadata["num_classes"], classes)
    member = Member(file=path.name, sha256=weights_sha256(path), of_classes=restricted)
    done = job.is_done(val_data.sha256, [member])
    size = stage.image_size or detector.image_size
    return PreparedDetector(
        **vars(job), source=job.sources[0], detector=detector, member=member, val_data=val_data, classes=classes,
        image_size=size, done=done,
    )  # fmt: skip


def run_detector(job: PreparedDetector) -> None:
    """Evaluate, print and record. Returns on every rank and leaves the process group.

    Writes into ``job.stage_dir``, beside the files of every evaluation, those of :class:`CocoEvaluator`.

    Args:
        job: the prepared evaluation.
    """
    job.run(job.done, partial(_run, job))


def _run(job: PreparedDetector, device: torch.device, watchdog: Watchdog) -> None:
    config, metadata, val = job.engine_config, job.detector.metadata, job.val_data
    model = job.detector.load()
    total, encoder = (sum(p.numel() for p in module.parameters()) for module in (model, model.encoder))
    model.to(device, config.model_dtype)
    normalize = Normalize(tuple(metadata["mean"]), tuple(metadata["std"]))
    normalize.to(device)
    outputs = None if job.classes is None else _places(job.classes, metadata["num_classes"]).to(device)

    def detect(engine: nn.Module, batch: DetectionBatch) -> list[Mapping[str, Tensor]]:
        images = batch.normalized(normalize.mean, normalize.std).to(config.model_dtype)
        with config.autocast(device):
            found = engine(images, batch.sizes)
        return found if outputs is None else [_of_classes(image, outputs) for image in found]

    record = RunRecord(
        **describe_run(job.recipe, "evaluate", job.launch, device),
        parameters=Parameters(total=total, trainable=0, encoder=encoder),
        data=describe_data(val, val.num_classes),
        schedule=Schedule(epochs=0, global_batch=config.micro_batch * job.launch.world_size, steps=0),
        members=(job.member,),
    )
    context = EvalContext(job.recipe, config, job.launch, device, val, watchdog.heartbeat, job.stage_dir)

    def scores() -> Scores:
        return CocoEvaluator(context, detect, val, job.image_size, 1, 1).run(model)

    found = job.measure(record, watchdog, scores)
    if job.launch.rank == 0:
        ap = ", ".join(f"{kind} AP {found[f'{kind}/AP']:.2f} %" for kind in ("box", "mask") if f"{kind}/AP" in found)
        print(f"  {job.source}: {ap}", flush=True)


def _places(classes: tuple[int, ...], num_classes: int) -> Tensor:
    """Return the label (1 to the data set's number of classes) of each label of the detector, 0 for none."""
    labels = torch.zeros(num_classes + 1, dtype=torch.int64)
    labels[torch.tensor(classes) + 1] = torch.arange(1, len(classes) + 1)
    return labels


def _of_classes(image: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Return an image's detections of the data set's classes, by its labels."""
    own = labels[image["labels"]]
    return {name: values[own > 0] for name, values in (dict(image) | {"labels": own}).items()}
