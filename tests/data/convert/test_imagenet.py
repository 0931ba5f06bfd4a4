"""Three classes of ImageNet-1K in its published layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.convert.compare import compare_with_source
from mrmae_ds.data.convert.imagenet import ImageNetSource, open_imagenet, write_imagenet
from mrmae_ds.data.convert.imagenet_labels import read_class_names, read_synsets
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.data.convert.options import Output, WriteOptions
from mrmae_ds.errors import UserError
from tests.support.jpegs import stored_jpegs
from tests.support.sample_data import photograph

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(120, method="thread")

# The devkit's numbers are not in the order of the ids.
SYNSETS = "n02119789 1 kit_fox\nn02100735 2 English_setter\nn02096294 17 Australian_terrier\n"
SETTER, TERRIER, FOX = WNIDS = ["n02100735", "n02096294", "n02119789"]
SORTED = [TERRIER, SETTER, FOX]
VAL = [FOX, TERRIER, TERRIER, SETTER, FOX]
LABELS = [2, 0, 0, 1, 2]


def _image(path: Path, place: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph().crop((8 * place, 9 * place, 8 * place + 48, 9 * place + 36)).save(path, "JPEG", quality=95)


def _train(root: Path) -> Path:
    for place, wnid in enumerate(wnid for wnid in WNIDS for _ in range(2)):
        _image(root / "train" / wnid / f"{wnid}_{place}.JPEG", place)
    return root


def _flat_val(root: Path) -> Path:
    for place in range(len(VAL)):
        _image(root / "val" / f"ILSVRC2012_val_{place + 1:08}.JPEG", 20 + place)
    return root


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """train/ID/*.JPEG and a flat val/, without labels."""
    return _flat_val(_train(tmp_path / "in"))


def _opened(source: Path, **options: Path) -> ImageIndex:
    """Check the training set and return the validation set."""
    train, val, wnids = open_imagenet(ImageNetSource(source, allow_partial=True, **options))
    assert wnids == SORTED
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert all(Path(train.name(row)).parent.name == SORTED[label] for row, label in enumerate(train.labels))
    return val


def _numbers(val: ImageIndex) -> list[int]:
    return [int(Path(val.name(row)).stem[-8:]) for row in range(len(val))]


def _kaggle(source: Path) -> None:
    """Write Kaggle's labels, whose order differs from the images', as in the real file."""
    boxes = [f"ILSVRC2012_val_{i + 1:08},{wnid} 85 1 499 272 {wnid} 1 2 3 4" for i, wnid in enumerate(VAL)]
    (source / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(boxes), ""]))


def _devkit(source: Path) -> None:
    folder = source / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    numbers = {FOX: 1, SETTER: 2, TERRIER: 17}
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{numbers[wnid]}\n" for wnid in VAL))
    (source / "map_clsloc.txt").write_text(SYNSETS)


def _ids(source: Path) -> None:
    (source / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(VAL) + "\n")


def _caffe(source: Path) -> None:
    """Write Caffe's labels, indices of 1000 sorted ids; the other ids are before, between and after."""
    others = [f"n{number:08}" for number in [*range(1440000, 1440400), *range(3000000, 3000597)]]
    everything = sorted(others + WNIDS)
    numbered = "".join(f"{wnid} {number} name\n" for number, wnid in enumerate(reversed(everything), start=1))
    (source / "map_clsloc.txt").write_text(numbered)
    lines = [f"ILSVRC2012_val_{i + 1:08}.JPEG {everything.index(wnid)}" for i, wnid in enumerate(VAL)]
    (source / "val.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("labels", [_kaggle, _devkit, _ids, _caffe])
def test_labels_of_flat_validation_images(flat: Path, labels: object) -> None:
    assert callable(labels)
    labels(flat)
    val = _opened(flat)
    assert val.labels.tolist() == LABELS
    assert _numbers(val) == [1, 2, 3, 4, 5]


def test_validation_images_in_class_folders(tmp_path: Path) -> None:
    source = _train(tmp_path)
    for place, wnid in enumerate(VAL):
        _image(source / "val" / wnid / f"ILSVRC2012_val_{place + 1:08}.JPEG", place)
    val = _opened(source)
    assert (val.labels.tolist(), _numbers(val)) == ([0, 0, 1, 2, 2], [2, 3, 4, 1, 5])
    (source / "val" / "n00000001").mkdir()
    with pytest.raises(UserError, match=r"train/ and val/ differ in the classes n00000001"):
        open_imagenet(ImageNetSource(source, allow_partial=True))


def test_kaggle_archive_layout_is_read_with_its_labels(tmp_path: Path) -> None:
    _flat_val(_train(tmp_path / "ILSVRC" / "Data" / "CLS-LOC"))
    _kaggle(tmp_path)
    assert _opened(tmp_path).labels.tolist() == LABELS


def test_label_files_can_be_passed(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "truth.txt").write_text("1\n17\n17\n2\n1\n")
    with pytest.raises(UserError, match=r"truth\.txt: holds the devkit's class numbers; pass --synsets map_clsloc"):
        open_imagenet(ImageNetSource(flat, val_labels=tmp_path / "truth.txt", allow_partial=True))
    (tmp_path / "synsets.txt").write_text(SYNSETS)
    val = _opened(flat, val_labels=tmp_path / "truth.txt", synsets=tmp_path / "synsets.txt")
    assert val.labels.tolist() == LABELS


def test_other_counts_than_published_are_errors(
    flat: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _kaggle(flat)
    counts = "3 of 1,000 classes, 6 of 1,281,167 training images, 5 of 50,000 validation images"
    message = f"not ImageNet-1K as published: {counts}"
    with pytest.raises(UserError, match=f"{message}; unpack it again, or pass --allow-partial"):
        open_imagenet(ImageNetSource(flat))
    open_imagenet(ImageNetSource(flat, allow_partial=True))
    assert caplog.messages == [f"{flat}: {message}"]
    caplog.clear()
    for name, count in (("IMAGENET_CLASSES", 3), ("IMAGENET_TRAIN_SAMPLES", 6), ("IMAGENET_EVAL_SAMPLES", 5)):
        monkeypatch.setattr(f"mrmae_ds.data.convert.imagenet.{name}", count)
    open_imagenet(ImageNetSource(flat))
    assert caplog.messages == []
    (flat / "train" / FOX / f"{FOX}_9.JPEG").write_bytes(b"one more")
    with pytest.raises(UserError, match=r"not ImageNet-1K as published: 7 of 6 training images;"):
        open_imagenet(ImageNetSource(flat))


def test_labels_that_do_not_match_are_errors(flat: Path) -> None:
    with pytest.raises(UserError, match=r"holds no class folders, so the labels are needed: put LOC_val_solution\.csv"):
        open_imagenet(ImageNetSource(flat))
    labels = flat / "labels.txt"

    def fails(text: str, message: str, synsets: str | None = None) -> None:
        labels.write_text(text)
        if synsets is not None:
            (flat / "synsets.txt").write_text(synsets)
        named = flat / "synsets.txt" if synsets is not None else None
        with pytest.raises(UserError, match=message):
            open_imagenet(ImageNetSource(flat, val_labels=labels, synsets=named))

    fails("\n".join(VAL[:4]), r"labels\.txt: has no label of ILSVRC2012_val_00000005\.JPEG")
    fails("\n".join([*VAL[:4], "n01440764"]), r"_00000005\.JPEG is of n01440764, of which train/ has no folder")
    fails("fox\n", r"line 1 is neither a WordNet id, a number nor FILE LABEL: fox")
    fails("ILSVRC2012_val_00000001.JPEG 3\n", r"numbers refer to 1,000 classes, but 3 are known; pass --synsets")
    fails("1\n3\n", r"line 2: there is no class 3", SYNSETS)
    fails("1\n", r"synsets\.txt: line 2 is not `n02119789 1 kit_fox`: 2 n02100735", "n02119789 1 fox\n2 n02100735\n")
    with pytest.raises(UserError, match=r"meta\.mat: a MATLAB file; docs/data\.md"):
        read_synsets(flat / "meta.mat")
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read as text"):
        open_imagenet(ImageNetSource(flat, val_labels=flat / "nowhere.txt"))


def test_unexpected_trees_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither train/ nor .*; expected .*/train/n01440764/"):
        open_imagenet(ImageNetSource(tmp_path))
    _train(tmp_path)
    with pytest.raises(UserError, match=r"val: no such folder; unpack ILSVRC2012_img_val\.tar there"):
        open_imagenet(ImageNetSource(tmp_path))
    (tmp_path / "val").mkdir()
    _ids(tmp_path)
    with pytest.raises(UserError, match=r"val: no images ILSVRC2012_val_\*\.JPEG"):
        open_imagenet(ImageNetSource(tmp_path))
    _image(tmp_path / "train" / "cats" / "1.JPEG", 1)
    with pytest.raises(UserError, match=r"train: cats is no WordNet id .* data/folder\.py"):
        open_imagenet(ImageNetSource(tmp_path))


