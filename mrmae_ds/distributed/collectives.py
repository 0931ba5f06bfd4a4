"""Agreeing over the processes: what one of them saw, all of them know, and all of them raise together.

An error that only one process raises leaves the others waiting for it in their next collective operation. So whatever
can fail on one process alone (a disk, a file) is caught there, told to all, and raised by all.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from mrmae_ds.errors import CollectiveError

T = TypeVar("T")
MAX_SHOWN = 4


def gather(value: T) -> list[T]:
    """Every process's value, by rank, on every process. The values are pickled; keep them small."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every process."""
    values: list[T] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_on_all_ranks(error: str | None, what: str = "") -> None:
    """Raise on every process if any of them has an error. All must call it.

    Args:
        error: this process's, None if it has none.
        what: said before the errors.

    Raises:
        CollectiveError: the same on every process, with each different error and the ranks that had it.
    """
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(gather(error)):
        if message is not None:
            ranks.setdefault(message, []).append(rank)
    if not ranks:
        return
    everywhere = len(next(iter(ranks.values()))) == dist.get_world_size()
    told = [message if everywhere else f"{_named(who)}: {message}" for message, who in ranks.items()]
    more = f" (and {len(told) - MAX_SHOWN} more)" if len(told) > MAX_SHOWN else ""
    raise CollectiveError(what + "; ".join(told[:MAX_SHOWN]) + more)


def _named(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {listed}"
