"""Assignment of folders and files to training and validation, by the names that are in use; refusal of other shapes."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mrmae_ds.errors import UserError
from mrmae_ds.units import first_few, printable

logger = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
_NAMES: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
# HEIC is included so that it is reported as unreadable instead of ignored.
_SUFFIXES = "jpg jpeg jpe jfif mpo png apng gif webp avif bmp dib ppm pgm pbm pnm tif tiff jp2 j2k jpx heic heif"
EXTENSIONS = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip", ".7z", ".rar")
# Folders of file systems and of archives: thumbnails, trash, copies of attributes.
_SYSTEM_FOLDERS = frozenset(
    {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
_HIDDEN, _LOOSE = "hidden folders", "images beside the class folders"


def part_of(name: str) -> Part | None:
    """Return the part of a data set that a folder's name stands for, in any letter case; None for any other name."""
    return next((part for part, names in _NAMES.items() if name.lower() in names), None)


def part_of_file(path: str) -> Part | None:
    """Return the part that a word of a file's path stands for (``data/train-00001-of-00004.parquet``), if one does.

    Raises:
        UserError: if there are words of two parts.
    """
    parts = {part for word in re.split(r"[^A-Za-z]+", path) if (part := part_of(word))}
    if len(parts) > 1:
        raise UserError(f"{path}: named like {' and like '.join(sorted(parts))}; rename it or its folder")
    return parts.pop() if parts else None


def is_hidden(name: str) -> bool:
    """Return True for the name of a hidden file or folder, and of a folder that the operating system keeps."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Return True for the name of an image that is not hidden."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not is_hidden(name)


def kind_of(name: str) -> str:
    """Return the kind of a file that is no image, for the count of ignored ones."""
    return os.path.splitext(name)[1].lower() or "no extension"


def list_folder(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name.

    Raises:
        UserError: if it is missing or cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def check_is_folder(source: Path) -> None:
    """Check that the source of a conversion is a folder; raises UserError otherwise."""
    if not source.is_dir():
        raise UserError(f"{source}: {'a file; name the folder that holds it' if source.exists() else 'no such folder'}")


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one; False for a link that leads nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def subfolders(folder: str | Path) -> list[str]:
    """Return the names of a folder's folders, sorted; hidden ones do not count."""
    return [entry.name for entry in list_folder(folder) if is_folder(entry) and not is_hidden(entry.name)]


def _holds_images(entries: Iterable[os.DirEntry[str]]) -> bool:
    return any(is_image(entry.name) for entry in entries if not is_folder(entry))


def find_parts(source: Path) -> tuple[Path, Path | None]:
    """Find the folders of training and of validation images in a tree, and print warnings of folders that are not used.

    Args:
        source: SRC with folders of usual names (``Train/``, ``valid/``), or with class folders.

    Returns:
        The folders whose folders are classes; the second is None if the tree has no validation images.

    Raises:
        UserError: for a tree whose folders may be parts or classes, or of which two may be the same part.
    """
    check_is_folder(source)
    folders = subfolders(source)
    named: dict[str | None, list[str]] = {part: [n for n in folders if part_of(n) == part] for part in _NAMES}
    others = [name for name in folders if part_of(name) is None]
    for part in ("train", "val"):
        if len(named[part]) > 1:
            raise UserError(
                f"{source}: {' and '.join(named[part])} are both names of {part}; rename or move away all but one"
            )
    train = next((source / name for name in named["train"] if subfolders(source / name)), None)
    if train is not None:
        for name in others + named["test"]:
            hint = "; rename it to val, to validate on it" if name in named["test"] and not named["val"] else ""
            logger.warning("%s: not used%s", printable(str(source / name)), hint)
        return train, next((source / name for name in named["val"]), None)
    parts = [name for names in named.values() for name in names]
    of_classes = [name for name in parts if subfolders(source / name)]
    if of_classes:
        lacks = f"but {named['train'][0]}/ holds no class folders" if named["train"] else "but no train/"
        raise UserError(f"{source}: has {of_classes[0]}/ {lacks}; expected {source}/train/CLASS and {source}/val/CLASS")
    if parts and not others:
        raise UserError(
            f"{source}: {first_few(parts, 3)} hold no class folders; expected {source}/{parts[0]}/CLASS/IMAGE"
        )
    return source, None


