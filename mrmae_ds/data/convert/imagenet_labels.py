"""Text files that come with ImageNet-1K: labels of the validation images, numbers and names of classes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES

WORDNET_ID = re.compile(r"n\d{8}")
VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})(\.JPEG)?", re.IGNORECASE)


def read_val_labels(path: Path, wnids: Sequence[str], synsets: Path | None) -> dict[int, str]:
    """Read the WordNet id of each validation image.

    A line of the file may be:
        ``ILSVRC2012_val_00000001,n01751748 ...``: Kaggle's LOC_val_solution.csv, or the same with blanks
        ``ILSVRC2012_val_00000001.JPEG 65``: Caffe's val.txt, an index of the sorted ids of all 1000 classes
        ``n01751748``: the images in order
        ``490``: the images in order, by the devkit's own numbers 1..1000, which are not in the order of the ids

    Args:
        path: the file.
        wnids: the sorted ids of the training set's classes.
        synsets: the file that translates the devkit's numbers.

    Returns:
        The ids by image number, 1..50000.

    Raises:
        UserError: for other files.
    """
    labels: dict[int, str] = {}
    numbers: dict[int, str] | None = None
    lines = read_lines(path)
    if lines and lines[0].startswith("ImageId"):
        lines = lines[1:]
    for place, line in enumerate(lines, start=1):
        words = line.replace(",", " ").split()
        match = VAL_FILE.fullmatch(words[0])
        label = words[1] if match and len(words) > 1 else words[0]
        image = int(match[1]) if match else place
        if WORDNET_ID.fullmatch(label):
            labels[image] = label
        elif label.isdecimal():
            if numbers is None:
                numbers = _all_classes(path, wnids, synsets) if match else _devkit_numbers(path, synsets)
            if int(label) not in numbers:
                raise UserError(f"{path}: line {place}: there is no class {label}")
            labels[image] = numbers[int(label)]
        else:
            raise UserError(f"{path}: line {place} is neither a WordNet id, a number nor FILE LABEL: {line[:60]}")
    return labels


def _devkit_numbers(path: Path, synsets: Path | None) -> dict[int, str]:
    if synsets is None:
        raise UserError(
            f"{path}: holds the devkit's class numbers; pass --synsets map_clsloc.txt (lines `n02119789 1 kit_fox`), "
            "or labels by WordNet id (docs/data.md names the files that are read)"
        )
    return read_synsets(synsets)


def _all_classes(path: Path, wnids: Sequence[str], synsets: Path | None) -> dict[int, str]:
    """Return Caffe's numbers, indices of the sorted ids of all classes."""
    names = sorted(read_synsets(synsets).values()) if synsets else list(wnids)
    if len(names) != IMAGENET_CLASSES:
        raise UserError(
            f"{path}: numbers refer to {IMAGENET_CLASSES:,} classes, but {len(names):,} are known; pass --synsets"
        )
    return dict(enumerate(names))


def read_synsets(path: Path) -> dict[int, str]:
    """Read the WordNet ids of the devkit's class numbers, from lines ``n02119789 1 kit_fox`` (map_clsloc.txt).

    Raises:
        UserError: for other files.
    """
    numbers: dict[int, str] = {}
    if path.suffix == ".mat":
        raise UserError(f"{path}: a MATLAB file; docs/data.md has the command that converts it to map_clsloc.txt")
    for place, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if len(words) < 2 or not WORDNET_ID.fullmatch(words[0]) or not words[1].isdecimal():
            raise UserError(f"{path}: line {place} is not `n02119789 1 kit_fox`: {line[:60]}")
        numbers[int(words[1])] = words[0]
    return numbers


def read_class_names(path: Path, wnids: Sequence[str]) -> list[str]:
    """Read readable, unique names of the classes.

    The file has lines ``n01440764 tench, Tinca tinca`` (Kaggle's LOC_synset_mapping.txt, Caffe's synset_words.txt), of
    which the part before the comma is used, or is a JSON object of ids to names. The id is appended to a name that two
    classes share.

    Args:
        path: the file.
        wnids: WordNet ids of the classes.

    Returns:
        The names in the order of ``wnids``.

    Raises:
        UserError: for other files, and for a class without a name.
    """
    if path.suffix == ".json":
        try:
            names = {str(wnid): str(name) for wnid, name in json.loads("\n".join(read_lines(path))).items()}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a JSON object of WordNet ids to names ({error})") from error
    else:
        pairs = (line.partition(" ") for line in read_lines(path))
        names = {wnid: name.split(",")[0].strip() for wnid, _, name in pairs}
    missing = [wnid for wnid in wnids if not names.get(wnid)]
    if missing:
        raise UserError(f"{path}: has no name of {missing[0]}; expected lines `n01440764 tench, Tinca tinca`")
    used = Counter(names[wnid] for wnid in wnids)
    return [names[wnid] if used[names[wnid]] == 1 else f"{names[wnid]} ({wnid})" for wnid in wnids]


def read_lines(path: Path) -> list[str]:
    """Return a text's lines that are not empty, stripped; raises UserError if it cannot be read."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
