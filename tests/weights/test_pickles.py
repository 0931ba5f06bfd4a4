"""Pickles of numpy arrays, the format of Detectron2's model zoo: every array is read, nothing in the file is called."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrmae_ds.errors import UserError
from mrmae_ds.weights.formats import read_tensor_file

NUMBERS = np.random.default_rng(0).normal(size=(3, 4))
ARRAYS = {
    "single": NUMBERS.astype("float32"),
    "half": NUMBERS.astype("float16"),
    "big_endian": NUMBERS.astype(">f8"),
    "by_columns": np.asfortranarray(NUMBERS),
    "part": NUMBERS[1:, ::2],
    "number": np.array(7),
    "none": np.zeros((0, 2), dtype="float32"),
    "bytes": np.arange(9, dtype="uint8"),
    "truth": NUMBERS > 0,
}


class Calls:
    """Unpickling it calls a function with arguments, then sets the result's state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("key", ["model", ""])
def test_arrays_of_every_protocol_are_read(protocol: int, key: str, tmp_path: Path) -> None:
    content = {key: ARRAYS, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True} if key else ARRAYS
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    file = read_tensor_file(tmp_path / "x.pkl")
    assert (file.format, file.state_key, file.tensors.keys()) == ("pickle", key, ARRAYS.keys())
    for name, array in ARRAYS.items():
        assert torch.equal(file.tensors[name], torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C")))


def test_arrays_that_an_older_numpy_or_python_wrote(tmp_path: Path) -> None:
    """Numpy 1 has another name for its module, and the strings of Python 2 are bytes."""
    old = pickle.dumps({"w": ARRAYS["single"]}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "x.pkl").write_bytes(old)
    assert torch.equal(read_tensor_file(tmp_path / "x.pkl").tensors["w"], torch.from_numpy(ARRAYS["single"]))
    values = np.arange(4, dtype="<f4").tobytes()
    python2 = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x04\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x10" + values + b"tbs."
    )
    (tmp_path / "x.pkl").write_bytes(python2)
    assert read_tensor_file(tmp_path / "x.pkl").tensors["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_anything_but_numbers_are_refused(protocol: int, tmp_path: Path) -> None:
    """Among them pointers in place of objects, which numpy would follow."""
    reconstruct, arguments, _ = np.zeros(1).__reduce__()
    flags_of_numbers = (3, "|", None, None, None, -1, -1, 0)
    pointers = Calls(reconstruct, arguments, (1, (1,), Calls(np.dtype, ("O8",), flags_of_numbers), False, b"\1" * 8))
    for array in (np.array(["a"]), np.array([None]), np.zeros(2, dtype="f4,i4"), pointers):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": {"w": array}}, protocol=protocol))
        with pytest.raises(UserError, match=r"x.pkl: not a readable weights file.* an array of type .*not of numbers"):
            read_tensor_file(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_beside_arrays_is_named_and_never_runs(protocol: int, tmp_path: Path) -> None:
    path, ran = tmp_path / "x.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"model": ARRAYS, "hook": Calls(Path.touch, (ran,))}, protocol=protocol))
    pickle.loads(path.read_bytes())
    assert ran.exists()  # it would run
    ran.unlink()
    with pytest.raises(UserError, match=r"x.pkl: a pickle that calls .*, and code in a file is never executed"):
        read_tensor_file(path)
    assert not ran.exists()


def test_a_file_cannot_change_how_others_are_read(tmp_path: Path) -> None:
    """A pickle may set attributes of what it names."""
    path, good = tmp_path / "bad.pkl", tmp_path / "good.pkl"
    good.write_bytes(pickle.dumps(ARRAYS))
    path.write_bytes(b"\x80\x02cnumpy\nndarray\nN}U\x06tensorK\x01s\x86b.")  # ndarray.tensor = 1
    with pytest.raises(UserError, match=r"bad.pkl: "):
        read_tensor_file(path)
    assert read_tensor_file(good).tensors.keys() == ARRAYS.keys()


@pytest.mark.parametrize("left", [30, 200, -40])
def test_a_truncated_file_is_refused(left: int, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": ARRAYS})[:left])
    with pytest.raises(UserError, match=r"x.pkl: not a readable weights file, or truncated"):
        read_tensor_file(tmp_path / "x.pkl")
