"""Trace the activation memory and the operators of a micro-batch, operation by operation, on fake tensors.

Modules run, forward and backward, on fake tensors (shape, dtype and lifetime, no data; torch's ``FakeTensorMode``).
After every operation, the bytes of all live storages are recorded: the tensors that autograd saves, each storage once,
in the dtypes of autocast, with the effect of activation checkpointing. Workspaces that a kernel allocates and frees
within one operation are not included.

The sequence of operations does not depend on the number of images, and every size is linear in it. Two runs therefore
determine the bytes after each operation for any number of images.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mrmae_ds.planning.operator_trace import OperatorCost, Operators, operator_cost

# Traced micro-batches: even, because mixup pairs images, and not 1, which broadcasts.
TRACED_SIZES = (2, 4)


class TensorRecorder(TorchDispatchMode):
    """Record the live bytes after every operation, as a context manager.

    Args:
        owned: modules whose parameters and buffers are not counted.

    Attributes:
        phase: name of the current phase, set by the caller.
        events: (phase, live bytes) after each operation.
        costs: FLOPs and bytes of each operation.
        gradients: (number of preceding events, elements) of each parameter gradient, in the order of completion.
    """

    def __init__(self, owned: Iterable[nn.Module]) -> None:
        super().__init__()
        self.phase = ""
        self.events: list[tuple[str, int]] = []
        self.costs: list[OperatorCost] = []
        self.gradients: list[tuple[int, int]] = []
        self._live = 0
        self._sizes: dict[int, int] = {}
        for module in owned:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._sizes[id(tensor.untyped_storage())] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record the live bytes after it."""
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        for output in tree_iter(outputs):
            if isinstance(output, Tensor):
                self._count(output.untyped_storage())
        self.events.append((self.phase, self._live))
        self.costs.append(operator_cost(func, args, kwargs, outputs))
        return outputs

    def take_gradient(self, parameter: Tensor) -> None:
        """Record a complete gradient and free it; a post-accumulate-grad hook."""
        self.gradients.append((len(self.events), parameter.numel()))
        parameter.grad = None

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += self._sizes[key]
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


class CudaPolicy(TorchFunctionMode):
    """Make tensors on the CPU take CUDA's code paths.

    Autocast computes LayerNorm in float32; the devices agree on all other operations used here. Models see tensors of
    CUDA, and so choose its attention.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function; LayerNorm receives float32 inputs under autocast."""
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Timeline:
    """Memory of a micro-batch over its operations (N of them).

    Attributes:
        phases: phase of each operation.
        fixed: live bytes after each operation that do not depend on the number of images, [N].
        per_image: live bytes after each operation per image, [N].
        gradients: elements of the parameter gradients completed before the end of each operation, [N].
        operators: FLOPs and bytes of the operations.
    """

    phases: tuple[str, ...]
    fixed: npt.NDArray[np.float64]
    per_image: npt.NDArray[np.float64]
    gradients: npt.NDArray[np.int64]
    operators: Operators

    def live_bytes(self, images: int) -> npt.NDArray[np.float64]:
        """Return the live bytes after each operation, [N]."""
        return self.fixed + self.per_image * images

    def peak(self, images: int, *phases: str) -> float:
        """Return the peak of the live bytes in the given phases; 0 if none of them occurs."""
        return float(self.live_bytes(images)[self.in_phases(*phases)].max(initial=0))

    def in_phases(self, *phases: str) -> npt.NDArray[np.bool_]:
        """Return a mask of the operations in the given phases, [N]."""
        return np.isin(np.array(self.phases), phases)

    def saved(self, images: int) -> float:
        """Return the live bytes at the start of backward: the activations that forward saved for it."""
        backward = np.flatnonzero(self.in_phases("backward"))
        return float(self.live_bytes(images)[backward[0]]) if len(backward) else 0.0


def trace_timeline(run: Callable[[int], TensorRecorder]) -> Timeline:
    """Trace ``run`` with two numbers of images.

    Args:
        run: runs a micro-batch of the given number of images and returns the recorder. It is called at least twice.

    Raises:
        RuntimeError: if the operations depend on the number of images.
    """
    low, high = TRACED_SIZES
    # The first run may execute additional operations.
    for _ in range(3):
        first, second = run(low), run(high)
        if [phase for phase, _ in first.events] == [phase for phase, _ in second.events]:
            break
    else:
        raise RuntimeError("the operations depend on the micro-batch size, so its memory cannot be extrapolated")
    at_low, at_high = (np.array([live for _, live in r.events], dtype=np.float64) for r in (first, second))
    slope = (at_high - at_low) / (high - low)
    completed = np.zeros(len(at_low), dtype=np.int64)
    for before, elements in second.gradients:
        completed[min(before, len(completed) - 1)] += elements
    phases = tuple(phase for phase, _ in second.events)
    operators = Operators.fit(TRACED_SIZES, [first.costs, second.costs])
    return Timeline(phases, at_low - slope * low, slope, completed.cumsum(), operators)
