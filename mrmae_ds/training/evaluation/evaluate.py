"""The stage ``evaluate``: how good one fine-tuned model is, or several together, their softmax outputs averaged.

Nothing is trained, so there is no DeepSpeed engine: each process holds every model whole, as a plain module in eval
mode in the engine config's precision (``torch_autocast``, ``bf16``), and takes its share of the images.

Shape legend: B images of a batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.config.engine import EngineConfig, validate_sections
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import EvaluateConfig
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton
from mrmae_ds.data.loaders.build import check_backend
from mrmae_ds.data.node_cache import cache_all
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.records.metrics import MetricsWriter
from mrmae_ds.records.record import RECORD_FILE, RunRecord, Status, summarize_finetuning, utc_now
from mrmae_ds.records.sections import DataInfo, Member, Parameters, Results, Schedule
from mrmae_ds.training.checkpoint.manifest import RunIdentity
from mrmae_ds.training.checkpoint.run_dir import decide_start, prepare_folder
from mrmae_ds.training.evaluation.accuracy import AccuracyCounter
from mrmae_ds.training.evaluation.base import EvalContext, Scores
from mrmae_ds.training.job import TrainArgs, load_configs
from mrmae_ds.training.run_logger import identity
from mrmae_ds.training.tasks.base import Normalize
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.model_file import build_classifier, find_weights, read_metadata


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned model with what its file says it needs.

    Attributes:
        source: as the recipe names it. member: the same for the record.
        model: in eval mode. normalize: with the model's own statistics. image_size: pixels, both sides.
    """

    source: str
    member: Member
    model: nn.Module
    normalize: Normalize
    image_size: int

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and convert the model; move its statistics."""
        self.model.to(device, dtype)
        self.normalize.to(device)

    def logits(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 [B, classes] of decoded images, uint8 [B, 3, H, W]."""
        return self.model(self.normalize.student(self.normalize.pixels(images), dtype)).float()


@dataclass(frozen=True)
class Evaluation:
    """Everything that the stage needs, on the CPU of this process; ``done`` if the folder holds its result."""

    recipe: Recipe
    engine_config: EngineConfig
    launch: Launch
    stage_dir: Path
    val_data: BetonInfo
    classifiers: tuple[Classifier, ...]
    done: bool


def prepare_evaluation(options: TrainArgs, launch: Launch) -> Evaluation:
    """Resolve, check, and load the models on the CPU.

    Raises:
        UserError: for anything a user can mend: a member that has not finished, is no classifier, or has other
            classes than the validation set; an image size that the patches do not tile.
    """
    recipe, engine_config = load_configs(options)
    stage = recipe.stages.evaluate
    if options.dry_run:
        raise UserError("--dry-run: stage evaluate has none; it trains nothing and changes no weights, just run it")
    if options.resume not in ("auto", "never"):
        raise UserError(f"--resume {options.resume}: stage evaluate has no checkpoints; give auto or never")
    validate_sections(engine_config)
    check_backend(recipe.data.val_backend)
    stage_dir = options.stage_dir(recipe)
    val_data = check_beton(recipe.data.val)
    identity = RunIdentity(
        recipe_hash=recipe.hash("evaluate"),
        seed=recipe.seed,
        train="",
        val=val_data.sha256,
        recipe=recipe.counted("evaluate"),
    )
    done = decide_start(stage_dir, "evaluate", identity, options.resume).action == "done"
    sources = stage.members or (str(stage_dir.parent / "finetune"),)
    classifiers = tuple(
        load_classifier(source, f"stages.evaluate.members[{i}]", stage, val_data) for i, source in enumerate(sources)
    )
    members = tuple(classifier.member for classifier in classifiers)
    if done and [member.sha256 for member in RunRecord.load(stage_dir).members] != [m.sha256 for m in members]:
        raise UserError(
            f"{stage_dir}: holds the evaluation of other weights of {', '.join(sources)}; name another folder with "
            "--run, or start anew here with --resume never"
        )
    if not done:
        cache_all([recipe.data.val], recipe.loader.cache_dir)
    return Evaluation(recipe, engine_config, launch, stage_dir, val_data, classifiers, done)


def load_classifier(source: str, key: str, stage: EvaluateConfig, val_data: BetonInfo) -> Classifier:
    """A member, built and loaded as its file says.

    Args:
        source: a stage folder or model file. key: where the recipe names it.
        stage: says the image size.
        val_data: whose classes must be the model's.

    Raises:
        UserError: naming ``key`` and what does not fit.
    """
    path = find_weights(Path(source), key)
    metadata = read_metadata(path)
    if metadata["kind"] != "classifier":
        raise UserError(f"{key}: {path} holds no classifier ({metadata['kind']}); name a fine-tuned model")
    if tuple(metadata["class_names"]) != val_data.class_names:
        raise UserError(
            f"{key}: {path} tells other classes apart ({metadata['num_classes']}) than data.val, {val_data.path} "
            f"({val_data.num_classes}); evaluate it on data of its own classes, in their order"
        )
    image_size = stage.image_size or metadata["image_size"]
    try:
        model = build_classifier(metadata, image_size)
    except ConfigError as error:
        raise ConfigError(f"stages.evaluate.{error.key}", f"{error.reason}, for {path}") from None
    report = load_encoder(model, path, key)
    if report.missing:
        raise UserError(f"{key}: {path} is not whole: {report}")
    finetune = None
    if (path.parent / RECORD_FILE).exists():
        record = RunRecord.load(path.parent)
        finetune = summarize_finetuning(record) if record.stage == "finetune" else None
    member = Member(file=path.name, sha256=file_sha256(path), finetune=finetune)
    normalize = Normalize(tuple(metadata["mean"]), tuple(metadata["std"]))
    return Classifier(source, member, model.eval(), normalize, image_size)


