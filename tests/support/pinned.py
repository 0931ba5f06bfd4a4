"""Support for tests that compare stored numbers bit by bit: CPU kernels pinned, versions named, weights hashed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from tests.support.small_runs import SPEEDS

# Kernels are chosen by the processor; these settings choose the same ones on every x86-64 processor with AVX2. They
# must be in the environment before torch is loaded. MKL's only branch that is the same for all vendors is COMPATIBLE.
PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}
# The packages whose arithmetic, random numbers or JPEG codec decide the numbers.
PACKAGES = ("torch", "deepspeed", "timm", "numpy", "pillow")


def cpu_flags() -> set[str]:
    """Instruction sets of this processor as Linux names them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def made_by() -> dict[str, Any]:
    """Return this machine's versions and processor, which are stored beside recorded numbers."""
    from mrmae_ds.records.environment import cpu_name

    return {
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= cpu_flags(),
        "avx512_bf16": "avx512_bf16" in cpu_flags(),
        "amx_bf16": "amx_bf16" in cpu_flags(),
        "pinned": {name: os.environ.get(name) for name in PINNED},
    }


def incomparable(made: dict[str, Any], bfloat16: bool = False) -> str:
    """Return the reason why this machine cannot reproduce recorded numbers; empty if it can.

    The kernels for bfloat16 are chosen by the processor whatever is pinned, so its kind must be the same for these.

    Args:
        made: :func:`made_by` of the machine that recorded them.
        bfloat16: True if they were computed in bfloat16.
    """
    now = made_by()
    differences = [
        f"{package} {version} was recorded, {now['versions'][package]} is installed"
        for package, version in made["versions"].items()
        if now["versions"][package] != version
    ]
    if now["machine"] != made["machine"]:
        differences.append(f"{made['machine']} was recorded, this is {now['machine']}")
    elif now["machine"] == "x86_64" and not {"avx2", "fma"} <= cpu_flags():
        differences.append("the processor has no AVX2 and FMA, which the pinned kernels need")
    if bfloat16:
        keys = [key for key in ("avx512", "avx512_bf16", "amx_bf16") if now[key] != made[key]]
        differences += [f"{key} was {made[key]}, is {now[key]} ({now['cpu']}; bfloat16)" for key in keys]
    return "; ".join(differences)


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of a .safetensors file's tensors, by name: name, type, shape and raw bytes of each."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {"__metadata__"}):
        entry = tensors[name]
        begin, end = entry["data_offsets"]
        digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
        digest.update(content[8 + length + begin : 8 + length + end])
    return digest.hexdigest()


def results(stage: Path) -> dict[str, float | int]:
    """Return the results in a stage's record, without speeds and without null values."""
    found = json.loads((stage / "record.json").read_text())["results"]
    return {name: value for name, value in found.items() if name not in SPEEDS and value is not None}
