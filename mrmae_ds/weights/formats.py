"""Files of weights, whoever wrote them, read without running anything that they hold.

safetensors, torch's pickles (with ``weights_only``; of all classes only ``argparse.Namespace`` is allowed, because
MAE's and MCMAE's released files keep their command line in one), and TorchScript archives (OpenAI's CLIP).
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

# Where a training script's checkpoint keeps its weights, in the order in which they are looked for.
STATE_KEYS = ("model", "state_dict", "module")
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds.

    Attributes:
        path: where it was read.
        format: how it is stored.
        tensors: by name, on the CPU, prefixes of wrappers removed.
        metadata: of a safetensors file's header; empty for others.
        args: the command line that a released file keeps, by option.
        code: a TorchScript archive's source text; empty for others.
    """

    path: Path
    format: Literal["safetensors", "pickle", "torchscript"]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    code: str = ""


def read_tensor_file(path: Path, key: str = "") -> TensorFile:
    """Read all tensors of a file; its kind is told from its bytes, not its name.

    Args:
        path: .safetensors, .pt, .pth, .bin, or a TorchScript archive.
        key: the recipe key that named the file, for errors.

    Raises:
        UserError: if it does not exist, is damaged, holds code, or holds no weights.
    """
    where = f"{key}: {path}" if key else str(path)
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    try:
        with warnings.catch_warnings():
            # Of torch: TorchScript is deprecated, and this pickle's protocol is not its usual one.
            warnings.simplefilter("ignore")
            found = _read(path)
    # What a damaged pickle or archive makes its reader raise has no end: TypeError, struct.error, BadZipFile, ...
    except Exception as error:
        if refused := _code_named_in(path, str(error)):
            raise UserError(
                f"{where}: a pickle that calls {refused}, and code in a file is never run here; where you trust it, "
                "open it with the program that wrote it and save its state_dict alone, as safetensors"
            ) from None
        raise UserError(f"{where}: not a readable file of weights, or cut short ({_first_line(error)})") from None
    if isinstance(found, TensorFile):
        return found
    state, args = _state_of(found, where)
    return TensorFile(path, "pickle", unwrap(state), args=args)


def _read(path: Path) -> Any:
    """A safetensors file or TorchScript archive whole, of any other file what ``torch.load`` gives."""
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
    """Compare the checksums of a zip archive (torch's files), which reading does not; other files have none.

    Raises:
        UserError: naming the entry whose bytes have changed.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise UserError(f"{path}: damaged: the checksum of {damaged} in it does not hold; fetch or write it again")


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that wrappers of modules put before every one of them."""
    names = dict(tensors)
    while names and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in names)), "")):
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:9] == b"{" and start[6:8] == b"\0\0")


def _torchscript_code(path: Path) -> str:
    """The source text of a TorchScript archive, "" for any other file."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/code/" in name and name.endswith(".py")]
        return "\n".join(archive.read(name).decode() for name in names)


def _code_named_in(path: Path, error: str) -> str:
    """What a refused pickle wants to call: torch's error names it, or else a plain pickle's text does; "" for none."""
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
    except Exception:  # not a pickle, or cut short
        return ""
    return called[0] if called else ""


def _state_of(content: Any, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in what ``torch.load`` gave, and the command line beside them."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: holds a {type(content).__name__}, not a dictionary of tensors")
    args = content.get("args", {})
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    for state in (content, *(content.get(key) for key in STATE_KEYS)):
        if state is not None and _is_state(state):
            return dict(state), options
    networks = [str(name) for name, value in content.items() if _is_state(value)]
    if networks:
        raise UserError(
            f"{where}: holds {len(networks)} sets of weights under names of its own ({', '.join(networks)}); save the "
            "one that is meant by itself, as safetensors"
        )
    shown = json.dumps([str(name) for name in list(content)[:8]])
    places = ", ".join(STATE_KEYS)
    raise UserError(f"{where}: no weights found, neither at the top nor under {places}; it has {shown}")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's text is advice to turn safety off
        return "no pickle of torch's"
    sentences = [text for text in re.split(r"\n|\. ", str(error)) if text.strip()]
    return f"{type(error).__name__}: {sentences[0].strip()}" if sentences else type(error).__name__