def run_evaluation(job: Evaluation) -> None:
    """Evaluate, print and record. Returns on every rank; leaves the process group.

    Writes into ``job.stage_dir``: recipe.yaml, engine.json, record.json, metrics.jsonl and tensorboard/.
    """
    first = job.launch.rank == 0
    if job.done:
        if first:
            print(f"{job.stage_dir}: already finished; --resume never starts anew, --run DIR elsewhere")
        return
    device = choose_device(job.launch)
    start_process_group(device)
    with Watchdog(job.launch, 60 * job.recipe.watchdog.timeout_minutes) as monitor:
        _run(job, device, monitor)
    end_process_group()


def _run(job: Evaluation, device: torch.device, monitor: Watchdog) -> None:
    began, record = time.monotonic(), None
    if job.launch.rank == 0:
        prepare_folder(
            job.stage_dir, job.recipe, json.dumps(job.engine_config.as_written(), indent=2) + "\n", fresh=True
        )
        record = new_record(job, device)
        record.write(job.stage_dir)
        _announce(job, record.parameters, device)
    try:
        average, members = score(job, device, monitor.beat)
    except BaseException:
        if record:
            _close(record, "failed", job.stage_dir, began)
        raise
    if record:
        _report(job, average, members)
        results = dict(average)
        for number, scores in enumerate(members, start=1):
            results |= {f"member{number}/{name}": value for name, value in scores.items() if name != "eval_samples"}
        with MetricsWriter(job.stage_dir) as metrics:
            metrics.write(0, results)
        record.results = Results(**results)
        _close(record, "finished", job.stage_dir, began)


@torch.no_grad()
def score(
    job: Evaluation, device: torch.device, beat: Callable[[str], None] = lambda activity: None
) -> tuple[Scores, list[Scores]]:
    """Return the scores of the averaged softmax outputs, and each member's own. All ranks must call it.

    Members of different image sizes see the same images, each read at its size. ``beat`` is called with each batch.
    """
    config, dtype = job.engine_config, job.engine_config.model_dtype
    for classifier in job.classifiers:
        classifier.to(device, dtype)
    sizes = sorted({classifier.image_size for classifier in job.classifiers})
    context = EvalContext(job.recipe, config, job.launch, device, job.val_data.num_classes, beat)
    readers = [context.loader(size) for size in sizes]
    average, scores = AccuracyCounter(), [AccuracyCounter() for _ in job.classifiers]
    for batches in zip(*(reader.epoch(0) for reader in readers), strict=True):
        beat("evaluating")
        by_size = dict(zip(sizes, batches, strict=True))
        with config.autocast(device):
            logits = [classifier.logits(by_size[classifier.image_size].images, dtype) for classifier in job.classifiers]
        for own, output in zip(scores, logits, strict=True):
            own.add(output, batches[0])
        average.add(log_mean_softmax(logits), batches[0])
    samples = readers[0].num_samples
    return average.read(samples), [own.read(samples) for own in scores]


def log_mean_softmax(logits: list[Tensor]) -> Tensor:
    """The logarithm of the mean softmax of several models, [B, classes] each, in float64; one model's is itself."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([F.softmax(output.double(), dim=1) for output in logits]).mean(dim=0).log()


def new_record(job: Evaluation, device: torch.device) -> RunRecord:
    """The record of an evaluation that is about to run; it trains nothing, so its schedule is empty."""
    total = sum(p.numel() for classifier in job.classifiers for p in classifier.model.parameters())
    data = job.val_data
    return RunRecord(
        **identity(job.recipe, "evaluate", job.launch, device),
        parameters=Parameters(total=total, trainable=0, encoder=total),
        data=DataInfo(
            dataset=data.name,
            file=data.path.name,
            sha256=data.sha256,
            samples=data.num_samples,
            classes=data.num_classes,
        ),
        schedule=Schedule(epochs=0, global_batch=job.engine_config.micro_batch * job.launch.world_size, steps=0),
        members=tuple(classifier.member for classifier in job.classifiers),
    )


def _close(record: RunRecord, status: Status, stage_dir: Path, began: float) -> None:
    record.status, record.ended = status, utc_now()
    record.wall_seconds = round(time.monotonic() - began, 1)
    record.write(stage_dir)


def _announce(job: Evaluation, parameters: Parameters, device: torch.device) -> None:
    count = len(job.classifiers)
    models = "1 model" if count == 1 else f"{count} models averaged"
    print(
        f"{job.recipe.name} evaluate: {models}, {parameters.total / 1e6:.2f} M parameters, on {job.launch.world_size} "
        f"x {device.type}, {job.val_data.num_samples:,} images of {job.val_data.name}, into {job.stage_dir}",
        flush=True,
    )


def _report(job: Evaluation, average: Scores, members: list[Scores]) -> None:
    rows = [(classifier.source, scores) for classifier, scores in zip(job.classifiers, members, strict=True)]
    if len(rows) > 1:
        rows.append((f"average of {len(rows)}", average))
    for label, scores in rows:
        top5 = f", top-5 {scores['top5']:.2f} %" if "top5" in scores else ""
        print(f"  {label}: top-1 {scores['top1']:.2f} %{top5}, loss {scores['loss']:.4f}", flush=True)
