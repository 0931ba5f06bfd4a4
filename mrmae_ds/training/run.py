"""Run of a prepared training stage: process group, engine, training, export."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
from mrmae_ds.distributed.signals import StopSignals
from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import RaisedOnAllRanks, StopRequested
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.callbacks.build import build_optional_callbacks
from mrmae_ds.training.callbacks.checkpoint import CheckpointCallback
from mrmae_ds.training.callbacks.evaluation import EvaluationCallback
from mrmae_ds.training.callbacks.metrics import MetricsCallback
from mrmae_ds.training.callbacks.nonfinite_capture import CaptureSource, NonfiniteCaptureCallback
from mrmae_ds.training.checkpoint.folder import CheckpointPolicy
from mrmae_ds.training.checkpoint.manifest import ResultValues
from mrmae_ds.training.checkpoint.resume import load_checkpoint, verify_start
from mrmae_ds.training.checkpoint.run_dir import RunStart, prepare_folder
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.engine.build import gather_state
from mrmae_ds.training.engine.kernels import set_optimizer_threads
from mrmae_ds.training.evaluation.base import EvalContext
from mrmae_ds.training.final_figures import draw, finish_drawing
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.loop import run_step, train
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.perf_metrics import PerfMeter, peak_memory
from mrmae_ds.training.run_logger import RunLogger, export_metadata
from mrmae_ds.training.step_sync import StepSync
from mrmae_ds.training.tasks.build import build_task_engine
from mrmae_ds.units import GIB, counted
from mrmae_ds.weights.model_file import save_weights
from mrmae_ds.weights.paths import MODEL_FILE

logger = logging.getLogger(__name__)

ALREADY_FINISHED = "%s: already finished; --resume never starts over, --run DIR elsewhere"


@contextmanager
def process_group(launch: Launch, timeout_minutes: float) -> Iterator[tuple[torch.device, Watchdog]]:
    """Join the process group under a watchdog, and leave it at the end.

    After an exception that not all ranks raise, the watchdog ends the job and nothing is left in order.

    Args:
        launch: this rank among the others.
        timeout_minutes: time without progress after which the job fails.

    Yields:
        The device of this rank and the watchdog.
    """
    device = choose_device(launch)
    start_process_group(device)
    try:
        with Watchdog(launch, 60 * timeout_minutes) as watchdog:
            yield device, watchdog
    except RaisedOnAllRanks:
        end_process_group()
        raise
    end_process_group()


def run_stage(job: PreparedStage) -> None:
    """Train the stage to its end. Returns on every rank and leaves the process group.

    Writes into ``job.stage_dir``: recipe.yaml, engine.json, record.json, metrics.jsonl, tensorboard/, checkpoints/,
    captures/ of skipped steps, model.safetensors, loss_curves.png and, after pre-training, images/.

    Args:
        job: the prepared stage.

    Raises:
        StopRequested: on every rank, after a signal and a checkpoint.
        CollectiveError: on every rank.
        TrainingError: on every rank.
    """
    with process_group(job.launch, job.recipe.watchdog.timeout_minutes) as (device, watchdog), StopSignals() as signals:
        start = verify_start(job.start, job.stage_dir)
        if start.action != "done":
            _train(job, start, device, watchdog, signals)
        elif job.launch.rank == 0:
            logger.info(ALREADY_FINISHED, job.stage_dir)
            has_images = job.stage_name == "pretrain" and job.recipe.logging.num_images > 0
            finish_drawing(job.stage_dir, has_images, watchdog)


def _train(job: PreparedStage, start: RunStart, device: torch.device, watchdog: Watchdog, signals: StopSignals) -> None:
    parameters = job.task.count_parameters()  # before they are partitioned
    engine = _build_engine(job, device)
    state, results = TrainState(), {}
    if start.checkpoint:
        state, manifest = load_checkpoint(engine, start.checkpoint, job.launch, job.schedule.micro_batch)
        results = dict(manifest.results)
    run_logger = None
    if job.launch.rank == 0:
        config = json.dumps(job.engine_config.as_used(job.schedule.accumulation), indent=2)
        prepare_folder(job.stage_dir, job.recipe, config + "\n", fresh=start.action == "fresh")
        run_logger = RunLogger(job, parameters, device, state.step, results)
        watchdog.on_failure = lambda: run_logger.fail(state.step)
        _announce(job, start, device, state.step, parameters.total)
    context = _train_context(job, engine, device, state, results, run_logger, watchdog, signals)
    try:
        train(context)
        _export(job, engine, results)
        if run_logger:
            run_logger.finish(results)
    except RaisedOnAllRanks as error:  # any other failure is reported by the watchdog
        if run_logger:
            run_logger.stop(state.step) if isinstance(error, StopRequested) else run_logger.fail(state.step)
        raise
    finally:
        job.task.release()
    if job.launch.rank == 0:
        watchdog.heartbeat("drawing")
        draw(job.stage_dir)


def _train_context(
    job: PreparedStage,
    engine: deepspeed.DeepSpeedEngine,
    device: torch.device,
    state: TrainState,
    results: ResultValues,
    run_logger: RunLogger | None,
    watchdog: Watchdog,
    signals: StopSignals,
) -> TrainContext:
    schedule, config = job.schedule, job.recipe.checkpoint
    policy = CheckpointPolicy(config, schedule.steps_per_epoch, schedule.total_steps)

    def committed(folder: Path, step: int, saved: ResultValues) -> None:
        if run_logger:
            run_logger.saved(step, saved)

    checkpointer = job.checkpointer(engine, policy.retention(), committed)
    source = CaptureSource(
        stage=job.stage_name,
        seed=schedule.seed,
        recipe_hash=job.identity.recipe_hash,
        world_size=job.launch.world_size,
        accumulation=schedule.accumulation,
        micro_batch=schedule.micro_batch,
        engine=job.engine_config.as_written(),
    )
    callbacks: list[Callback] = [
        NonfiniteCaptureCallback(job.stage_dir, source),
        CheckpointCallback(checkpointer, policy),
    ]
    evaluator = job.task.build_evaluator(
        EvalContext(
            recipe=job.recipe,
            engine_config=job.engine_config,
            launch=job.launch,
            device=device,
            val_data=job.val_data,
            heartbeat=watchdog.heartbeat,
            stage_dir=job.stage_dir,
        )
    )
    if evaluator is not None:
        callbacks.append(EvaluationCallback(evaluator))
    callbacks.append(MetricsCallback(run_logger))
    callbacks += build_optional_callbacks(job.recipe, job.stage_name, job.stage_dir, job.launch.rank, device)
    return TrainContext(
        engine=engine,
        task=job.task,
        loader=job.train_loader(device),
        schedule=schedule,
        state=state,
        step_sync=StepSync(signals, config.every_minutes, checkpointer.writing),
        log_every=job.recipe.logging.every_steps,
        callbacks=callbacks,
        results=results,
        perf_meter=PerfMeter(engine, device),
        heartbeat=watchdog.heartbeat,
    )


def _build_engine(job: PreparedStage, device: torch.device) -> deepspeed.DeepSpeedEngine:
    set_optimizer_threads(job.engine_config, job.recipe.loader.num_workers, device)
    return build_task_engine(job.task, job.engine_config, job.schedule.accumulation, device)


def _announce(job: PreparedStage, start: RunStart, device: torch.device, step: int, num_parameters: int) -> None:
    schedule, launch = job.schedule, job.launch
    logger.info(
        f"{job.recipe.name} {job.stage_name}: {num_parameters / 1e6:.2f} M parameters, "
        f"ZeRO-{job.engine_config.zero.stage} on {launch.world_size} x {device.type}, "
        f"batch {schedule.stage.batch_size} = {schedule.micro_batch} x {launch.world_size} x {schedule.accumulation}, "
        f"{counted(schedule.epochs, 'epoch')} of {counted(schedule.steps_per_epoch, 'step')}, into {job.stage_dir}"
        + (f", resuming after step {step}" if step else "")
    )
    for damaged in start.damaged:
        logger.info(f"  skipped: {damaged}")
    if job.task.init_report:
        logger.info(f"  initialized from {job.task.init_report}")


def _export(job: PreparedStage, engine: deepspeed.DeepSpeedEngine, results: ResultValues) -> None:
    state = gather_state(engine)
    if job.launch.rank == 0:
        save_weights(job.stage_dir / MODEL_FILE, job.task.export_state(state), export_metadata(job, results))


def dry_run(job: PreparedStage) -> None:
    """Run two steps on real images and print their time and peak memory; nothing is written.

    The shapes are the stage's largest: full micro-batches, and all of them in each step.

    Args:
        job: the prepared stage, of at least two steps.
    """
    with process_group(job.launch, job.recipe.watchdog.timeout_minutes) as (device, _):
        _dry_run(job, device)


def _dry_run(job: PreparedStage, device: torch.device) -> None:
    engine, loader, schedule = _build_engine(job, device), job.train_loader(device), job.schedule
    batches, times = loader.epoch(0), []
    for step in range(2):
        meter, started = Meter(), time.perf_counter()
        run_step(engine, job.task, batches, schedule, step, meter, StepSync())
        losses, _, _ = meter.read(job.launch, schedule.micro_batch)
        times.append(time.perf_counter() - started)
    loader.close()
    memory = torch.tensor(peak_memory(device), dtype=torch.float64, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    if job.launch.rank == 0:
        kind = "device memory" if device.type != "cpu" else "resident memory"
        print(
            f"dry run: {job.recipe.name} {job.stage_name}, loss {losses['loss']:.4f}; first step {times[0]:.2f} s "
            f"(with warm-up), second {times[1]:.2f} s = {job.stage.batch_size / times[1]:.1f} images/s; peak {kind} of "
            f"a rank {memory.item() / GIB:.2f} GiB"
        )
