"""WebDataset, Hugging Face files and ImageNet's archives give the same bytes as a tree of the same images."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrmae_ds.cli.main import main
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.convert.compare import compare_with_source
from mrmae_ds.data.convert.imagenet import ImageNetSource, open_imagenet, write_imagenet
from mrmae_ds.data.convert.options import Output, WriteOptions
from mrmae_ds.data.convert.shards import ShardOptions, find_shards, open_parts
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.errors import UserError
from tests.support.jpegs import stored_jpegs
from tests.support.shards import NAMES, SAMPLES, image_bytes, write_tar, write_webdataset

pytestmark = pytest.mark.timeout(120, method="thread")


def _expected(folder: Path, numbers: Iterable[int]) -> list[tuple[bytes, int, int]]:
    """Return what the same images give as a plain data set."""
    images = [(Image.open(io.BytesIO(image_bytes(number))), number % 2) for number in numbers]
    path = folder / "expected.beton"
    write_beton(images, path, WriteOptions(workers=1), class_names=NAMES, name="x", source="x")  # type: ignore[arg-type]
    return stored_jpegs(path)


def test_webdataset_gives_the_bytes_of_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_webdataset(tmp_path / "in"), tmp_path / "out"
    arguments = ["--class-names", str(source / "names.txt"), "--workers", "2"]
    assert main(["data", "tars", str(source), "--out", str(out), *arguments]) == 0
    printed = capsys.readouterr()
    assert "2 files, train-000000.tar ... train-000001.tar: taken as train" in printed.err
    assert "index train-000000.tar, ...: 100%" in printed.err and "index validation-0.tar: 100%" in printed.err
    assert "ignored   6 .txt" in printed.out
    assert stored_jpegs(out / "train.beton") == _expected(tmp_path, range(6))
    assert stored_jpegs(out / "val.beton") == _expected(tmp_path, range(6, 8))
    assert check_beton(out / "val.beton").class_names == ("finch", "wren")
    assert compare_with_source(out / "train.beton", source, 10) > 25


def test_classes_without_names_are_reported_with_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    folder, names = tmp_path / "in", tmp_path / "names.txt"
    folder.mkdir()
    samples = [(f"{i}.png", image_bytes(i)) for i in range(4)] + [(f"{i}.cls", b"%d" % (i % 2)) for i in range(4)]
    write_tar(folder / "x.tar", sorted(samples))
    names.write_text("cat\ndog\n")
    assert open_parts(folder, "tars", ShardOptions(0.5))[2] == ["0", "1"]
    assert "in: names no classes, which are called by their numbers; --class-names FILE names them" in caplog.text
    assert "in: 1 file, x.tar: taken as train" in caplog.text
    caplog.clear()
    assert open_parts(folder, "tars", ShardOptions(0.5, str(names)))[2] == ["cat", "dog"]
    assert "--class-names" not in caplog.text
    arguments = ["data", "tars", str(folder), "--out", str(tmp_path / "out"), "--val-fraction", "0.5"]
    assert main([*arguments, "--class-names", str(names)]) == 0  # the option has this name
    assert "2 classes (cat, dog)" in capsys.readouterr().out


def test_the_files_that_macos_adds_are_ignored(tmp_path: Path) -> None:
    files = [(f"{n}.{end}", content) for n in range(4) for end, content in (("png", image_bytes(n)), ("cls", b"0"))]
    write_tar(tmp_path / "x.tar", [("./._0.png", b"Mac OS X"), *files])
    train, val, _ = open_parts(tmp_path, "tars", ShardOptions(val_fraction=0.5))
    assert (len(train), len(val), train.ignored) == (2, 2, {"hidden files": 1})


def test_shards_that_are_refused(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as caught:
            open_parts(tmp_path, "tars", ShardOptions())
        return str(caught.value)

    assert "no .tar files for training" in message()
    write_tar(tmp_path / "x.tar", [("1.png", image_bytes(1))])
    assert "1.png has no label" in message()
    write_tar(tmp_path / "x.tar", [("1.png", image_bytes(1)), ("1.cls", b"cat")])
    assert "1.cls is no label" in message()
    write_tar(tmp_path / "x.tar", [("1.png", image_bytes(1)), ("1.jpg", image_bytes(2)), ("1.cls", b"0")])
    assert "two images of one sample" in message()
    write_tar(tmp_path / "x.tar", [("1.png", image_bytes(1)), ("1.cls", b"0"), ("1.json", b'{"label": 1}')])
    assert "1.json says the label 1, another file 0" in message()
    for label in ("1.7", "true"):
        write_tar(tmp_path / "x.tar", [("1.png", image_bytes(1)), ("1.json", f'{{"label": {label}}}'.encode())])
        assert "1.json is no label" in message() and "is no whole number" in message()
    write_tar(
        tmp_path / "x.tar", [("1.png", image_bytes(1)), ("1.cls", b"0"), ("2.png", image_bytes(1)), ("2.cls", b"2")]
    )
    assert "no image of the class 1" in message() or "single image" in message()
    content = (tmp_path / "x.tar").read_bytes()
    for length in (1000, 512 * 3 + 100, len(content.rstrip(b"\0")) // 512 * 512 + 512):
        (tmp_path / "x.tar").write_bytes(content[:length])
        assert "no complete, uncompressed tar archive" in message()
    link = tarfile.TarInfo("2.png")
    link.type, link.linkname = tarfile.LNKTYPE, "1.png"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(link)
    assert "2.png is a link or has holes" in message()
    (tmp_path / "y.tar.gz").write_bytes(b"")
    assert "y.tar.gz: a compressed archive" in message()
    (tmp_path / "y.tar.gz").unlink()
    write_tar(tmp_path / "train-0.tar", [])
    with pytest.raises(UserError, match=r"x\.tar is named like no part"):
        find_shards(tmp_path, "tars")


def _table(rows: Iterable[tuple[int, int]], names: list[str] | None = NAMES) -> Any:
    pa = pytest.importorskip("pyarrow")
    rows = list(rows)
    images = [{"bytes": image_bytes(number), "path": f"{number}.png"} for number, _ in rows]
    table = pa.table({"image": images, "label": pa.array([label for _, label in rows], pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_hugging_face_files_give_the_bytes_of_a_tree(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    source, out = tmp_path / "in", tmp_path / "out"
    for part, rows in (("train", SAMPLES[:6]), ("validation", SAMPLES[6:]), ("test", [(0, -1)])):
        if form == "parquet":
            path = source / "data" / f"{part}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(_table(rows), path, row_group_size=4)
        else:
            path = source / part / "data-00000-of-00001.arrow"
            path.parent.mkdir(parents=True)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _table(rows).schema) as writer:
                writer.write_table(_table(rows), max_chunksize=4)
    assert main(["data", "parquet", str(source), "--out", str(out), "--workers", "2"]) == 0
    assert re.search(r"index \S+: 100%.* 1/1 ", capsys.readouterr().err)
    assert stored_jpegs(out / "train.beton") == _expected(tmp_path, range(6))
    assert stored_jpegs(out / "val.beton") == _expected(tmp_path, range(6, 8))
    assert check_beton(out / "train.beton").class_names == ("finch", "wren")
    assert compare_with_source(out / "train.beton", source, 10) > 25


def _numbered(folder: Path, *names: str) -> Path:
    """Write files of no content: their names are checked before they are read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "refusal"),
    [
        (["train-00000-of-00004", "train-00003-of-00004"], "of 4 files for train, these are missing: 1, 2; fetch them"),
        (["train-00001-of-00004"], "of 4 files for train, these are missing: 0, 2, 3; fetch them"),
        (["train-0-of-1", "val-1-of-2"], "of 2 files for val, these are missing: 0; fetch them"),
        (["train-0-of-99999999999"], "of 99,999,999,999 files for train, these are missing: 1, 2, 3, ...;"),
        (
            ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
            "train-00000-of-00001.parquet and train-00001-of-00002.parquet are of different sets; move one set away",
        ),
        (["train-0-of-1", "train"], "train-0-of-1.parquet and train.parquet are of different sets"),
        (["a_train-0-of-1", "b_train-0-of-1"], "a_train-0-of-1.parquet and b_train-0-of-1.parquet are of different"),
        (["train-0-of-1-3fe9", "train-0-of-1-a01b"], "train-0-of-1-3fe9.parquet is beyond the 1 file for train; move"),
        (["train-0-of-1", "train-1-of-1"], "train-0-of-1.parquet is beyond the 1 file for train"),
    ],
)
def test_shards_that_are_not_one_complete_set(names: list[str], refusal: str, tmp_path: Path) -> None:
    _numbered(tmp_path, *(f"{name}.parquet" for name in names))
    with pytest.raises(UserError) as caught:
        find_shards(tmp_path, "parquet")
    assert str(caught.value).startswith(f"{tmp_path}: {refusal}")


