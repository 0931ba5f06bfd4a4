"""Trees of other shapes: usual names are recognized and printed, what may mean two things is refused."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pytest

from mrmae_ds.data.convert.folder import open_folder
from mrmae_ds.data.convert.splits import part_of_file
from mrmae_ds.errors import UserError
from tests.support.sample_data import photograph

CLASSES = ("ant", "bee")


def _images(*folders: Path, count: int = 2) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            photograph().crop((9 * number, 0, 9 * number + 30, 20)).save(folder / f"{number}.png")


def _part(folder: Path, count: int = 2) -> None:
    _images(*(folder / name for name in CLASSES), count=count)


def _refusal(source: Path, nested: bool | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_folder(source, 0.5, nested)
    return str(caught.value)


@pytest.mark.parametrize("train", ["train", "Train", "training", "TRAIN"])
@pytest.mark.parametrize("val", ["val", "Val", "valid", "validation", "eval"])
def test_usual_names_of_parts(train: str, val: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _part(tmp_path / train, 3)
    _part(tmp_path / val, 1)
    _part(tmp_path / "test")
    with caplog.at_level(logging.INFO):
        first, second, names = open_folder(tmp_path, 0.5)
    assert (len(first), len(second), names) == (6, 2, ["ant", "bee"])
    assert f"{tmp_path / 'test'}: not used" in caplog.text
    assert f"{tmp_path / train}: taken as train: 2 classes, 6 images" in caplog.text
    assert f"{tmp_path / val}: taken as val: 2 classes, 2 images" in caplog.text


def test_a_test_folder_alone_is_named_as_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _part(tmp_path / "train", 4)
    _part(tmp_path / "test", 4)
    with caplog.at_level(logging.INFO):
        first, second, _ = open_folder(tmp_path, 0.5)
    assert (len(first), len(second)) == (4, 4)
    assert f"{tmp_path / 'test'}: not used; rename it to val, to validate on it" in caplog.text
    assert "taken as train, and 0.5 of each class as val" in caplog.text


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        _part(tmp_path / name)
    assert "val and valid are both names of val" in _refusal(tmp_path)


def test_a_tree_one_level_too_deep_names_the_folder_to_pass(tmp_path: Path) -> None:
    _part(tmp_path / "mydata" / "train")
    _part(tmp_path / "mydata" / "val")
    assert _refusal(tmp_path).endswith(f"pass {tmp_path / 'mydata'}")
    open_folder(tmp_path / "mydata", 0.5)
    _part(tmp_path / "other" / "train" / "train")
    assert "train is the name of a part" in _refusal(tmp_path / "other")


def test_parts_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    _images(tmp_path / "train", tmp_path / "val")
    assert "train, val hold no class folders" in _refusal(tmp_path)


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize("name", ["test", "val", "Training"])
def test_a_class_named_like_a_part_must_be_confirmed(name: str, below: str, tmp_path: Path) -> None:
    root = tmp_path / below
    _images(root / name, root / "bus", count=4)
    confirm = "move it away, or say with --no-nested-classes that it is a class"
    assert _refusal(tmp_path) == f"{root}: {name} is the name of a part of a data set; {confirm}"
    assert open_folder(tmp_path, 0.5, False)[2] == sorted(["bus", name])


def test_a_part_among_the_lower_classes_is_refused(tmp_path: Path) -> None:
    _images(*(tmp_path / name for name in ("a/ant", "a/test", "b/bee", "b/val")))
    for nested in (None, True):
        assert _refusal(tmp_path, nested).startswith(f"{tmp_path}: a/test, b/val are names of parts of a data set; ")


def test_folders_of_initial_letters_hold_the_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = tmp_path / "train"
    for name in ("a/airfield", "a/arch", "b/bakery/shop", "b/bakery/street"):
        _images(train / name)
    with caplog.at_level(logging.INFO):
        first, _, names = open_folder(tmp_path, 0.5)
    assert names == ["a/airfield", "a/arch", "b/bakery/shop", "b/bakery/street"]
    assert first.labels.tolist() == [0, 1, 2, 3] and "folders of initial letters" in caplog.text


def test_classes_at_two_possible_levels_are_refused(tmp_path: Path) -> None:
    for name in ("pets/cat", "pets/dog", "farm/cow", "farm/pig"):
        _images(tmp_path / name)
    assert "say which with --no-nested-classes or --nested-classes" in _refusal(tmp_path)
    assert open_folder(tmp_path, 0.5, True)[2] == ["farm/cow", "farm/pig", "pets/cat", "pets/dog"]
    first, _, names = open_folder(tmp_path, 0.5, False)
    assert names == ["farm", "pets"] and first.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("loose", ["animals", "plants"])
def test_an_image_beside_the_lower_classes_does_not_merge_them(loose: str, tmp_path: Path) -> None:
    train = tmp_path / "train"
    for name in ("animals/cat", "animals/dog", "plants", loose):
        _images(train / name)
    assert "the classes may be animals, plants, or the folders in them (cat, dog in animals)" in _refusal(tmp_path)
    assert open_folder(tmp_path, 0.5, False)[2] == ["animals", "plants"]


def test_a_letter_that_holds_images_is_no_initial(tmp_path: Path) -> None:
    for name in ("a/airfield", "a/arch", "b/bakery"):
        _images(tmp_path / name)
    assert open_folder(tmp_path, 0.5)[2] == ["a/airfield", "a/arch", "b/bakery"]
    _images(tmp_path / "a")
    assert "say which with --no-nested-classes or --nested-classes" in _refusal(tmp_path)


def test_one_folder_of_one_name_in_every_class_is_part_of_the_class(tmp_path: Path) -> None:
    _images(tmp_path / "cat" / "images", tmp_path / "dog" / "images", tmp_path / "dog")
    (tmp_path / "dog" / "notes").mkdir()
    assert open_folder(tmp_path, 0.5)[2] == ["cat", "dog"]


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "lost+found", ".trash"])
def test_folders_of_the_system_never_count(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _images(*(tmp_path / inner for inner in ("cat", "dog", f"cat/{name}/0", f"cat/{name}", f"{name}/cat", name)))
    first, second, names = open_folder(tmp_path, 0.5)
    assert (len(first), len(second), names) == (2, 2, ["cat", "dog"])
    assert "ignored: 2 hidden folders" in caplog.text


def test_a_part_without_classes_beside_one_with_classes_is_named(tmp_path: Path) -> None:
    _images(tmp_path / "train")
    _part(tmp_path / "test")
    assert _refusal(tmp_path).startswith(f"{tmp_path}: has test/ but train/ holds no class folders; expected ")


def test_a_single_class_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _images(tmp_path / "jpg")
    assert open_folder(tmp_path, 0.5)[2] == ["jpg"]
    assert f"{tmp_path}: a single class, jpg; is each class a folder?" in caplog.text


def test_hidden_folders_never_count(tmp_path: Path) -> None:
    _part(tmp_path, 4)
    _images(tmp_path / "ant" / ".thumbnails", tmp_path / "ant" / "more" / ".Trash" / "files", tmp_path / ".cache")
    first, second, _ = open_folder(tmp_path, 0.5)
    assert len(first) + len(second) == 8 and first.ignored == {"hidden folders": 3}


def test_loose_images_are_counted_and_archives_refused(tmp_path: Path) -> None:
    _part(tmp_path)
    _images(tmp_path, count=3)
    (tmp_path / "ant.tar").write_bytes(b"left over after unpacking")
    assert open_folder(tmp_path, 0.5)[0].ignored == {"images beside the class folders": 3, ".tar": 1}
    (tmp_path / "cow.tar.gz").write_bytes(b"not unpacked")
    assert "holds cow.tar.gz without a folder of that name; unpack" in _refusal(tmp_path)


def test_links_upward_and_to_the_same_image(tmp_path: Path) -> None:
    _part(tmp_path / "train", 3)
    folder = tmp_path / "train" / "ant"
    (folder / "up").symlink_to(tmp_path)
    (folder / "again.png").symlink_to(folder / "0.png")
    (folder / "here").symlink_to(folder)
    first, second, _ = open_folder(tmp_path, 0.34)
    assert len(first) + len(second) == 6
    assert first.ignored == {
        "links to folders above": 1, "links to images already read": 1, "links to folders already read": 1
    }  # fmt: skip
    (folder / "zoo").symlink_to(tmp_path / "train" / "bee")
    assert f"is a link into the class {tmp_path / 'train' / 'bee'}" in _refusal(tmp_path)


def test_one_folder_for_both_parts_is_refused(tmp_path: Path) -> None:
    _part(tmp_path / "train")
    (tmp_path / "val").symlink_to("train")
    assert "val and train are the same folder" in _refusal(tmp_path)


def test_names_of_another_unicode_form_are_shown(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    _images(tmp_path / "train" / composed, tmp_path / "val" / decomposed)
    assert r"differ in the classes 'cafe\u0301' (val), 'caf\xe9' (train)" in _refusal(tmp_path)


@pytest.mark.parametrize("nested", [None, False, True])
def test_two_classes_that_look_alike_are_refused(nested: bool | None, tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        _images(tmp_path / unicodedata.normalize(form, "café"))
    both = r"'cafe\u0301' and 'caf\xe9' are one name in two Unicode forms"
    assert _refusal(tmp_path, nested) == f"{tmp_path}: {both}; rename one, or merge the classes"


def test_parts_of_file_names() -> None:
    assert part_of_file("data/train-00000-of-00004.parquet") == "train"
    assert part_of_file("imagenet1k-validation-07.tar") == "val"
    assert part_of_file("shard-00001.tar") is part_of_file("trainer.tar") is None
    with pytest.raises(UserError, match="named like train and like val"):
        part_of_file("train/val-0.tar")
