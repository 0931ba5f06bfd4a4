"""Run a prepared job: start the processes' group, build the engine, train, write what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mrmae_ds.config.stages import FinetuneConfig, OptimizerConfig, PretrainConfig
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.base import Loader, LoaderRequest, TrainTransform
from mrmae_ds.data.loaders.build import build_loader
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
from mrmae_ds.distributed.signals import StopSignals
from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import RaisedOnAllRanks, StopRequested, TrainingError, UserError
from mrmae_ds.training.checkpoint.async_saver import AsyncCheckpointer
from mrmae_ds.training.checkpoint.folder import CheckpointPolicy
from mrmae_ds.training.checkpoint.manifest import ResultValues
from mrmae_ds.training.checkpoint.resume import load_checkpoint, verify_start
from mrmae_ds.training.checkpoint.run_dir import RunStart, prepare_folder
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.engine.build import build_engine, gather_state
from mrmae_ds.training.evaluation.accuracy import evaluation_loader
from mrmae_ds.training.evaluation.knn import KnnEvaluator
from mrmae_ds.training.final_figures import draw, finish_drawing
from mrmae_ds.training.hooks import StageHooks
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.loop import run_step, train
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.perf_metrics import GIB, PerfMeter, peak_memory
from mrmae_ds.training.run_logger import RunLogger, count_parameters, export_metadata
from mrmae_ds.training.step_sync import StepSync
from mrmae_ds.training.tasks.base import FinetuneTask
from mrmae_ds.training.tasks.linear_probe import ProbeTask
from mrmae_ds.weights.load import MODEL_FILE, save_weights


def open_loader(job: PreparedStage, device: torch.device, *, training: bool) -> Loader:
    """Return this rank's loader of the training or the validation set."""
    launch, stage, recipe = job.plan.launch, job.stage, job.recipe
    if not training:
        return evaluation_loader(recipe, job.image_size, job.plan.micro_batch, launch, device)
    policy = stage.rand_augment if isinstance(stage, FinetuneConfig) else None
    request = LoaderRequest(
        split="train",
        image_size=job.image_size,
        micro_batch=job.plan.micro_batch,
        seed=recipe.seed,
        transform=TrainTransform(
            CropSettings(scale=stage.crop_scale, flip=stage.flip),
            AugmentSettings(policy, recipe.data.mean) if policy else None,
        ),
        accumulation=job.plan.accumulation,
        world_size=launch.world_size,
        rank=launch.rank,
    )
    return build_loader(recipe.data, recipe.loader, request, device)


def run_stage(job: PreparedStage) -> None:
    """Train the stage to its end. Returns on every rank; leaves the process group.

    Writes into ``job.stage_dir``: recipe.yaml, engine.json, record.json, metrics.jsonl, tensorboard/, checkpoints/,
    captures/ of skipped steps, model.safetensors, loss_curves.png and, after pre-training, images/.

    Raises:
        StopRequested: on every rank, after a signal and a checkpoint.
        CollectiveError, TrainingError: on every rank.
    """
    launch = job.plan.launch
    device = choose_device(launch)
    start_process_group(device)
    try:
        with Watchdog(launch, 60 * job.recipe.watchdog.timeout_minutes) as monitor, StopSignals() as signals:
            start = verify_start(job.start, job.stage_dir)
            if start.action != "done":
                _train(job, start, device, monitor, signals)
            elif launch.rank == 0:
                print(f"{job.stage_dir}: already finished; --resume never starts anew, --run DIR elsewhere", flush=True)
                finish_drawing(job.stage_dir, _has_images(job), monitor)
    except RaisedOnAllRanks:
        end_process_group()
        raise
    end_process_group()


def _train(job: PreparedStage, start: RunStart, device: torch.device, monitor: Watchdog, signals: StopSignals) -> None:
    plan, launch, first = job.plan, job.plan.launch, job.plan.launch.rank == 0
    parameters = count_parameters(job)
    engine = _engine(job, device)
    state, results = TrainState(), {}
    if start.checkpoint:
        state, manifest = load_checkpoint(engine, start.checkpoint, launch, plan.micro_batch)
        results = dict(manifest.results)
    recorder = None
    if first:
        config = json.dumps(job.engine_config.as_used(plan.accumulation), indent=2)
        prepare_folder(job.stage_dir, job.recipe, config + "\n", fresh=start.action == "fresh")
        recorder = RunLogger(job, parameters, device, state.step, results)
        monitor.on_failure = lambda: recorder.fail(state.step)
        _announce(job, start, device, state.step, parameters.total)
    hooks = _hooks(job, engine, device, recorder, monitor, signals, results)
    try:
        accountant = PerfMeter(engine, device)
        reader = open_loader(job, device, training=True)
        log_every = job.recipe.logging.every_steps
        train(engine, job.task, reader, plan, state, log_every, hooks, hooks.boundary, accountant)
        accountant.close()
        hooks.saver.finish()
        _export(job, engine, results)
        if recorder:
            recorder.finish(results)
    except RaisedOnAllRanks as error:  # of any other failure the monitor tells the other processes first
        if isinstance(error, TrainingError):
            hooks.saver.finish()
        if recorder:
            recorder.stop(state.step) if isinstance(error, StopRequested) else recorder.fail(state.step)
        raise
    finally:
        job.task.release()
    if first:
        monitor.beat("drawing")
        draw(job.stage_dir)


