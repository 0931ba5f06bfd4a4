"""Trees of images, class-balanced subsets, and the scripts that write data sets."""

from __future__ import annotations

import errno
import gzip
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.convert.fashion_mnist import FashionMNIST, find_files, read_idx
from mrmae_ds.data.convert.folder import open_folder, scan, write_folder
from mrmae_ds.data.convert.options import Output, WriteOptions
from mrmae_ds.data.convert.subset import balanced_subset, split_off
from mrmae_ds.data.convert.verify import describe_beton
from mrmae_ds.errors import UserError
from tests.support.jpegs import stored_jpegs
from tests.support.sample_data import photograph

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(120, method="thread")


def _tree(root: Path, classes: dict[str, int]) -> Path:
    """Write ROOT/CLASS/*.jpg with the given counts."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            photograph().crop((20 * i, 0, 20 * i + 40, 50)).save(root / name / f"{i:02}.jpg")
    return root


def _script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of data/."""
    return subprocess.run(
        [sys.executable, str(ROOT / "data" / name), *arguments],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip


def test_balanced_subsets_are_balanced_nested_and_reproducible() -> None:
    labels = np.array([0] * 50 + [1] * 4 + [2] * 30)
    rows = balanced_subset(labels, 30)
    assert rows.tolist() == sorted(set(rows.tolist())) == balanced_subset(labels, 30).tolist()
    assert np.bincount(labels[rows]).tolist() == [13, 4, 13]
    assert set(balanced_subset(labels, 9).tolist()) < set(rows.tolist())
    assert np.bincount(labels[balanced_subset(labels, 9)]).tolist() == [3, 3, 3]
    assert balanced_subset(labels, 84).tolist() == list(range(84))
    assert balanced_subset(labels, 0).tolist() == []
    with pytest.raises(ValueError, match="cannot take 85 of 84"):
        balanced_subset(labels, 85)


def test_split_takes_a_fraction_of_every_class() -> None:
    labels = np.array([0] * 40 + [1] * 3 + [2] * 10 + [3])
    first, second = split_off(labels, 0.1)
    assert sorted(first.tolist() + second.tolist()) == list(range(54))
    assert np.bincount(labels[second], minlength=4).tolist() == [4, 1, 1, 0]
    assert second.tolist() == split_off(labels, 0.1)[1].tolist()


def test_train_and_val_folders_are_used_unchanged(tmp_path: Path) -> None:
    _tree(tmp_path / "train", {"cat": 4, "ant": 3})
    _tree(tmp_path / "val", {"cat": 1, "ant": 2})
    train, val, names = open_folder(tmp_path, 0.1)
    assert names == ["ant", "cat"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([0] * 3 + [1] * 4, [0] * 2 + [1])
    assert [Path(train.name(row)).relative_to(tmp_path).as_posix() for row in (0, 6)] == [
        "train/ant/00.jpg",
        "train/cat/03.jpg",
    ]


@pytest.mark.parametrize("below", ["", "train"])
def test_validation_set_is_split_off_without_val_folder(tmp_path: Path, below: str) -> None:
    _tree(tmp_path / below, {"a": 10, "b": 5})
    train, val, _ = open_folder(tmp_path, 0.2)
    assert (np.bincount(train.labels).tolist(), np.bincount(val.labels).tolist()) == ([8, 4], [2, 1])
    assert not {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))}


def test_names_of_classes_are_printed_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = _tree(tmp_path / "in", {"a\nb": 2, "\x1b[31mc": 2})
    write = ["data", "write", str(tree), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*write, "--name", "d\ne", "--max-side", "30", "--val-fraction", "0.5"]) == 0
    assert capsys.readouterr().out.count(r": d\ne, 2 images, 2 classes (\x1b[31mc, a\nb), ") == 2
    assert main(["data", "info", str(tmp_path / "out" / "val.beton")]) == 0
    assert r"(\x1b[31mc, a\nb)" in capsys.readouterr().out
    _tree(tree, {"f\ng": 1})
    with pytest.raises(UserError, match=r"the class f\\ng has a single image"):
        open_folder(tree, 0.5)
    (tree / "f\ng" / "00.jpg").unlink()
    with pytest.raises(UserError, match=r"/f\\ng: no images"):
        open_folder(tree, 0.5)


