"""Run a prepared job: start the processes' group, build the engine, train, write what came of it."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mrmae_ds.data.augment import AugmentSettings
from mrmae_ds.data.crop import CropSettings
from mrmae_ds.data.reader import Reader, build_reader
from mrmae_ds.data.staging import located
from mrmae_ds.errors import UserError
from mrmae_ds.models.weights import MODEL_FILE, save_weights
from mrmae_ds.recipe_stages import FinetuneConfig
from mrmae_ds.training.accounting import GIB, Accountant, peak_memory
from mrmae_ds.training.checkpoint import load_checkpoint, save_checkpoint
from mrmae_ds.training.distributed import choose_device, end_process_group, start_process_group
from mrmae_ds.training.engine import build_engine, gather_state
from mrmae_ds.training.job import Job
from mrmae_ds.training.loop import Meter, run_step, train
from mrmae_ds.training.recorder import Recorder, count_parameters, export_metadata
from mrmae_ds.training.run_folder import prepare_folder
from mrmae_ds.training.scores import evaluate, validation_reader
from mrmae_ds.training.tasks import FinetuneTask


def open_reader(job: Job, device: torch.device, *, training: bool) -> Reader:
    """This rank's reader of the training or the validation set."""
    launch, data, stage = job.plan.launch, job.recipe.data, job.stage
    if not training:
        return validation_reader(job.recipe, job.image_size, job.plan.micro_batch, launch, device)
    policy = stage.rand_augment if isinstance(stage, FinetuneConfig) else None
    return build_reader(
        located(data.train, job.recipe.loader.stage_to),
        train=True,
        image_size=job.image_size,
        micro_batch=job.plan.micro_batch,
        accumulation=job.plan.accumulation,
        world_size=launch.world_size,
        rank=launch.rank,
        seed=job.recipe.seed,
        crop=CropSettings(scale=stage.crop_scale, flip=stage.flip),
        num_workers=job.recipe.loader.workers,
        device=device,
        backend=data.backend,
        augment=AugmentSettings(policy, data.mean) if policy else None,
    )


class _Hooks:
    """Evaluation, records and checkpoints of a running stage; ``recorder`` exists on rank 0 only."""

    def __init__(
        self, job: Job, engine: deepspeed.DeepSpeedEngine, val: Reader | None, recorder: Recorder | None
    ) -> None:
        self.job, self.engine, self.val, self.recorder = job, engine, val, recorder
        self.results: dict[str, float | int] = {}

    def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
        """See :class:`Hooks`."""
        task, stage = self.job.task, self.job.stage
        if self.val is None or not isinstance(task, FinetuneTask) or not isinstance(stage, FinetuneConfig):
            return {}
        if epochs % stage.eval_every_epochs and epochs != stage.epochs:
            return {}
        self.results |= evaluate(self.engine, lambda images: task.logits(self.engine, images), self.val)
        return {"top1": self.results["top1"], "val_loss": self.results["loss"]}

    def log(self, step: int, values: dict[str, float]) -> None:
        """See :class:`Hooks`."""
        if step == 1:
            self.results["first_loss"] = values["loss"]
        self.results["last_loss"] = values["loss"]
        if self.recorder:
            self.recorder.log(step, values)

    def save(self, epochs: int, step: int) -> None:
        """See :class:`Hooks`."""
        record, job = self.job.recipe.record, self.job
        if epochs % record.save_every_epochs and epochs != job.stage.epochs:
            return
        keep = record.keep_checkpoints
        save_checkpoint(self.engine, job.stage_dir, step, job.recipe.hash(job.stage_name), job.recipe.seed, keep)
        if self.recorder:
            self.recorder.saved(step, self.results)


