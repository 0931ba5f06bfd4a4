"""Torch's kernels and threads in this process, as the engine config states them.

On the CPU only ``deterministic`` is applied, which changes no value there.
"""

from __future__ import annotations

import os

import torch

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.kernels import KernelSettings
from mrmae_ds.data.loaders.build import default_num_workers

# Kernels that torch may choose from, by the preferred one. Flash and cuDNN do not take float32, which then gets
# memory-efficient attention; the plain formula is left for what no other kernel takes.
_ATTENTION = {
    "flash": ("flash", "efficient", "math"),
    "efficient": ("efficient", "math"),
    "cudnn": ("cudnn", "efficient", "math"),
    "math": ("math",),
}


def apply_kernel_settings(settings: KernelSettings, device: torch.device) -> None:
    """Set torch's global switches; call it before the first computation on the device.

    Args:
        settings: of the engine config.
        device: of this rank.
    """
    if settings.deterministic:
        # cuBLAS reads it when its first handle is created, and torch refuses its products without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Torch would also fill every new tensor with NaN, a kernel per allocation; nothing here reads unwritten memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(settings.deterministic)
    if device.type == "cpu":
        return
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark = settings.deterministic, not settings.deterministic
    torch.set_float32_matmul_precision(settings.float32_matmul_precision)
    cudnn.allow_tf32 = settings.float32_matmul_precision != "highest"
    if settings.attention_backend != "auto":
        allowed = _ATTENTION[settings.attention_backend]
        cuda.enable_flash_sdp("flash" in allowed)
        cuda.enable_mem_efficient_sdp("efficient" in allowed)
        cuda.enable_cudnn_sdp("cudnn" in allowed)
        cuda.enable_math_sdp("math" in allowed)


def set_optimizer_threads(config: EngineConfig, num_workers: int | None, device: torch.device) -> None:
    """Give an optimizer that is offloaded from a GPU more than the one thread that launchers leave to each rank.

    It gets this rank's share of the cores less those of the decoders, and at least half of it, because decoders idle
    once their batches are ready. On the CPU nothing changes: there the number of threads is part of the result.

    Args:
        config: the engine config.
        num_workers: decoders, ``loader.num_workers``; None is the whole share.
        device: of this rank.
    """
    if device.type == "cpu" or not config.offloads_optimizer or torch.get_num_threads() > 1:
        return
    share = default_num_workers()
    torch.set_num_threads(max(1, share // 2, share - (num_workers or share)))
