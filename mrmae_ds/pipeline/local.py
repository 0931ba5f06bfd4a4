"""A chain on this machine, without Slurm: the same commands, as many at a time as is asked."""

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

from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.pipeline.status import JobStatus
from mrmae_ds.records.record import RECORD_FILE, RunRecord

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
_POLL_S = 0.2
_GRACE_S = 300  # to save and leave after a signal


@dataclass
class _Job:
    link: PipelineJob
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


class LocalPipeline:
    """Runs links whose needs are met until none is left. A link that fails takes those that need it with it.

    Args:
        links: in the order of their needs. known: the status of each.
        processes: of each link. gpus: on this machine; with none, they run on its processor.
        at_once: links that run at the same time.
        say: told in a line what begins and ends.
    """

    def __init__(
        self,
        links: Sequence[PipelineJob],
        known: Mapping[str, JobStatus],
        *,
        processes: int,
        gpus: int,
        at_once: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self.waiting = [link for link in links if known[link.key].missing]
        self.done = {key for key, status in known.items() if status.state == "finished"}
        self.processes, self.gpus, self.at_once, self.say = processes, gpus, at_once, say
        self.total = len(self.waiting)
        self.failed: dict[str, str] = {}
        self._running: list[_Job] = []

    def run(self) -> dict[str, str]:
        """Run everything; why links did not finish, by key. A signal is passed on: what runs saves and stops."""
        try:
            while self.waiting or self._running:
                self._collect()
                self._start()
                time.sleep(_POLL_S)
        finally:
            self._stop()
        return self.failed

    def _start(self) -> None:
        for link in list(self.waiting):
            if lost := [need for need in link.needs if need in self.failed]:
                self.waiting.remove(link)
                self.failed[link.key] = f"needs {', '.join(lost)}"
            elif len(self._running) < self.at_once and all(need in self.done for need in link.needs):
                self.waiting.remove(link)
                self._running.append(self._begin(link))

    def _begin(self, link: PipelineJob) -> _Job:
        path = log_file(link)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
        number = self.total - len(self.waiting)
        self.say(f"[{number}/{self.total}] {link.key} begins; its output goes to {path}")
        process = subprocess.Popen(
            self.command(link), stdout=log, stderr=subprocess.STDOUT, env=self.environment(), start_new_session=True
        )
        return _Job(link, process, log, time.monotonic())

    def command(self, link: PipelineJob) -> list[str]:
        """The command of the README, for one process or several."""
        train = [str(TRAIN), "--ds_config", str(link.config), *link.arguments]
        if self.processes == 1:
            return [sys.executable, *train]
        launcher = Path(sys.executable).with_name("deepspeed")
        return [str(launcher), "-q", "--num_gpus", str(self.processes), *train]

    def environment(self) -> dict[str, str]:
        """This process's, without what a launcher left in it, and the processor shared among all processes."""
        launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in launchers}
        if not self.gpus:
            cores = len(os.sched_getaffinity(0))
            env |= {"DS_ACCELERATOR": "cpu"}
            env.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.processes * self.at_once))))
        return env

    def _collect(self) -> None:
        for job in [job for job in self._running if job.process.poll() is not None]:
            self._running.remove(job)
            job.log.close()
            # The record decides: a launcher can end well although a process of it was killed.
            minutes = (time.monotonic() - job.began) / 60
            record = RunRecord.load(job.link.folder) if (job.link.folder / RECORD_FILE).exists() else None
            if job.process.returncode == 0 and record is not None and record.status == "finished":
                self.done.add(job.link.key)
                top1 = "" if record.results.top1 is None else f", top-1 {record.results.top1:.2f} %"
                self.say(f"    {job.link.key} finished in {minutes:.1f} min{top1}")
            else:
                how = f"exit status {job.process.returncode}, see {log_file(job.link)}"
                self.failed[job.link.key] = how
                self.say(f"    {job.link.key} did not finish: {how}")

    def _stop(self) -> None:
        for job in self._running:
            self.say(f"    {job.link.key} is asked to save and stop")
            os.killpg(job.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for job in self._running:
            try:
                job.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            job.log.close()
        self._running = []


def log_file(link: PipelineJob) -> Path:
    """Where a link's output goes: beside the runs, because a stage's folder must not be there before it begins."""
    return link.folder.parents[1] / "logs" / f"{link.run}-{link.stage}.log"
