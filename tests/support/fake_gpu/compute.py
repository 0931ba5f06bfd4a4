"""Real results of operators that are not large, so that counts, flags and the losses of tiny models come out right."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 (defines its operators)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LARGE = 1 << 20
aten = torch.ops.aten
# The host reads the number of their results from the device, so they are computed whatever their size.
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.index.Tensor,
    torch.ops.torchvision.nms.default,
}


class ComputeOnHost(TorchDispatchMode):
    """Mode in which every operator on CUDA tensors of at most :data:`LARGE` elements is computed.

    The operator is first issued as always, so that waits, launches and the choice of kernels are those of a GPU. Then
    it is computed on the CPU, and the result is written into the device's memory, which is the host's. Larger results
    stay as they are: zero in new memory. Random operators draw other numbers than a GPU, from the CPU's generator,
    which they do not advance.

    Attributes:
        not_computed: names of operators that the CPU does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.not_computed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        small = all(tensor.numel() <= LARGE for tensor in tensors) or func in SIZED_BY_VALUES
        if not small or not any(tensor.is_cuda for tensor in tensors) or not _has_values(func, leaves):
            return result
        on_host = FUSED_ATTENTION.get(func, func)
        host_args, host_kwargs = tree_map(_on_host, (args, kwargs))
        try:
            with torch.random.fork_rng(devices=(), enabled=torch.Tag.nondeterministic_seeded in func.tags):
                computed = on_host(*host_args, **host_kwargs)
        except (NotImplementedError, RuntimeError):  # the CPU has no such operator, or not for these dtypes
            self.not_computed.add(str(func))
            return result
        if any(returned.alias_info for returned in func._schema.returns):
            return result  # written in place
        return _write(result, computed)


def _has_values(func: Any, leaves: list[Any]) -> bool:
    """Return True for an operator of torch or torchvision that computes values."""
    if func.namespace not in ("aten", "torchvision") or "empty" in func.__name__:
        return False
    if any(isinstance(leaf, torch.UntypedStorage) for leaf in leaves):
        return False  # another view of a storage, as any operator whose result is an alias and is not written to
    return all(returned.alias_info.is_write for returned in func._schema.returns if returned.alias_info)


def _on_host(value: Any) -> Any:
    """Return a CPU tensor on the memory of a CUDA tensor, or the CPU's device or generator; other values unchanged."""
    if isinstance(value, torch.Generator):
        return None
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    storage = value.untyped_storage()
    if not storage.nbytes():
        return torch.empty(value.shape, dtype=value.dtype)
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(whole, value.storage_offset(), value.shape, value.stride())


def _write(result: Any, computed: Any) -> Any:
    """Write computed values into a result; return it, or a new tensor if only the values say its shape."""
    if isinstance(result, tuple | list):
        return type(result)(map(_write, result, [*computed, *result[len(computed) :]]))
    if not isinstance(result, Tensor) or result is computed:
        return result
    if result.shape != computed.shape:
        result = torch.empty(computed.shape, dtype=result.dtype, device=result.device)
    _on_host(result).copy_(computed)
    return result


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor]:
    """Return the output [B, heads, N, D] of attention without dropout, from inputs of the same shape.

    Args:
        query: not scaled.
        key: of the tokens.
        value: of the tokens.
        bias: of the scores, [B, heads, N, N], or a shape that is broadcast to it.
        scale: of the scores.
    """
    query, key, value = (tensor.float() for tensor in (query, key, value))
    return (F.scaled_dot_product_attention(query, key, value, None if bias is None else bias.float(), scale=scale),)


def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key and value, each [B, heads, N, D], and that of a bias of all scores."""
    gradient, query, key, value = (tensor.float() for tensor in (gradient, query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (scale * query @ key.mT + (0.0 if bias is None else bias.float())).softmax(-1)
    of_weights = gradient @ value.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_inputs = scale * of_scores @ key, scale * of_scores.mT @ query, weights.mT @ gradient
    return of_inputs if bias is None else (*of_inputs, of_scores)


def _without_rest(attention: Any, has_bias: bool) -> Any:
    """Return a function of a kernel's arguments: after the tensors, a bias or not, and what is not used here."""
    tensors = 3 if attention is _attention else 4

    def computed(*arguments: Any, scale: float | None = None) -> tuple[Tensor, ...]:
        return attention(*arguments[: tensors + has_bias], scale=scale)

    return computed


# Kernels that the CPU does not have. Their first results are computed, the others serve only their backward.
FUSED_ATTENTION = {
    aten._scaled_dot_product_efficient_attention.default: _without_rest(_attention, has_bias=True),
    aten._scaled_dot_product_efficient_attention_backward.default: _without_rest(_attention_backward, has_bias=True),
    aten._scaled_dot_product_flash_attention.default: _without_rest(_attention, has_bias=False),
    aten._scaled_dot_product_flash_attention_backward.default: _without_rest(_attention_backward, has_bias=False),
}
