"""Collective operations on Python objects, and errors that all ranks raise together.

An error that only one rank raises leaves the others waiting in their next collective operation. So whatever can fail on
one rank alone (a disk, a file) is caught there, shared, and raised on all ranks.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from mrmae_ds.errors import CollectiveError
from mrmae_ds.units import first_few

T = TypeVar("T")
MAX_SHOWN = 4


def gather(value: T) -> list[T]:
    """Return every rank's value, by rank, on every rank. The values are pickled; keep them small."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast_object(value: T) -> T:
    """Return rank 0's value, on every rank."""
    values: list[T] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_on_all_ranks(error: str | None, prefix: str = "") -> None:
    """Raise on every rank if any of them has an error. All ranks must call it.

    Args:
        error: this rank's message, None if it has none.
        prefix: of the exception's message.

    Raises:
        CollectiveError: the same on every rank, with each different error and the ranks that had it.
    """
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(gather(error)):
        if message is not None:
            ranks.setdefault(message, []).append(rank)
    if not ranks:
        return
    everywhere = len(next(iter(ranks.values()))) == dist.get_world_size()
    lines = [message if everywhere else f"{_name(group)}: {message}" for message, group in ranks.items()]
    more = f" (and {len(lines) - MAX_SHOWN} more)" if len(lines) > MAX_SHOWN else ""
    raise CollectiveError(prefix + "; ".join(lines[:MAX_SHOWN]) + more)


def _name(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {first_few(ranks, 8)}"
