"""`mrmae submit` on a real Slurm: the order of a pipeline's jobs, and recovery from a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.multi_process

PIPELINE = """
name: short
runs:
  - {config: ds_configs/tiny.json, recipe: ds_configs/baselines/mae_tiny.yaml, nodes: 2}
"""


def test_failed_pipeline_is_resubmitted(cluster: Cluster, stub_site: Path, tmp_path: Path) -> None:
    """A failed pre-training removes the fine-tuning from the queue; submitted again, both run in order."""
    pipeline, runs, log, broken = (tmp_path / name for name in ("pipeline.yaml", "runs", "log", "broken"))
    pipeline.write_text(PIPELINE)
    broken.touch()
    stub = f'[ ! -f {broken} ] || exit 1; sleep 1; echo "$SLURM_JOB_NAME $SLURM_PROCID" >> {log}'

    def submit() -> dict[str, str]:
        options = f"--sbatch=--output={tmp_path}/%j.out"
        result = cluster.run("mrmae", "submit", pipeline, "--runs", runs, options, MRMAE_SITE=str(stub_site), STUB=stub)
        assert result.returncode == 0, result.stderr
        jobs = json.loads((runs / "slurm_jobs.json").read_text())
        cluster.jobs += jobs.values()
        return jobs

    first = submit()
    cluster.wait_for_job(first["mae_tiny/pretrain"], ["FAILED"], 120)
    cluster.wait_for_job(first["mae_tiny/finetune"], ["CANCELLED"], 120)
    cluster.wait_for_job(first["tables"], ["COMPLETED"], 120)
    assert (runs / "table6.md").exists()
    assert not log.exists()
    broken.unlink()
    second = submit()
    assert not set(second.values()) & set(first.values())
    for stage in ("pretrain", "finetune"):
        cluster.wait_for_job(second[f"mae_tiny/{stage}"], ["COMPLETED"], 120)
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["mae_tiny-pretrain"] * 2 + ["mae_tiny-finetune"] * 2
