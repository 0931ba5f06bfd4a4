"""Software versions, hardware and git state of a run, without host or user names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from mrmae_ds.records.sections import GitState, Hardware, Kernels

if TYPE_CHECKING:
    import torch

PACKAGES = ("mrmae_ds", "torch", "torchvision", "deepspeed", "timm", "open_clip_torch", "ffcv", "numpy")


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of those packages in `PACKAGES` that are installed."""
    import torch  # Late: reading records and making tables must not wait for it.

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # The package metadata lacks the build ("2.10.0+cpu").
    versions["torch"] = str(torch.__version__)
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def collect_hardware(world_size: int, device: str | torch.device) -> Hardware:
    """Return the name and count of this node's devices of `device`'s type, and the job's `world_size`."""
    import torch  # Late, as above.

    kind = torch.device(device).type
    if kind == "cpu":
        return Hardware(device=cpu_name(), count=os.cpu_count() or 1, world_size=world_size)
    module = torch.get_device_module(kind)
    return Hardware(device=module.get_device_name(device), count=module.device_count(), world_size=world_size)


def collect_kernels(device: str | torch.device) -> Kernels:
    """Return the choice of kernels that is in effect in this process for `device`; a CPU has none for attention."""
    import torch  # Late, as above.

    on_cpu, cuda = torch.device(device).type == "cpu", torch.backends.cuda
    attention = {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return Kernels(
        attention=None if on_cpu else tuple(name for name, enabled in attention.items() if enabled),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        threads=torch.get_num_threads(),
    )


def cpu_name() -> str:
    """Return the CPU's model name on Linux, otherwise its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.machine() or "CPU"


def git_state(root: str | Path) -> GitState | None:
    """Return commit and dirtiness of the repository around `root`.

    Returns:
        None without git, outside a repository, or before its first commit.
    """
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain")
    if not commit or changes is None:
        return None
    return GitState(commit=commit, dirty=bool(changes))


def _git(root: str | Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None
