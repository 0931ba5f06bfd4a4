"""`mrmae submit` on a real Slurm: the order of a chain's jobs, and what a failure does to it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.slurm_cluster import Cluster

CHAIN = """
name: short
runs:
  - {config: ds_configs/tiny.json, recipe: ds_configs/baselines/mae_tiny.yaml, nodes: 2}
"""


def test_a_chain_of_jobs(cluster: Cluster, stub_site: Path, tmp_path: Path) -> None:
    """A pre-training that fails takes the fine-tuning out of the queue; submitted again, both run, in their order."""
    chain, runs, log, broken = (tmp_path / name for name in ("chain.yaml", "runs", "log", "broken"))
    chain.write_text(CHAIN)
    broken.touch()
    stub = f'[ ! -f {broken} ] || exit 1; sleep 1; echo "$SLURM_JOB_NAME $SLURM_PROCID" >> {log}'

    def submit() -> dict[str, str]:
        options = f"--sbatch=--output={tmp_path}/%j.out"
        done = cluster.run("mrmae", "submit", chain, "--runs", runs, options, MRMAE_SITE=str(stub_site), STUB=stub)
        assert done.returncode == 0, done.stderr
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
    for link in ("pretrain", "finetune"):
        cluster.wait_for_job(second[f"mae_tiny/{link}"], ["COMPLETED"], 120)
    told = log.read_text().split("\n")
    assert [line.split()[0] for line in told if line] == ["mae_tiny-pretrain"] * 2 + ["mae_tiny-finetune"] * 2
