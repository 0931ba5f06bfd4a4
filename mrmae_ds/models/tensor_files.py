"""Files of weights, whoever wrote them, read without running anything that they hold.

safetensors, torch's pickles (with ``weights_only``; of all classes only ``argparse.Namespace`` is allowed, because
MAE's and MCMAE's released files keep their command line in one), and TorchScript archives (OpenAI's CLIP).
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
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
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
                return TensorFile(path, "safetensors", unwrap(tensors), metadata=dict(file.metadata() or {}))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                code = _torchscript_code(archive)
            if code:
                state = torch.jit.load(str(path), map_location="cpu").state_dict()
                return TensorFile(path, "torchscript", dict(state), code=code)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if refused := re.search(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)", str(error)):
            raise UserError(
                f"{where}: a pickle that wants to run code ({refused[1]}), which is never done here; where you "
                "trust it, open it with the program that wrote it and save its state_dict alone, as safetensors"
            ) from None
        raise UserError(f"{where}: not a readable file of weights, or cut short ({_first_line(error)})") from None
    state, args = _state_of(content, where)
    return TensorFile(path, "pickle", unwrap(state), args=args)


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


def _torchscript_code(archive: zipfile.ZipFile) -> str:
    """The source text of a TorchScript archive, "" for any other zip file."""
    names = [name for name in archive.namelist() if "/code/" in name and name.endswith(".py")]
    return "\n".join(archive.read(name).decode() for name in names)


def _state_of(content: Any, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in what ``torch.load`` gave, and the command line beside them."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: holds a {type(content).__name__}, not a dictionary of tensors")
    args = content.get("args", {})
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    candidates = [content, *(content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping))]
    for state in candidates:
        if state and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state), options
    shown = json.dumps([str(name) for name in list(content)[:8]])
    places = ", ".join(STATE_KEYS)
    raise UserError(f"{where}: no weights found, neither at the top nor under {places}; it has {shown}")


def _first_line(error: Exception) -> str:
    sentences = [text for text in re.split(r"\n|\. ", str(error)) if text.strip()]
    return f"{type(error).__name__}: {sentences[0].strip()}" if sentences else type(error).__name__
