"""Metrics to Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import WandbConfig
from mrmae_ds.config.stages import StageName
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.callbacks.nonfatal import run_within

ID_FILE = "wandb_id.txt"
# W&B waits for its server without end, but the rest of the stage, or a requeued job's last minutes, must not.
FINISH_LIMIT_S = 60


class WandbCallback(Callback):
    """Sends logged intervals to a W&B run; used on rank 0 alone. A resumed stage continues its W&B run.

    Args:
        config: the recipe's ``wandb`` section.
        recipe: resolved recipe, stored as the run's config.
        stage_name: stage that is trained.
        stage_dir: output folder, which also gets W&B's files.
    """

    def __init__(self, config: WandbConfig, recipe: Recipe, stage_name: StageName, stage_dir: Path) -> None:
        self.config, self.recipe, self.stage_name, self.stage_dir = config, recipe, stage_name, stage_dir
        self._run: Any = None

    def on_train_start(self, context: TrainContext) -> None:
        """Start or continue the W&B run."""
        import wandb  # optional dependency

        id_file = self.stage_dir / ID_FILE
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            group=self.config.group,
            tags=list(self.config.tags),
            mode=self.config.mode,
            name=f"{self.recipe.name} {self.stage_name}",
            job_type=self.stage_name,
            config=self.recipe.model_dump(mode="json"),
            dir=str(self.stage_dir),
            id=id_file.read_text(encoding="utf-8") if id_file.exists() else None,
            resume="allow",
        )
        if self.config.mode != "disabled":
            id_file.write_text(self._run.id, encoding="utf-8")

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        """Send the values."""
        self._run.log(values, step=context.state.step)

    def on_train_end(self, context: TrainContext) -> None:
        """Send the results as the summary."""
        self._run.summary.update(context.results)

    def close(self) -> None:
        """Finish the W&B run.

        Raises:
            TimeoutError: if W&B has not sent everything within a minute.
        """
        run, self._run = self._run, None
        if run is not None:
            late = f"not everything was sent within {FINISH_LIMIT_S} s; wandb sync sends the rest"
            run_within(FINISH_LIMIT_S, run.finish, late)
