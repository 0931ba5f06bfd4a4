"""What a micro-batch keeps in memory, operation by operation, without computing it.

Modules run, forward and backward, on tensors that have shapes, types and lives but no values (torch's
``FakeTensorMode``). After every operation the bytes of the storages that are alive are noted: what autograd really
saves, each storage once, in the types that autocast really makes, with what checkpointing drops and computes again.
Not seen: memory that a kernel takes and gives back within itself.

The same operations run whatever the number of images, and every size is linear in it; so two runs give each
moment's bytes for any number.
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

# What is traced: even, because mixup pairs images, and not 1, which broadcasts.
TRACED = (2, 4)


class TensorRecorder(TorchDispatchMode):
    """Notes living bytes after every operation, while it is entered.

    Args:
        owned: modules whose parameters and buffers are not counted.

    Attributes:
        phase: what is going on; set it as it changes.
        events: (phase, living bytes) after each operation.
        gradients: (number of events before, elements) of each parameter gradient, as it was finished.
    """

    def __init__(self, owned: Iterable[nn.Module]) -> None:
        super().__init__()
        self.phase = ""
        self.events: list[tuple[str, int]] = []
        self.gradients: list[tuple[int, int]] = []
        self._living = 0
        self._sizes: dict[int, int] = {}
        for module in owned:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._sizes[id(tensor.untyped_storage())] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what lives after it."""
        outputs = func(*args, **(kwargs or {}))
        for output in tree_iter(outputs):
            if isinstance(output, Tensor):
                self._count(output.untyped_storage())
        self.events.append((self.phase, self._living))
        return outputs

    def take_gradient(self, parameter: Tensor) -> None:
        """Note that a gradient is finished, and drop it; a hook for after its accumulation."""
        self.gradients.append((len(self.events), parameter.numel()))
        parameter.grad = None

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._living += self._sizes[key]
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._living -= self._sizes.pop(key)


class CudaPolicy(TorchFunctionMode):
    """Autocast on CUDA computes LayerNorm in float32, on the CPU in the input's type; else they do alike here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, a LayerNorm with float32 input where autocast is on."""
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Timeline:
    """The memory of a micro-batch over its operations.

    Attributes:
        phases: of each operation.
        fixed, per_image: bytes alive after each operation are ``fixed + per_image * images``.
        gradients: elements of parameter gradients that were finished before each operation ended.
    """

    phases: tuple[str, ...]
    fixed: npt.NDArray[np.float64]
    per_image: npt.NDArray[np.float64]
    gradients: npt.NDArray[np.int64]

    def living(self, images: int) -> npt.NDArray[np.float64]:
        """Bytes alive after each operation."""
        return self.fixed + self.per_image * images

    def peak(self, images: int, *phases: str) -> float:
        """The most bytes alive in any of the phases; 0 if there is none."""
        return float(self.living(images)[self.where(*phases)].max(initial=0))

    def where(self, *phases: str) -> npt.NDArray[np.bool_]:
        """Which operations are of one of the phases."""
        return np.isin(np.array(self.phases), phases)

    def saved(self, images: int) -> float:
        """Bytes alive when backward begins: what forward kept for it."""
        backward = np.flatnonzero(self.where("backward"))
        return float(self.living(images)[backward[0]]) if len(backward) else 0.0


def trace(run: Callable[[int], TensorRecorder]) -> Timeline:
    """The timeline of what ``run`` does with a number of images.

    Args:
        run: gives the recorder of one run. It is called at least twice.

    Raises:
        RuntimeError: if it does not do the same operations for different numbers of images.
    """
    low, high = TRACED
    # The first run of an operation may do more than later ones do.
    for _ in range(3):
        first, second = run(low), run(high)
        if [phase for phase, _ in first.events] == [phase for phase, _ in second.events]:
            break
    else:
        raise RuntimeError("a micro-batch of another size does other operations, so its memory cannot be told")
    at_low, at_high = (np.array([living for _, living in r.events], dtype=np.float64) for r in (first, second))
    slope = (at_high - at_low) / (high - low)
    finished = np.zeros(len(at_low), dtype=np.int64)
    for before, elements in second.gradients:
        finished[min(before, len(finished) - 1)] += elements
    return Timeline(tuple(phase for phase, _ in second.events), at_low - slope * low, slope, finished.cumsum())
