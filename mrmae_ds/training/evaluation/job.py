"""Start, end and record of an evaluation, whatever it measures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import RaisedOnAllRanks, UserError
from mrmae_ds.records.metrics import MetricsWriter
from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import Member
from mrmae_ds.training.checkpoint.manifest import RunIdentity
from mrmae_ds.training.checkpoint.run_dir import decide_start, prepare_folder
from mrmae_ds.training.engine.kernels import apply_kernel_settings
from mrmae_ds.training.evaluation.base import Scores
from mrmae_ds.training.job import TrainArgs, load_configs
from mrmae_ds.training.run import ALREADY_FINISHED, process_group
from mrmae_ds.training.run_logger import RecordWriter
from mrmae_ds.weights.paths import find_weights
from mrmae_ds.weights.resolve import Weights, resolve

logger = logging.getLogger(__name__)


def member_key(number: int) -> str:
    """Return the recipe key of a member."""
    return f"stages.evaluate.members[{number}]"


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation that is about to start.

    Attributes:
        recipe: resolved recipe.
        engine_config: engine config, for micro-batch and precision.
        launch: this rank among the others.
        stage_dir: output folder.
        resume: ``auto`` or ``never``.
    """

    recipe: Recipe
    engine_config: EngineConfig
    launch: Launch
    stage_dir: Path
    resume: str

    @classmethod
    def of_args(cls, args: TrainArgs, launch: Launch) -> EvaluationJob:
        """Read and check the configuration.

        Raises:
            UserError: for arguments that have no meaning in an evaluation.
        """
        recipe, engine_config = load_configs(args)
        if args.dry_run:
            raise UserError("--dry-run: not available for stage evaluate, which trains nothing; run it without")
        if args.resume not in ("auto", "never"):
            raise UserError(f"--resume {args.resume}: stage evaluate has no checkpoints; give auto or never")
        return cls(recipe, engine_config, launch, args.stage_dir(recipe), args.resume)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the members: those of the recipe, or this run's fine-tuned model."""
        return self.recipe.stages.evaluate.members or (str(self.stage_dir.parent / "finetune"),)

    def resolve_member(self, number: int) -> Weights:
        """Read the weights of a member.

        Raises:
            UserError: naming its key, if it has not finished or cannot be read.
        """
        key = member_key(number)
        return resolve(find_weights(Path(self.sources[number]), key), key)

    def is_done(self, val_sha256: str, members: Sequence[Member]) -> bool:
        """Return True if the folder already has the result.

        Args:
            val_sha256: of the validation set.
            members: their entries in the run record.

        Raises:
            UserError: if the folder holds another evaluation.
        """
        recipe = self.recipe
        identity = RunIdentity(
            recipe_hash=recipe.hash("evaluate"),
            seed=recipe.seed,
            train="",
            val=val_sha256,
            recipe=recipe.counted("evaluate"),
        )
        if decide_start(self.stage_dir, "evaluate", identity, self.resume).action != "done":
            return False
        if [member.sha256 for member in RunRecord.load(self.stage_dir).members] != [m.sha256 for m in members]:
            raise UserError(
                f"{self.stage_dir}: holds the evaluation of other weights of {', '.join(self.sources)}; name another "
                "folder with --run, or start over here with --resume never"
            )
        return True

    def run(self, done: bool, measure: Callable[[torch.device, Watchdog], None]) -> None:
        """Measure in a process group that is left at the end, or report on rank 0 that the result exists.

        Args:
            done: the result exists (:meth:`is_done`).
            measure: function of device and watchdog.
        """
        if not done:
            with process_group(self.launch, self.recipe.watchdog.timeout_minutes) as (device, watchdog):
                apply_kernel_settings(self.engine_config.kernels, device)
                measure(device, watchdog)
        elif self.launch.rank == 0:
            logger.info(ALREADY_FINISHED, self.stage_dir)

    def measure(self, record: RunRecord, watchdog: Watchdog, scores: Callable[[], Scores]) -> Scores:
        """Measure, and record the scores on rank 0. All ranks must call it.

        Args:
            record: of the run.
            watchdog: of this rank.
            scores: function that measures.
        """
        writer = None
        if self.launch.rank == 0:
            config = json.dumps(self.engine_config.as_written(), indent=2)
            prepare_folder(self.stage_dir, self.recipe, config + "\n", fresh=True)
            writer = RecordWriter(self.stage_dir, record)
            writer.write("running")
            watchdog.on_failure = lambda: writer.close("failed")
        try:
            found = scores()
        except RaisedOnAllRanks:  # any other failure is reported by the watchdog
            if writer:
                writer.close("failed")
            raise
        if writer:
            with MetricsWriter(self.stage_dir) as metrics:
                metrics.write(0, found)
            writer.update(found)
            writer.close("finished")
        return found
