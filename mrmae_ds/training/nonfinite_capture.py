"""What a skipped step was about, so that it can be run again: ``captures/step_N/capture.json`` and the weights.

``mrmae replay`` (:mod:`mrmae_ds.training.replay`) reads it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError

from mrmae_ds.config.stages import StageName
from mrmae_ds.distributed.collectives import gather
from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.training.engine.build import gather_state
from mrmae_ds.training.step_sync import MicroBatch, StepStatus
from mrmae_ds.weights.model_file import MODEL_FILE, save_weights

FOLDER = "captures"
FILE = "capture.json"
KEPT = 5  # each holds the model's weights


class CapturedMicroBatch(BaseModel):
    """A micro-batch: rows of its samples in the data set, and its losses as text, which holds nan and inf."""

    model_config = ConfigDict(extra="forbid")
    indices: list[int]
    losses: dict[str, str]


class Capture(BaseModel):
    """A step that was skipped.

    Attributes:
        stage: its name. step: optimizer steps done before. seed: of the run.
        recipe_hash: of the stage's recipe.
        world_size, accumulation, micro_batch: how the global batch was divided.
        bad_loss, bad_gradient: which of them was not finite.
        engine: the engine config.
        ranks: every rank's micro-batches.
    """

    model_config = ConfigDict(extra="forbid")
    stage: StageName
    step: int
    seed: int
    recipe_hash: str
    world_size: int
    accumulation: int
    micro_batch: int
    bad_loss: bool
    bad_gradient: bool
    engine: dict[str, Any]
    ranks: list[list[CapturedMicroBatch]]


class Division(NamedTuple):
    """How a step's global batch was divided, of which run, under which engine config; see :class:`Capture`."""

    stage: StageName
    seed: int
    recipe_hash: str
    world_size: int
    accumulation: int
    micro_batch: int
    engine: dict[str, Any]


def write_capture(
    engine: deepspeed.DeepSpeedEngine,
    stage_dir: Path,
    division: Division,
    step: int,
    verdict: StepStatus,
    micros: list[MicroBatch],
    same_weights: bool,
) -> Path | None:
    """Write down a step that was not taken. All ranks must call it, right after it was skipped.

    Args:
        engine: whose weights are those of before the step.
        stage_dir: of the run. division: of the global batch.
        step: optimizer steps done before it.
        verdict: what was found. micros: this rank's micro-batches.
        same_weights: the step before was skipped too, so its capture holds the same weights.

    Returns:
        The folder, on rank 0 if it could be written; a capture that cannot be is told and does not end the training.
    """
    ranks = gather([_record(micro) for micro in micros])
    folder, earlier = capture_folder(stage_dir, step), capture_folder(stage_dir, step - 1) / MODEL_FILE
    reuse = all(gather(same_weights and earlier.is_file()))
    weights = {} if reuse else gather_state(engine)
    if dist.get_rank():
        return None
    capture = Capture(
        **division._asdict(), step=step, bad_loss=verdict.bad_loss, bad_gradient=verdict.bad_gradient, ranks=ranks
    )
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if reuse:
            _link(earlier, folder / MODEL_FILE)
        else:
            save_weights(folder / MODEL_FILE, weights, {"kind": "capture", "step": step})
        write_text(folder / FILE, capture.model_dump_json(indent=1))
        _prune(folder.parent)
    except OSError as error:
        print(f"warning: the skipped step {step} was not captured: {error}", file=sys.stderr, flush=True)
        return None
    return folder


def capture_folder(stage_dir: Path, step: int) -> Path:
    """Where the step after ``step`` steps is captured."""
    return stage_dir / FOLDER / f"step_{step:09d}"


def read_capture(path: Path) -> tuple[Path, Capture]:
    """The folder of a capture and what it says.

    Args:
        path: the folder, or the file in it.

    Raises:
        UserError: if it is none.
    """
    folder = path.parent if path.name == FILE else path
    try:
        return folder, Capture.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder / FILE}: {error.strerror}; name a folder RUN/STAGE/captures/step_N") from None
    except ValidationError as error:
        raise UserError(f"{folder / FILE}: not a capture of this version: {error.errors()[0]['msg']}") from None


def _record(micro: MicroBatch) -> CapturedMicroBatch:
    losses: dict[str, Any] = {name: repr(value.item()) for name, value in micro.losses.items()}
    return CapturedMicroBatch(indices=micro.indices.tolist(), losses=losses)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("step_*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
