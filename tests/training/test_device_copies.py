"""Copies between host and device, on the GPU stand-in: pinned, few waits, right values, no buffer overwritten early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes
from tests.support.fake_gpu import preload
from tests.support.sample_data import write_crops_beton

pytestmark = [
    pytest.mark.multi_process,
    pytest.mark.ffcv,
    pytest.mark.timeout(300, method="thread"),
    pytest.mark.skipif(bool(preload.missing_requirement()), reason=f"stand-in: {preload.missing_requirement()}"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("copies")
    write_crops_beton(folder, train=40, val=8)
    command = [sys.executable, "-m", "tests.support.device_copies_worker", str(folder)]
    environment = processes.environment(**preload.variables())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "RACE" not in done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_augmented_batches_are_sent_from_the_decoders_buffer(result: dict[str, Any], place: str) -> None:
    """The values are those of the CPU's batches; the only waits are for a copy that ended long ago."""
    found = result[f"augmented on {place}"]
    assert found["equal"] and found["batches"] == 10 and found["races"] == 0
    assert found["stream_waits"] == 0 and found["other_waits"] <= found["batches"]


def test_erasing_touches_only_erased_images(result: dict[str, Any]) -> None:
    """Two launches for each of them, noise and copy."""
    found = result["erasing"]
    assert 0 < found["erased"] < 32 and found["launches"] == 2 * found["erased"]
    assert found["stream_waits"] == found["other_waits"] == found["copies_to_device"] == 0


def test_a_background_checkpoint_waits_once(result: dict[str, Any]) -> None:
    found = result["copies"]
    assert found["equal"] and found["own"] and all(found["pinned"])
    assert found["stream_waits"] + found["other_waits"] == 1


def test_a_checkpoint_is_written_through_pinned_memory(result: dict[str, Any]) -> None:
    assert result["saved"] == {"pinned": 5, "equal": True}
