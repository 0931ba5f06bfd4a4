"""Run a prepared job: start the processes' group, build the engine, train, write what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

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
from mrmae_ds.training.evaluation.base import EvalContext
from mrmae_ds.training.final_figures import draw, finish_drawing
from mrmae_ds.training.hooks import StageHooks
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.loop import run_step, train
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.perf_metrics import GIB, PerfMeter, peak_memory
from mrmae_ds.training.run_logger import RunLogger, export_metadata
from mrmae_ds.training.step_sync import StepSync
from mrmae_ds.weights.model_file import MODEL_FILE, save_weights


def run_stage(job: PreparedStage) -> None:
    """Train the stage to its end. Returns on every rank; leaves the process group.

    Writes into ``job.stage_dir``: recipe.yaml, engine.json, record.json, metrics.jsonl, tensorboard/, checkpoints/,
    captures/ of skipped steps, model.safetensors, loss_curves.png and, after pre-training, images/.

    Raises:
        StopRequested: on every rank, after a signal and a checkpoint.
        CollectiveError, TrainingError: on every rank.
    """
    launch = job.schedule.launch
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
    plan, launch, first = job.schedule, job.schedule.launch, job.schedule.launch.rank == 0
    parameters = job.task.count_parameters()
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
        reader = job.train_loader(device)
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
    plan, config = job.schedule, job.recipe.checkpoint
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
    heartbeat, classes = monitor.beat, job.val_data.num_classes
    context = EvalContext(job.recipe, job.engine_config, plan.launch, device, classes, heartbeat)
    return StageHooks(
        job=job,
        engine=engine,
        evaluator=job.task.build_evaluator(context),
        recorder=recorder,
        saver=saver,
        saves=saves,
        boundary=StepSync(signals, config.every_minutes, saver.writing),
        monitor=monitor,
        results=results,
    )


def _engine(job: PreparedStage, device: torch.device) -> deepspeed.DeepSpeedEngine:
    task = job.task
    groups, accumulation = task.param_groups(), job.schedule.accumulation
    engine = build_engine(task.model, groups, task.make_optimizer, job.engine_config, accumulation, device)
    task.to(device)
    return engine


def _announce(job: PreparedStage, start: RunStart, device: torch.device, step: int, parameters: int) -> None:
    plan, launch = job.schedule, job.schedule.launch
    print(
        f"{job.recipe.name} {job.stage_name}: {parameters / 1e6:.2f} M parameters, ZeRO-{job.engine_config.zero.stage} "
        f"on {launch.world_size} x {device.type}, batch {plan.stage.batch_size} = {plan.micro_batch} x "
        f"{launch.world_size} x {plan.accumulation}, {plan.epochs} epochs of {plan.steps_per_epoch} steps, "
        f"into {job.stage_dir}" + (f", going on after step {step}" if step else ""),
        flush=True,
    )
    for damaged in start.damaged:
        print(f"  passed over: {damaged}", flush=True)
    if job.task.init_report:
        print(f"  started from {job.task.init_report}", flush=True)


def _export(job: PreparedStage, engine: deepspeed.DeepSpeedEngine, results: dict[str, float | int]) -> None:
    state = gather_state(engine)
    if job.schedule.launch.rank == 0:
        save_weights(job.stage_dir / MODEL_FILE, job.task.export_state(state), export_metadata(job, results))


def _has_images(job: PreparedStage) -> bool:
    return job.stage_name == "pretrain" and job.recipe.logging.num_images > 0


def dry_run(job: PreparedStage) -> None:
    """Two real steps on real images, nothing written: prints each one's time and the peak memory of this node.

    The shapes are the stage's largest: a whole micro-batch, every micro-batch of the step, and one evaluation batch
    where the stage evaluates.
    """
    device = choose_device(job.schedule.launch)
    start_process_group(device)
    with Watchdog(job.schedule.launch, 60 * job.recipe.watchdog.timeout_minutes):
        _dry_run(job, device)
    end_process_group()


def _dry_run(job: PreparedStage, device: torch.device) -> None:
    launch, engine = job.schedule.launch, _engine(job, device)
    reader = job.train_loader(device)
    if job.schedule.total_steps < 2:
        raise UserError("the stage has a single step; a dry run needs two")
    engine.train()
    batches, times = reader.epoch(0), []
    for step in range(2):
        meter = Meter()
        began = time.perf_counter()
        run_step(engine, job.task, batches, job.schedule, step, meter)
        losses, _, _ = meter.read(launch, job.schedule.micro_batch)
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