def find_classes(root: Path, nested: bool | None = None) -> tuple[list[str], bool]:
    """Find the class folders of one part.

    Args:
        root: the folder of the part.
        nested: True makes each folder that holds images a class, False each folder directly below ``root``; None
            decides, and refuses a tree that allows both.

    Returns:
        The names of the classes, sorted, and ``nested``.

    Raises:
        UserError: if there are none; if the classes seem to lie lower; for archives in place of class folders; for
            classes named like a part unless ``nested`` is False; for two names that look alike.
    """
    names = subfolders(root)
    archives = [
        entry.name
        for entry in list_folder(root)
        if entry.name.lower().endswith(ARCHIVES) and entry.name.split(".")[0] not in names
    ]
    if archives:
        raise UserError(f"{root}: holds {first_few(archives, 3)} without a folder of that name; unpack or move it away")
    if not names:
        raise UserError(f"{root}: holds no class folders; expected {root}/CLASS/IMAGE")
    trees = [name for name in names if part_of(name) and subfolders(root / name)]
    _refuse_parts(root, trees, "pass the folder that holds train/ and val/, or rename it")
    if nested is not False:
        _refuse_parts(root, names, "move it away, or say with --no-nested-classes that it is a class")
    if nested is None:
        nested = _decide_nested(root, names)
    if nested:
        found = [os.path.relpath(folder, root) for name in names for folder in _image_folders(str(root / name))]
        names = sorted(found, key=lambda name: name.split(os.sep))
        _refuse_parts(root, names, "move it away or rename it")
    check_look_alikes(root, names)
    return names, nested


def _refuse_parts(root: Path, names: Iterable[str], fix: str) -> None:
    parts = [name for name in names if any(map(part_of, name.split(os.sep)))]
    if parts:
        are = "is the name of a part" if len(parts) == 1 else "are names of parts"
        raise UserError(f"{root}: {first_few(parts, 3)} {are} of a data set; {fix}")


def check_look_alikes(source: Path | str, names: Iterable[str]) -> None:
    """Check that no two class names are the same text in two Unicode forms; raises UserError with both, escaped."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            both = f"{other!a} and {name!a} are one name in two Unicode forms"
            raise UserError(f"{source}: {both}; rename one, or merge the classes")


def _image_folders(folder: str) -> list[str]:
    """Return the folders at or below ``folder`` that hold images; links to folders are not followed."""
    entries = list_folder(folder)
    below = [e.path for e in entries if e.is_dir(follow_symlinks=False) and not is_hidden(e.name)]
    found = [inner for path in below for inner in _image_folders(path)]
    return [folder, *found] if _holds_images(entries) else found


def _decide_nested(root: Path, names: Sequence[str]) -> bool:
    """Return whether the classes lie below folders of initial letters; raises UserError where this cannot be seen."""
    direct, below = False, dict[str, list[str]]()
    for name in names:
        entries = list_folder(root / name)
        folders = [entry for entry in entries if is_folder(entry) and not is_hidden(entry.name)]
        if _holds_images(entries):  # beside images, only folders that hold some may be classes
            direct = True
            folders = [entry for entry in folders if not entry.is_symlink() and _image_folders(entry.path)]
        below[name] = [entry.name for entry in folders]
    inner = {folder for folders in below.values() for folder in folders}
    if len(names) == 1 and inner and not direct:
        name = printable(names[0])
        raise UserError(f"{root}: holds only the folder {name}, which holds folders; pass {root / name}")
    if len(inner) < 2:  # none, or one of the same name in every class, as CLASS/images
        return False
    if not direct and all(len(name) == 1 and name.isalpha() for name in names):
        logger.info("%s: folders of initial letters; the classes are the folders in them, with images", root)
        return True
    example = next(name for name, folders in below.items() if folders)
    raise UserError(
        f"{root}: the classes may be {first_few(names, 3)}, or the folders in them ({first_few(below[example], 3)} in "
        f"{printable(example)}); say which with --no-nested-classes or --nested-classes"
    )


def count_ignored(root: Path) -> Counter[str]:
    """Count what lies beside the class folders of ``root`` and is not used, by kind."""
    ignored: Counter[str] = Counter()
    for entry in list_folder(root):
        if is_folder(entry):
            ignored[_HIDDEN] += is_hidden(entry.name)
        else:
            ignored[_LOOSE if is_image(entry.name) else kind_of(entry.name)] += 1
    return ignored


def check_same_classes(source: Path | str, train: Sequence[str], val: Sequence[str]) -> None:
    """Check that both parts have the same classes.

    Raises:
        UserError: naming classes that only one of them has, escaped where the names differ only in their encoding.
    """
    differing = sorted(set(train) ^ set(val))
    if differing:
        if len({unicodedata.normalize("NFC", name) for name in differing}) < len(differing):
            differing = [f"{name!a} ({'train' if name in train else 'val'})" for name in differing]
        raise UserError(f"{source}: train/ and val/ differ in the classes {first_few(differing, 10)}")


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Return the counts as text, "3 .txt, 1 hidden folder"; kinds of files are plurals."""
    singular = {kind: re.sub(r"\b(archive|file|folder|image|link)s\b", r"\1", kind, count=1) for kind in ignored}
    return ", ".join(f"{count:,} {singular[kind] if count == 1 else kind}" for kind, count in ignored.items())
