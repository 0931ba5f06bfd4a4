"""Exchange of results between ranks that needs no working GPU link."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mrmae_ds.distributed.launch import Launch

JOIN_S = 120.0


class RankStore:
    """Exchanges JSON values through the launcher's rendezvous store, also while collectives hang.

    The process group later uses the same store.

    Args:
        launch: this rank.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self._round = launch, 0
        self._store: Store | None = None
        if launch.world_size > 1:
            timeout = timedelta(seconds=JOIN_S)
            store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
            self._store = PrefixStore("mrmae-doctor", store)

    def gather(self, value: Any, limit_s: float = JOIN_S) -> list[Any]:
        """Return every rank's value by rank; None for a rank that did not call this in time. All ranks must call it.

        Args:
            value: a JSON value, not null.
            limit_s: seconds to wait for all ranks together.
        """
        if self._store is None:
            return [value]
        self._round += 1
        deadline = time.monotonic() + limit_s
        self._store.set(f"{self._round}/{self.launch.rank}", json.dumps(value))
        return [self._read(f"{self._round}/{rank}", deadline) for rank in range(self.launch.world_size)]

    def _read(self, key: str, deadline: float) -> Any:
        assert self._store is not None
        try:
            self._store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
        except RuntimeError:
            return None
        return json.loads(self._store.get(key))
