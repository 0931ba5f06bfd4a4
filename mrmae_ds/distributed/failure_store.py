"""Failure reports shared through torch.distributed's rendezvous store."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from mrmae_ds.distributed.collectives import broadcast_object
from mrmae_ds.distributed.launch import Launch

STORE_S = 60.0  # after which a store that does not answer counts as lost
QUIET_S = 5.0  # the first rank to fail waits at most this long for the others to stop printing
LINGER_S = 3.0  # other ranks wait this long for the failing rank's own message


@dataclass(frozen=True)
class Failure:
    """A failure of a rank.

    Attributes:
        rank: that failed.
        text: the message.
        hung: True if the rank made no progress; all ranks then dump their stacks.
    """

    rank: int
    text: str
    hung: bool = False


class FailureStore:
    """Holds the first failure of a job. All ranks must construct it together; each uses a connection of its own.

    If the store is lost (its process has ended), no failure can be reported, and no rank is waited for.

    Attributes:
        lost: True if the store does not answer.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self.lost = launch, False
        self._store: dist.TCPStore | None = None
        key = broadcast_object(f"mrmae/{os.getpid()}-{time.time_ns()}")
        self._failure, self._quiet = f"{key}/failure", f"{key}/quiet"
        if launch.world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_S))
            dist.barrier()  # no rank may exit, and take the store along, before all have connected

    def report(self, failure: Failure) -> bool:
        """Report a failure. Return True if it is the first of the job, which is the one that is kept."""
        store, own = self._store, json.dumps(asdict(failure))
        if store is None:
            return True
        try:
            return store.compare_set(self._failure, "", own).decode() == own
        except RuntimeError:
            self._lose()
            return True

    def read(self) -> Failure | None:
        """Return the first failure, if there is one."""
        store = self._store
        if store is None:
            return None
        try:
            return Failure(**json.loads(store.get(self._failure))) if store.check([self._failure]) else None
        except RuntimeError:
            self._lose()
            return None

    def note_death(self, rank: int) -> None:
        """Note that a rank has ended. Rank 0 holds the store, unless torchrun's agent does.

        The store's connections may outlive rank 0, because its child processes inherit them.
        """
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._lose()

    def wait_until_quiet(self, dead: int = 0) -> None:
        """Wait until all other ranks, except ``dead`` of them, have called :meth:`keep_quiet`; at most QUIET_S."""
        store, deadline = self._store, time.monotonic() + QUIET_S
        while store is not None and time.monotonic() < deadline:
            try:
                if store.add(self._quiet, 0) >= self.launch.world_size - 1 - dead:
                    return
            except RuntimeError:
                return
            time.sleep(0.1)

    def keep_quiet(self) -> None:
        """Announce that this rank prints nothing more; return once the first to fail has had time to print."""
        store = self._store
        if store is None:
            return
        try:
            store.add(self._quiet, 1)
        except RuntimeError:
            return
        # The first to fail prints when all are quiet, and a launcher ends all ranks as soon as one has exited.
        self.wait_until_quiet()
        time.sleep(LINGER_S)

    def _lose(self) -> None:
        self._store, self.lost = None, True
