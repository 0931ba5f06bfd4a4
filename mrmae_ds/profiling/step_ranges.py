"""Named ranges of a training step in profiles of Nsight Systems (NVTX) and torch.profiler; off by default.

Ranges: ``loader``, ``forward`` (in pre-training with ``teachers`` and ``student`` inside), ``backward`` (with
``reduce`` inside: gradients that are left to reduce after the backward pass, those that it did not overlap), ``sync``
(the status exchange before the update) and ``optimizer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.profiler import record_function

_recorders = 0


def start_ranges() -> None:
    """Record ranges until :func:`stop_ranges` is called as often as this."""
    global _recorders
    _recorders += 1


def stop_ranges() -> None:
    """End one :func:`start_ranges`."""
    global _recorders
    _recorders -= 1


def step_range(name: str) -> AbstractContextManager[object]:
    """Return a context that is a range of this name, or does nothing while no one records."""
    return _range(name) if _recorders else nullcontext()


def mark_reduction(engine: Any) -> None:
    """Make a DeepSpeed engine's reduction of gradients at the end of a backward pass the range ``reduce``."""
    reduce = engine.allreduce_gradients

    @wraps(reduce)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with step_range("reduce"):
            return reduce(*args, **kwargs)

    engine.allreduce_gradients = marked


@contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
    with record_function(name), nvtx:
        yield