def test_allow_partial_leaves_out_images_of_other_classes(flat: Path) -> None:
    _kaggle(flat)
    for path in (flat / "train" / FOX).iterdir():
        path.unlink()
    (flat / "train" / FOX).rmdir()
    _, val, wnids = open_imagenet(ImageNetSource(flat, allow_partial=True))
    assert (wnids, _numbers(val), val.labels.tolist()) == ([TERRIER, SETTER], [2, 3, 4], [0, 0, 1])
    assert val.ignored == {"of classes that train/ lacks": 2}


def test_readable_class_names_are_unique_and_complete(tmp_path: Path) -> None:
    text = tmp_path / "names.txt"
    text.write_text(f"{FOX} kit fox, Vulpes macrotis\n{SETTER} crane\n{TERRIER} crane\nn01440764 tench\n")
    expected = [f"crane ({TERRIER})", f"crane ({SETTER})", "kit fox"]
    assert read_class_names(text, SORTED) == expected
    (tmp_path / "names.json").write_text(json.dumps({FOX: "kit fox", SETTER: "crane", TERRIER: "crane"}))
    assert read_class_names(tmp_path / "names.json", SORTED) == expected
    text.write_text(f"{FOX} kit fox\n")
    with pytest.raises(UserError, match=f"has no name of {TERRIER}"):
        read_class_names(text, SORTED)
    (tmp_path / "names.json").write_text("[1]")
    with pytest.raises(UserError, match=r"names\.json: not a JSON object"):
        read_class_names(tmp_path / "names.json", SORTED)


