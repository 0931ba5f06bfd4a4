"""GPUs are identified by their exact name and memory."""

from __future__ import annotations

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.profiling.gpus import GPUS, find_gpu, match_device

MIB = 2**20

# Name and total memory (MiB) as printed by torch on real machines, and the dense bf16 peak of the data sheet.
DEVICES = [
    ("NVIDIA H100 80GB HBM3", 81089, "h100-80", 989.5),
    ("NVIDIA H100 80GB HBM3", 81082, "h100-80", 989.5),
    ("NVIDIA H100 PCIe", 81008, "h100-80-pcie", 756.5),
    ("NVIDIA H200", 143156, "h200", 989.5),
    ("NVIDIA A100-PCIE-40GB", 40326, "a100-40-pcie", 312.0),
    ("NVIDIA A100-SXM4-80GB", 81920, "a100-80", 312.0),
    ("NVIDIA A10G", 22723, "a10g", 70.0),
]


@pytest.mark.parametrize(("name", "mib", "key", "peak"), DEVICES)
def test_device_is_matched_by_its_name_and_memory(name: str, mib: int, key: str, peak: float) -> None:
    gpu = match_device(name, mib * MIB)
    assert gpu is not None and (gpu.key, gpu.peak_tflops) == (key, peak)


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA H20", 97285),  # prefix of H200
        ("NVIDIA H200 144G HBM3e", 143156),
        ("NVIDIA H800", 81089),
        ("NVIDIA A100 80GB PCIe MIG 1g.10gb", 9728),
        ("NVIDIA H100 80GB HBM3", 40544),  # half of the GPU
        ("nvidia h200", 143156),
        ("NVIDIA PG506-230", 97457),
        ("", 81089),
    ],
)
def test_unknown_device_is_none(name: str, mib: int) -> None:
    assert match_device(name, mib * MIB) is None


def test_every_gpu_of_the_table_is_found_by_name_and_key() -> None:
    names = [name for gpu in GPUS for name in gpu.names]
    assert len(set(names)) == len(names) and len({gpu.key for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert all(match_device(name, gpu.memory) is gpu for name in gpu.names)
        assert find_gpu(gpu.key) is gpu


def test_memory_bandwidth_of_data_sheets() -> None:
    # TB/s as the vendor prints them.
    printed = {"a100-80": 2.039, "h100-80": 3.35, "h100-94-nvl": 3.9, "h200": 4.8, "gh200-96": 4.0, "b200": 8.0}
    assert all(find_gpu(key).memory_gbs == pytest.approx(1000 * tbs) for key, tbs in printed.items())
    assert all(gpu.memory_gbs for gpu in GPUS)


def test_gpu_without_bf16_has_no_peak() -> None:
    assert find_gpu("v100-32").peak_tflops is None


def test_unknown_key_lists_known_ones() -> None:
    options = r"`mrmae plan` takes --memory .* and --peak .*`mrmae data bench` --images-per-s"
    with pytest.raises(UserError, match=rf"--gpu h300: .*h100-80, .*b200.*{options}"):
        find_gpu("h300")
    with pytest.raises(UserError, match=r"--gpu H100-80: unknown GPU; did you mean 'h100-80'\?; known are"):
        find_gpu("H100-80")
