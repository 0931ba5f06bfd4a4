"""Metrics to an MLflow server or folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import MlflowConfig
from mrmae_ds.config.stages import StageName
from mrmae_ds.training.callbacks.base import Callback, TrainContext

logger = logging.getLogger(__name__)

ID_FILE = "mlflow_id.txt"
# MLflow's own values wait minutes for a server that is gone, and the other ranks with it. Set variables are kept.
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class MlflowCallback(Callback):
    """Sends logged intervals to an MLflow run; used on rank 0 alone. A resumed stage continues its MLflow run.

    Args:
        config: the recipe's ``mlflow`` section.
        recipe: resolved recipe, stored as the run's artifact ``recipe.json``.
        stage_name: stage that is trained.
        stage_dir: output folder, which keeps the run's ID.
    """

    def __init__(self, config: MlflowConfig, recipe: Recipe, stage_name: StageName, stage_dir: Path) -> None:
        self.config, self.recipe, self.stage_name, self.id_file = config, recipe, stage_name, stage_dir / ID_FILE
        self._client: Any = None
        self._run_id = ""
        self._status = "KILLED"

    def on_train_start(self, context: TrainContext) -> None:
        """Start or continue the MLflow run."""
        from mlflow import MlflowClient  # optional dependency

        uri = self.config.tracking_uri
        folder = {"MLFLOW_ALLOW_FILE_STORE": "true"} if uri and uri.startswith("file:") else {}
        for name, value in {**LIMITS, **folder}.items():
            os.environ.setdefault(name, value)
        client = MlflowClient(uri)
        self._run_id = self.id_file.read_text(encoding="utf-8") if self.id_file.exists() else ""
        if self._run_id and _is_deleted(client, self._run_id):
            logger.warning(f"mlflow: run {self._run_id} was deleted; a new one gets the values from here")
            self._run_id = ""
        if self._run_id:
            client.update_run(self._run_id, status="RUNNING")
        else:
            experiment = client.get_experiment_by_name(self.config.experiment)
            number = experiment.experiment_id if experiment else client.create_experiment(self.config.experiment)
            tags = {**self.config.tags, "stage": self.stage_name}
            run = client.create_run(number, run_name=f"{self.recipe.name} {self.stage_name}", tags=tags)
            self._run_id = run.info.run_id
            client.log_dict(self._run_id, self.recipe.model_dump(mode="json"), "recipe.json")
            self.id_file.write_text(self._run_id, encoding="utf-8")
        self._client = client

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        """Send the values."""
        self._send(context.state.step, values)

    def on_train_end(self, context: TrainContext) -> None:
        """Send the results."""
        self._send(context.state.step, context.results)
        self._status = "FINISHED"

    def close(self) -> None:
        """End the MLflow run: finished, or killed if training did not reach its end."""
        client, self._client = self._client, None
        if client is not None:
            client.set_terminated(self._run_id, self._status)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # A folder of MLflow cannot hold both loss and loss/pixels.
        metrics = [Metric(name.replace("/", "."), float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)


def _is_deleted(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "deleted"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # as without a server
            raise
        return True
