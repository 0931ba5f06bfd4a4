"""A real Slurm on this machine: munged, slurmctld and two slurmd that act as two nodes, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.processes import REPOSITORY, environment, free_port

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

# cred_expire delays a requeued job. SlurmdTimeout: seconds until an unresponsive node is down.
CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
SchedulerParameters=sched_interval=1
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=2000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def find_program(name: str) -> str | None:
    """Return a program's path, searching /usr/sbin and /sbin too."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that are not installed."""
    return [name for name in DAEMONS if find_program(name) is None]


def wait_for(condition: Callable[[], bool], what: str, limit_s: float, pause_s: float = 0.1) -> None:
    """Wait until a condition holds; raise TimeoutError naming it after ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timeout after {limit_s:g} s: {what}")
        time.sleep(pause_s)


class Cluster:
    """Two nodes, n1 and n2, whose names only Slurm resolves.

    Args:
        folder: empty folder for all files of the cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.jobs: list[str] = []
        for part in ("munge", "state", *NODES):
            (folder / part).mkdir()
        (folder / "munge").chmod(0o700)
        self.config = folder / "slurm.conf"
        user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname().split(".")[0]
        self.config.write_text(CONFIG.format(folder=folder, host=host, user=user, ports=ports))

    # ---- daemons

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        wait_for((munge / "socket").exists, "munged listens", 30)
        self._start("slurmctld", "-D", "-f", str(self.config))
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start("slurmd", "-D", "-N", node, "-f", str(self.config), name=node)

    def wait_for_nodes(self) -> None:
        """Wait until both nodes accept jobs."""
        wait_for(lambda: self.query("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES), "idle nodes", 60)

    def stop(self) -> None:
        """End all jobs, then the daemons, each by its id."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            for job in self.jobs:
                self.run("scancel", job)
        for pid in [pid for node in NODES for pid in self.pids_of(node)]:
            _kill(pid)
        for name in reversed(self.daemons):
            daemon = self.daemons[name]
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def fail_node(self, node: str) -> None:
        """Simulate a power failure: kill a node's slurmd and all processes of its jobs."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for pid in self.pids_of(node):
            _kill(pid)

    def restore_node(self, node: str) -> None:
        """Restart a failed node, and the controller, which drops its pending messages.

        Slurm retries for a minute to deliver a signal to a step, here the termination of the step that failed with the
        node. A requeued job has a step of the same number. By default it starts only after two minutes; this cluster
        starts it sooner (cred_expire), so it would receive that signal.
        """
        self.daemons["slurmctld"].terminate()
        self.daemons["slurmctld"].wait(30)
        self._start("slurmctld", "-D", "-f", str(self.config))
        self.start_node(node)

    def pids_of(self, node: str) -> list[int]:
        """Return the ids of the jobs' processes on a node, found by environment, and of their slurmstepd."""
        pids = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._runs_on(entry, node):
                pids.add(int(entry.name))
        return sorted(pids | {parent for pid in pids if (parent := _stepd_above(pid))})

    def _runs_on(self, entry: Path, node: str) -> bool:
        try:
            values = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return {f"SLURM_CONF={self.config}".encode(), f"SLURMD_NODENAME={node}".encode()} <= set(values)

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = find_program(program)
        assert path is not None, f"{program} is not installed"
        log = self.folder / f"{name or program}.out"
        with log.open("ab") as file:
            self.daemons[name or program] = subprocess.Popen([path, *arguments], stdout=file, stderr=file)

    # ---- jobs

    def run(self, *command: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command in the repository, with ``extra`` in its environment."""
        env = environment(SLURM_CONF=str(self.config), **extra)
        words = [str(part) for part in command]
        return subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=180)

    def query(self, *command: str) -> str:
        """Return the output of a Slurm command; raise AssertionError if it fails."""
        result = self.run(*command)
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout

    def submit(self, *arguments: str | Path, **extra: str) -> str:
        """Run ``sbatch ARGUMENTS`` and return the job's id. Its output is written to FOLDER/job-ID.out."""
        result = self.run("sbatch", "--parsable", f"--output={self.folder}/job-%j.out", *arguments, **extra)
        assert result.returncode == 0, result.stderr
        self.jobs.append(result.stdout.strip())
        return self.jobs[-1]

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``: JobState, Restarts, ExitCode, ..."""
        words = self.query("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, job: str) -> str:
        """Return a job's output so far."""
        path = self.folder / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_job(self, job: str, states: Sequence[str], limit_s: float, restarts: int = 0) -> dict[str, str]:
        """Wait until a job is in one of the states after at least ``restarts`` restarts and return its fields.

        Raises AssertionError with its output if it ends in another state or ``limit_s`` seconds pass.
        """
        deadline = time.monotonic() + limit_s
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        while True:
            now = self.job(job)
            if now["JobState"] in states and int(now["Restarts"]) >= restarts:
                return now
            in_time = time.monotonic() < deadline
            assert in_time and now["JobState"] not in ended, f"{now}\n{self.output(job)}"
            time.sleep(0.2)


def _stepd_above(pid: int) -> int | None:
    """Return the slurmstepd that a process descends from."""
    while pid > 1:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            name = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return None
        if name.startswith("slurmstepd"):
            return pid
        pid = int(status.split("PPid:")[1].split()[0])
    return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
