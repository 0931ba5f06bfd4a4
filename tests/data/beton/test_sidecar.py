"""Sidecar of a .beton: what it records, and the errors that name a missing, damaged or wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar, sidecar_path
from mrmae_ds.errors import UserError

CONTENT: dict[str, Any] = {
    "format": 1,
    "num_samples": 2,
    "class_names": ["a", "b"],
    "max_side": 64,
    "quality": 90,
    "name": "t",
    "source": "tests",
    "size": 4,
    "sha256": "0" * 64,
    "versions": {},
}


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    """A file of four bytes with a sidecar that fits it."""
    path = tmp_path / "train.beton"
    path.write_bytes(b"data")
    sidecar_path(path).write_text(json.dumps(CONTENT))
    return path


@pytest.mark.parametrize("as_text", [True, False])
def test_sidecar_lies_beside_the_file(as_text: bool) -> None:
    path = Path("sets/train.beton")
    assert sidecar_path(str(path) if as_text else path) == Path("sets/train.beton.json")


def test_sidecar_is_read_into_the_description(beton: Path) -> None:
    info = check_beton(beton)
    assert (info.path, info.num_classes, info.class_names, info.tables_sha256) == (beton, 2, ("a", "b"), None)
    same = ("num_samples", "max_side", "quality", "name", "source", "size", "sha256")
    assert {key: getattr(info, key) for key in same} == {key: CONTENT[key] for key in same}
    assert read_sidecar(beton) == CONTENT


def test_missing_file_error_names_the_scripts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.beton: no such file; write it with data/folder\.py"):
        check_beton(tmp_path / "train.beton")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "lacks format"),
        ('{"format": 1}', "lacks num_samples"),
        (json.dumps(CONTENT | {"format": 2}), "has format 2, not 1"),
        *(
            (json.dumps(CONTENT | changed), rf"damaged \(.*{next(iter(changed))}.*copy it from the origin of train")
            for changed in (
                {"num_samples": "2"},
                {"num_samples": 0},
                {"class_names": {"a": 0}},
                {"versions": {"numpy": 2}},
                {"class_counts": [1, 2, 3]},
                {"modes": {"raw": "all"}},
                {"skipped": [{"reason": "empty file"}]},
                {"copies": {"repeated": 0, "across_classes": 0, "of_train": None}},
                {"copies": {"repeated": 0, "across_classes": 0, "of_train": None, "examples": [["a"]]}},
                {"seconds": "long"},
                {"tables_sha256": 1},
            )
        ),
    ],
)
def test_invalid_sidecar_is_an_error(beton: Path, content: str | None, message: str) -> None:
    sidecar_path(beton).unlink()
    if content is not None:
        sidecar_path(beton).write_text(content)
    with pytest.raises(UserError, match=rf"train\.beton\.json: {message}"):
        check_beton(beton)


def test_file_of_another_size_is_an_error(beton: Path) -> None:
    beton.write_bytes(b"dat")
    with pytest.raises(UserError, match=r"train\.beton: has 3 bytes, its sidecar says 4; it is truncated"):
        check_beton(beton)
