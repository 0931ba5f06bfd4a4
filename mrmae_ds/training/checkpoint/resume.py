"""Choosing a checkpoint together, and going on from it.

Every process looks with its own eyes, and nothing is loaded before all of them have found the same checkpoint whole:
a shard that one process cannot read would leave the others waiting for it in the middle of the load.
"""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mrmae_ds.distributed.collectives import gather, raise_on_all_ranks
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.errors import CollectiveError
from mrmae_ds.training.checkpoint import folder as store
from mrmae_ds.training.checkpoint.manifest import (
    EngineLayout,
    Manifest,
    check_contents,
    check_sizes,
    read_manifest,
    shares,
)
from mrmae_ds.training.checkpoint.run_dir import RunStart, none_whole
from mrmae_ds.training.checkpoint.save import layout_of
from mrmae_ds.training.checkpoint.train_state import TrainState, load_state
from mrmae_ds.training.checkpoint.universal import convert, load_universal


def agree_on_start(start: RunStart, stage_dir: Path) -> RunStart:
    """What all processes are to do: each one's own decision, which must be the same, its checkpoint read and verified.

    A checkpoint that is not whole is passed over for the one before, unless it was named. All ranks must call it.

    Args:
        start: this process's decision (:func:`mrmae_ds.training.checkpoint.run_dir.decide_start`).
        stage_dir: of the run.

    Raises:
        CollectiveError: on every process: if they see different things, or none of the checkpoints is whole.
    """
    seen = gather((start.action, [path.name for path in start.candidates]))
    if any(one != seen[0] for one in seen):
        other = next(rank for rank, one in enumerate(seen) if one != seen[0])
        raise CollectiveError(
            f"{stage_dir}: rank 0 sees {_described(seen[0])}, rank {other} sees {_described(seen[other])}; the run's "
            "folder must be on a file system that all nodes share"
        )
    if start.action != "resume":
        return start
    damaged = list(start.damaged)
    for checkpoint in start.candidates:
        wrong = verify(checkpoint)
        if not wrong:
            _leave_others(checkpoint, stage_dir)
            return RunStart("resume", (checkpoint,), tuple(damaged))
        damaged.append(wrong)
        if start.named:
            raise CollectiveError(f"{wrong}. Name another one, or leave --resume out: the newest whole one is taken")
    raise CollectiveError(none_whole(stage_dir, damaged))


def _described(seen: tuple[str, list[str]]) -> str:
    action, names = seen
    return f"{names[0]} to go on from" if names else {"done": "a finished stage"}.get(action, "no checkpoint")


def verify(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, the same words on every process; nothing if it is whole. All ranks must call it.

    Every process reads the manifest and looks at every file's size; the contents are read once, divided among them.
    """
    wrong: list[str] = []
    try:
        manifest = read_manifest(checkpoint)
        wrong = check_sizes(checkpoint, manifest)
        own = shares(manifest, dist.get_world_size())[dist.get_rank()]
        wrong = wrong or check_contents(checkpoint, manifest, own)
        identity = manifest.id
    except Exception as error:  # also what nobody thought of: the others must hear of it
        wrong, identity = [str(error) or type(error).__name__], ""
    reports = gather((identity, wrong))
    told = list(dict.fromkeys(line for _, lines in reports for line in lines))
    if not told and any(other != reports[0][0] for other, _ in reports):
        told = [f"{checkpoint}: not the same checkpoint on every node; is the file system shared?"]
    return "; ".join(told[:3]) + (f" (and {len(told) - 3} more)" if len(told) > 3 else "")


def _leave_others(checkpoint: Path, stage_dir: Path) -> None:
    """Set aside what is newer: damaged, or of the line that is left here. Otherwise the next start would take it up."""
    error = None
    if dist.get_rank() == 0 and checkpoint.resolve().parent == (stage_dir / store.FOLDER).resolve():
        there = store.checkpoint_folders(stage_dir)
        names = [path.name for path in there]
        try:
            store.set_aside(there[names.index(checkpoint.name) + 1 :])
        except OSError as raised:
            error = f"{raised.filename}: {raised.strerror}; what is newer than {checkpoint.name} cannot be set aside"
    raise_on_all_ranks(error)


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Path, launch: Launch, micro_batch: int
) -> tuple[TrainState, Manifest]:
    """Restore engine, counters and random states from a verified checkpoint. All ranks must call it.

    On another number of processes than wrote it, the checkpoint is converted first.

    Args:
        engine: new: nothing was trained or loaded yet.
        checkpoint: whole, on every process.
        launch, micro_batch: of this job.

    Raises:
        CollectiveError: on every process, if the engine config has another layout, or the engine is not where the
            checkpoint says.
    """
    manifest, now = read_manifest(checkpoint), layout_of(engine)
    raise_on_all_ranks(layout_conflict(manifest.layout, now, checkpoint))
    # Without ZeRO every rank has all of the state, so its file serves any number of them.
    if now == manifest.layout or now.zero_stage == 0:
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        error = None if loaded else f"{checkpoint}: DeepSpeed loaded nothing from it; use an older one: --resume DIR"
    else:
        load_universal(engine, convert(checkpoint, manifest))
        error = None
    device = torch.device(engine.device)
    state = load_state(checkpoint, manifest.layout.world_size, engine.module, launch, micro_batch, device)
    steps = {"the manifest": manifest.step, "the state": state.step, "DeepSpeed": int(engine.global_steps)}
    if error is None and len(set(steps.values())) > 1:
        error = f"{checkpoint}: its parts disagree on the steps done: {steps}"
    raise_on_all_ranks(error)
    return state, manifest


def layout_conflict(saved: EngineLayout, now: EngineLayout, checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded into an engine of another layout; None if it can."""
    for name, key in {"zero_stage": "zero_optimization.stage", "dtype": "bf16.enabled"}.items():
        before, after = getattr(saved, name), getattr(now, name)
        if before != after:
            return (
                f"{checkpoint}: written with {key.split('.')[0]} of {name} {before}, the engine config has {after}; "
                f"set {key} as it was, or start anew with --resume never"
            )
    return None
