"""Real trainings on two nodes of a real Slurm: interrupted by the time limit, by a lost node, by an exception."""

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

pytestmark = pytest.mark.timeout(900)
CONFIG = "ds_configs/tiny.json"
STEPS = 40
# Of a logged line, what a training computes and not how fast.
COMPUTED = ("step", "epoch", "lr", "loss", "loss/pixels", "grad_norm")


@dataclass(frozen=True)
class Data:
    """A small data set, in a folder for runs too."""

    folder: Path

    def arguments(self, run: str) -> tuple[str, ...]:
        """train.py's arguments after the engine config: MAE, four epochs of ten steps, a line each step."""
        return (
            *("--recipe", "ds_configs/baselines/mae_tiny.yaml", "--run", str(self.folder / run)),
            *(f"data.train={self.folder / 'train.beton'}", f"data.val={self.folder / 'val.beton'}"),
            *("stages.pretrain.epochs=4", "logging.every_steps=1", "logging.num_images=0"),
        )

    def steps(self, run: str) -> int:
        """Steps that a run has logged."""
        folder = self.folder / run / "pretrain"
        lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        return int(lines[-1]["step"]) if lines else 0

    def curve(self, run: str) -> list[dict[str, float]]:
        """What a run has computed, step by step."""
        return [{name: line[name] for name in COMPUTED} for line in read_metrics(self.folder / run / "pretrain")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("training")
    write_sample_beton(folder, train=320, val=40)
    return Data(folder)


def _get_to(data: Data, run: str, step: int, cluster: Cluster, job: str) -> None:
    """Until a run has done so many steps; with the job's output if it does not."""
    try:
        wait_for(lambda: data.steps(run) >= step, f"step {step}", 200)
    except TimeoutError as error:
        raise AssertionError(f"{cluster.job(job)}\n{cluster.output(job)}") from error


def test_the_time_limit_and_a_lost_node_leave_no_trace(cluster: Cluster, training_site: Path, data: Data) -> None:
    """ZeRO-3 on two nodes: signaled by Slurm near its limit, saved, queued again; a node lost, queued again; finished.

    Its losses and weights are those of a run that nothing disturbed, which Slurm had no part in.
    """
    pace = data.folder / "pace"
    pace.write_text("2")
    job = cluster.submit(
        *("--nodes=2", "--time=30", "slurm/train.sbatch", CONFIG, *data.arguments("disturbed")),
        **{"MRMAE_SITE": str(training_site), "PACE": str(pace)},
    )
    _get_to(data, "disturbed", 2, cluster, job)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # the signal comes five minutes before
    plain = rank_processes(2, "--ds_config", CONFIG, *data.arguments("plain"))  # in the time that Slurm takes to look
    try:
        cluster.wait_for_job(job, ["PENDING"], 120, restarts=1)
        cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        signaled = data.steps("disturbed")
        assert "SIGUSR1" in cluster.output(job) and "stopped and saved; queued again" in cluster.output(job)
        pace.write_text("0.3")
        _get_to(data, "disturbed", signaled + 4, cluster, job)
        cluster.lose("n2")
        lost = data.steps("disturbed")
        assert [result.status for result in finish(plain, 240)] == [0, 0]
    finally:
        for process in plain:
            kill(process)
    cluster.wait_for_job(job, ["PENDING"], 120, restarts=2)
    cluster.give_back("n2")
    pace.write_text("0")
    cluster.wait_for_job(job, ["COMPLETED"], 240, restarts=2)
    assert 2 <= signaled < lost < STEPS
    assert data.curve("disturbed") == data.curve("plain")
    assert [line["step"] for line in data.curve("disturbed")] == list(range(1, STEPS + 1))
    ours, theirs = (load_file(data.folder / run / "pretrain/model.safetensors") for run in ("disturbed", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    record = RunRecord.load(data.folder / "disturbed" / "pretrain")
    assert (record.status, record.slurm_job, record.hardware.world_size) == ("finished", job, 2)
    output = cluster.output(job)
    assert [f"start {number} of job {job}" in output for number in (1, 2, 3, 4)] == [True, True, True, False], output


def test_a_rank_that_raises_fails_the_job(cluster: Cluster, training_site: Path, data: Data) -> None:
    """Rank 1, on the other node, in its third step; rank 0 waits for it in a collective."""
    job = cluster.submit(
        *("--nodes=2", "slurm/train.sbatch", CONFIG, *data.arguments("raised")),
        **{"MRMAE_SITE": str(training_site), "RAISE": "1 2"},
    )
    ended = cluster.wait_for_job(job, ["FAILED"], 240)
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "0")
    assert "ArithmeticError: a disturbance" in cluster.output(job)
    assert data.steps("raised") == 2
    assert not cluster.pids_of("n1") and not cluster.pids_of("n2")
