"""Real training on two nodes of a real Slurm, interrupted by the time limit, a node failure or an exception."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mrmae_ds.records.metrics import read_metrics
from mrmae_ds.records.record import RunRecord
from tests.support.processes import finish, kill, rank_processes
from tests.support.sample_data import write_sample_beton
from tests.support.slurm_cluster import Cluster, wait_for

pytestmark = [pytest.mark.timeout(900), pytest.mark.multi_process]
CONFIG = "ds_configs/tiny.json"
STEPS = 40
# Logged values that are computed, not timed.
COMPUTED = ("step", "epoch", "lr", "loss", "loss/pixels", "grad_norm")


@dataclass(frozen=True)
class Data:
    """A small data set, and the folder of its runs."""

    folder: Path

    def arguments(self, run: str) -> tuple[str, ...]:
        """Return train.py's arguments after the engine config: MAE, four epochs of ten steps, logged every step."""
        return (
            *("--recipe", "ds_configs/baselines/mae_tiny.yaml", "--run", str(self.folder / run)),
            *(f"data.train={self.folder / 'train.beton'}", f"data.val={self.folder / 'val.beton'}"),
            *("stages.pretrain.epochs=4", "logging.every_steps=1", "logging.num_images=0"),
        )

    def steps(self, run: str) -> int:
        """Return the number of logged steps."""
        folder = self.folder / run / "pretrain"
        lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        return int(lines[-1]["step"]) if lines else 0

    def curve(self, run: str) -> list[dict[str, float]]:
        """Return a run's computed values, by step."""
        return [{name: line[name] for name in COMPUTED} for line in read_metrics(self.folder / run / "pretrain")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("training")
    write_sample_beton(folder, train=320, val=40)
    return Data(folder)


def _wait_for_step(data: Data, run: str, step: int, cluster: Cluster, job: str) -> None:
    """Wait until a run has logged this step; raise AssertionError with the job's output on a timeout."""
    try:
        wait_for(lambda: data.steps(run) >= step, f"step {step}", 200)
    except TimeoutError as error:
        raise AssertionError(f"{cluster.job(job)}\n{cluster.output(job)}") from error


@pytest.mark.slow
def test_resumes_exactly_after_time_limit_and_node_failure(cluster: Cluster, training_site: Path, data: Data) -> None:
    """ZeRO-3 on two nodes: signaled near the time limit, saved, requeued; a node fails, requeued; finished.

    Losses and weights are equal to those of an uninterrupted run without Slurm.
    """
    pace = data.folder / "pace"
    pace.write_text("2")
    job = cluster.submit(
        *("--nodes=2", "--time=30", "slurm/train.sbatch", CONFIG, *data.arguments("disturbed")),
        **{"MRMAE_SITE": str(training_site), "PACE": str(pace)},
    )
    _wait_for_step(data, "disturbed", 2, cluster, job)
    cluster.query("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # the signal comes five minutes before
    plain = rank_processes(2, "--ds_config", CONFIG, *data.arguments("plain"))  # runs until Slurm checks the time limit
    try:
        cluster.wait_for_job(job, ["PENDING"], 120, restarts=1)
        cluster.query("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        signaled = data.steps("disturbed")
        assert "SIGUSR1" in cluster.output(job) and "stopped after a checkpoint; requeued" in cluster.output(job)
        pace.write_text("0.3")
        _wait_for_step(data, "disturbed", signaled + 4, cluster, job)
        cluster.fail_node("n2")
        lost = data.steps("disturbed")
        assert [result.status for result in finish(plain, 240)] == [0, 0]
    finally:
        for process in plain:
            kill(process)
    cluster.wait_for_job(job, ["PENDING"], 120, restarts=2)
    cluster.restore_node("n2")
    pace.write_text("0")
    cluster.wait_for_job(job, ["COMPLETED"], 240, restarts=2)
    assert 2 <= signaled < lost < STEPS
    assert data.curve("disturbed") == data.curve("plain")
    assert [line["step"] for line in data.curve("disturbed")] == list(range(1, STEPS + 1))
    actual, expected = (load_file(data.folder / run / "pretrain/model.safetensors") for run in ("disturbed", "plain"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    record = RunRecord.load(data.folder / "disturbed" / "pretrain")
    assert (record.status, record.slurm_job, record.hardware.world_size) == ("finished", job, 2)
    output = cluster.output(job)
    assert [f"start {number} of job {job}" in output for number in (1, 2, 3, 4)] == [True, True, True, False], output


def test_exception_on_a_rank_fails_the_job(cluster: Cluster, training_site: Path, data: Data) -> None:
    """Rank 1 on the other node raises in its third step; rank 0 waits for it in a collective."""
    job = cluster.submit(
        *("--nodes=2", "slurm/train.sbatch", CONFIG, *data.arguments("raised")),
        **{"MRMAE_SITE": str(training_site), "RAISE": "1 2"},
    )
    ended = cluster.wait_for_job(job, ["FAILED"], 240)
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "0")
    assert "ArithmeticError: a disturbance" in cluster.output(job)
    assert data.steps("raised") == 2
    # slurmstepd may outlive the job's change of state for a moment.
    wait_for(lambda: not cluster.pids_of("n1") + cluster.pids_of("n2"), "all processes have ended", 60)