def test_shards_of_two_configurations_are_refused(tmp_path: Path) -> None:
    _numbered(tmp_path, "full/train-0-of-1.parquet", "full/val-0-of-1.parquet", "small/train-0-of-1.parquet")
    with pytest.raises(UserError, match=f": {tmp_path}/full and {tmp_path}/small both hold files for train; name one"):
        find_shards(tmp_path, "parquet")
    assert {part: len(paths) for part, paths in find_shards(tmp_path / "full", "parquet").items()} == {
        "train": 1, "val": 1
    }  # fmt: skip


def test_complete_sets_of_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zero = _numbered(tmp_path / "zero", "train-0-of-2-ab.parquet", "train-1-of-2-cd.parquet", "test-1-of-9.parquet")
    one = _numbered(tmp_path / "one", "train_1_of_2.parquet", "train_2_of_2.parquet")
    links = tmp_path / "links"
    links.mkdir()
    for number, source in enumerate((zero, one)):
        (links / f"{number}.parquet").symlink_to(next(source.glob("train*")))
    for folder in (zero, one, links):
        assert len(find_shards(folder, "parquet")["train"]) == 2
    assert "missing" not in caplog.text


def test_a_gap_in_the_numbers_of_shards_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    find_shards(_numbered(tmp_path, *(f"train-{n:06}.tar" for n in (0, 1, 2)), "val-07.tar"), "tars")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    find_shards(_numbered(tmp_path, "train-000005.tar", "val-10.tar"), "tars")
    assert f"{tmp_path}: no train-*.tar is numbered 3, 4; are files missing?" in caplog.text
    assert f"{tmp_path}: no val-*.tar is numbered 8, 9; are files missing?" in caplog.text


