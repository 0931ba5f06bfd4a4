"""Checkpoint manifest: read back as written, or rejected with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.training.checkpoint.manifest import (
    EngineLayout,
    FileEntry,
    Manifest,
    RunIdentity,
    check_contents,
    check_sizes,
    leaf_differences,
    read_manifest,
    shares,
)
from tests.support.engines import FILES, IDENTITY, written

MODEL = "mp_rank_00_model_states.pt"


def test_round_trip(tmp_path: Path) -> None:
    results = {"top1": 71.5, "last_loss": 0.1 + 0.2, "n": 3, "x": math.inf}
    manifest = read_manifest(written(tmp_path, 12, results=results))
    assert (manifest.step, manifest.identity, manifest.layout.world_size) == (12, IDENTITY, 1)
    assert manifest.results == results
    assert manifest.size == sum(map(len, FILES.values()))
    other = read_manifest(written(tmp_path / "other", 12))
    assert other.id != manifest.id


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 2, "content": 3, "sha256": "x"}', "\x00", "3", "null"]
)
def test_rejects_other_files(tmp_path: Path, text: str) -> None:
    checkpoint = written(tmp_path)
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        read_manifest(checkpoint)


def test_rejects_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: .*checkpoints/step_N"):
        read_manifest(tmp_path / "nowhere")


def test_rejects_a_changed_digit(tmp_path: Path) -> None:
    """The file is still complete JSON, but differs from what was written."""
    path = written(tmp_path, 12) / "manifest.json"
    text = path.read_text()
    assert text.count('"step": 12') == 1
    path.write_text(text.replace('"step": 12', '"step": 13'))
    with pytest.raises(UserError, match="not what was written"):
        read_manifest(path.parent)


def test_rejects_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    path = written(tmp_path) / "manifest.json"
    path.write_text(json.dumps({"step": 1, "world_size": 2, "recipe_hash": "x", "seed": 0, "files": {"a": 3}}))
    with pytest.raises(UserError, match="format 1"):
        read_manifest(path.parent)


def test_finds_no_problem_in_complete_files(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    manifest = read_manifest(checkpoint)
    assert check_sizes(checkpoint, manifest) == check_contents(checkpoint, manifest, manifest.files) == []


def test_names_a_missing_file(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    manifest = read_manifest(checkpoint)
    (checkpoint / MODEL).unlink()
    for wrong in (check_sizes(checkpoint, manifest), check_contents(checkpoint, manifest, manifest.files)):
        assert len(wrong) == 1 and wrong[0].startswith(f"{checkpoint / MODEL}: No such file")


@pytest.mark.parametrize("content", [b"", b"mode", b"model+"])
def test_names_a_file_of_another_size(tmp_path: Path, content: bytes) -> None:
    checkpoint = written(tmp_path)
    (checkpoint / MODEL).write_bytes(content)
    (wrong,) = check_sizes(checkpoint, read_manifest(checkpoint))
    assert wrong == f"{checkpoint / MODEL}: {len(content)} bytes instead of 5 bytes"


def test_finds_a_flipped_byte_by_the_contents_alone(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    manifest = read_manifest(checkpoint)
    (checkpoint / MODEL).write_bytes(b"modem")
    assert check_sizes(checkpoint, manifest) == []
    (wrong,) = check_contents(checkpoint, manifest, manifest.files)
    assert str(checkpoint / MODEL) in wrong and "SHA-256" in wrong


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_divides_the_files_evenly_each_once(parts: int) -> None:
    sizes = [900, 40, 800, 70, 700, 10, 600, 500, 3]
    files = {f"file{i}": FileEntry(size=size, sha256="") for i, size in enumerate(sizes)}
    layout = EngineLayout(world_size=1, zero_stage=3, dtype="float32")
    lists = shares(Manifest(step=1, identity=IDENTITY, layout=layout, files=files), parts)
    assert len(lists) == parts
    assert sorted(name for names in lists for name in names) == sorted(files)
    loads = [sum(files[name].size for name in names) for names in lists]
    assert max(loads) - min(loads) <= max(sizes)


def test_names_every_difference_between_two_runs() -> None:
    old = RunIdentity(
        recipe_hash="a", seed=0, train="1" * 64, val="2" * 64, teachers={"clip": "3" * 64, "dino": "4" * 64},
        recipe={"stages": {"pretrain": {"epochs": 4, "batch_size": 32}}},
    )  # fmt: skip
    new = RunIdentity(
        recipe_hash="b", seed=5, train="6" * 64, val="7" * 64, teachers={"clip": "8" * 64, "mae": "9" * 64},
        recipe={"stages": {"pretrain": {"epochs": 9, "batch_size": 32}}},
    )  # fmt: skip
    assert old.differences(new) == [
        "stages.pretrain.epochs: 4 -> 9",
        "seed: 0 -> 5",
        "data.train: sha256 111111111111 -> sha256 666666666666",
        "data.val: sha256 222222222222 -> sha256 777777777777",
        "teachers.clip: sha256 333333333333 -> sha256 888888888888",
        "teachers.dino: sha256 444444444444 -> none",
        "teachers.mae: none -> sha256 999999999999",
    ]
    assert old.differences(old) == []


def test_initial_weights_are_compared_where_both_are_known() -> None:
    """Checkpoints of earlier versions do not have them."""
    first, second = (IDENTITY.model_copy(update={"init": digit * 64}) for digit in "12")
    assert first.differences(second) == ["initial weights: sha256 111111111111 -> sha256 222222222222"]
    assert IDENTITY.differences(second) == second.differences(IDENTITY) == []


def test_another_recipe_is_a_difference_even_where_its_text_is_not_known() -> None:
    old = IDENTITY.model_copy(update={"recipe": {}})
    assert old.differences(IDENTITY.model_copy(update={"recipe_hash": "xyz"})) == ["recipe: abc -> xyz"]


def test_differences_are_leaves() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": 2}, "gone": {"x": 1}, "same": None}
    new = {"a": 1, "b": {"c": [1, 3], "d": 2}, "new": {"y": 2}, "same": None}
    assert leaf_differences(old, new) == ["b.c: [1, 2] -> [1, 3]", "gone: {'x': 1} -> None", "new: None -> {'y': 2}"]
    assert leaf_differences(old, old) == []
