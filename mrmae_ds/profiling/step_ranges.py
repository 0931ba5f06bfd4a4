"""Named ranges of a training step in profiles of Nsight Systems (NVTX) and torch.profiler; off by default.

Ranges: ``loader``, ``forward`` (in pre-training with ``teachers`` and ``student`` inside), ``backward``, ``sync`` (the
status exchange before the update) and ``optimizer``. DeepSpeed adds NVTX ranges of its own functions, among them the
reduction of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


@contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()
    with record_function(name), nvtx:
        yield
