"""Read weights files of any origin without executing code in them.

Supported are safetensors, torch pickles (with ``weights_only``; the only allowed class is ``argparse.Namespace``, in
which the files released by MAE and MCMAE store their command line), and TorchScript archives (OpenAI's CLIP).
"""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from mrmae_ds.errors import UserError

# Keys of the weights in a training script's checkpoint, in the order of lookup.
STATE_KEYS = ("model", "state_dict", "module")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class TensorFile:
    """Content of a weights file.

    Attributes:
        path: path of the file.
        format: storage format.
        tensors: tensors by name, on the CPU, without prefixes of wrappers.
        metadata: header metadata of a safetensors file; empty for others.
        args: command line stored in a released file, by option.
        code: source text of a TorchScript archive; empty for others.
    """

    path: Path
    format: Literal["safetensors", "pickle", "torchscript"]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    code: str = ""


def read_tensor_file(path: Path, key: str = "") -> TensorFile:
    """Read all tensors of a file; the format is detected from its bytes, not its name.

    Args:
        path: .safetensors, .pt, .pth, .bin, or a TorchScript archive.
        key: recipe key that named the file, for errors.

    Raises:
        UserError: if the file does not exist, is damaged, contains code, or contains no weights.
    """
    where = f"{key}: {path}" if key else str(path)
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    try:
        with warnings.catch_warnings():
            # torch warns that TorchScript is deprecated, and that a pickle's protocol is unusual.
            warnings.simplefilter("ignore")
            content = _read(path)
    # Damaged pickles and archives raise many types of exception: TypeError, struct.error, BadZipFile, ...
    except Exception as error:
        if refused := _code_named_in(path, str(error)):
            raise UserError(
                f"{where}: a pickle that calls {refused}, and code in a file is never executed; if you trust the file, "
                "open it with the program that wrote it and save only its state_dict, as safetensors"
            ) from None
        raise UserError(f"{where}: not a readable weights file, or truncated ({_first_line(error)})") from None
    if isinstance(content, TensorFile):
        return content
    state, args = _state_of(content, where)
    return TensorFile(path, "pickle", unwrap(state), args=args)


def _read(path: Path) -> Any:
    """Return the content of a safetensors file or TorchScript archive; of others, the result of ``torch.load``."""
    if _is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return TensorFile(path, "safetensors", unwrap(tensors), metadata=dict(file.metadata() or {}))
    if code := _torchscript_code(path):
        if "__setstate__" in code:
            raise ValueError("a TorchScript archive whose __setstate__ would run when it is loaded")
        return TensorFile(path, "torchscript", dict(torch.jit.load(path, map_location="cpu").state_dict()), code=code)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


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


def _code_named_in(path: Path, error: str) -> str:
    """Return the name of a callable in a refused pickle, from torch's error or the pickle's opcodes; "" if none."""
    if refused := re.search(r"GLOBAL ([\w.]+)", error):
        return refused[1]
    called: list[str] = []
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    called.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    called.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # not a pickle, or truncated
        return ""
    return called[0] if called else ""


def _state_of(content: Any, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in the result of ``torch.load``, and the command line stored beside them."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: contains a {type(content).__name__}, not a dictionary of tensors")
    args = content.get("args", {})
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    for state in (content, *(content.get(key) for key in STATE_KEYS)):
        if state is not None and _is_state(state):
            return dict(state), options
    networks = [str(name) for name, value in content.items() if _is_state(value)]
    if networks:
        raise UserError(
            f"{where}: contains {len(networks)} sets of weights under unknown keys ({', '.join(networks)}); save the "
            "one to load as a separate safetensors file"
        )
    shown = json.dumps([str(name) for name in list(content)[:8]])
    places = ", ".join(STATE_KEYS)
    raise UserError(f"{where}: no weights found, neither at the top level nor under {places}; its keys are {shown}")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises turning safety off
        return "not a torch pickle"
    sentences = [text for text in re.split(r"\n|\. ", str(error)) if text.strip()]
    return f"{type(error).__name__}: {sentences[0].strip()}" if sentences else type(error).__name__
