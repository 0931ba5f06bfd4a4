"""Runs of a few seconds: MAE on small images, two ranks, ZeRO-3, float32, two micro-batches per step.

Twenty-four steps in three epochs, a checkpoint every second step. Two runs are compared bit by bit.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.ranks import Ranks, start
from tests.support.sample_data import write_sample_beton

# Values of a line that depend on the machine's speed, or on when the process started.
SPEEDS = {"images_per_s", "data_wait", "peak_memory_gib", "gather_gib", "tflops", "mfu"}
ENGINE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,
        "leaf_module": {"classes": ["Block"]},
    },
}
RECIPE = "ds_configs/baselines/mae_tiny.yaml"
STEPS, STEPS_PER_EPOCH = 24, 8
SETTINGS = (
    "data.backend=pillow",
    "loader.num_workers=1",
    "model.overrides={depth: 2}",
    "model.decoder.depth=1",
    "stages.pretrain.batch_size=8",
    "stages.pretrain.epochs=3",
    "stages.pretrain.optimizer.warmup_epochs=0.5",
    "logging.every_steps=3",
    "checkpoint.every_epochs=null",
    "checkpoint.every_steps=2",
    "logging.num_images=0",
)


class SmallRuns:
    """Folder with data and runs, ``FOLDER/NAME/pretrain``; ``more`` are recipe values for all runs."""

    def __init__(self, folder: Path, more: tuple[str, ...] = ()) -> None:
        self.folder, self.more = folder, more
        folder.mkdir(parents=True, exist_ok=True)
        write_sample_beton(folder, train=8 * STEPS_PER_EPOCH, val=24)
        (folder / "engine.json").write_text(json.dumps(ENGINE))

    def arguments(self, name: str | Path, *more: str) -> list[str | Path]:
        """Return the command line of train.py for a run in ``FOLDER/NAME``, or in another folder."""
        data = (f"data.train={self.folder / 'train.beton'}", f"data.val={self.folder / 'val.beton'}")
        command = ["--ds_config", self.folder / "engine.json", "--recipe", RECIPE, "--run", self.folder / name]
        return [*command, *data, *SETTINGS, *self.more, *more]

    def launch(self, name: str | Path, *more: str, world_size: int = 2, fault: str = "") -> Ranks:
        """Start or resume a run, by the same command."""
        logs = self.folder / "logs" / Path(name).name
        return start(world_size, self.arguments(name, *more), logs, fault)

    def stage(self, name: str | Path, stage: str = "pretrain") -> Path:
        """Return a run's folder of a stage."""
        return self.folder / name / stage


def curve(stage: Path) -> list[dict[str, float]]:
    """Return the logged lines without speeds; read without the package's own reader."""
    lines = [json.loads(text) for text in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """Assert that two stages computed the same, bit by bit: every line, every weight, every result."""
    assert curve(ours) == curve(theirs)
    mine, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert mine.keys() == other.keys()
    different = [name for name in other if not torch.equal(mine[name], other[name])]
    assert not different, different
    records = [json.loads((stage / "record.json").read_text()) for stage in (ours, theirs)]
    results = [{k: v for k, v in record["results"].items() if k not in SPEEDS} for record in records]
    assert results[0] == results[1] and {record["status"] for record in records} == {"finished"}


def leftovers(stage: Path) -> list[str]:
    """Return hidden files and folders of a stage and of its checkpoints."""
    return sorted(path.name for path in [*stage.iterdir(), *(stage / "checkpoints").iterdir()] if path.name[0] == ".")
