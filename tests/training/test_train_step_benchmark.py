"""benchmarks/train_step.py: the whole command at tiny size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, run

pytestmark = [pytest.mark.slow, pytest.mark.multi_process, pytest.mark.timeout(180)]


def test_finetuning_is_measured_without_the_run_that_teaches_the_pretraining(tmp_path: Path) -> None:
    """The teacher of ds_configs/tiny.yaml is a run of the working directory."""
    command = [sys.executable, str(REPOSITORY / "benchmarks/train_step.py"), "tiny", "--stage", "finetune"]
    options = ["--micro-batch", "2", "--processes", "1", "--steps", "1"]
    result = run([*command, *options], 150, cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert '"step_s"' in result.stderr and "| tiny | 2 |" in result.stdout
