"""``mrmae data`` commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar
from mrmae_ds.data.convert.folder import open_folder
from tests.support.sample_data import photograph

pytestmark = pytest.mark.timeout(120, method="thread")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of six images; one that is not split off for validation is empty."""
    for place in range(12):
        path = tmp_path / "birds" / ("finch", "wren")[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph().crop((15 * place, 20 * place, 15 * place + 90, 20 * place + 120)).save(path)
    Path(open_folder(tmp_path / "birds", 0.34)[0].name(7)).write_bytes(b"")
    return tmp_path / "birds"


def test_write_info_and_verify(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["data", "write", str(tree), "--out", str(out), "--val-fraction", "0.34", "--workers", "1"]
    assert main([*command, "--max-side", "64", "--quality", "85", "--name", "Birds", "--max-bad", "10%"]) == 0
    printed = capsys.readouterr()
    train = out / "train.beton"
    assert f"{train}: Birds, 7 images, 2 classes (finch, wren)" in printed.out
    assert "3 to 4 images per class" in printed.out and "7 reduced" in printed.out
    assert f"warning: some images were left out, see {train}.skipped.csv" in printed.err
    assert (read_sidecar(train)["max_side"], read_sidecar(train)["quality"]) == (64, 85)
    assert main(["data", "info", str(train)]) == 0
    assert "left out  1 that cannot be read, listed in train.beton.skipped.csv" in capsys.readouterr().out
    assert main(["data", "verify", str(train), "--source", str(tree), "--num-images", "5"]) == 0
    printed = capsys.readouterr()
    assert f"{train}: 7 images decoded, checksum as written" in printed.out
    assert f"{train}: 5 images compared with {tree}: the same, at " in printed.out and "dB or more" in printed.out


def test_write_fails_beyond_max_bad(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "write", str(tree), "--out", str(tmp_path / "out"), "--val-fraction", "0.34", "--max-bad", "0"]
    assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "1 of 8 images cannot be read, more than the 0 that --max-bad allows" in errors[0]
    assert not (tmp_path / "out" / "train.beton").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["write", "{}/nowhere", "--out", "{}/out"], "nowhere: no such folder"),
        (["write", "{}/birds/wren/1.png", "--out", "{}/out"], "1.png: a file; name the folder that holds it"),
        (["tars", "{}/birds/wren/1.png", "--out", "{}/out"], "1.png: a file; name the folder that holds it"),
        (["write", "{}/birds", "--out", "{}/out", "--background", "whitish"], "background must be a color"),
        (["imagenet", "{}/birds", "--out", "{}/out"], "has neither train/ nor ILSVRC2012_img_train.tar"),
        (["write", "{}/birds", "--out", "{}/birds/wren/1.png"], "1.png: no files can be written there (File exists)"),
        (["write", "{}/birds", "--out", "{}/birds/wren/1.png/x"], "no files can be written there (Not a directory)"),
        (["write", "{}/birds", "--out", "{}/out", "--num-val-images", "1"], "fewer images than the 2 classes"),
        (["verify", "{}/x.beton", "--num-images", "0"], "--num-images must be at least 1"),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    arguments: list[str], message: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *(argument.format(tmp_path) for argument in arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "taken as" not in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


@pytest.mark.parametrize("text", ["many", "1.5.2", "x%"])
def test_invalid_max_bad_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "write", "SRC", "--out", "DIR", "--max-bad", text])
    assert caught.value.code == 2
    assert "--max-bad" in capsys.readouterr().err


def test_write_imports_neither_torch_nor_ffcv(tree: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from mrmae_ds.cli.main import main; status = main(sys.argv[1:]); "
        "sys.exit(status or ', '.join(name for name in ('torch', 'ffcv', 'cv2', 'timm') if name in sys.modules) or 0)"
    )
    command = ["data", "write", str(tree), "--out", str(tmp_path / "out"), "--val-fraction", "0.34"]
    command = [sys.executable, "-c", program, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert check_beton(tmp_path / "out" / "val.beton").num_samples == 4


def test_an_output_that_is_a_folder_is_refused_before_anything_is_converted(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "val.beton").mkdir(parents=True)
    assert main(["data", "write", str(tree), "--out", str(tmp_path / "out"), "--val-fraction", "0.34"]) == 2
    assert "val.beton: is a folder; remove it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.beton").exists()


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show_are_escaped(tree: Path, tmp_path: Path, encoding: str) -> None:
    (tree / "wren").rename(tree / "caf\udce9 鳥")
    program = "import sys; from mrmae_ds.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    out = tmp_path / "out"
    for arguments in (["write", str(tree), "--out", str(out), "--val-fraction", "0.34"], ["info", f"{out}/val.beton"]):
        command = [sys.executable, "-c", program, "data", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert rb"2 classes (caf\xe9 " in done.stdout
    assert check_beton(out / "val.beton").class_names[0] == "caf\udce9 鳥"
