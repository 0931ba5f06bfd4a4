"""Lock of a stage's folder: one job at a time reads and writes a run.

    RUN/.STAGE.lock      filelock's marker, which the holder renews every few seconds
    RUN/.STAGE.holder    the holder, for messages

The marker is created exclusively, so the lock also works between the nodes of a shared file system. A holder that died
on this machine is recognized at once; one on another machine, by a marker that is not renewed any longer. So a job that
was killed is resumed by the same command without anybody's help.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import SoftFileLease, Timeout

from mrmae_ds.errors import UserError
from mrmae_ds.files import make_folder, write_text
from mrmae_ds.records.record import utc_now

logger = logging.getLogger(__name__)

LEASE_S = 120.0  # without renewal, after which the holder counts as dead; must be the same for all jobs of a run
RENEW_S = 5.0
ATTEMPT_S = 1.0  # for taking over from a dead holder


@dataclass(frozen=True)
class Holder:
    """A job that holds the lock.

    Attributes:
        host: of its rank 0.
        namespace: of the process id, which differs between containers.
        pid: of its rank 0.
        job: Slurm's id; None outside Slurm.
        since: UTC.
    """

    host: str
    namespace: str
    pid: int
    job: str | None
    since: str

    @classmethod
    def current(cls) -> Holder:
        """Return this process."""
        namespace, job = os.readlink("/proc/self/ns/pid"), os.environ.get("SLURM_JOB_ID")
        return cls(socket.gethostname(), namespace, os.getpid(), job, utc_now().isoformat())

    def __str__(self) -> str:
        """Return a description for messages."""
        return f"process {self.pid} on {self.host}{f' (Slurm job {self.job})' if self.job else ''}, since {self.since}"


@contextlib.contextmanager
def locked(stage_dir: Path) -> Iterator[None]:
    """Hold the lock of a stage's folder, which need not exist. Rank 0 enters before it reads anything of the run.

    Args:
        stage_dir: runs/NAME/STAGE.

    Raises:
        UserError: if another job holds it, or the run's folder cannot be made.
    """
    folder = stage_dir.parent
    made: list[Path] = []
    with contextlib.suppress(OSError):  # a name that is too long
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    lock = SoftFileLease(
        folder / f".{stage_dir.name}.lock",
        lease_duration=LEASE_S,
        heartbeat_interval=RENEW_S,
        on_compromise=lambda _: _end(stage_dir),
    )
    note = folder / f".{stage_dir.name}.holder"
    try:
        _acquire(lock, stage_dir, note)
        try:
            write_text(note, json.dumps(asdict(Holder.current())) + "\n")
            yield
        finally:
            note.unlink(missing_ok=True)
            lock.release()
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: the run began
                path.rmdir()


def _acquire(lock: SoftFileLease, stage_dir: Path, note: Path) -> None:
    """Take the lock, also over from a dead holder; a holder that lives elsewhere shows it by a renewal."""
    current, renewed = Holder.current(), None
    deadline = time.monotonic() + LEASE_S + 2 * RENEW_S
    while True:
        last = time.monotonic() > deadline  # after it: this process may be stopped for long at any moment
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=ATTEMPT_S, poll_interval=0.1)
            return
        holder, before, renewed = _read(note), renewed, _modified(Path(lock.lock_file))
        ours = (current.host, current.namespace)
        here = holder is not None and holder.pid == lock.pid and (holder.host, holder.namespace) == ours
        if here or (before and renewed and before != renewed) or last:
            raise UserError(
                f"{stage_dir}: {holder or 'another job'}, trains here; wait for it or stop it, or name another folder "
                "with --run"
            )
        if before is None:
            logger.info(
                "%s: waiting for a sign of life of %s, or, if it is dead, to take over: at most %g s",
                stage_dir,
                holder or "another job",
                LEASE_S,
            )


def _read(note: Path) -> Holder | None:
    try:
        return Holder(**json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _end(stage_dir: Path) -> None:
    """End this process: it was suspended or cut off for so long that another job may have taken the run over."""
    message = f"error: {stage_dir}: the lock of this run was lost, and another job may train here; nothing was saved"
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
