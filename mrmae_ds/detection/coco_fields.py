"""Checks of the fields of COCO's images, annotations and categories; errors name the entry, the field and the fix.

Masks are checked in ``coco_masks.py``.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from reprlib import repr as short
from typing import Any, NamedTuple

from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, first_few

Entry = dict[str, Any]
KINDS = {"images": "image", "annotations": "annotation", "categories": "category"}


class _Field(NamedTuple):
    """A field of an entry.

    Attributes:
        key: its name.
        valid: function of its value.
        expected: what the value must be.
        required: False, if it may be absent.
    """

    key: str
    valid: Callable[[Any], bool]
    expected: str
    required: bool = True


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; true and false are none."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_side(value: Any) -> bool:
    return _is_id(value) and value > 0


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(is_number, value)) and min(value[2:]) >= 0


def _is_area(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_flag(value: Any) -> bool:
    return value in (0, 1)  # "0" would be true


def _is_text(value: Any) -> bool:
    """Return whether a value is a text that files can hold; JSON can escape halves of characters."""
    try:
        return isinstance(value, str) and bool(value.strip()) and "\0" not in value and bool(os.fsencode(value))
    except UnicodeEncodeError:
        return False


def _is_relative(value: Any) -> bool:
    return _is_text(value) and not value.startswith("/") and ".." not in PurePosixPath(value).parts


_SIDE = "an integer above 0: the height and width of the stored image in pixels"
_FIELDS = {
    "images": (
        _Field("id", _is_id, "an integer: number the images, and let image_id of the annotations name these numbers"),
        _Field("file_name", _is_relative, "a path below the image folder, without a leading / and without .."),
        _Field("height", _is_side, _SIDE),
        _Field("width", _is_side, _SIDE),
    ),
    "annotations": (
        _Field("id", _is_id, "an integer: number the annotations"),
        _Field("image_id", _is_id, "an integer, the id of an image"),
        _Field("category_id", _is_id, "an integer, the id of a category"),
        _Field(
            "bbox", _is_box, "[left, top, width, height] in pixels, four finite numbers, width and height not negative"
        ),
        _Field("area", _is_area, "a finite number of pixels, not negative; without it, the mask's is taken", False),
        _Field("iscrowd", _is_flag, "0 or 1; without it, 0 is taken", False),
    ),
    "categories": (
        _Field("id", _is_id, "an integer: number the categories, and let category_id name these numbers"),
        _Field("name", _is_text, "a text that is not blank"),
    ),
}


def check_entries(path: Path, content: dict[str, list[Any]]) -> None:
    """Check each field that is used, and that ids and names are unique and references exist.

    Args:
        path: of the JSON, for messages.
        content: lists of images, annotations and categories.

    Raises:
        UserError: for the first fault.
    """
    for kind, fields in _FIELDS.items():
        _check_types(path, kind, fields, content[kind])
        repeated = _repeated(entry["id"] for entry in content[kind])
        if repeated:
            raise UserError(
                f"{path}: {kind} with the same id: {first_few(repeated, 3)}; ids must be unique, so that nothing is "
                "counted twice"
            )
    for image in content["images"]:
        if image["height"] * image["width"] > WriteOptions.max_pixels:
            raise UserError(
                f"{path}: image {image['id']} has {image['width']} x {image['height']} pixels (width x height), but "
                f"images of more than {WriteOptions.max_pixels:,} are not decoded; correct them, or cut or resize the "
                "image before it is annotated"
            )
    _check_references(path, content["images"], content["annotations"], content["categories"])


def _check_types(path: Path, kind: str, fields: Sequence[_Field], entries: Sequence[Any]) -> None:
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {kind}[{number}] is {short(entry)}, without keys; correct or remove it")
        for key, valid, expected, required in fields:
            if key in entry:
                if valid(entry[key]):
                    continue
                fault = f"has the {key} {short(entry[key])}; it must be {expected}"
            elif required:
                fault = f"has no {key!r}; correct or remove it"
            else:
                continue
            where = f"{kind}[{number}]" if key == "id" else f"{KINDS[kind]} {entry['id']}"
            raise UserError(f"{path}: {where} {fault}")


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _check_references(
    path: Path, images: Sequence[Entry], annotations: Sequence[Entry], categories: Sequence[Entry]
) -> None:
    repeated = _repeated(entry["name"] for entry in categories)
    if repeated:
        raise UserError(f"{path}: categories with the same name: {first_few(repeated, 3)}; names must be unique")
    for key, entries in (("image_id", images), ("category_id", categories)):
        known = {entry["id"] for entry in entries}
        wrong = next((entry for entry in annotations if entry[key] not in known), None)
        if wrong is not None:
            raise UserError(
                f"{path}: annotation {wrong['id']} names {key} {wrong[key]}, which does not exist; add it or remove "
                "the annotation"
            )
    boxes_only = [entry["id"] for entry in annotations if not entry.get("segmentation")]
    if boxes_only:
        raise UserError(
            f"{path}: {counted(len(boxes_only), 'annotation')} without segmentation, the first with id "
            f"{boxes_only[0]}; masks cannot be trained or evaluated on boxes alone"
        )
