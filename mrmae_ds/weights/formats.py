"""Read weights files of any origin without executing code in them.

Supported are safetensors (also in shards with an index), torch pickles (with ``weights_only``), pickles of numpy arrays
(Detectron2's), and TorchScript archives (OpenAI's CLIP). The only classes that a torch pickle may name besides torch's
own are those of a stored command line: ``argparse.Namespace``, and the paths and numpy scalars in it.

A file may hold several sets of weights (``model`` and ``model_ema``, ``student`` and ``teacher``); ``FILE#KEY`` names
one.
"""

from __future__ import annotations

import argparse
import json
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
from mrmae_ds.units import first_few
from mrmae_ds.weights.paths import INDEX_SUFFIX, read_index
from mrmae_ds.weights.pickles import holds_arrays, pickle_contents, read_arrays

# Keys of the weights in a training script's checkpoint.
STATE_KEYS = (
    *("model", "state_dict", "module", "model_state_dict", "network", "net", "backbone", "encoder"),
    *("model_ema", "state_dict_ema", "ema", "ema_state_dict", "student", "teacher"),
)
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
# Starts of files that lie in the place of weights, and what they are.
_IN_PLACE = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the weights; run git lfs pull in its repository",
    b"<": "a web page in place of the weights; download them again",
    b"{": "text in JSON, not weights; of files in shards, only the index of safetensors is read",
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
        wrapper: prefix of wrappers before every name in the file, which was removed first.
        prefix: prefix of the encoder's names, which was removed then.
        left: names of tensors outside that prefix.
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
            content = _read(path)
    except UserError as error:
        raise UserError(f"{key}: {error}" if key else str(error)) from None
    # Damaged pickles and archives raise many types of exception: TypeError, struct.error, BadZipFile, ...
    except Exception as error:
        raise UserError(f"{where}: {_reason(path, error)}") from None
    if isinstance(content, TensorFile):
        return replace(content, choice=choice)
    return _without_wrapper(_state_of(content, path, choice, where))


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
        return _without_wrapper(TensorFile(path, "safetensors", tensors, metadata=metadata))
    if code := _torchscript_code(path):
        if "__setstate__" in code:
            raise ValueError("a TorchScript archive whose __setstate__ would run when it is loaded")
        return TensorFile(path, "torchscript", dict(torch.jit.load(path, map_location="cpu").state_dict()), code=code)
    if holds_arrays(pickle_contents(path)[1]):
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
    return _without_wrapper(TensorFile(index, "safetensors", tensors))


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


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that wrappers of modules put before every name."""
    names = dict(tensors)
    while names and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in names)), "")):
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def _without_wrapper(file: TensorFile) -> TensorFile:
    tensors = unwrap(file.tensors)
    wrapper = next(iter(file.tensors), "").removesuffix(next(iter(tensors), ""))
    return replace(file, tensors=tensors, wrapper=wrapper)


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
    protocol, called = pickle_contents(path)
    if holds_arrays(called) or (zipfile.is_zipfile(path) and not isinstance(error, pickle.UnpicklingError)):
        return f"not a readable weights file, or truncated ({_first_line(error)})"
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    # torch's own functions, of which every torch pickle consists, and the classes of a command line are no code.
    foreign = [name for name in called if not name.startswith(("torch.", "collections.", "argparse.", "numpy."))]
    if code := refused[1] if refused else next(iter(foreign), ""):
        return (
            f"a pickle that calls {code}, and code in a file is never executed; if you trust the file, open it with "
            "the program that wrote it and save only its state_dict, as safetensors"
        )
    if protocol > 2 and called:
        return (
            f"a pickle of protocol {protocol}, and only protocol 2 (torch.save's default) is read without executing "
            "code; save its state_dict again, as safetensors or without pickle_protocol"
        )
    return f"not a readable weights file, or truncated ({_first_line(error)})"


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
    if _is_state(content):
        return TensorFile(path, "pickle", dict(content), args=options, choice=choice)
    states = _states(content)
    # Sets without a layer's weight are buffers, as of a loss.
    networks = [name for name, state in states.items() if any(n.endswith("weight") for n in state)] or list(states)
    known = [name for name in networks if name in STATE_KEYS]
    chosen = next((name for name in states if f"{choice}.".startswith(f"{name}.")), "")
    # Another state of the same names is another copy, as of a moving average; of other names, another part.
    names = unwrap(states[known[0]]).keys() if known else set()
    copies = [name for name in networks if unwrap(states[name]).keys() & names]
    if chosen in networks or (not chosen and len(known) == len(copies) == 1):
        rest = choice[len(chosen) :].removeprefix(".")
        state_key = chosen or known[0]
        keys = frozenset(map(str, content))
        file = TensorFile(path, "pickle", dict(states[state_key]), args=options, keys=keys)
        return replace(file, state_key=state_key, choice=rest)
    if states:
        what = f"{len(networks)} sets of weights" if known else f"weights under unknown keys ({len(networks)})"
        refused = f"{chosen} holds no layers, only {first_few(list(states[chosen]), 3)}; " if chosen else ""
        raise UserError(
            f"{where}: {refused}contains {what}: {', '.join(networks)}; choose one: "
            f"{' or '.join(f'{path}#{name}' for name in networks)}"
        )
    shown = json.dumps([str(name) for name in list(content)[:8]])
    raise UserError(
        f"{where}: no weights found, neither at the top level nor under {first_few(STATE_KEYS, 4)}; its keys are "
        f"{shown}"
    )


def _states(content: Mapping[Any, Any]) -> dict[str, Mapping[str, Tensor]]:
    """Return the sets of tensors in a checkpoint by key, ``KEY.KEY`` for one in a dictionary of it."""
    parts = {name: part for name, part in content.items() if isinstance(part, Mapping) and not _is_state(part)}
    inner = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    return {str(name): value for name, value in {**content, **inner}.items() if _is_state(value)}


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises turning safety off
        return "not a torch pickle"
    sentences = [text for text in re.split(r"\n|\. ", str(error)) if text.strip()]
    return f"{type(error).__name__}: {sentences[0].strip()}" if sentences else type(error).__name__
