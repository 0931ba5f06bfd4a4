from __future__ import annotations

import os
import platform
import socket
import subprocess
from pathlib import Path

import torch

from mrmae_ds.records.environment import collect_hardware, collect_kernels, collect_versions, git_state


def _git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def test_git_state_returns_commit_and_dirtiness(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None
    _git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-q", "-m", "a")
    state = git_state(tmp_path)
    assert state is not None
    assert (state.commit, state.dirty) == (_git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / "a").write_text("2")
    dirty = git_state(tmp_path)
    assert dirty is not None and dirty.dirty


def test_versions_and_hardware_contain_no_host_name() -> None:
    versions = collect_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert {"deepspeed", "timm"} <= versions.keys()
    hardware = collect_hardware(4, "cpu")
    assert (hardware.count, hardware.world_size) == (os.cpu_count(), 4)
    assert hardware.device
    assert socket.gethostname() not in hardware.model_dump_json() + str(versions)


def test_kernels_are_those_in_effect() -> None:
    before = collect_kernels("cuda")
    assert not before.deterministic and before.attention == ("flash", "efficient", "cudnn", "math")
    assert before.threads == torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        changed, on_cpu = collect_kernels("cuda"), collect_kernels("cpu")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert changed.deterministic and changed.attention == ("flash", "efficient", "math")
    assert on_cpu.deterministic and on_cpu.attention is None
