"""List what a pickle calls, and read pickles of numpy arrays (``.pkl`` of Detectron2's model zoo) without calling it.

Numpy's own functions are not called either: with states that a file makes up, they follow pointers of the file.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


def pickle_contents(path: Path) -> tuple[int, list[str]]:
    """Return a pickle's highest protocol and the names of the classes and functions in it; (0, []) for other files."""
    protocol, called = 0, []
    strings: list[str] = [""]
    memo: list[str] = []
    last = ""  # the object that MEMOIZE stores, if it is a string
    try:
        for opcode, argument in _opcodes(path):
            if opcode == "PROTO":
                protocol, memo = max(protocol, int(argument)), []
            elif opcode in ("GLOBAL", "INST"):
                called.append(str(argument).replace(" ", "."))
            elif opcode == "STACK_GLOBAL":
                called.append(".".join(strings[-2:]))
            elif opcode == "MEMOIZE":
                memo.append(last)
            elif opcode in ("BINGET", "LONG_BINGET") and int(argument) < len(memo):
                strings.append(memo[int(argument)])
            elif isinstance(argument, str):
                strings.append(argument)
            last = argument if isinstance(argument, str) else ""
    except Exception:  # not a pickle, or truncated
        return 0, []
    return protocol, called


def _opcodes(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield names and arguments of the opcodes of a pickle, of torch's archives or of its older files of several."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            yield from ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(archive.read(content)))
        return
    with path.open("rb") as file:
        start, more = 0, True
        while more:
            file.seek(start)
            yield from ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(file))
            start = file.tell()
            more = file.read(1) == b"\x80"  # PROTO: another pickle


class _DType:
    """Stand-in for ``numpy.dtype``: a name of numpy's, and the byte order that the pickle sets."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, ""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numbers(self) -> np.dtype:
        """Return numpy's type of real numbers."""
        dtype = np.dtype(self.order.strip("|") + self.name.lstrip("<>|="))
        if dtype.kind not in "biuf":
            raise ValueError(f"an array of type {dtype}, not of numbers")
        return dtype


class _Array:
    """Stand-in for an array, which its state or :func:`_from_buffer` fills."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def tensor(self) -> torch.Tensor:
        """Return the values, in this machine's byte order."""
        _, shape, dtype, by_columns, values = self.state
        numbers = dtype.numbers()
        data = values.encode("latin1") if isinstance(values, str) else values
        array = np.frombuffer(data, numbers).reshape(shape, order="F" if by_columns else "C")
        return torch.from_numpy(np.array(array, numbers.newbyteorder("="), order="C"))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    """Return an array of protocol 5."""
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(data))
    return array


def _bytes(text: str = "", *_: Any) -> bytes:
    """Return the bytes that Python 3 stores as text in protocols below 3."""
    return text.encode("latin1")


_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    **dict.fromkeys(("_codecs.encode", "__builtin__.bytes", "builtins.bytes"), _bytes),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return partial(_STAND_INS[f"{module}.{name}"])  # a pickle can set attributes of what it names


def holds_arrays(called: Collection[str]) -> bool:
    """Return True for a pickle that calls nothing but what makes arrays.

    Args:
        called: names of the classes and functions in it.
    """
    return bool(called) and _STAND_INS.keys() >= set(called)


def read_arrays(path: Path) -> Any:
    """Return the content of a pickle for which :func:`holds_arrays` is true, arrays as tensors on the CPU.

    Raises:
        ValueError: for arrays of anything but numbers.
    """
    with path.open("rb") as file:
        return _tensors(_Unpickler(file, encoding="latin1").load())


def _tensors(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _tensors(value) for name, value in content.items()}
    return content.tensor() if isinstance(content, _Array) else content
