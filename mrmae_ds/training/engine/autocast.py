"""The engine config's precision for modules that no engine holds."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from deepspeed.runtime.config import get_torch_autocast_dtype, get_torch_autocast_enabled

from mrmae_ds.config.engine import EngineConfig


def autocast(config: EngineConfig, device: torch.device) -> AbstractContextManager[None]:
    """The engine config's ``torch_autocast``, read as DeepSpeed reads it."""
    dtype = get_torch_autocast_dtype(config.raw)
    return torch.autocast(device.type, dtype=dtype, enabled=get_torch_autocast_enabled(config.raw))
