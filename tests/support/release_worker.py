"""Check that a teacher's memory is released: a pre-training that fails and one that finishes, in one process.

``python -m tests.support.release_worker FOLDER KIND`` prints, as JSON, what remains of the teacher after each; KIND is
the placement.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import TrainingError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.training import run as stage
from mrmae_ds.training.callbacks.base import TrainContext
from mrmae_ds.training.job import PreparedStage, TrainArgs, prepare_stage
from mrmae_ds.training.loop import train
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from tests.support.jobs import ALONE
from tests.support.sample_data import write_sample_beton

ENGINE, RECIPE, TEACHER = (Path("ds_configs") / name for name in ("tiny.json", "tiny.yaml", "baselines/mae_tiny.yaml"))


def save_teacher(folder: Path) -> Path:
    """Write a model file of the teacher's recipe with random weights; return its folder."""
    recipe = load_recipe(TEACHER)
    assert recipe.stages.pretrain is not None
    torch.manual_seed(1)
    model, _ = build_pretraining(recipe, recipe.stages.pretrain)
    metadata = {"kind": "pretrain", **encoder_metadata(model.encoder), "mean": recipe.data.mean, "std": recipe.data.std}
    save_weights(folder / "model.safetensors", model.state_dict(), metadata)
    return folder


def run(job: PreparedStage) -> dict[str, Any]:
    """Run a job, which may fail; return its error, and the teacher's storages and hooks that remain after it."""
    (teacher,) = job.task.teachers.values()
    weights = [StorageWeakRef(t.untyped_storage()) for t in (*teacher.parameters(), *teacher.buffers())]
    network = teacher.network
    error = None
    try:
        stage.run_stage(job)
    except TrainingError as raised:
        error = str(raised)
    gc.collect()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
    return {"error": error, "left": sum(not storage.expired() for storage in weights), "hooks": hooks}


def main(folder: Path, kind: str) -> None:
    """Run a job that fails in its second step, then one that completes."""
    images = write_sample_beton(folder, train=64, val=20)
    overrides = [f"data.train={images[0]}", f"data.val={images[1]}", "stages.pretrain.epochs=2"]
    overrides += [f"teachers.mae.source={save_teacher(folder / 'mae')}", f"stages.pretrain.placement={kind}"]

    def prepare() -> PreparedStage:
        return prepare_stage(TrainArgs(ENGINE, "pretrain", RECIPE, folder / "run", "never", tuple(overrides)), ALONE)

    def fail(context: TrainContext) -> None:
        task = context.task
        losses, calls = task.losses, []

        def second(*arguments: Any) -> dict[str, torch.Tensor]:
            result = losses(*arguments)
            calls.append(result)
            if len(calls) == 2:
                raise TrainingError("no more")
            return result

        task.losses = second
        train(context)

    leave, stage.end_process_group = stage.end_process_group, lambda: None  # DeepSpeed starts once a process
    stage.train = fail
    failed = run(prepare())
    stage.train, stage.end_process_group = train, leave
    ended = run(prepare())
    record = json.loads((folder / "run/pretrain/record.json").read_text())
    print(json.dumps({"failed": failed, "ended": ended, "status": record["status"], "teachers": record["teachers"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
