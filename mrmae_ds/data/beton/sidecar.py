"""Metadata of a .beton file, stored in a JSON sidecar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mrmae_ds.errors import UserError
from mrmae_ds.schema import validation_faults
from mrmae_ds.units import first_few

SIDECAR_FORMAT = 1


class _Content(BaseModel):
    """Base class of the sidecar's parts: types are exact, and keys of other versions are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)


class _CopyCounts(_Content):
    repeated: int
    across_classes: int
    of_train: int | None
    examples: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    train: str | None = None


class _LeftOut(_Content):
    row: int


class _Sidecar(_Content):
    """Content of a sidecar; earlier versions and ``mrmae data adopt`` write less than all of it."""

    format: int
    num_samples: int = Field(ge=1)
    class_names: list[str]
    max_side: int
    quality: int | None
    name: str
    source: str
    size: int
    sha256: str
    versions: dict[str, str]
    tables_sha256: str | None = None
    adler32: str | None = None
    class_counts: list[int] | None = None
    modes: dict[str, int] = {}
    converted: dict[str, int] = {}
    ignored: dict[str, int] = {}
    skipped: list[_LeftOut] = []
    copies: _CopyCounts | None = None
    origin: dict[str, Any] | None = None
    written: str | None = None
    workers: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None

    @model_validator(mode="after")
    def _count_each_class(self) -> _Sidecar:
        if self.class_counts is not None and len(self.class_counts) != len(self.class_names):
            raise ValueError(f"{len(self.class_counts)} class_counts of {len(self.class_names)} class_names")
        return self


@dataclass(frozen=True)
class BetonInfo:
    """A data set on disk.

    Attributes:
        path: the .beton.
        num_samples: number of images.
        num_classes: labels are 0..num_classes-1.
        class_names: in the order of the labels.
        max_side: upper limit of the images' longer side, pixels.
        quality: of the JPEGs; None if it is unknown.
        size: bytes.
        sha256: of the whole file.
        tables_sha256: result of ``file.tables_sha256``; None for files that were written without it.
        name: of the data set, as tables show it.
        source: description of the images that it was made from.
    """

    path: Path
    num_samples: int
    num_classes: int
    class_names: tuple[str, ...]
    max_side: int
    quality: int | None
    size: int
    sha256: str
    tables_sha256: str | None
    name: str
    source: str


def sidecar_path(path: str | Path) -> Path:
    """Return the path of a .beton's sidecar, ``train.beton.json``."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """Read the sidecar of a .beton.

    Raises:
        UserError: if the .beton or its sidecar is missing, or the sidecar is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.beton"))
        fix = (
            f"name a file in it: {first_few(files, 4)}" if files else f"mrmae data write {path} --out DIR converts one"
        )
        raise UserError(f"{path}: a folder, and a data set is a .beton file; {fix} (see docs/data.md)")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; write it with data/folder.py or data/fashion_mnist.py (see docs/data.md)"
        )
    sidecar = sidecar_path(path)
    if path.suffix != ".beton" and not sidecar.is_file():
        raise UserError(f"{path}: not a data set; name a .beton file, such as data/NAME/train.beton (see docs/data.md)")
    if not sidecar.is_file():
        raise UserError(
            f"{sidecar}: no such file; it is written last, when {path.name} is complete: "
            "copy it from the origin of the .beton, run `mrmae data adopt` on a file of FFCV's writer, or write the "
            "set again (see docs/data.md)"
        )
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{sidecar}: not JSON ({error}); write the data set again (see docs/data.md)") from error
    required = [key for key, field in _Sidecar.model_fields.items() if field.is_required()]
    missing = [key for key in required if not isinstance(content, dict) or key not in content]
    if missing or content["format"] != SIDECAR_FORMAT:
        fault = f"lacks {', '.join(missing)}" if missing else f"has format {content['format']}, not {SIDECAR_FORMAT}"
        raise UserError(f"{sidecar}: {fault}; write the data set again (see docs/data.md)")
    try:
        _Sidecar.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{sidecar}: damaged ({validation_faults(error)}); copy it from the origin of {path.name}, or write the "
            "data set again (see docs/data.md)"
        ) from None
    return content


def check_beton(path: str | Path) -> BetonInfo:
    """Check that a .beton and its sidecar exist and that the file has the recorded size.

    This reads a few kilobytes, whatever the size of the set. ``verify.verify_beton`` is the thorough check.

    Args:
        path: the .beton.

    Returns:
        Its metadata.

    Raises:
        UserError: if the check fails.
    """
    path = Path(path)
    content = read_sidecar(path)
    size = path.stat().st_size
    if size != content["size"]:
        raise UserError(
            f"{path}: has {size:,} bytes, its sidecar says {content['size']:,}; it is truncated or "
            "another file: copy or write it again"
        )
    return describe_content(path, content)


def describe_content(path: Path, content: Mapping[str, Any]) -> BetonInfo:
    """Return the metadata of a .beton from the content of its sidecar."""
    return BetonInfo(
        path=path,
        num_samples=content["num_samples"],
        num_classes=len(content["class_names"]),
        class_names=tuple(content["class_names"]),
        max_side=content["max_side"],
        quality=content["quality"],
        size=content["size"],
        sha256=content["sha256"],
        tables_sha256=content.get("tables_sha256"),
        name=content["name"],
        source=content["source"],
    )