def run_job(job: Job) -> None:
    """Train the stage to its end. Returns on every rank; leaves the process group.

    Writes into ``job.stage_dir``: recipe.yaml, engine.json, record.json, metrics.jsonl, tensorboard/, checkpoints/,
    model.safetensors, loss_curves.png and, after pre-training, pictures/.
    """
    launch = job.plan.launch
    if job.start.action == "done":
        if launch.rank == 0:
            print(f"{job.stage_dir}: already finished; --resume never starts anew, --run DIR elsewhere")
        return
    parameters = count_parameters(job)
    device = choose_device(launch)
    start_process_group(device)
    engine = _engine(job, device)
    first = launch.rank == 0
    if first:
        config = json.dumps(job.engine_config.for_deepspeed(job.plan.accumulation), indent=2)
        prepare_folder(job.stage_dir, job.recipe, config + "\n", fresh=job.start.action == "fresh")
    step = load_checkpoint(engine, job.start.checkpoint) if job.start.checkpoint else 0
    recorder = Recorder(job, parameters, device, step) if first else None
    try:
        _announce(job, device, step, parameters.total)
        val = open_reader(job, device, training=False) if isinstance(job.task, FinetuneTask) else None
        hooks = _Hooks(job, engine, val, recorder)
        reader = open_reader(job, device, training=True)
        accountant = Accountant(engine, device)
        train(engine, job.task, reader, job.plan, step, job.recipe.record.log_every, hooks, accountant)
        accountant.close()
        if step == job.plan.total_steps:  # it ended between its last checkpoint and its record
            hooks.end_of_epoch(job.plan.epochs, step)
        _export(job, engine, hooks.results)
        if recorder:
            recorder.finish(hooks.results)
    except BaseException:
        if recorder:
            recorder.fail(engine.global_steps)
        raise
    finally:
        job.task.release()
    if first:
        _draw(job.stage_dir)
    end_process_group()


def _engine(job: Job, device: torch.device) -> deepspeed.DeepSpeedEngine:
    task = job.task
    engine = build_engine(
        task.model, task.groups(), job.stage.optimizer.betas, job.engine_config, job.plan.accumulation, device
    )
    task.to(device)
    return engine


def _announce(job: Job, device: torch.device, step: int, parameters: int) -> None:
    plan, launch = job.plan, job.plan.launch
    if launch.rank:
        return
    print(
        f"{job.recipe.name} {job.stage_name}: {parameters / 1e6:.2f} M parameters, ZeRO-{job.engine_config.zero_stage} "
        f"on {launch.world_size} x {device.type}, batch {plan.stage.batch_size} = {plan.micro_batch} x "
        f"{launch.world_size} x {plan.accumulation}, {plan.epochs} epochs of {plan.steps_per_epoch} steps, "
        f"into {job.stage_dir}" + (f", going on after step {step}" if step else ""),
        flush=True,
    )
    for damaged in job.start.damaged:
        print(f"  passed over: {damaged}", flush=True)
    if job.report:
        print(f"  started from {job.report}", flush=True)


def _export(job: Job, engine: deepspeed.DeepSpeedEngine, results: dict[str, float | int]) -> None:
    state = gather_state(engine)
    if job.plan.launch.rank == 0:
        save_weights(job.stage_dir / MODEL_FILE, state, export_metadata(job, results))


def _draw(stage_dir: Path) -> None:
    """Curves and pictures of a finished stage; it stays finished whatever becomes of them, so the reason is printed."""
    for what, draw in {"loss curves": _draw_curves, "pictures": _draw_pictures}.items():
        try:
            draw(stage_dir)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else traceback.format_exc().strip()
            print(f"{stage_dir}: finished, but its {what} were not drawn: {reason}", file=sys.stderr, flush=True)


def _draw_curves(stage_dir: Path) -> None:
    from mrmae_ds.reporting.figures import loss_curves

    loss_curves(stage_dir, stage_dir / "loss_curves.png")


def _draw_pictures(stage_dir: Path) -> None:
    from mrmae_ds.reporting.show import show_run

    show_run(stage_dir)


def dry_run(job: Job) -> None:
    """Two real steps on real pictures, nothing written: prints each one's time and the peak memory of this node.

    The shapes are the stage's largest: a whole micro-batch, every micro-batch of the step, and one evaluation batch
    where the stage evaluates.
    """
    launch = job.plan.launch
    device = choose_device(launch)
    start_process_group(device)
    engine = _engine(job, device)
    reader = open_reader(job, device, training=True)
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
    end_process_group()