def test_the_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["data", "parquet", str(tmp_path), "--out", str(tmp_path / "out"), "--val-fraction", "0.5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: Parquet and Arrow files need pyarrow (")
    assert error.endswith("in the clone: pip install -e '.[parquet]' -c constraints.txt")


def test_tables_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    command = ["data", "parquet", str(tmp_path), "--out", str(tmp_path / "out"), "--val-fraction", "0.5"]

    def message() -> str:
        assert main(command) == 2
        return capsys.readouterr().err

    pq.write_table(_table([(0, -1)]), path)
    assert "row 0 has the label -1" in message()
    labels = pq.read_table(path).drop_columns("label").append_column("label", [[True]])
    pq.write_table(labels, path)
    assert "row 0 has the label True; every row needs a whole number, 0 or more" in message()
    pixels = pq.read_table(path).drop_columns("image").append_column("image", [[[1, 2]]])
    pq.write_table(pixels, path)
    assert "column image holds list<element: int64>, but images are bytes of a file such as JPEG" in message()
    pq.write_table(_table(SAMPLES, ["caf\xe9", "cafe\u0301"]), path)
    assert r"'caf\xe9' and 'cafe\u0301' are one name in two Unicode forms" in message()
    pq.write_table(_table(SAMPLES, ["finch"]), path)
    assert "has the label 1, but only 1 class, from 0" in message()
    pq.write_table(_table(SAMPLES).rename_columns(["pixels", "target"]).replace_schema_metadata(None), path)
    assert "0 columns may hold the images, of pixels, target; name it with --image-column" in message()
    assert main([*command, "--image-column", "pixels", "--label-column", "target", "--workers", "1"]) == 0
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in message()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "it is a pointer of Git LFS: `git lfs pull` fetches the file" in message()


@pytest.mark.parametrize("metadata", ['{"info": null}', "none", "[]", '{"info": {"features": []}}'])
def test_a_description_that_cannot_be_read_is_none(metadata: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(_table(SAMPLES).replace_schema_metadata({"huggingface": metadata}), tmp_path / "x.parquet")
    train, val, names = open_parts(tmp_path, "parquet", ShardOptions(val_fraction=0.5))
    assert len(train) + len(val) == len(SAMPLES) and names == ["0", "1"]


def test_arrow_files_of_both_formats_hold_the_same_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = _table(SAMPLES)
    stored = []
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        (tmp_path / name).mkdir()
        with new(str(tmp_path / name / "x.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert (
            main(["data", "parquet", str(tmp_path / name), "--out", str(tmp_path / f"{name}.out"), "--workers", "1"])
            == 0
        )
        stored.append(stored_jpegs(tmp_path / f"{name}.out/train.beton"))
    assert stored[0] == stored[1] and stored[0]


def test_imagenets_archives_give_the_bytes_of_the_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, archives = tmp_path / "tree", tmp_path / "archives"
    wnids = ["n01440764", "n01443537"]
    inner = []
    for wnid in wnids:
        files = [(f"{wnid}_{number}.JPEG", image_bytes(number)) for number in range(3)]
        (tree / "train" / wnid).mkdir(parents=True)
        for name, content in files:
            (tree / "train" / wnid / name).write_bytes(content)
        write_tar(tmp_path / f"{wnid}.tar", reversed(files))
        inner.append((f"{wnid}.tar", (tmp_path / f"{wnid}.tar").read_bytes()))
    val = [(f"ILSVRC2012_val_{number:08}.JPEG", image_bytes(number + 3)) for number in (1, 2, 3)]
    (tree / "val").mkdir()
    for name, content in val:
        (tree / "val" / name).write_bytes(content)
    write_tar(archives / "ILSVRC2012_img_train.tar", reversed(inner))
    write_tar(archives / "ILSVRC2012_img_val.tar", reversed(val))
    for folder in (tree, archives):
        (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join([wnids[1], *wnids]))
    options = WriteOptions(workers=2)
    for folder in (tree, archives):
        source = ImageNetSource(folder, allow_partial=True)
        write_imagenet(source, Output(tmp_path / "out" / folder.name, options=options))
        assert ("index ILSVRC2012_img_val.tar: 100%" in capsys.readouterr().err) == (folder == archives)
    for part in ("train", "val"):
        paths = [tmp_path / "out" / folder.name / f"{part}.beton" for folder in (tree, archives)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert compare_with_source(paths[1], archives, 10) > 25
    damaged = archives / "ILSVRC2012_img_train.tar"
    damaged.write_bytes(damaged.read_bytes()[:-12000])
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar.*no complete, uncompressed tar archive"):
        open_imagenet(ImageNetSource(archives, allow_partial=True))
