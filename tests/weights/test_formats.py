"""Weights files of other programs: every format is read, code is never executed, damage is reported."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.cli.inspect import describe_file
from mrmae_ds.errors import UserError
from mrmae_ds.files import split_choice
from mrmae_ds.weights.formats import TensorFile, read_tensor_file, verify_checksums
from mrmae_ds.weights.paths import find_weights, weights_sha256
from mrmae_ds.weights.states import unwrap

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


class TouchesAFile:
    """Unpickling it calls ``Path.touch``: a harmless stand-in for any code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class SetsItsState(nn.Module):
    """A TorchScript module whose ``__setstate__`` runs on loading."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]


def assert_holds_state(file: TensorFile) -> None:
    assert file.tensors.keys() == STATE.keys()
    assert all(torch.equal(file.tensors[name], value) for name, value in STATE.items())


def scripted() -> Any:
    return torch.jit.script(nn.Linear(3, 2))


def traced() -> Any:
    return torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3))


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_detects_safetensors_by_their_bytes(name: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / name, metadata={"format": "pt", "note": "n"})
    file = read_tensor_file(tmp_path / name)
    assert_holds_state(file)
    assert (file.format, file.metadata["note"], file.args, file.path) == ("safetensors", "n", {}, tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "module", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_torch_files_are_read_whatever_holds_their_state(
    zipped: bool, key: str | None, prefix: str, tmp_path: Path
) -> None:
    state = {prefix + name: value for name, value in STATE.items()}
    content = {key: state, "epoch": 3, "optimizer": {"lr": 0.1}} if key else state
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    file = read_tensor_file(tmp_path / "x.pth")
    assert_holds_state(file)
    assert (file.format, file.args) == ("pickle", {})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_released_file_may_keep_its_command_line(zipped: bool, tmp_path: Path) -> None:
    args = argparse.Namespace(model="convmae_convvit_base_patch16_dec512d8b", mask_ratio=0.75)
    torch.save({"model": STATE, "args": args}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    file = read_tensor_file(tmp_path / "x.pth")
    assert_holds_state(file)
    assert file.args == vars(args)
    with pytest.raises(pickle.UnpicklingError):  # the class is allowed while that one file is read, not for good
        torch.load(tmp_path / "x.pth", weights_only=True)


@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_archives_are_read_without_running_their_code(
    make: Callable[[], Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    module = make()
    module.save(str(tmp_path / "ViT.pt"))
    recwarn.clear()
    file = read_tensor_file(tmp_path / "ViT.pt")
    assert file.format == "torchscript" and "Linear" in file.code
    assert all(torch.equal(file.tensors[name], value) for name, value in module.state_dict().items())
    assert sorted(file.tensors) == ["bias", "weight"]
    assert len(recwarn) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_that_would_run_on_loading_is_refused(tmp_path: Path) -> None:
    torch.jit.script(SetsItsState()).save(str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match=r"x.pt: not a readable weights file.*__setstate__ would run"):
        read_tensor_file(tmp_path / "x.pt")


def test_arrays_of_numpy_in_torchs_archive_are_named(tmp_path: Path) -> None:
    torch.save({"a": np.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x.pt: a pickle that calls numpy\.\w+\.multiarray\._reconstruct, and code"):
        read_tensor_file(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain0", "plain2", "plain4", "plain5"])
def test_code_is_named_and_never_runs(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    content = {"model": STATE if not kind.startswith("plain") else {}, "hook": TouchesAFile(ran)}
    if kind.startswith("plain"):
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
        pickle.loads(path.read_bytes())
        assert ran.exists()  # it would run
        ran.unlink()
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    called = r"((builtins\.|__builtin__\.)?getattr|pathlib\.Path\.touch)"
    with pytest.raises(UserError, match=rf"x.pt: a pickle that calls {called}, and code in a file is never executed"):
        read_tensor_file(path)
    assert not ran.exists()
    assert len(recwarn) == 0


def test_a_whole_pickled_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x.pt: a pickle that calls torch.nn.modules.linear.Linear"):
        read_tensor_file(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("left", [0, 9, 100, -300])
def test_truncated_torch_files_are_refused(zipped: bool, left: int, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(500)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "x.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:left])
    with pytest.raises(UserError, match=r"x.pt: not a readable weights file, or truncated"):
        read_tensor_file(tmp_path / "x.pt")


@pytest.mark.parametrize("left", [0, 7, 40, -100])
def test_truncated_safetensors_are_refused(left: int, tmp_path: Path) -> None:
    save_file({"w": torch.ones(500)}, tmp_path / "whole.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:left])
    with pytest.raises(UserError, match=r"x.safetensors: not a readable weights file, or truncated \(.+\)"):
        read_tensor_file(tmp_path / "x.safetensors")


def test_rejects_files_of_other_formats(tmp_path: Path) -> None:
    contents = {
        "noise": bytes(torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0)).tolist()),
        "pickle": pickle.dumps({"a": 1}, protocol=2),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/b.jpg", "c")
    with zipfile.ZipFile(tmp_path / "program.zip", "w") as archive:
        archive.writestr("a/code/b.py", "pass")
    with zipfile.ZipFile(tmp_path / "directory.zip", "w") as archive:
        archive.writestr("a/code/b.py", "pass" * 9)
    bad = (tmp_path / "directory.zip").read_bytes()
    (tmp_path / "directory.zip").write_bytes(bad.replace(b"passpass", b"passport"))  # its checksum no longer holds
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"^{path}: not a readable weights file, or truncated"):
            read_tensor_file(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "a pointer of Git LFS.*git lfs pull",
        ),
        ("\n<!DOCTYPE html><html>404</html>", "a web page in place of the weights"),
        ('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}', "only the index of safetensors is read"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_lies_in_the_place_of_weights_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        read_tensor_file(tmp_path / name)


def test_errors_name_the_recipes_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^teachers.t.weights: {tmp_path}/absent.pt: no such file"):
        read_tensor_file(tmp_path / "absent.pt", "teachers.t.weights")
    with pytest.raises(UserError, match=r": a folder; name a file in it"):
        read_tensor_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "contains a list, not a dictionary of tensors"),
        (torch.ones(2), "contains a Tensor, not a dictionary of tensors"),
        ({}, r"no weights found, neither at the top level nor under model, state_dict, .*; its keys are \[\]"),
        ({"model": {}, "epoch": 1}, r'no weights found, .* its keys are \["model", "epoch"\]'),
        ({"student": STATE, "teacher": STATE, "epoch": 3}, r"contains 2 sets of weights: student, teacher; choose one"),
        (
            {"model": STATE, "model_ema": STATE},
            r"contains 2 sets of weights: model, model_ema; choose one: .*x.pt#model",
        ),
        (
            {"model": STATE, "averaged": {f"module.{name}": value for name, value in STATE.items()}},
            r"contains 2 sets of weights: model, averaged; choose one: .*x.pt#model",
        ),
        (
            {"model": STATE, "ema": {"decay": 0.9, "module": STATE}},
            r"contains 2 sets of weights: model, ema.module; choose one: .*x.pt#model or .*x.pt#ema.module",
        ),
        ({"generator": STATE}, r"contains weights under unknown keys \(1\): generator; choose one: .*x.pt#generator"),
    ],
    ids=["list", "tensor", "empty", "empty-model", "dino", "ema", "unknown key", "ema within", "unknown"],
)
def test_torch_files_without_a_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"x.pt: {message}"):
        read_tensor_file(tmp_path / "x.pt")


@pytest.mark.parametrize("chosen", ["teacher", "student"])
def test_one_of_two_sets_is_chosen_by_key(chosen: str, tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in STATE.items()}
    content = {"student": STATE, "teacher": STATE, "dino_loss": {"center": torch.ones(1)}} | {chosen: other}
    torch.save(content, tmp_path / "x.pt")
    file = read_tensor_file(Path(f"{tmp_path}/x.pt#{chosen}"))
    assert torch.equal(file.tensors["b"], other["b"])
    assert (file.path, file.state_key, file.choice) == (tmp_path / "x.pt", chosen, "")
    with pytest.raises(UserError, match=r"contains 2 sets of weights: student, teacher; choose one"):
        read_tensor_file(Path(f"{tmp_path}/x.pt#ema"))


def test_a_set_within_a_dictionary_is_chosen_by_both_keys(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in STATE.items()}
    content = {
        "model": STATE,
        "ema": {"decay": 0.9, "module": other},
        "optimizer": {"state": {0: {"step": STATE["b"]}}},
    }
    torch.save(content, tmp_path / "x.pt")
    file = read_tensor_file(Path(f"{tmp_path}/x.pt#ema.module.backbone"))
    assert torch.equal(file.tensors["b"], other["b"])
    assert (file.state_key, file.choice) == ("ema.module", "backbone")
    assert torch.equal(read_tensor_file(Path(f"{tmp_path}/x.pt#model")).tensors["b"], STATE["b"])


def test_choice_is_offered_by_the_whole_path(tmp_path: Path) -> None:
    path = tmp_path / "a: b.pt"
    torch.save({"student": STATE, "teacher": STATE}, path)
    with pytest.raises(UserError, match=rf"choose one: {path}#student or {path}#teacher$"):
        read_tensor_file(path, "teachers.t.weights")


def test_a_number_sign_may_be_part_of_a_file_name(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a#b")
    assert split_choice(tmp_path / "a#b") == (tmp_path / "a#b", "")
    assert_holds_state(read_tensor_file(tmp_path / "a#b"))
    assert split_choice(f"{tmp_path}/a#b#teacher") == (tmp_path / "a#b", "teacher")
    assert weights_sha256(Path(f"{tmp_path}/a#b#teacher")) == weights_sha256(tmp_path / "a#b")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_command_line_may_hold_numpy_scalars_and_paths(zipped: bool, tmp_path: Path) -> None:
    values = {"lr": np.float64(0.1), "epochs": np.int64(300), "ema": np.bool_(True), "arch": np.str_("vit")}
    args = argparse.Namespace(**values, out=Path("/some/folder"), data=PureWindowsPath("C:/data"))
    torch.save({"model": STATE, "args": args}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    file = read_tensor_file(tmp_path / "x.pth")
    assert_holds_state(file)
    read = {name: file.args[name] for name in values}
    assert read == {"lr": 0.1, "epochs": 300, "ema": True, "arch": "vit"}
    assert [type(value) for value in read.values()] == [float, int, bool, str]
    assert [str(file.args[name]) for name in ("out", "data")] == ["/some/folder", "C:\\data"]


def test_a_command_line_with_other_classes_is_refused(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(when=datetime.date(2024, 1, 1))}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: a pickle that calls datetime.date, and code in a file is never"):
        read_tensor_file(tmp_path / "x.pth")
    torch.save({"model": STATE, "args": argparse.Namespace(when=np.datetime64("2024-01-01"))}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: "):
        read_tensor_file(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_protocol_of_a_pickle_is_named(zipped: bool, tmp_path: Path) -> None:
    args = argparse.Namespace(lr=np.float64(0.1))
    for content in (STATE, {"model": STATE, "args": args}):
        torch.save(content, tmp_path / "x.pt", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            UserError, match=r"x.pt: a pickle of protocol 4, and only protocol 2 .* save its state_dict"
        ):
            read_tensor_file(tmp_path / "x.pt")
    hidden = {"model": STATE, "hook": TouchesAFile(tmp_path / "ran")}
    torch.save(hidden, tmp_path / "x.pt", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x.pt: a pickle that calls (getattr|builtins.getattr|pathlib.Path.touch)"):
        read_tensor_file(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def write_shards(folder: Path) -> Path:
    """Two shards with the index that Hugging Face's libraries write; return the index."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, name in zip(names, STATE, strict=True):
        save_file({name: STATE[name]}, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": dict(zip(STATE, names, strict=True))}))
    return index


def test_check_says_what_the_checksum_of_shards_is_of(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    files = [index, *sorted(tmp_path.glob("*.safetensors"))]
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    expected = hashlib.sha256(digests.encode()).hexdigest()
    assert dict(describe_file(index))["sha256"] == f"{expected} (of the checksums of index and shards)"
    (single,) = tmp_path.glob("*00001-of*")
    single.rename(tmp_path / "x.safetensors")
    plain = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert dict(describe_file(tmp_path / "x.safetensors"))["sha256"] == plain


def test_safetensors_in_shards_are_read_by_their_index(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    file = read_tensor_file(index)
    assert_holds_state(file)
    assert file.format == "safetensors"
    before = weights_sha256(index)
    with pytest.raises(UserError, match=r"00002.safetensors: one shard of several; name their index, .*index.json"):
        read_tensor_file(tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": STATE["b"] + 1}, tmp_path / "model-00002-of-00002.safetensors")
    assert weights_sha256(index) != before
    save_file({"c": STATE["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(
        UserError, match=r"00002.safetensors: does not hold the tensors that .*index.json names, first b"
    ):
        read_tensor_file(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"index.json: its shard model-00002-of-00002.safetensors is not beside it"):
        read_tensor_file(index)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match=r"t.weights: .*index.json: not an index of safetensors"):
        read_tensor_file(index, "t.weights")
    index.write_text(json.dumps({"weight_map": {"b": "../b.safetensors"}}))
    with pytest.raises(UserError, match=r"its shard ../b.safetensors is not beside it"):
        read_tensor_file(index)


def test_checksums_of_an_archive(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(500)}, tmp_path / "x.pt")
    verify_checksums(tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(torch.ones(8).numpy().tobytes()) + 16] ^= 1  # one bit of one weight
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x.pt: damaged: the checksum of its entry x/data/0 does not match"):
        verify_checksums(tmp_path / "x.pt")
    (tmp_path / "text").write_text("no archive")
    verify_checksums(tmp_path / "text")


def test_a_prefix_of_some_names_stays() -> None:
    assert list(unwrap({"module.a": STATE["b"], "b": STATE["b"]})) == ["module.a", "b"]
    assert unwrap({}) == {}


def write_zip(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.gguf", b"GGUF\x03\0\0\0", "a GGUF file; convert it"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file, as of Keras; convert it"),
        ("x.npy", b"\x93NUMPY\x01\0", "one array of numpy; convert it"),
        ("x.pth.gz", b"\x1f\x8b\x08\0", "a gzip archive; unpack it"),
        ("x.onnx", b"\x08\x07\x12\x07pytorch", "a program in ONNX; convert it"),
        ("__0_0.distcp", b"PK", "a part of torch's distributed checkpoint; convert the whole: python -m torch.dist"),
        ("flax_model.msgpack", b"\x81\xa6params", "weights of Flax; convert it"),
        ("x.npz", "a/b.npy", r"arrays of numpy \(.npz\), as of JAX; convert it"),
        ("x.zip", "a/model.pth", "an archive with a/model.pth; unpack it and name the weights file in it"),
    ],
)
def test_files_of_other_formats_are_named(name: str, content: bytes | str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        write_zip(path, content)
    else:
        path.write_bytes(content)
    for refuse in (read_tensor_file, describe_file):
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            refuse(path)


def test_a_folder_of_other_weights_is_no_unfinished_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has not finished"):
        find_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"init: .* has no model.safetensors; name a file in it: pytorch_model.bin$"):
        find_weights(tmp_path, "init")
