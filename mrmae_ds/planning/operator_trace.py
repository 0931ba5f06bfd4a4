"""FLOPs and bytes of each operator of a micro-batch, and its time on a device.

An operator takes the longer of its arithmetic and its memory traffic, and at least the time of the shortest kernel: the
roofline model. Every operator is a kernel of its own: nothing is fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mrmae_ds.profiling.flops import flop_counter

# Kinds of operators: views run no kernel; ``memory`` has no products, as casts, copies, sums, normalization and GELU.
KINDS = ("view", "matmul", "matmul_fp32", "attention", "convolution", "memory")
VIEW, MATMUL, MATMUL_FP32, ATTENTION, CONVOLUTION, MEMORY = KINDS
_WITHOUT_KERNEL = {"device", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "_unsafe_view"}
_FORMULAS: dict[Any, Any] = dict(flop_counter().flop_registry)
# Traces run on the CPU, whose attention has no formula of its own.
for _name in ("", "_backward"):
    _on_cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{_name}")
    _FORMULAS[_on_cpu] = _FORMULAS[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{_name}")]


def _multi_head_attention_flops(query: Tensor, *_: Any, out_val: Any) -> int:
    """Count the four projections and two products of a layer's attention in inference, [B, N, C]."""
    batch, tokens, width = query.shape
    return 2 * batch * tokens * width * (4 * width + 2 * tokens)


_FUSED_LAYER = torch.ops.aten._native_multi_head_attention
_FORMULAS[_FUSED_LAYER] = _multi_head_attention_flops


@dataclass(frozen=True)
class OperatorCost:
    """Cost of one call of an operator.

    Attributes:
        kind: one of ``KINDS``.
        flops: operations of its products.
        size: bytes of its inputs and outputs.
        name: of the operator, without its overload.
    """

    kind: str
    flops: float = 0.0
    size: float = 0.0
    name: str = ""


def operator_cost(func: Any, args: Any, kwargs: Any, outputs: Any) -> OperatorCost:
    """Return the cost of a call, from the shapes of its tensors; arguments as in ``__torch_dispatch__``."""
    name = func._overloadpacket.__name__
    if func.is_view or name in _WITHOUT_KERNEL:
        return OperatorCost(VIEW)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    written = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    size = float(sum(tensor_bytes(tensor) for tensor in (*inputs, *written)))
    formula = _FORMULAS.get(func._overloadpacket)
    flops = 0.0 if formula is None else float(formula(*args, **kwargs, out_val=outputs))
    if "attention" in name and func._overloadpacket is not _FUSED_LAYER:
        kind = ATTENTION
    elif "convolution" in name:
        kind = CONVOLUTION
    elif formula is not None:
        wide = any(tensor.dtype == torch.float32 and tensor.dim() > 1 for tensor in inputs)
        kind = MATMUL_FP32 if wide else MATMUL
    else:
        kind = MEMORY
    return OperatorCost(kind, flops, size, name)


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes that a kernel reads or writes; an expanded dimension is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


@dataclass(frozen=True)
class DeviceRates:
    """Rates that a device reaches.

    Attributes:
        flops: FLOP/s by kind of operator, for the kinds with products.
        sizes: B/s by kind of operator, and by the names of single operators that differ from their kind.
        kernel_s: seconds of the shortest kernel.
    """

    flops: Mapping[str, float]
    sizes: Mapping[str, float]
    kernel_s: float


@dataclass(frozen=True)
class Operators:
    """Operators of a micro-batch with kernels (N of them); FLOPs and bytes are linear in the number of images.

    Attributes:
        kinds: kind of each operator.
        flops: operations, [2, N]: those of no image, and those that each image adds.
        sizes: bytes in the same form, [2, N].
        names: name of each operator.
    """

    kinds: tuple[str, ...]
    flops: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float64]
    names: tuple[str, ...]

    @classmethod
    def fit(cls, counts: Sequence[int], traces: Sequence[Iterable[OperatorCost]]) -> Operators:
        """Fit two traces of the same operators.

        Args:
            counts: number of images of each of the two traces.
            traces: costs of their operators, with views.
        """
        low, high = ([cost for cost in trace if cost.kind != VIEW] for trace in traces)
        kinds = tuple(cost.kind for cost in low)

        def linear(values: list[list[float]]) -> npt.NDArray[np.float64]:
            at_low, at_high = np.array(values, dtype=np.float64)
            slope = (at_high - at_low) / (counts[1] - counts[0])
            return np.stack([at_low - counts[0] * slope, slope])

        flops = linear([[cost.flops for cost in trace] for trace in (low, high)])
        sizes = linear([[cost.size for cost in trace] for trace in (low, high)])
        return cls(kinds, flops, sizes, tuple(cost.name for cost in low))

    def __len__(self) -> int:
        """Return the number of operators with kernels."""
        return len(self.kinds)

    def total_flops(self, images: int) -> float:
        """Return the operations of a micro-batch."""
        return float((self.flops[0] + self.flops[1] * images).sum())

    def seconds(self, images: int, rates: DeviceRates) -> npt.NDArray[np.float64]:
        """Return the time of each operator on a device, [N]."""
        flops, sizes = (values[0] + values[1] * images for values in (self.flops, self.sizes))
        computing = flops / np.array([rates.flops.get(kind, math.inf) for kind in self.kinds])
        named = zip(self.names, self.kinds, strict=True)
        moving = sizes / np.array([rates.sizes.get(name, rates.sizes[kind]) for name, kind in named])
        return np.maximum(np.maximum(computing, moving), rates.kernel_s)
