"""Read weights files of any origin without executing code in them.

Supported are safetensors (also in shards with an index), torch pickles (with ``weights_only``), pickles of numpy arrays
(Detectron2's), and TorchScript archives (OpenAI's CLIP). The only classes that a torch pickle may name besides torch's
own are those of a stored command line: ``argparse.Namespace``, and the paths and numpy scalars in it.

A file may hold several sets of weights (``model`` and ``model_ema``, ``student`` and ``teacher``); ``FILE#KEY`` names
one.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.files import split_choice
from mrmae_ds.units import first_few, printable
from mrmae_ds.weights.paths import INDEX_SUFFIX, read_index
from mrmae_ds.weights.pickles import holds_arrays, pickle_contents, read_arrays
from mrmae_ds.weights.states import choose_state, removed_words, unwrap, with_dots

_CONVERT = "convert it with the program that wrote it, and save its state_dict as safetensors"
# Starts of files that lie in the place of weights, and what they are.
_IN_PLACE = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the weights; run git lfs pull in its repository",
    b"<": "a web page in place of the weights; download them again",
    b"{": "text in JSON, not weights; of files in shards, only the index of safetensors is read",
    b"gguf": f"a GGUF file; {_CONVERT}",
    b"\x89hdf": f"an HDF5 file, as of Keras; {_CONVERT}",
    b"\x93numpy": f"one array of numpy; {_CONVERT}",
    b"\x1f\x8b": "a gzip archive; unpack it and name the weights file in it",
}
# Endings of files of other formats, whose starts do not tell them.
_ENDINGS = {
    ".onnx": f"a program in ONNX; {_CONVERT}",
    ".distcp": "a part of torch's distributed checkpoint; convert the whole: python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth",
    ".msgpack": f"weights of Flax; {_CONVERT}",
}
SHARD = re.compile(r"[-_](\d+)-of-(\d+)\.\w+$")  # model-00001-of-00002.safetensors


def _numpy_scalar(dtype: np.dtype, data: bytes) -> int | float | bool | str:
    """Return a pickled numpy scalar as Python's own number or text; other types are refused."""
    if dtype.kind not in "biufU":
        raise pickle.UnpicklingError(f"a numpy scalar of type {dtype}")
    return np.frombuffer(data, dtype)[0].item()


# Classes of a stored command line by their names in pickles; concrete paths exist on one system only.
_ARGUMENT_CLASSES = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, name) for name in dir(np.dtypes) if re.fullmatch(r"(Bool|Float|U?Int|Str)\d*DType", name)),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(
        (kind, f"pathlib.{module}{prefix}{name}")
        for kind, name in ((PurePosixPath, "PosixPath"), (PureWindowsPath, "WindowsPath"))
        for module in ("", "_local.")
        for prefix in ("", "Pure")
    ),
]


@dataclass(frozen=True)
class TensorFile:
    """Content of a weights file.

    Attributes:
        path: path of the file.
        format: storage format.
        tensors: tensors by name, on the CPU, without prefixes of wrappers.
        metadata: header metadata of a safetensors file; empty for others.
        args: command line stored in a released file, by option.
        keys: keys of a checkpoint, with that of the weights; empty for others.
        code: source text of a TorchScript archive; empty for others.
        state_key: key of the weights in a checkpoint; "" if they are its whole content.
        choice: part of the tensor names that the user chose; "" for none.
        wrapper: words of wrappers in the names, which were removed first.
        prefix: prefix of the encoder's names, which was removed then.
        left: names of tensors outside that prefix.
        ignored: keys beside the tensors that hold none.
        layout: other project whose names were converted to timm's or open_clip's; "" for none.
    """

    path: Path
    format: Literal["safetensors", "pickle", "torchscript"]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    code: str = ""
    state_key: str = ""
    choice: str = ""
    wrapper: str = ""
    prefix: str = ""
    left: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    layout: str = ""


