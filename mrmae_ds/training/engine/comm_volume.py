"""Communication volume: bytes and calls of the all-gathers that DeepSpeed issues.

Sizes are known on the host, so counting never waits for the device.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed import comm
from torch import Tensor

# DeepSpeed's backend gathers by these methods; the gathered tensor, or tensors, is the argument of this name.
_GATHERS = {"all_gather_into_tensor": "output_tensor", "all_gather": "tensor_list"}
_counting: list[GatherCounter] = []


class GatherCounter:
    """Counts the all-gathers of every engine in this process.

    These are: parameters in forward, recomputation and backward under ZeRO-3, updated parameters after the step under
    ZeRO-1 and 2, and whatever else is gathered (an export, a sharded teacher). With one rank nothing is gathered.

    Attributes:
        bytes: size of the gathered tensors since :meth:`install`; each of W ranks receives (W - 1) / W of it.
        calls: number of all-gathers.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.calls = 0

    def install(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Start counting. ``engine`` is a parameter because DeepSpeed's backend exists once an engine does."""
        _hook(comm.comm.cdb)
        if self not in _counting:
            _counting.append(self)

    def close(self) -> None:
        """Stop counting; the counts stay. No effect on a counter that is not installed."""
        if self in _counting:
            _counting.remove(self)


def _hook(backend: Any) -> None:
    """Wrap a backend's gathers to update the counters; the wrappers stay, and cost nothing without counters."""

    def hooked(name: str, argument: str) -> Any:
        gather = getattr(backend, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if _counting:
                size = _size(arguments[0] if arguments else options[argument])
                for counter in _counting:
                    counter.bytes += size
                    counter.calls += 1
            return gather(*arguments, **options)

        return counted

    for name, argument in _GATHERS.items():
        if name not in vars(backend):
            setattr(backend, name, hooked(name, argument))


def _size(gathered: Tensor | list[Tensor]) -> int:
    if isinstance(gathered, Tensor):
        return gathered.numel() * gathered.element_size()
    return sum(map(_size, gathered))
