"""The ``evaluate`` stage: accuracy of one classifier or of an ensemble (averaged softmax).

Nothing is trained, so there is no DeepSpeed engine: each rank holds every model whole, as a plain module in eval mode
in the engine config's precision (``torch_autocast``, ``bf16``), and evaluates its share of the images.

Shape legend: B images of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.data.beton.copies import recorded_copies
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton
from mrmae_ds.data.loaders.build import check_backend
from mrmae_ds.data.node_cache import cache_all
from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.records.record import RECORD_FILE, RunRecord, summarize_finetuning
from mrmae_ds.records.sections import Member, Parameters, Schedule
from mrmae_ds.training.evaluation.accuracy import AccuracyCounter
from mrmae_ds.training.evaluation.base import EvalContext, Scores
from mrmae_ds.training.evaluation.classes import match_classes, restricted_from
from mrmae_ds.training.evaluation.job import EvaluationJob, member_key
from mrmae_ds.training.run_logger import describe_data, describe_run
from mrmae_ds.training.tasks.base import Normalize
from mrmae_ds.units import counted
from mrmae_ds.weights.load import load_encoder_weights
from mrmae_ds.weights.model_file import build_classifier
from mrmae_ds.weights.paths import weights_sha256
from mrmae_ds.weights.resolve import Weights, model_metadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classifier:
    """A classifier with the settings from its weights file.

    Attributes:
        source: its name in the recipe.
        member: its entry in the run record.
        model: in eval mode.
        normalize: with the model's own statistics.
        image_size: pixels, both sides.
        classes: outputs of the validation set's classes, in its order; None if they are all of them.
    """

    source: str
    member: Member
    model: nn.Module
    normalize: Normalize
    image_size: int
    classes: tuple[int, ...] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and convert the model; move its statistics."""
        self.model.to(device, dtype)
        self.normalize.to(device)

    def logits(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits, float32 [B, classes].

        Args:
            images: decoded images, uint8 [B, 3, H, W].
            dtype: dtype of the model's input.
        """
        logits = self.model(self.normalize.student(self.normalize.pixels(images), dtype)).float()
        return logits if self.classes is None else logits[:, self.classes]


@dataclass(frozen=True)
class PreparedEvaluation(EvaluationJob):
    """An evaluation of classifiers on the CPU of this rank, ready to run.

    Attributes:
        val_data: validation set.
        classifiers: members of the ensemble.
        done: True if the folder already has the result.
    """

    val_data: BetonInfo
    classifiers: tuple[Classifier, ...]
    done: bool


def prepare_evaluation(job: EvaluationJob, first: Weights) -> PreparedEvaluation:
    """Check the stage, and load the models on the CPU.

    Args:
        job: what is evaluated.
        first: weights of its first member; the others are read one by one.

    Raises:
        UserError: for everything that the user can fix: a member that has not finished, is no classifier, or has other
            classes than the validation set; an image size that the patches do not tile.
    """
    recipe = job.recipe
    check_backend(recipe.data.val_backend)
    val_data = check_beton(recipe.data.val)
    classifiers = [load_classifier(job, 0, first, val_data)]
    for number in range(1, len(job.sources)):
        classifiers.append(load_classifier(job, number, job.resolve_member(number), val_data))
    done = job.is_done(val_data.sha256, [classifier.member for classifier in classifiers])
    if not done:
        cache_all([recipe.data.val], recipe.loader.cache_dir)
    return PreparedEvaluation(**vars(job), val_data=val_data, classifiers=tuple(classifiers), done=done)


def load_classifier(job: EvaluationJob, number: int, weights: Weights, val_data: BetonInfo) -> Classifier:
    """Build a classifier from its weights file.

    Args:
        job: what is evaluated.
        number: of the member.
        weights: its file.
        val_data: validation set, whose classes must be among the model's.

    Raises:
        UserError: naming the member's key in the recipe, and what does not fit.
    """
    stage, source, key = job.recipe.stages.evaluate, job.sources[number], member_key(number)
    path, metadata = weights.source, model_metadata(weights)
    if metadata["kind"] != "classifier":
        raise UserError(f"{key}: {path} holds no classifier ({metadata['kind']}); name a fine-tuned model")
    if not metadata.get("pool", "avg"):
        raise UserError(f"{key}: {path} has a head whose input is not known, so it cannot be evaluated")
    classes = match_classes(metadata["class_names"], metadata["num_classes"], val_data, f"{key}: {path}")
    image_size = stage.image_size or metadata["image_size"]
    try:
        model = build_classifier(metadata, image_size)
    except ConfigError as error:
        raise ConfigError(f"stages.evaluate.{error.key}", f"{error.reason}, for {path}") from None
    report = load_encoder_weights(model, weights)
    if report.missing:
        raise UserError(f"{key}: {path} is incomplete: {report}")
    finetune = None
    if (path.parent / RECORD_FILE).exists():
        record = RunRecord.load(path.parent)
        finetune = summarize_finetuning(record) if record.stage == "finetune" else None
    restricted = restricted_from(metadata["num_classes"], classes)
    member = Member(file=path.name, sha256=weights_sha256(path), finetune=finetune, of_classes=restricted)
    normalize = Normalize(tuple(metadata["mean"]), tuple(metadata["std"]))
    return Classifier(source, member, model.eval(), normalize, image_size, classes)


def run_evaluation(job: PreparedEvaluation) -> None:
    """Evaluate, print and record. Returns on every rank and leaves the process group.

    Writes into ``job.stage_dir``: recipe.yaml, engine.json, record.json, metrics.jsonl and tensorboard/.

    Args:
        job: the prepared evaluation.
    """
    job.run(job.done, partial(_run, job))


def _run(job: PreparedEvaluation, device: torch.device, watchdog: Watchdog) -> None:
    record = new_record(job, device)

    def scores() -> Scores:
        if job.launch.rank == 0:
            _announce(job, record.parameters.total, device)
        average, members = evaluate(job, device, watchdog.heartbeat)
        if job.launch.rank == 0:
            _print_scores(job, average, members)
        results = dict(average)
        for number, own in enumerate(members, start=1):
            results |= {f"member{number}/{name}": value for name, value in own.items() if name != "eval_samples"}
        return results

    job.measure(record, watchdog, scores)


@torch.no_grad()
def evaluate(
    job: PreparedEvaluation, device: torch.device, heartbeat: Callable[[str], None] = lambda activity: None
) -> tuple[Scores, list[Scores]]:
    """Evaluate the ensemble and its members. All ranks must call it.

    Members of different image sizes are evaluated on the same images, each read at its size.

    Args:
        job: the prepared evaluation.
        device: device of this rank.
        heartbeat: called before every batch, with the current activity.

    Returns:
        Scores of the averaged softmax outputs, and each member's own.
    """
    config, dtype = job.engine_config, job.engine_config.model_dtype
    for classifier in job.classifiers:
        classifier.to(device, dtype)
    sizes = sorted({classifier.image_size for classifier in job.classifiers})
    context = EvalContext(job.recipe, config, job.launch, device, job.val_data, heartbeat)
    loaders = [context.loader(size) for size in sizes]
    average, counters = AccuracyCounter(), [AccuracyCounter() for _ in job.classifiers]
    for batches in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        heartbeat("evaluating")
        by_size = dict(zip(sizes, batches, strict=True))
        with config.autocast(device):
            logits = [classifier.logits(by_size[classifier.image_size].images, dtype) for classifier in job.classifiers]
        for counter, output in zip(counters, logits, strict=True):
            counter.add(output, batches[0])
        average.add(log_mean_softmax(logits), batches[0])
    samples = loaders[0].num_samples
    return average.read(samples), [counter.read(samples) for counter in counters]


def log_mean_softmax(logits: list[Tensor]) -> Tensor:
    """Return the logarithm of the mean softmax, float64 [B, classes]; a single model's logits are returned as they are.

    Args:
        logits: of several models, [B, classes] each.
    """
    if len(logits) == 1:
        return logits[0]
    return torch.stack([F.softmax(output.double(), dim=1) for output in logits]).mean(dim=0).log()


def _known_copies(job: PreparedEvaluation) -> int | None:
    """Return the validation images that are exact copies of a member's training images, as far as it is recorded."""
    tunings = [classifier.member.finetune for classifier in job.classifiers]
    return recorded_copies(job.val_data, {tuning.data.sha256 for tuning in tunings if tuning and tuning.data})


def new_record(job: PreparedEvaluation, device: torch.device) -> RunRecord:
    """Return the record of an evaluation that is about to run; its schedule is empty."""
    total = sum(p.numel() for classifier in job.classifiers for p in classifier.model.parameters())
    return RunRecord(
        **describe_run(job.recipe, "evaluate", job.launch, device),
        parameters=Parameters(total=total, trainable=0, encoder=total),
        data=describe_data(job.val_data, job.val_data.num_classes, _known_copies(job)),
        schedule=Schedule(epochs=0, global_batch=job.engine_config.micro_batch * job.launch.world_size, steps=0),
        members=tuple(classifier.member for classifier in job.classifiers),
    )


def _announce(job: PreparedEvaluation, num_parameters: int, device: torch.device) -> None:
    count = len(job.classifiers)
    models = "1 model" if count == 1 else f"{count} models averaged"
    logger.info(
        f"{job.recipe.name} evaluate: {models}, {num_parameters / 1e6:.2f} M parameters, on {job.launch.world_size} "
        f"x {device.type}, {counted(job.val_data.num_samples, 'image')} of {job.val_data.name}, into {job.stage_dir}"
    )


def _print_scores(job: PreparedEvaluation, average: Scores, members: list[Scores]) -> None:
    rows = []
    for classifier, scores in zip(job.classifiers, members, strict=True):
        of_classes = classifier.member.of_classes
        among = f" (among {job.val_data.num_classes} of its {of_classes} classes)" if of_classes is not None else ""
        rows.append((classifier.source + among, scores))
    if len(rows) > 1:
        rows.append((f"average of {len(rows)}", average))
    for label, scores in rows:
        top5 = f", top-5 {scores['top5']:.2f} %" if "top5" in scores else ""
        print(f"  {label}: top-1 {scores['top1']:.2f} %{top5}, loss {scores['loss']:.4f}", flush=True)