def read_tensor_file(source: Path, key: str = "") -> TensorFile:
    """Read all tensors of a file; the format is detected from its bytes, not its name.

    Args:
        source: .safetensors, .pt, .pth, .bin, .pkl, a TorchScript archive, or the index of safetensors in shards;
            ``FILE#KEY`` if it holds several sets of weights.
        key: recipe key that named the file, for errors.

    Raises:
        UserError: if the file does not exist, is damaged, contains code, or contains no weights or several sets.
    """
    path, choice = split_choice(source)
    where = f"{key}: {path}" if key else str(path)
    if not path.is_file():
        raise UserError(f"{where}: {'a folder; name a file in it' if path.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            # torch warns that TorchScript is deprecated, and that a pickle's protocol is unusual.
            warnings.simplefilter("ignore")
            if ending := _ENDINGS.get(path.suffix):
                raise UserError(f"{path}: {ending}")
            content = _read(path)
    except UserError as error:
        raise UserError(f"{key}: {error}" if key else str(error)) from None
    # Damaged pickles and archives raise many types of exception: TypeError, struct.error, BadZipFile, ...
    except Exception as error:
        raise UserError(f"{where}: {_reason(path, error)}") from None
    if isinstance(content, TensorFile):
        return _without_wrapper(replace(content, choice=choice), where)
    return _without_wrapper(_state_of(content, path, choice, where), where)


def _read(path: Path) -> Any:
    """Return the content of safetensors or a TorchScript archive; of other files, what is pickled."""
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if (shard := SHARD.search(path.name)) and int(shard[2]) > 1:
        index = path.with_name(path.name[: shard.start()] + INDEX_SUFFIX)
        fix = "name their index" if index.is_file() else "download all of them as safetensors, and name their index"
        raise UserError(f"{path}: one shard of several; {fix}, {index}")
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return TensorFile(path, "safetensors", tensors, metadata=metadata)
    if code := _torchscript_code(path):
        if "__setstate__" in code:
            raise ValueError("a TorchScript archive whose __setstate__ would run when it is loaded")
        return TensorFile(path, "torchscript", dict(torch.jit.load(path, map_location="cpu").state_dict()), code=code)
    if not zipfile.is_zipfile(path) and holds_arrays(pickle_contents(path)[1]):
        return read_arrays(path)
    with torch.serialization.safe_globals(_ARGUMENT_CLASSES):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and its header's metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return tensors, dict(file.metadata() or {})


def _read_shards(index: Path) -> TensorFile:
    """Read the tensors that an index names, each from its shard.

    Raises:
        UserError: naming a shard that is missing, lies elsewhere, or does not have exactly its tensors.
    """
    try:
        shards = read_index(index)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors ({type(error).__name__}: {error})") from None
    _check_numbers(index, set(shards.values()))
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{index}: its shard {name} is not beside it; download it to {index.parent}")
        expected = {tensor for tensor, file in shards.items() if file == name}
        found, _ = read_safetensors(path)
        if found.keys() != expected:
            wrong = sorted(found.keys() ^ expected)
            raise UserError(
                f"{path}: does not hold the tensors that {index.name} names, first {wrong[0]}; copy both again"
            )
        tensors |= found
    return TensorFile(index, "safetensors", tensors)


def _check_numbers(index: Path, names: set[str]) -> None:
    """Check that an index names all shards, by their numbers.

    Raises:
        UserError: naming the first that it lacks.
    """
    for name in sorted(names):
        if shard := SHARD.search(name):
            width, count = len(shard[1]), int(shard[2])
            numbers = {int(found[1]) for found in map(SHARD.search, names) if found and int(found[2]) == count}
            if lacking := sorted(set(range(1, count + 1)) - numbers):
                raise UserError(
                    f"{index}: names {len(numbers)} of {count} shards, not number {lacking[0]:0{width}}; download it "
                    "again"
                )


def verify_checksums(path: Path) -> None:
    """Verify the checksums of a zip archive (torch's format), which reading does not; other formats have none.

    Raises:
        UserError: naming the damaged entry.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise UserError(
            f"{path}: damaged: the checksum of its entry {damaged} does not match; download or write the file again"
        )


def _without_wrapper(file: TensorFile, where: str) -> TensorFile:
    """Remove what wrappers put into the names, also of the choice.

    Raises:
        UserError: naming a weight without elements.
    """
    if empty := [name for name, tensor in file.tensors.items() if name.endswith("weight") and not tensor.numel()]:
        raise UserError(
            f"{where}: {len(empty)} weights have no elements, first {empty[0]}; a checkpoint of ZeRO-3 keeps them in "
            "the files of its ranks: run zero_to_fp32.py in its folder, and name the file that it writes"
        )
    tensors, choice = unwrap(file.tensors), file.choice
    words = removed_words(file.tensors, tensors)
    for word in words:
        choice = f"{choice}.".removeprefix(f"{word}.").removesuffix(".")
    return replace(file, tensors=with_dots(tensors), wrapper="".join(f"{word}." for word in words), choice=choice)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:9] == b"{" and start[6:8] == b"\0\0")


def _torchscript_code(path: Path) -> str:
    """Return the source text of a TorchScript archive, "" for any other file."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/code/" in name and name.endswith(".py")]
        return "\n".join(archive.read(name).decode() for name in names)


