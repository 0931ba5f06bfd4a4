"""Capture of skipped steps for ``mrmae replay``: ``captures/step_N/capture.json`` and the weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError

from mrmae_ds.config.stages import StageName
from mrmae_ds.distributed.collectives import gather
from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.engine.build import gather_state
from mrmae_ds.training.step_sync import MicroBatch, StepStatus
from mrmae_ds.weights.model_file import save_weights
from mrmae_ds.weights.paths import MODEL_FILE

logger = logging.getLogger(__name__)

CAPTURES_DIR = "captures"
CAPTURE_FILE = "capture.json"
MAX_CAPTURES = 5  # each holds the model's weights


class CapturedMicroBatch(BaseModel):
    """A micro-batch.

    Attributes:
        indices: the samples' rows in the data set.
        losses: by name, as text, because JSON has no nan and inf.
    """

    model_config = ConfigDict(extra="forbid")
    indices: list[int]
    losses: dict[str, str]


class Capture(BaseModel):
    """A step that was skipped.

    Attributes:
        stage: stage that was trained.
        step: optimizer steps completed before it.
        seed: seed of the run.
        recipe_hash: hash of the stage's recipe.
        world_size: number of ranks.
        accumulation: micro-batches per optimizer step.
        micro_batch: images per micro-batch.
        bad_loss: a loss was not finite.
        bad_gradient: a gradient was not finite.
        engine: engine config.
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


class CaptureSource(NamedTuple):
    """The run that is captured; the fields are those of :class:`Capture`."""

    stage: StageName
    seed: int
    recipe_hash: str
    world_size: int
    accumulation: int
    micro_batch: int
    engine: dict[str, Any]


class NonfiniteCaptureCallback(Callback):
    """Captures skipped steps and reports them on rank 0.

    Args:
        stage_dir: output folder.
        source: the run.
    """

    def __init__(self, stage_dir: Path, source: CaptureSource) -> None:
        self.stage_dir, self.source = stage_dir, source

    def on_step_skipped(self, context: TrainContext, status: StepStatus) -> None:
        """Capture the step."""
        state, micro_batches = context.state, context.step_sync.micro_batches
        step, same_weights = state.step - 1, state.bad_in_row > 1
        folder = write_capture(
            context.engine, self.stage_dir, self.source, step, status, micro_batches, same_weights=same_weights
        )
        context.engine.train()
        if context.schedule.launch.rank == 0:
            logger.warning(
                "step %d skipped: %s was not finite (%d skipped so far, %d consecutive)%s",
                state.step,
                "a loss" if status.bad_loss else "a gradient",
                state.skipped,
                state.bad_in_row,
                f"; repeat it with mrmae replay {folder}" if folder else "",
            )


def write_capture(
    engine: deepspeed.DeepSpeedEngine,
    stage_dir: Path,
    source: CaptureSource,
    step: int,
    status: StepStatus,
    micro_batches: list[MicroBatch],
    same_weights: bool,
) -> Path | None:
    """Write a skipped step. All ranks must call it, right after the step was skipped.

    Args:
        engine: holds the weights from before the step.
        stage_dir: output folder.
        source: the run.
        step: optimizer steps completed before it.
        status: status of the step.
        micro_batches: this rank's micro-batches.
        same_weights: the step before was skipped too, so its capture holds the same weights.

    Returns:
        The capture's folder on rank 0, or None if it could not be written, which does not end training; None on other
        ranks.
    """
    ranks = gather([_capture(micro_batch) for micro_batch in micro_batches])
    folder, earlier = capture_folder(stage_dir, step), capture_folder(stage_dir, step - 1) / MODEL_FILE
    reuse = all(gather(same_weights and earlier.is_file()))
    weights = {} if reuse else gather_state(engine)
    if dist.get_rank():
        return None
    capture = Capture(
        **source._asdict(), step=step, bad_loss=status.bad_loss, bad_gradient=status.bad_gradient, ranks=ranks
    )
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if reuse:
            _link(earlier, folder / MODEL_FILE)
        else:
            save_weights(folder / MODEL_FILE, weights, {"kind": "capture", "step": step})
        write_text(folder / CAPTURE_FILE, capture.model_dump_json(indent=1))
        _prune(folder.parent)
    except OSError as error:
        logger.warning("the skipped step %d was not captured: %s", step, error)
        return None
    return folder


def capture_folder(stage_dir: Path, step: int) -> Path:
    """Return the folder of the capture of the step after ``step`` steps."""
    return stage_dir / CAPTURES_DIR / f"step_{step:09d}"


def read_capture(path: Path) -> tuple[Path, Capture]:
    """Read a capture.

    Args:
        path: its folder, or the file in it.

    Returns:
        The folder and its content.

    Raises:
        UserError: if it is not a capture.
    """
    folder = path.parent if path.name == CAPTURE_FILE else path
    try:
        return folder, Capture.model_validate_json((folder / CAPTURE_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        message = f"{folder / CAPTURE_FILE}: {error.strerror}; name a folder RUN/STAGE/captures/step_N"
        raise UserError(message) from None
    except ValidationError as error:
        raise UserError(f"{folder / CAPTURE_FILE}: not a capture of this version: {error.errors()[0]['msg']}") from None


def _capture(micro_batch: MicroBatch) -> CapturedMicroBatch:
    losses = {name: repr(value.item()) for name, value in micro_batch.losses.items()}
    return CapturedMicroBatch(indices=micro_batch.indices.tolist(), losses=losses)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("step_*"))[:-MAX_CAPTURES]:
        shutil.rmtree(old, ignore_errors=True)
