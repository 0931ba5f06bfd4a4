"""Chaos test: kill a training run repeatedly, and check that it computes the same as an undisturbed one.

    python -m tests.support.chaos --kills 100 --out /somewhere

A run of two ranks under ZeRO-3 (MAE on small images, float32, two micro-batches per step, a checkpoint every second
step) is killed by SIGKILL at random moments, most of them while a checkpoint is being written. The same command
restarts it until it finishes; then another run follows, until there were enough kills. After each kill the newest
checkpoint must be complete and no older than before. At the end of each run the logged lines and the final weights must
equal those of an undisturbed run, bit by bit.

Most kills hit both ranks at once. Some hit one rank: then the other must exit soon by itself, with a nonzero status.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tests.support.ranks import Ranks
from tests.support.small_runs import STEPS, SmallRuns, assert_same, leftovers

WORLD_SIZE = 2
ALONE_EVERY = 8  # one kill in this many hits a single rank
ALONE_LIMIT_S = 30.0  # within which the other rank must have exited


class Chaos:
    """Folder with data, the undisturbed run, and the killed runs.

    Args:
        folder: for everything.
        seed: of the random moments.
        more: further recipe values (``checkpoint.async_save=true``).
    """

    def __init__(self, folder: Path, seed: int = 0, more: tuple[str, ...] = ()) -> None:
        self.runs = SmallRuns(folder, more)
        self.random = random.Random(seed)
        self.moments: Counter[str] = Counter()
        self.undisturbed = self.runs.stage("undisturbed")

    def log(self, text: str) -> None:
        """Print a line, flushed."""
        print(text, flush=True)

    def reference(self) -> None:
        """Run without kills, for comparison."""
        began = time.monotonic()
        statuses = self.runs.launch("undisturbed").wait(300)
        assert statuses == [0] * WORLD_SIZE, statuses
        self.log(f"undisturbed run: {STEPS} steps, {time.monotonic() - began:.1f} s")

    def rounds(self, kills: int) -> None:
        """Kill this many times, over several runs; each run finishes and is compared with the undisturbed one."""
        done, number = 0, 0
        while done < kills:
            number += 1
            name = f"killed{number}"
            shutil.rmtree(self.runs.folder / name, ignore_errors=True)
            here = 0
            while True:
                ranks = self.runs.launch(name)
                if done == kills or not self.kill(ranks, self.runs.stage(name), done + 1):
                    statuses = ranks.wait(300)
                    assert statuses == [0] * WORLD_SIZE, f"{statuses}\n{ranks.text()}"
                    break
                done, here = done + 1, here + 1
            assert_same(self.runs.stage(name), self.undisturbed)
            assert not leftovers(self.runs.stage(name)), leftovers(self.runs.stage(name))
            self.log(f"run {number}: killed {here} times; its {STEPS} steps and its weights are the undisturbed run's")
            shutil.rmtree(self.runs.folder / name)

    def kill(self, ranks: Ranks, stage: Path, number: int) -> bool:
        """Kill a run at a random moment; return False if it finished before."""
        before = newest_complete_step(stage)
        in_a_save = self.random.random() < 0.7
        if in_a_save:
            saves, deadline = self.random.randint(1, 4), time.monotonic() + 120
            staging: set[str] = set()
            while ranks.alive() and len(staging) < saves:
                assert time.monotonic() < deadline, ranks.text()
                with contextlib.suppress(FileNotFoundError):  # a fresh start sets the folder aside
                    staging |= {path.name for path in (stage / "checkpoints").glob(".saving-*")}
                time.sleep(0.001)
            pause = self.random.random() ** 2 * 0.15
        else:
            pause = self.random.uniform(0.0, 8.0)
        self._sleep(pause, ranks)
        if not ranks.alive():
            return False
        moment = describe(stage)
        if self.random.randrange(ALONE_EVERY):
            ranks.kill()
        else:
            self._kill_one(ranks)
            moment += ", a single rank"
        after = newest_complete_step(stage)
        assert after >= before, f"the newest complete checkpoint was of step {before} and is of step {after}"
        self.moments[moment] += 1
        self.log(f"kill {number}: {moment}; newest checkpoint of step {after}, {before} before")
        return True

    def _sleep(self, pause: float, ranks: Ranks) -> None:
        until = time.monotonic() + pause
        while ranks.alive() and time.monotonic() < until:
            time.sleep(min(0.01, max(0.0, until - time.monotonic())))

    def _kill_one(self, ranks: Ranks) -> None:
        victim = self.random.randrange(WORLD_SIZE)
        process = ranks.processes[victim]
        process.kill()
        process.join()
        others = [p for p in ranks.processes if p is not process]
        for other in others:
            other.join(ALONE_LIMIT_S)
        codes, text = [other.exitcode for other in others], ranks.text()
        # A process that is alone before the group exists waits for the other one; a launcher would end it.
        began = "resuming after step" in text or "steps, into" in text
        if began and any(code in (None, 0) for code in codes):
            where = "\n".join(stacks(other.pid) for other in others if other.is_alive() and other.pid)
            ranks.kill()
            raise AssertionError(f"{victim} was killed, and others ended with {codes}\n{text}\n{where}")
        ranks.kill()

    def summary(self, kills: int) -> str:
        """Return the number of kills by moment."""
        rows = [f"  {count:4}  {moment}" for moment, count in self.moments.most_common()]
        return "\n".join([f"{kills} kills, at these moments:", *rows])


def stacks(pid: int) -> str:
    """Return the stacks of a watched process, written by its own handler; see mrmae_ds/distributed/local_ranks.py."""
    try:
        os.kill(pid, signal.SIGUSR2)
        time.sleep(1)
        names = [path for path in Path(f"/proc/{pid}/fd").iterdir() if "memfd:stacks" in os.readlink(path)]
        state = Path(f"/proc/{pid}/status").read_text().splitlines()[2]
    except OSError:
        return f"process {pid} has ended"
    return f"process {pid}, {state}:\n" + "\n".join(name.read_text() for name in names)


def newest_complete_step(stage: Path) -> int:
    """Return the step of the newest checkpoint, verified independently of the package; 0 if there is none.

    Every committed checkpoint must be complete, not only the newest.
    """
    newest = 0
    for folder in (stage / "checkpoints").glob("step_*"):
        content = json.loads((folder / "manifest.json").read_text())["content"]
        for name, entry in content["files"].items():
            data = (folder / name).read_bytes()
            assert len(data) == entry["size"] and hashlib.sha256(data).hexdigest() == entry["sha256"], folder / name
        newest = max(newest, content["step"])
    return newest


def describe(stage: Path) -> str:
    """Describe the current phase of a run by its checkpoint folder, which changes while it is read."""
    for _ in range(5):
        with contextlib.suppress(FileNotFoundError):
            return _describe(stage)
    return "in a save: folders coming and going"


def _describe(stage: Path) -> str:
    folder = stage / "checkpoints"
    if not folder.is_dir():
        return "before the first save"
    names = {path.name for path in folder.iterdir()}
    saving = [name for name in names if name.startswith(".saving-")]
    if saving:
        files = list((folder / saving[0]).rglob("*.*"))
        if any(path.name == "manifest.json" for path in files):
            return "in a save: manifest written, not yet named"
        written = sum(path.suffix == ".pt" for path in files)
        return "in a save: " + ("no file yet" if not written else "files being written")
    if any(name.startswith(".removing-") for name in names):
        return "in a save: an older one being removed"
    newest = max((name for name in names if name.startswith("step_")), default="")
    pointer = folder / "latest"
    if newest and (not pointer.exists() or pointer.read_text() != newest):
        return "in a save: named, pointer not yet replaced"
    return "between two saves"


def main(argv: list[str] | None = None) -> int:
    """Run the chaos test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="a folder for data, runs and logs")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="checkpoint.async_save=true, ...")
    args = parser.parse_args(argv)
    began = time.monotonic()
    chaos = Chaos(args.out, args.seed, tuple(args.overrides))
    chaos.reference()
    chaos.rounds(args.kills)
    chaos.log(chaos.summary(args.kills))
    chaos.log(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
