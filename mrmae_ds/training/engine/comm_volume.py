"""How many bytes a process gathers, counted where DeepSpeed hands an all-gather to the communication library.

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
    """Counts the all-gathers that DeepSpeed issues in this process, those of every engine in it.

    That is: parameters in forward, recomputation and backward under ZeRO-3, updated parameters after the step under
    ZeRO-1 and 2, and whatever else is gathered (an export, a teacher divided among the processes). ``bytes`` is the
    size of what is gathered; of W processes each receives (W - 1) / W of it over its links. A process alone gathers
    nothing.

    Attributes:
        bytes: since :meth:`install`.
        calls: how many all-gathers.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.calls = 0

    def install(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Begin to count. ``engine`` is asked for so that DeepSpeed's backend exists."""
        _hook(comm.comm.cdb)
        if self not in _counting:
            _counting.append(self)

    def close(self) -> None:
        """Stop counting; the counts stay. Without effect on a counter that does not count."""
        if self in _counting:
            _counting.remove(self)


def _hook(backend: Any) -> None:
    """Let a backend's gathers tell the counters; the hooks stay, and cost nothing when nobody counts."""

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
