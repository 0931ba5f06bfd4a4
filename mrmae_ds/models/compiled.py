"""torch.compile of single modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def compile_each(modules: Sequence[nn.Module]) -> None:
    """Compile the forward of every module with torch, at its first call; a module that is not one graph is an error.

    Hooks of the module itself stay outside its graph. Shapes are fixed: a graph that became dynamic between forward and
    its recomputation would save other tensors.
    """
    # Modules of a class share their code, and each drop path rate, precision and mode is a graph of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(modules))
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False, fullgraph=True)
