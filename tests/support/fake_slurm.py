"""Fake sbatch and squeue: two programs that store their arguments and a queue as files."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

SBATCH = """#!{python}
import json, pathlib, sys
room = pathlib.Path({room!r})
if (room / "refuse").exists() and (room / "refuse").read_text() in " ".join(sys.argv):
    sys.exit("sbatch: error: Batch job submission failed: Invalid account")
jobs = sorted(int(path.stem) for path in room.glob("*.json"))
job = (jobs or [100])[-1] + 1
(room / f"{{job}}.json").write_text(json.dumps(sys.argv[1:]))
(room / f"{{job}}.state").write_text("PENDING")
print(f"{{job}};cluster")
"""
SQUEUE = """#!{python}
import pathlib
for path in sorted(pathlib.Path({room!r}).glob("*.state")):
    print(path.stem, path.read_text())
"""


@dataclass(frozen=True)
class FakeSlurm:
    """Submitted jobs and the queue.

    Attributes:
        room: folder of the files that hold them.
    """

    room: Path

    @classmethod
    def make(cls, folder: Path) -> FakeSlurm:
        """Write the programs into ``folder``, which must be on the PATH."""
        room = folder / "queue"
        room.mkdir(parents=True)
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE}.items():
            program = folder / name
            program.write_text(text.format(python=sys.executable, room=str(room)))
            program.chmod(0o755)
        return cls(room)

    def jobs(self) -> dict[str, list[str]]:
        """Return sbatch's arguments, by job."""
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.room.glob("*.json"))}

    def leave(self, job: str) -> None:
        """Remove a job from the queue."""
        (self.room / f"{job}.state").unlink()

    def refuse(self, word: str) -> None:
        """Make sbatch fail if its arguments contain ``word``; "" never fails."""
        if word:
            (self.room / "refuse").write_text(word)
        else:
            (self.room / "refuse").unlink()