def test_folders_are_written(tmp_path: Path) -> None:
    _tree(tmp_path / "in", {"a": 10, "b": 6})
    output = Output(tmp_path / "out", options=WriteOptions(max_side=30, workers=1))
    written = write_folder(tmp_path / "in", replace(output, train_count=6), val_fraction=0.5)
    assert [(info.path.name, info.num_samples, info.class_names) for info in written] == [
        ("train.beton", 6, ("a", "b")),
        ("val.beton", 8, ("a", "b")),
    ]
    assert [label for _, label, _ in stored_jpegs(written[0].path)] == [0, 0, 0, 1, 1, 1]
    assert write_folder(tmp_path / "in", replace(output, val_count=9), val_fraction=0.5)[1].num_samples == 8
    with pytest.raises(UserError, match=r"the val count must be at least 1, not 0"):
        write_folder(tmp_path / "in", replace(output, val_count=0), val_fraction=0.5)
    with pytest.raises(UserError, match=r"--num-train-images 1: fewer images than the 2 classes .*; give 2 or more"):
        write_folder(tmp_path / "in", replace(output, train_count=1), val_fraction=0.5)


def test_unexpected_trees_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere", 0.1)
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(UserError, match=r"no class folders; expected .*/CLASS/IMAGE"):
        open_folder(tmp_path, 0.1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=r"a: no images \(1 \.txt\); add some or remove the folder"):
        open_folder(tmp_path, 0.1)
    _tree(tmp_path / "half" / "val", {"a": 1})
    with pytest.raises(UserError, match="has val/ but no train/"):
        open_folder(tmp_path / "half", 0.1)
    _tree(tmp_path / "half" / "train", {"a": 1, "b": 1})
    with pytest.raises(UserError, match="differ in the classes b"):
        open_folder(tmp_path / "half", 0.1)
    with pytest.raises(UserError, match="between 0 and 1"):
        open_folder(_tree(tmp_path / "flat", {"a": 2}), 1.0)
    with pytest.raises(UserError, match="the class b has a single image"):
        open_folder(_tree(tmp_path / "single", {"a": 2, "b": 1}), 0.5)


