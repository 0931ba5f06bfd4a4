"""Where processes tell of failures: the key-value store by which they found each other."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from mrmae_ds.distributed.collectives import broadcast_object
from mrmae_ds.distributed.launch import Launch

STORE_S = 60.0  # after which a store that does not answer counts as gone
SILENCE_S = 5.0  # that the first to fail waits for the others to fall silent
LEAVE_S = 3.0  # that the others leave it to speak


@dataclass(frozen=True)
class Failure:
    """Which rank failed, how, and whether it got no further (``stuck``): then all tell where they are."""

    rank: int
    text: str
    stuck: bool = False


class FailureStore:
    """Holds the first failure of a job. All ranks make it together; each uses a connection of its own.

    Where the store is gone (its process has ended), a failure can be told to nobody, and nobody is waited for.

    Attributes:
        lost: the store is gone.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self.lost = launch, False
        self._store: dist.TCPStore | None = None
        key = broadcast_object(f"mrmae/{os.getpid()}-{time.time_ns()}")
        self._failure, self._silent = f"{key}/failure", f"{key}/silent"
        if launch.world_size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_S))
            dist.barrier()  # nobody may leave, and take the store along, before all have found it

    def tell(self, failure: Failure) -> bool:
        """Whether this is the first failure of the job; if it is, it stands from now on."""
        store, mine = self._store, json.dumps(asdict(failure))
        if store is None:
            return True
        try:
            return store.compare_set(self._failure, "", mine).decode() == mine
        except RuntimeError:
            self._lose()
            return True

    def read(self) -> Failure | None:
        """The first failure, if there is one."""
        store = self._store
        if store is None:
            return None
        try:
            return Failure(**json.loads(store.get(self._failure))) if store.check([self._failure]) else None
        except RuntimeError:
            self._lose()
            return None

    def note_end(self, rank: int) -> None:
        """A rank has ended. Its store may seem to be there for long: processes that it began hold the connections."""
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun has the store itself
            self._lose()

    def wait_for_silence(self, ended: int = 0) -> None:
        """Until all other ranks, but for so many that have ended, have fallen silent; not for long."""
        store, deadline = self._store, time.monotonic() + SILENCE_S
        while store is not None and time.monotonic() < deadline:
            try:
                if store.add(self._silent, 0) >= self.launch.world_size - 1 - ended:
                    return
            except RuntimeError:
                return
            time.sleep(0.1)

    def fall_silent(self) -> None:
        """Print nothing from now on; returns when the first one has had time to speak."""
        store = self._store
        if store is None:
            return
        try:
            store.add(self._silent, 1)
        except RuntimeError:
            return
        time.sleep(LEAVE_S)

    def _lose(self) -> None:
        self._store, self.lost = None, True
