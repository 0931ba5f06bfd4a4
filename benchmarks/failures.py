"""Time until a job of two ranks ends after one of them fails, with the watchdog, without it, and without parts of it.

    python benchmarks/failures.py [--timeout 20] [--limit 90] [--out FILE.json]

Two CPU ranks all-reduce in a loop (gloo), stop signals handled as in a training run. Rank 1 fails as the table says;
"rank 0 busy" means that rank 0 is outside of collective operations (it evaluates, saves or draws). Each case runs under
no launcher, under torchrun and under DeepSpeed's launcher. A cell gives the seconds from the failure to the end of the
last process, and whether rank 0 closed its record (run status "failed" instead of "running"); ">" means that the job
was still running after the limit.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

FAILURES = {
    "exception": "exception on rank 1",
    "exception, rank 0 busy": "exception on rank 1, rank 0 busy",
    "exit": "rank 1 killed",
    "exit, rank 0 busy": "rank 1 killed, rank 0 busy",
    "hang": "rank 1 hangs",
    "freeze": "rank 1 hangs and holds the interpreter",
}
LAUNCHERS = ("none", "torchrun", "deepspeed")
# What is taken out of the watchdog; "all" runs without it. Without local ranks is also how two nodes see each other.
PARTS = ("nothing", "all", "store", "local ranks", "store and local ranks", "last resort")


def work(failure: str, without: str, timeout_s: float, folder: Path) -> None:
    """Run one rank.

    Args:
        failure: of FAILURES.
        without: of PARTS.
        timeout_s: of the watchdog.
        folder: for the files ``pid0``, ``pid1``, ``failed`` and ``record``.
    """
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    (folder / f"pid{launch.rank}").write_text(str(os.getpid()))
    import torch
    import torch.distributed as dist

    from mrmae_ds.distributed.failure_store import FailureStore
    from mrmae_ds.distributed.local_ranks import LocalRanks
    from mrmae_ds.distributed.signals import StopSignals
    from mrmae_ds.distributed.watchdog import Watchdog

    if "store" in without:
        FailureStore.read = lambda self: None  # type: ignore[method-assign]
        FailureStore.report = lambda self, failure: True  # type: ignore[method-assign]
    if "local ranks" in without:
        LocalRanks.dead = lambda self: None  # type: ignore[method-assign]
    if without == "last resort":
        LocalRanks.postpone_last_resort = lambda self, now: None  # type: ignore[method-assign]
    dist.init_process_group("gloo", rank=launch.rank, world_size=launch.world_size)
    watchdog = Watchdog(launch, timeout_s) if without != "all" else None
    if watchdog is not None and launch.rank == 0:
        watchdog.on_failure = lambda: (folder / "record").touch()
    values = torch.ones(1000)
    with watchdog or nullcontext(), StopSignals():
        for step in range(10**9):
            if watchdog is not None:
                watchdog.heartbeat(f"step {step}")
            if step == 20:
                dist.barrier()
                if launch.rank == 1:
                    time.sleep(1)
                    (folder / "failed").touch()
                    fail(failure)
                elif "busy" in failure:
                    time.sleep(3600)
            dist.all_reduce(values)
            time.sleep(0.02)


def fail(failure: str) -> None:
    """Fail as named."""
    if failure.startswith("exception"):
        raise ValueError("the failure of this benchmark")
    if failure.startswith("exit"):
        os.kill(os.getpid(), signal.SIGKILL)
    if failure == "freeze":
        libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        for _ in range(2):  # a deadlock in a call that keeps the interpreter's lock, and that no signal interrupts
            libc.pthread_mutex_lock(mutex)
    time.sleep(3600)


def command(launcher: str, arguments: list[str], port: int) -> list[list[str]]:
    """Return the commands that start both ranks."""
    script = [str(Path(__file__).resolve()), *arguments]
    if launcher == "torchrun":
        return [[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *script]]
    if launcher == "deepspeed":
        return [["deepspeed", "--num_gpus", "2", "--master_port", str(port), *script]]
    return [[sys.executable, *script]] * 2


def measure(launcher: str, failure: str, without: str, timeout_s: float, limit_s: float, port: int) -> dict[str, Any]:
    """Run a case; return seconds (None beyond the limit), and whether the record was closed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["--case", failure, "--without", without, "--timeout", str(timeout_s), "--folder", name]
        processes = []
        for rank, line in enumerate(command(launcher, arguments, port)):
            env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            if launcher == "none":
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            output = (folder / f"output{rank}").open("w")
            processes.append(subprocess.Popen(line, env=env, stdout=output, stderr=output, start_new_session=True))
        pids = [folder / "pid0", folder / "pid1"]
        try:
            _wait(lambda: (folder / "failed").exists(), 300)
            failed = (folder / "failed").stat().st_mtime
            ended = _wait(lambda: all(p.poll() is not None for p in processes) and not any(map(_runs, pids)), limit_s)
            seconds = time.time() - failed if ended else None
            return {"seconds": seconds, "record": (folder / "record").exists()}
        finally:
            for path in pids:
                if _runs(path):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(path: Path) -> bool:
    """Return True if the process whose id a file holds is alive."""
    try:
        state = Path(f"/proc/{path.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=20, help="of the watchdog, in seconds; training: 1200")
    parser.add_argument("--limit", type=float, default=90, help="seconds after which a job counts as never ending")
    parser.add_argument("--at-once", type=int, default=4, help="cases that run at the same time")
    parser.add_argument("--out", type=Path, help="JSON file")
    for name in ("--case", "--without", "--folder", "--local_rank"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        work(args.case, args.without, args.timeout, Path(args.folder))
    from tests.support.processes import free_port

    cases = [(launcher, failure, without) for failure in FAILURES for launcher in LAUNCHERS for without in PARTS[:2]]
    cases += [("none", failure, without) for failure in FAILURES for without in PARTS[2:]]
    with ThreadPoolExecutor(args.at_once) as pool:
        jobs = {case: pool.submit(measure, *case, args.timeout, args.limit, free_port()) for case in cases}
    results = {case: job.result() for case, job in jobs.items()}
    columns = [(launcher, without) for launcher in LAUNCHERS for without in PARTS[:2]]
    columns += [("none", without) for without in PARTS[2:]]
    print("| failure | " + " | ".join(f"{launcher}, without {without}" for launcher, without in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for failure, words in FAILURES.items():
        cells = []
        for launcher, without in columns:
            result = results[launcher, failure, without]
            seconds = f"> {args.limit:.0f}" if result["seconds"] is None else f"{result['seconds']:.1f}"
            cells.append(seconds + (", closed" if result["record"] else ""))
        print(f"| {words} | {' | '.join(cells)} |")
    if args.out:
        from result_file import write_result

        rows = [
            {"launcher": launcher, "failure": failure, "without": without, **result}
            for (launcher, failure, without), result in results.items()
        ]
        write_result(args.out, 2, "cpu", timeout_s=args.timeout, limit_s=args.limit, cases=rows)


if __name__ == "__main__":
    main()