def test_other_files_links_and_subfolders_of_a_class_folder(tmp_path: Path) -> None:
    _tree(tmp_path / "in", {"a": 2, "b": 1})
    folder = tmp_path / "in" / "a"
    (folder / "like.jpg").mkdir()
    (folder / "01.jpg").rename(folder / "like.jpg" / "01.JPG")
    (folder / "like.jpg" / "again").symlink_to(folder)
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "notes.txt").write_text("none")
    (folder / ".hidden.jpg").write_text("none")
    (folder / "Makefile").write_text("none")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "b" / "00.jpg").rename(tmp_path / "elsewhere" / "00.jpg")
    (tmp_path / "in" / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    images = scan(tmp_path / "in", ["a", "b"])
    assert [Path(images.name(row)).relative_to(tmp_path / "in").as_posix() for row in range(len(images))] == [
        "a/00.jpg", "a/gone.png", "a/like.jpg/01.JPG", "b/linked/00.jpg"
    ]  # fmt: skip
    assert images.ignored == {".txt": 1, "hidden files": 1, "no extension": 1, "links to folders already read": 1}
    for name in ("02.png", "03.png", "04.png"):
        photograph().resize((40, 50)).save(folder / name)
    photograph().resize((40, 50)).save(tmp_path / "elsewhere" / "01.png")
    output = Output(tmp_path / "out", options=WriteOptions(max_bad=1))
    info, _ = write_folder(tmp_path / "in", output, val_fraction=0.5, nested=False)
    ignored = "1 .txt, 1 hidden file, 1 link to folders already read, 1 no extension"
    assert f"ignored   {ignored}" in describe_beton(info.path)


def test_classes_that_are_numbers_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    open_folder(_tree(tmp_path / "in", {"0": 2, "1": 2}), 0.5)
    assert "in: its classes are called by numbers; rename the folders if the classes have names" in caplog.text
    caplog.clear()
    open_folder(_tree(tmp_path / "named", {"0": 2, "b": 2}), 0.5)
    assert "rename" not in caplog.text and "2 classes, 4 images" in caplog.text


def test_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tree(tmp_path, {"a": 1})

    def refused(folder: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(UserError, match=r": cannot be read \(Permission denied\)"):
        scan(tmp_path, ["a"])


def test_folder_script_reports_the_written_files(tmp_path: Path) -> None:
    source, out = _tree(tmp_path / "in", {"a": 4, "b": 4}), tmp_path / "out"
    done = _script("folder.py", str(source), "--out", str(out), "--val-fraction", "0.25", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert f"{out}/train.beton: in, 6 images, 2 classes (a, b)" in done.stdout
    assert f"{out}/val.beton: in, 2 images" in done.stdout
    assert check_beton(out / "val.beton").num_samples == 2
    damaged = Path(open_folder(source, 0.25)[0].name(0))
    damaged.write_bytes(damaged.read_bytes()[:-200])
    arguments = ("folder.py", str(source), "--out", str(out), "--val-fraction", "0.25")
    done = _script(*arguments, "--max-bad", "0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{damaged}: OSError: image file is truncated" in done.stderr
    done = _script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "left out  1 that cannot be read, listed in train.beton.skipped.csv" in done.stdout
    assert f"warning: some images were left out, see {out}/train.beton.skipped.csv" in done.stderr


def _write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def idx_files(tmp_path: Path) -> Path:
    """The four files of Fashion-MNIST, with 40 and 20 gray crops of a photograph in ten classes."""
    gray = np.asarray(photograph().convert("L"))
    crops = np.stack([gray[9 * i : 9 * i + 28, 100:128] for i in range(60)])
    _write_idx(tmp_path, "train", crops[:40], np.arange(40, dtype=np.uint8) % 10)
    _write_idx(tmp_path, "t10k", crops[40:], np.arange(20, dtype=np.uint8) // 2)
    return tmp_path


def test_fashion_mnist_is_padded_rgb(idx_files: Path) -> None:
    dataset = FashionMNIST(idx_files, "val")
    assert len(dataset) == 20
    image, label = dataset[7]
    pixels = np.asarray(image)
    assert (image.mode, pixels.shape, label) == ("RGB", (32, 32, 3), 3)
    gray = np.asarray(photograph().convert("L"))[9 * 47 : 9 * 47 + 28, 100:128]
    assert (pixels[2:30, 2:30] == gray[:, :, None]).all()
    assert pixels.sum() == 3 * gray.astype(int).sum()
    assert sorted(label for _, label in (FashionMNIST(idx_files, "train", 10)[i] for i in range(10))) == list(range(10))


def test_fashion_mnist_script_reads_a_folder(idx_files: Path) -> None:
    out = idx_files / "out"
    done = _script("fashion_mnist.py", "--out", str(out), "--source", str(idx_files), "--num-train-images", "20")
    assert done.returncode == 0, done.stderr
    assert "train.beton: Fashion-MNIST, 20 images, 10 classes" in done.stdout
    assert "val.beton: Fashion-MNIST, 20 images, 10 classes" in done.stdout
    done = _script("fashion_mnist.py", "--out", str(out), "--source", str(idx_files), "--num-val-images", "21")
    assert (done.returncode, done.stderr.strip()) == (2, "error: the val count must be in 1..20, not 21")
    done = _script("fashion_mnist.py", "--out", str(out), "--source", str(idx_files), "--num-val-images", "9")
    assert done.returncode == 2 and "--num-val-images 9: fewer images than the 10 classes" in done.stderr


def test_invalid_fashion_mnist_files_are_errors(idx_files: Path) -> None:
    labels = idx_files / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"t10k-labels.*not a gzipped idx file"):
        FashionMNIST(idx_files, "val")
    labels.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(UserError, match=r"t10k-labels.*not a gzipped idx file"):
        read_idx(labels)
    labels.unlink()
    with pytest.raises(UserError, match="lacks t10k-labels-idx1-ubyte"):
        find_files(str(idx_files), idx_files / "cache")


def test_missing_fashion_mnist_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("mrmae_ds.data.convert.fashion_mnist.debian_folder", lambda: None)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(UserError, match=r"no network.*apt-get install dataset-fashion-mnist.*--source"):
        find_files("auto", tmp_path)
