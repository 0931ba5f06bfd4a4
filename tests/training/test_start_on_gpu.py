"""Start of a run on the GPU stand-in: the device of a rank, and torch's kernels there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mrmae_ds.records.record import RunRecord
from tests.support.fake_gpu import preload
from tests.support.processes import environment, run
from tests.support.small_runs import ENGINE, SmallRuns

MISSING = preload.missing_requirement()
pytestmark = [
    pytest.mark.multi_process,
    pytest.mark.timeout(300),
    pytest.mark.skipif(MISSING is not None, reason=f"GPU stand-in: {MISSING}"),
]


def test_a_task_that_sees_one_gpu_trains_with_deterministic_kernels(tmp_path: Path) -> None:
    one_step = ("stages.pretrain.epochs=1", "stages.pretrain.batch_size=64", "checkpoint.every_steps=null")
    runs = SmallRuns(tmp_path, one_step)
    engine = ENGINE | {"train_micro_batch_size_per_gpu": 32, "deterministic": True}
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    fourth_task = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "LOCAL_SIZE": "4", "CUDA_HOME": "/nonexistent"}
    command = [sys.executable, "-m", "tests.support.fake_gpu", "train.py", *runs.arguments("run")]
    done = run(command, 240, environment(**preload.variables(devices=1) | fourth_task))
    assert done.status == 0, done.stdout + done.stderr
    assert "on 1 x cuda" in done.stdout and "compatibility check failed" not in done.stdout + done.stderr
    kernels = RunRecord.load(runs.stage("run")).kernels
    assert kernels is not None and kernels.attention == ("flash", "efficient", "math")
    assert kernels.deterministic and not kernels.cudnn_benchmark