def test_written_files_equal_their_source(flat: Path, tmp_path: Path) -> None:
    _kaggle(flat)
    damaged = flat / "val" / "ILSVRC2012_val_00000002.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    options = WriteOptions(workers=1, max_bad=1)
    train, val = write_imagenet(ImageNetSource(flat, allow_partial=True), Output(tmp_path / "out", options=options))
    assert (train.name, train.class_names, train.num_samples) == ("ImageNet-1K", tuple(SORTED), 6)
    assert [label for _, label, _ in stored_jpegs(val.path)] == [2, 0, 1, 2]
    assert compare_with_source(val.path, flat, 100) > 30


def test_imagenet_script_writes_a_partial_set_only_if_allowed(flat: Path, tmp_path: Path) -> None:
    _devkit(flat)
    (flat / "names.txt").write_text(f"{FOX} kit fox\n{SETTER} setter, dog\n{TERRIER} terrier\n")
    command = [sys.executable, ROOT / "data" / "imagenet.py", flat, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "error: " in done.stderr and "--allow-partial" in done.stderr
    more = ["--allow-partial", "--class-names", flat / "names.txt", "--num-train-images", "3", "--workers", "1"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "train.beton: ImageNet-1K, 3 images, 3 classes (terrier, setter, kit fox)" in done.stdout
    assert check_beton(tmp_path / "out" / "val.beton").num_samples == 5
