"""Paths and checksums of weights files, without reading a tensor: importing this imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256, split_choice
from mrmae_ds.units import counted, first_few

MODEL_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
HUB = "hf:"
OTHER_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl")


def find_weights(source: Path, key: str = "") -> Path:
    """Return the model file of a folder (a stage's, or one with the index of a file in shards), or ``source`` itself.

    Args:
        source: folder or file; ``#KEY`` at its end chooses one of several sets of weights and is kept. ``hf:ORG/NAME``
            and ``hf:ORG/NAME@REVISION`` are repositories of the Hugging Face hub, downloaded to its cache.
        key: recipe key that named it, for errors; empty for an argument.

    Raises:
        UserError: if the file does not exist, or a folder has several indices.
    """
    source, choice = split_choice(source)
    if str(source).startswith(HUB):
        source = _download(str(source).removeprefix(HUB), key)
    where = f"{key}: {source}" if key else str(source)
    path = source / MODEL_FILE if source.is_dir() else source
    if source.is_dir() and not path.is_file():
        indices = sorted(source.glob(f"*{INDEX_SUFFIX}"))
        if len(indices) > 1:
            names = ", ".join(index.name for index in indices)
            raise UserError(f"{where} has {len(indices)} indices ({names}); name one of them")
        path = indices[0] if indices else path
    if not path.is_file():
        others = [] if not source.is_dir() else sorted(p.name for p in source.iterdir() if p.suffix in OTHER_SUFFIXES)
        if others:
            raise UserError(f"{where} has no {MODEL_FILE}; name a file in it: {first_few(others, 3)}")
        refuse_run_folder(source, where)
        what = "has not finished (no model.safetensors)" if source.is_dir() else "does not exist"
        fix = "run that stage first, or "
        if path.suffix in OTHER_SUFFIXES and not source.is_dir():
            fix = "get the file as the recipe's header says, or " if key else ""
        raise UserError(f"{where} {what}; {fix}name a stage folder (runs/NAME/STAGE) or a model file")
    return Path(f"{path}#{choice}") if choice else path


def refuse_run_folder(folder: Path, where: str, file: str = MODEL_FILE, what: str = "finished stage") -> None:
    """Check that a folder is not that of a run, of whose stages one has to be chosen.

    Args:
        folder: the folder.
        where: its description in the error.
        file: name of a file that the stages in question have.
        what: description of such a stage.

    Raises:
        UserError: naming the stages.
    """
    if stages := sorted(str(path.parent) for path in folder.glob(f"*/{file}")):
        raise UserError(f"{where} is the folder of {counted(len(stages), what)}; choose one: {first_few(stages, 8)}")


def _download(repository: str, key: str) -> Path:
    """Return the folder of a hub's repository in the cache, with its safetensors weights and configurations."""
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    files = [MODEL_FILE, "model-*.safetensors", f"model{INDEX_SUFFIX}", "*config.json"]
    where = f"{key}{': ' if key else ''}{HUB}{repository}"
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # of the client, and of the HTTP library under it, which differs between its versions
        raise UserError(f"{where}: cannot be downloaded {describe_hub_failure(error, 'read')}") from None
    if not any(folder.glob("model*.safetensors*")):
        raise UserError(f"{where}: the repository has no {MODEL_FILE}; download its weights file and name that")
    return folder


def describe_hub_failure(error: Exception, right: Literal["read", "write"]) -> str:
    """Return the reason of a failed request to the hub, in parentheses, and the way out.

    Args:
        error: of the hub's client.
        right: what a token must allow.
    """
    reason = " ".join(re.sub(r"For more information check: \S+", "", str(error)).split())[:300]
    answers = [getattr(cause, "response", None) for cause in (error, error.__cause__)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if isinstance(error, ValueError) and status is None:
        fix = "check the name"
    elif status in (401, 403, 404):  # the hub answers 401 for a name that it does not have, too
        fix = f"check the name, and that HF_TOKEN is a token that may {right} there"
    elif status is None:
        fix = "check the network and HF_ENDPOINT, then run the command again"
    else:
        fix = "run the command again later"
    return f"({reason or type(error).__name__}); {fix}"


def weights_sha256(source: Path) -> str:
    """Return the SHA-256 of a weights file, in hexadecimal; of an index, that of the checksums of index and shards.

    Args:
        source: the file, with or without a key.
    """
    path, _ = split_choice(source)
    if not path.name.endswith(INDEX_SUFFIX):
        return file_sha256(path)
    return hashlib.sha256("".join(file_sha256(file) for file in weights_files(path)).encode()).hexdigest()


def weights_files(path: Path) -> list[Path]:
    """Return the files of a weights file: the file, or an index and its shards."""
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(read_index(path).values())))]


def read_index(index: Path) -> dict[str, str]:
    """Return the file name of each tensor in an index."""
    content = json.loads(index.read_text(encoding="utf-8"))
    return {str(name): str(file) for name, file in content["weight_map"].items()}
