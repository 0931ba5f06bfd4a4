from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.kernels import KernelSettings
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.records.environment import collect_kernels
from mrmae_ds.training.engine.kernels import apply_kernel_settings, set_optimizer_threads

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OFFLOADED = ZeroSettings(3, autocast=False, bf16=False, offload_optimizer="cpu")
CONFIG = EngineConfig(Path("engine.json"), {}, 4, None, OFFLOADED, torch.float32, CheckpointPlan())


def _switches() -> dict[str, Any]:
    return collect_kernels(CUDA).model_dump() | {
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's switches as they were before the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "to be restored")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before, fill = _switches(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    cuda.enable_flash_sdp("flash" in before["attention"])
    cuda.enable_mem_efficient_sdp("efficient" in before["attention"])
    cuda.enable_cudnn_sdp("cudnn" in before["attention"])
    cuda.enable_math_sdp("math" in before["attention"])
    torch.use_deterministic_algorithms(before["deterministic"])
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_float32_matmul_precision(before["float32_matmul_precision"])
    cudnn.deterministic, cudnn.benchmark = before["cudnn_deterministic"], before["cudnn_benchmark"]
    cudnn.allow_tf32 = before["cudnn_tf32"]
    torch.set_num_threads(before["threads"])


@pytest.mark.parametrize(
    ("backend", "allowed"),
    [
        ("flash", ("flash", "efficient", "math")),
        ("efficient", ("efficient", "math")),
        ("cudnn", ("efficient", "cudnn", "math")),
        ("math", ("math",)),
        ("auto", ("flash", "efficient", "cudnn", "math")),
    ],
)
def test_attention_kernels_are_chosen_once_and_recorded(backend: Any, allowed: tuple[str, ...]) -> None:
    apply_kernel_settings(KernelSettings(attention_backend=backend), CUDA)
    assert collect_kernels(CUDA).attention == allowed


def test_cudnn_attention_is_off_by_default() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()  # torch prefers it on Hopper
    apply_kernel_settings(KernelSettings(), CUDA)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_kernels(deterministic: bool) -> None:
    apply_kernel_settings(KernelSettings(deterministic=deterministic), CUDA)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (deterministic, not deterministic)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    if deterministic:
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_new_memory_is_not_filled() -> None:
    apply_kernel_settings(KernelSettings(deterministic=True), CPU)
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_keeps_a_workspace_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    apply_kernel_settings(KernelSettings(deterministic=True), CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("precision", "tf32"), [("highest", False), ("high", True), ("medium", True)])
def test_precision_of_float32_products_and_convolutions(precision: Any, tf32: bool) -> None:
    apply_kernel_settings(KernelSettings(float32_matmul_precision=precision), CUDA)
    assert torch.get_float32_matmul_precision() == collect_kernels(CUDA).float32_matmul_precision == precision
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_changes_nothing_on_the_cpu_but_determinism() -> None:
    before = _switches()
    settings = KernelSettings(attention_backend="math", float32_matmul_precision="medium")
    apply_kernel_settings(settings, CPU)
    assert _switches() == before
    apply_kernel_settings(replace(settings, deterministic=True), CPU)
    assert _switches() == before | {"deterministic": True}


@pytest.mark.parametrize(
    ("share", "num_workers", "expected"), [(16, 4, 12), (16, None, 8), (16, 16, 8), (3, 1, 2), (1, None, 1), (2, 8, 1)]
)
def test_offloaded_optimizer_gets_the_cores_that_decoders_leave(
    share: int, num_workers: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrmae_ds.training.engine.kernels.default_num_workers", lambda: share)
    torch.set_num_threads(1)
    set_optimizer_threads(CONFIG, num_workers, CUDA)
    assert torch.get_num_threads() == expected == collect_kernels(CUDA).threads


def test_threads_stay_on_the_cpu_without_offloading_and_where_the_user_set_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mrmae_ds.training.engine.kernels.default_num_workers", lambda: 16)
    torch.set_num_threads(1)
    set_optimizer_threads(CONFIG, 4, CPU)
    set_optimizer_threads(replace(CONFIG, zero=replace(OFFLOADED, offload_optimizer=None)), 4, CUDA)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    set_optimizer_threads(CONFIG, 4, CUDA)
    assert torch.get_num_threads() == 2
