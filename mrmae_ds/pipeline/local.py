"""Run a pipeline on this machine, without Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mrmae_ds.files import make_folder
from mrmae_ds.pipeline.graph import REPOSITORY, PipelineJob
from mrmae_ds.pipeline.status import JobStatus
from mrmae_ds.records.record import RECORD_FILE, RunRecord

TRAIN = REPOSITORY / "train.py"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_S = 0.2
_GRACE_S = 300  # to save a checkpoint and exit after SIGTERM


@dataclass
class _RunningJob:
    job: PipelineJob
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


class LocalPipeline:
    """Run jobs whose dependencies have finished until none is left. If a job fails, its dependents fail too.

    Args:
        jobs: in topological order.
        statuses: status of each job, by key.
        processes: number of ranks of each job.
        gpus: number of GPUs of this machine; without any, jobs run on the CPU.
        parallel_jobs: number of jobs that run at the same time.
        log: callback that receives one line when a job starts or ends.
    """

    def __init__(
        self,
        jobs: Sequence[PipelineJob],
        statuses: Mapping[str, JobStatus],
        *,
        processes: int,
        gpus: int,
        parallel_jobs: int = 1,
        log: Callable[[str], None] = print,
    ) -> None:
        self.waiting = [job for job in jobs if statuses[job.key].missing]
        self.finished = {key for key, status in statuses.items() if status.state == "finished"}
        self.processes, self.gpus, self.parallel_jobs, self.log = processes, gpus, parallel_jobs, log
        self.total = len(self.waiting)
        self.failed: dict[str, str] = {}
        self._running: list[_RunningJob] = []

    def run(self) -> dict[str, str]:
        """Run all jobs. On KeyboardInterrupt, running jobs receive SIGTERM, so that they save a checkpoint and exit.

        Returns:
            The reason for each job that did not finish, by key.
        """
        try:
            while self.waiting or self._running:
                self._collect()
                self._start()
                time.sleep(_POLL_S)
        finally:
            self._stop()
        return self.failed

    def _start(self) -> None:
        for job in list(self.waiting):
            if failed := [key for key in job.dependencies if key in self.failed]:
                self.waiting.remove(job)
                self.failed[job.key] = f"depends on {', '.join(failed)}"
            elif len(self._running) < self.parallel_jobs and all(key in self.finished for key in job.dependencies):
                self.waiting.remove(job)
                self._running.append(self._launch(job))

    def _launch(self, job: PipelineJob) -> _RunningJob:
        path = log_file(job)
        make_folder(path.parent)
        log = path.open("ab")
        number = self.total - len(self.waiting)
        self.log(f"[{number}/{self.total}] {job.key} started; output: {path}")
        process = subprocess.Popen(
            self.command(job), stdout=log, stderr=subprocess.STDOUT, env=self.environment(), start_new_session=True
        )
        return _RunningJob(job, process, log, time.monotonic())

    def command(self, job: PipelineJob) -> list[str]:
        """Return the command of a job, with DeepSpeed's launcher if it has several ranks."""
        train = [str(TRAIN), "--ds_config", str(job.config), *job.arguments]
        if self.processes == 1:
            return [sys.executable, *train]
        launcher = Path(sys.executable).with_name("deepspeed")
        return [str(launcher), "-q", "--num_gpus", str(self.processes), *train]

    def environment(self) -> dict[str, str]:
        """Return this process's environment without a launcher's variables; on the CPU, cores are divided by rank."""
        env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        if not self.gpus:
            cores = len(os.sched_getaffinity(0))
            env["DS_ACCELERATOR"] = "cpu"
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.processes * self.parallel_jobs))))
        return env

    def _collect(self) -> None:
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            running.log.close()
            job, status = running.job, running.process.returncode
            # The record decides: a launcher may exit with 0 although one of its processes was killed.
            record = RunRecord.load(job.stage_dir) if (job.stage_dir / RECORD_FILE).exists() else None
            if status == 0 and record is not None and record.status == "finished":
                self.finished.add(job.key)
                minutes = (time.monotonic() - running.started) / 60
                top1 = "" if record.results.top1 is None else f", top-1 {record.results.top1:.2f} %"
                self.log(f"    {job.key} finished in {minutes:.1f} min{top1}")
            else:
                self.failed[job.key] = f"exit status {status}, see {log_file(job)}"
                self.log(f"    {job.key} did not finish: {self.failed[job.key]}")

    def _stop(self) -> None:
        for running in self._running:
            self.log(f"    stopping {running.job.key} after a checkpoint")
            os.killpg(running.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for running in self._running:
            try:
                running.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()
            running.log.close()
        self._running = []


def log_file(job: PipelineJob) -> Path:
    """Return a job's log file: beside the runs, because a stage's folder must not exist before the stage starts."""
    return job.stage_dir.parents[1] / "logs" / f"{job.run}-{job.stage}.log"