def _hooks(
    job: PreparedStage,
    engine: deepspeed.DeepSpeedEngine,
    device: torch.device,
    recorder: RunLogger | None,
    monitor: Watchdog,
    signals: StopSignals,
    results: ResultValues,
) -> StageHooks:
    plan, config = job.plan, job.recipe.checkpoint
    saves = CheckpointPolicy(config, plan.steps_per_epoch, plan.total_steps)

    def committed(folder: Path, step: int, saved: ResultValues) -> None:
        if recorder:
            recorder.saved(step, saved)

    saver = AsyncCheckpointer(
        engine,
        job.stage_dir,
        job.identity,
        saves.retention(),
        plan.micro_batch,
        background=config.async_save,
        committed=committed,
    )
    return StageHooks(
        job=job,
        engine=engine,
        val=open_loader(job, device, training=False) if isinstance(job.task, FinetuneTask | ProbeTask) else None,
        recorder=recorder,
        saver=saver,
        saves=saves,
        boundary=StepSync(signals, config.every_minutes, saver.writing),
        monitor=monitor,
        results=results,
        knn=_knn_check(job, engine, device, monitor),
    )


def _knn_check(
    job: PreparedStage, engine: deepspeed.DeepSpeedEngine, device: torch.device, monitor: Watchdog
) -> KnnEvaluator | None:
    wanted = isinstance(job.stage, PretrainConfig) and job.stage.knn is not None
    return KnnEvaluator(job, engine, device, lambda: monitor.beat("nearest neighbors")) if wanted else None


def _engine(job: PreparedStage, device: torch.device) -> deepspeed.DeepSpeedEngine:
    task, config, accumulation, rates = job.task, job.engine_config, job.plan.accumulation, job.stage.optimizer
    betas = rates.betas if isinstance(rates, OptimizerConfig) else (0.0, 0.0)
    make = task.optimizer if isinstance(task, ProbeTask) else None
    engine = build_engine(task.model, task.groups(), betas, config, accumulation, device, make)
    task.to(device)
    return engine


def _announce(job: PreparedStage, start: RunStart, device: torch.device, step: int, parameters: int) -> None:
    plan, launch = job.plan, job.plan.launch
    print(
        f"{job.recipe.name} {job.stage_name}: {parameters / 1e6:.2f} M parameters, ZeRO-{job.engine_config.zero.stage} "
        f"on {launch.world_size} x {device.type}, batch {plan.stage.batch_size} = {plan.micro_batch} x "
        f"{launch.world_size} x {plan.accumulation}, {plan.epochs} epochs of {plan.steps_per_epoch} steps, "
        f"into {job.stage_dir}" + (f", going on after step {step}" if step else ""),
        flush=True,
    )
    for damaged in start.damaged:
        print(f"  passed over: {damaged}", flush=True)
    if job.report:
        print(f"  started from {job.report}", flush=True)


def _export(job: PreparedStage, engine: deepspeed.DeepSpeedEngine, results: dict[str, float | int]) -> None:
    state = gather_state(engine)
    if job.plan.launch.rank == 0:
        if isinstance(job.task, ProbeTask):
            state = job.task.classifier(state)
        save_weights(job.stage_dir / MODEL_FILE, state, export_metadata(job, results))


def _has_images(job: PreparedStage) -> bool:
    return job.stage_name == "pretrain" and job.recipe.logging.num_images > 0


def dry_run(job: PreparedStage) -> None:
    """Two real steps on real images, nothing written: prints each one's time and the peak memory of this node.

    The shapes are the stage's largest: a whole micro-batch, every micro-batch of the step, and one evaluation batch
    where the stage evaluates.
    """
    device = choose_device(job.plan.launch)
    start_process_group(device)
    with Watchdog(job.plan.launch, 60 * job.recipe.watchdog.timeout_minutes):
        _dry_run(job, device)
    end_process_group()


def _dry_run(job: PreparedStage, device: torch.device) -> None:
    launch, engine = job.plan.launch, _engine(job, device)
    reader = open_loader(job, device, training=True)
    if job.plan.total_steps < 2:
        raise UserError("the stage has a single step; a dry run needs two")
    engine.train()
    batches, times = reader.epoch(0), []
    for step in range(2):
        meter = Meter()
        began = time.perf_counter()
        run_step(engine, job.task, batches, job.plan, step, meter)
        losses, _, _ = meter.read(launch, job.plan.micro_batch)
        times.append(time.perf_counter() - began)
    reader.close()
    memory = torch.tensor(peak_memory(device), dtype=torch.float64, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    if launch.rank == 0:
        kind = "device memory" if device.type != "cpu" else "resident memory"
        print(
            f"dry run: {job.recipe.name} {job.stage_name}, loss {losses['loss']:.4f}; first step {times[0]:.2f} s "
            f"(with warm-up), second {times[1]:.2f} s = {job.stage.batch_size / times[1]:.1f} images/s; peak {kind} of "
            f"a process {memory.item() / GIB:.2f} GiB"
        )
