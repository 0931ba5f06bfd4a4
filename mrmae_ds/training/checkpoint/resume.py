"""Choosing and loading the checkpoint that a run resumes from.

Each rank verifies the checkpoint on its own file system, and loading starts only after all ranks have found the same
complete checkpoint: a shard that one rank cannot read would leave the others waiting in the middle of the load.
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
from mrmae_ds.training.checkpoint.run_dir import RunStart, no_complete_checkpoint
from mrmae_ds.training.checkpoint.save import layout_of
from mrmae_ds.training.checkpoint.train_state import TrainState, load_state
from mrmae_ds.training.checkpoint.universal import convert, load_universal


def verify_start(start: RunStart, stage_dir: Path) -> RunStart:
    """Check that all ranks decided the same, and verify the checkpoint's content. All ranks must call it.

    A damaged checkpoint is passed over for the one before, unless the user named it.

    Args:
        start: this rank's decision (:func:`mrmae_ds.training.checkpoint.run_dir.decide_start`).
        stage_dir: of the run.

    Returns:
        The decision with a single, verified candidate.

    Raises:
        CollectiveError: on every rank, if the ranks decided differently, or no checkpoint is complete.
    """
    decisions = gather((start.action, [path.name for path in start.candidates]))
    if any(decision != decisions[0] for decision in decisions):
        other = next(rank for rank, decision in enumerate(decisions) if decision != decisions[0])
        raise CollectiveError(
            f"{stage_dir}: rank 0 finds {_describe(*decisions[0])}, rank {other} finds {_describe(*decisions[other])}; "
            "the run's folder must be on a file system that all nodes share"
        )
    if start.action != "resume":
        return start
    damaged = list(start.damaged)
    for checkpoint in start.candidates:
        problems = verify_checkpoint(checkpoint)
        if not problems:
            _set_aside_newer_checkpoints(checkpoint, stage_dir)
            return RunStart("resume", (checkpoint,), tuple(damaged))
        damaged.append(problems)
        if start.named:
            raise CollectiveError(f"{problems}. Name another one, or omit --resume to use the newest complete one")
    raise CollectiveError(no_complete_checkpoint(stage_dir, damaged))


def _describe(action: str, names: list[str]) -> str:
    return f"checkpoint {names[0]}" if names else {"done": "a finished stage"}.get(action, "no checkpoint")


def verify_checkpoint(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint, the same on every rank; "" if nothing is. All ranks must call it.

    Every rank reads the manifest and the size of every file; the contents are read once, divided among the ranks.
    """
    problems: list[str] = []
    try:
        manifest = read_manifest(checkpoint)
        problems = check_sizes(checkpoint, manifest)
        own = shares(manifest, dist.get_world_size())[dist.get_rank()]
        problems = problems or check_contents(checkpoint, manifest, own)
        identity = manifest.id
    except Exception as error:  # of any kind: the other ranks must learn of it
        problems, identity = [str(error) or type(error).__name__], ""
    reports = gather((identity, problems))
    lines = list(dict.fromkeys(line for _, reported in reports for line in reported))
    if not lines and any(other != reports[0][0] for other, _ in reports):
        lines = [f"{checkpoint}: not the same checkpoint on every node; is the file system shared?"]
    return "; ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else "")


def _set_aside_newer_checkpoints(checkpoint: Path, stage_dir: Path) -> None:
    """Move newer checkpoints aside, so that the next automatic resume does not select them.

    They are damaged, or belong to a branch that ``--resume DIR`` abandons.
    """
    error = None
    if dist.get_rank() == 0 and checkpoint.resolve().parent == (stage_dir / store.FOLDER).resolve():
        folders = store.checkpoint_folders(stage_dir)
        names = [path.name for path in folders]
        try:
            store.set_aside(folders[names.index(checkpoint.name) + 1 :])
        except OSError as raised:
            error = f"{raised.filename}: {raised.strerror}; what is newer than {checkpoint.name} cannot be set aside"
    raise_on_all_ranks(error)


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Path, launch: Launch, micro_batch: int
) -> tuple[TrainState, Manifest]:
    """Restore engine, counters and random states from a verified checkpoint. All ranks must call it.

    If another number of ranks wrote it, the checkpoint is converted first.

    Args:
        engine: new: nothing was trained or loaded yet.
        checkpoint: verified on every rank.
        launch: this rank.
        micro_batch: images a rank takes at a time.

    Raises:
        CollectiveError: on every rank, if the engine config has another layout, or the engine's step count is not the
            checkpoint's.
    """
    manifest, layout = read_manifest(checkpoint), layout_of(engine)
    raise_on_all_ranks(layout_conflict(manifest.layout, layout, checkpoint))
    # Without ZeRO every rank has all of the state, so its file serves any number of them.
    if layout == manifest.layout or layout.zero_stage == 0:
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        error = None if loaded else f"{checkpoint}: DeepSpeed loaded nothing from it; use an older one: --resume DIR"
    else:
        load_universal(engine, convert(checkpoint, manifest))
        error = None
    device = torch.device(engine.device)
    state = load_state(checkpoint, manifest.layout.world_size, engine.module, launch, micro_batch, device)
    steps = {"the manifest": manifest.step, "the state": state.step, "DeepSpeed": int(engine.global_steps)}
    if error is None and len(set(steps.values())) > 1:
        error = f"{checkpoint}: its files disagree on the number of steps: {steps}"
    raise_on_all_ranks(error)
    return state, manifest


def layout_conflict(saved: EngineLayout, current: EngineLayout, checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be loaded into an engine of another layout; None if it can."""
    for name, key in {"zero_stage": "zero_optimization.stage", "dtype": "bf16.enabled"}.items():
        before, after = getattr(saved, name), getattr(current, name)
        if before != after:
            return (
                f"{checkpoint}: written with {key.split('.')[0]} of {name} {before}, the engine config has {after}; "
                f"restore the earlier value of {key}, or start over with --resume never"
            )
    return None