def _reason(path: Path, error: Exception) -> str:
    """Explain why a file could not be read."""
    if in_place := next((what for start, what in _IN_PLACE.items() if _start(path).startswith(start)), ""):
        return in_place
    zipped = zipfile.is_zipfile(path)
    if zipped and (inside := _archived(path)):
        return inside
    protocol, called = pickle_contents(path)
    if not isinstance(error, pickle.UnpicklingError) if zipped else holds_arrays(called):
        return f"not a readable weights file, or truncated ({_first_line(error)})"
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    # torch's own functions, of which every torch pickle consists, and the classes of a command line are no code.
    foreign = [name for name in called if not name.startswith(("torch.", "collections.", "argparse.", "numpy."))]
    if code := refused[1] if refused else next(iter(foreign), ""):
        return (
            f"a pickle that calls {printable(code)}, and code in a file is never executed; if you trust the file, "
            "open it with the program that wrote it and save only its state_dict, as safetensors"
        )
    if protocol > 2 and called:
        return (
            f"a pickle of protocol {protocol}, and only protocol 2 (torch.save's default) is read without executing "
            "code; save its state_dict again, as safetensors or without pickle_protocol"
        )
    return f"not a readable weights file, or truncated ({_first_line(error)})"


def _archived(path: Path) -> str:
    """Describe a zip archive of arrays or of weights files; "" for others, as torch's own."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/archive_format") for name in names):
        return f"a program of torch.export; {_CONVERT}"
    if any(name.endswith(".npy") for name in names):
        return f"arrays of numpy (.npz), as of JAX; {_CONVERT}"
    weights = [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors", ".ckpt"))]
    return f"an archive with {first_few(weights, 3)}; unpack it and name the weights file in it" if weights else ""


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(100).lstrip().lower()


def _state_of(content: Any, path: Path, choice: str, where: str) -> TensorFile:
    """Return the weights in the result of ``torch.load``, their key, and the command line stored beside them.

    Raises:
        UserError: if there are no weights, or several sets of them and no choice.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: contains a {type(content).__name__}, not a dictionary of tensors")
    args = content.get("args", {})
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    chosen = choose_state(content, path, choice, where)
    keys = frozenset(map(str, content)) if chosen.key else frozenset()
    file = TensorFile(path, "pickle", chosen.tensors, args=options, keys=keys, ignored=chosen.ignored)
    return replace(file, state_key=chosen.key, choice=chosen.choice)


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises turning safety off
        return "not a torch pickle"
    sentences = [text for text in re.split(r"\n|\. ", str(error)) if text.strip()]
    return f"{type(error).__name__}: {sentences[0].strip()}" if sentences else type(error).__name__
