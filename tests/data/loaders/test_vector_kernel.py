"""Instructions of the kernels: of vectors against numpy, for this CPU and for others, and the atomic one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding
import numpy as np
import pytest
from numba import njit

from mrmae_ds.data.loaders.vector_kernel import (
    LANES,
    SIDE,
    filter_to_int16,
    filter_to_int32,
    store_pixels,
    take_next,
    transpose,
)


@njit
def _address(array):  # type: ignore[no-untyped-def]
    return np.uint64(array.ctypes.data)


@njit
def _filter(pairs, weights, to16, to32):  # type: ignore[no-untyped-def]
    number, count, half, shift = len(pairs), pairs.shape[1], np.int32(1 << 13), np.int32(14)
    source, factors, every = _address(pairs), _address(weights), weights.shape[1]
    filter_to_int16(source, count, factors, every, number, _address(to16), count, half, shift)
    filter_to_int32(source, count, factors, every, number, _address(to32), count, half, shift)


@njit
def _transpose(block, transposed, image):  # type: ignore[no-untyped-def]
    count = block.shape[1]
    transpose(_address(block), count, _address(transposed), SIDE, count)
    store_pixels(_address(block), count, _address(image), 3 * SIDE, count)


def _check() -> None:
    rng = np.random.default_rng(0)
    for number in range(1, 12):  # with and without an inner loop
        taps = rng.integers(-(2**14), 2**14, (number, 3 * LANES, 2), dtype=np.int16)
        weights = rng.integers(-(2**10), 2**10, (number, 5, 2), dtype=np.int16)
        expected = ((taps.astype(int) * weights[:, :1]).sum((0, 2)) + (1 << 13)) >> 14
        results = np.zeros(3 * LANES, np.int16), np.zeros(3 * LANES, np.int32)
        _filter(taps.view(np.int32)[..., 0].copy(), weights.view(np.int32)[..., 0].copy(), *results)
        assert all(np.array_equal(result, expected) for result in results)
    block = rng.integers(0, 2**31, (SIDE, 3 * SIDE), dtype=np.int32)
    transposed, image = np.zeros((3 * SIDE, SIDE), np.int32), np.zeros((3 * SIDE, SIDE, 3), np.uint8)
    _transpose(block, transposed, image)
    assert np.array_equal(transposed, block.T)
    assert np.array_equal(image, np.ascontiguousarray(block.T).view(np.uint8).reshape(3 * SIDE, SIDE, 4)[..., :3])


def test_vectors_equal_numpy() -> None:
    _check()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names CPUs of this kind")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("cpu, features", [("x86-64", []), ("haswell", ["avx", "avx2"])])
def test_vectors_of_other_cpus_equal_numpy(cpu: str, features: list[str]) -> None:
    if not all(llvmlite.binding.get_host_cpu_features().get(feature) for feature in features):
        pytest.skip(f"this CPU has no {features}")
    names = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features)}
    command = [sys.executable, "-m", "tests.data.loaders.test_vector_kernel"]
    done = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    _check()


@njit(nogil=True)
def _take_all(counter, taken):  # type: ignore[no-untyped-def]
    while True:
        number = take_next(_address(counter))
        if number >= len(taken):
            return
        taken[number] += 1


def test_each_number_is_taken_once() -> None:
    counter, taken = np.zeros(1, np.int64), np.zeros(1_000_000, np.int64)
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(_take_all, counter, taken) for _ in range(4)]:
            done.result()
    assert (taken == 1).all() and counter[0] == len(taken) + 4
