"""What a checkpoint is, whoever wrote it: a file of weights, a stage's folder, or a checkpoint of a running stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.models.sizes import ARCHITECTURES
from mrmae_ds.records.record import RECORD_FILE, RunRecord
from mrmae_ds.units import first_few
from mrmae_ds.weights.export import input_statistics
from mrmae_ds.weights.formats import read_tensor_file, verify_checksums
from mrmae_ds.weights.identify import WeightIdentity, identify, nearest_architecture
from mrmae_ds.weights.model_file import MODEL_FILE

FORMATS = {"safetensors": "safetensors", "pickle": "torch pickle, no code in it", "torchscript": "TorchScript archive"}
# Of a released file's command line, what says how it was trained.
OPTIONS = ("model", "input_size", "mask_ratio", "norm_pix_loss", "nb_classes", "epochs", "batch_size", "blr")
InfoRow = tuple[str, str]


def describe(path: Path) -> str:
    """A few aligned lines on a file or folder.

    Args:
        path: a file of weights, a stage folder, its folder ``checkpoints``, or one checkpoint ``step_N`` in it.

    Raises:
        UserError: if it does not exist, is damaged, holds code, or is none of these.
    """
    if path.is_file():
        return _block(str(path), describe_file(path))
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    from mrmae_ds.training.checkpoint.folder import FOLDER, list_checkpoints
    from mrmae_ds.training.checkpoint.manifest import MANIFEST

    if (path / MANIFEST).is_file():
        return _block(str(path), _checkpoint_rows(path))
    if path.name == FOLDER:
        blocks = _checkpoint_blocks(list_checkpoints(path.parent))
    else:
        blocks = [_block(str(path), _record_rows(path))] if (path / RECORD_FILE).is_file() else []
        blocks += _checkpoint_blocks(list_checkpoints(path))
        if (path / MODEL_FILE).is_file():
            blocks.append(_block(str(path / MODEL_FILE), describe_file(path / MODEL_FILE)))
    if not blocks:
        raise UserError(
            f"{path}: neither a stage's folder (runs/NAME/STAGE) nor a checkpoint of one (checkpoints/step_N with a "
            f"{MANIFEST}); without its {MANIFEST} a checkpoint was not finished"
        )
    return "\n\n".join(blocks)


def describe_file(path: Path) -> list[InfoRow]:
    """What a file of weights is, as (label, text) rows.

    Raises:
        UserError: if it is damaged, holds code, or holds no weights.
    """
    file = read_tensor_file(path)
    verify_checksums(path)
    found = identify(file)
    rows = [("kind", found.title), ("format", FORMATS[file.format])]
    if found.family:
        rows += _encoder_rows(found)
    rows += _tensor_rows(file.tensors)
    rows.append(("sha256", file_sha256(path)))
    rows += _our_rows(found.metadata) if found.ours else []
    if options := [f"{key} {file.args[key]}" for key in OPTIONS if file.args.get(key) is not None]:
        rows.append(("made with", ", ".join(options)))
    rows.append(("use it", usage(found, path)))
    return rows


def usage(found: WeightIdentity, path: Path) -> str:
    """How a file of weights is used here."""
    if found.kind == "clip":
        return f"as a teacher: teachers.NAME={{kind: clip, source: MODEL, weights: {path}}}, MODEL by open_clip's name"
    if found.extras:
        return (
            f"as a teacher: teachers.NAME={{kind: timm, source: MODEL, weights: {path}}}, MODEL by timm's name; this "
            f"project's plain ViT has no {', '.join(found.extras[:3])}"
        )
    if not found.family:
        return f"as a teacher, if timm has its model: teachers.NAME={{kind: timm, source: MODEL, weights: {path}}}"
    if "create_model" in found.metadata:
        return f"{found.metadata['create_model'][:-1]}, checkpoint_path={str(path)!r})"
    arch, changes = nearest_architecture(found.family, found.sizes)
    settings = [f"model.arch={arch}", *(f"model.overrides.{key}={_yaml(value)}" for key, value in changes.items())]
    settings += ["stages.finetune.pool=token"] if found.pool == "token" else []
    return f"stages.finetune.init={path} with {' '.join(settings)}{_heads(found, arch, changes)}"


def _heads(found: WeightIdentity, arch: str, changes: Mapping[str, Any]) -> str:
    """What a user has to know of the number of heads, which only our own files tell."""
    if "num_heads" in found.sizes:
        return ""
    if "dims" in changes or "dim" in changes:
        return " model.overrides.num_heads=N (its heads: no shape tells them)"
    return f", if it has {ARCHITECTURES[arch].num_heads} heads (no shape tells them)"


def _encoder_rows(found: WeightIdentity) -> list[InfoRow]:
    sizes = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in found.sizes.items())
    rows = [("encoder", sizes)]
    stride = math.prod(found.sizes["patches"]) if found.family == "cvit" else found.sizes["patch"]
    if found.grid is not None:
        height, width = (side * stride for side in found.grid)
        pixels = f"{height}" if height == width else f"{height} x {width}"
        rows.append(("image", f"{pixels} pixels, grid {found.grid[0]} x {found.grid[1]}, patch {stride}"))
    if found.family == "cvit" and found.prefix_rows:
        rows.append(("class token", "one with a position of its own; a CViT has no use for it, and it is left out"))
    if statistics := input_statistics(found.metadata):
        rows.append(("input", statistics))
    if found.num_classes:
        names = found.metadata.get("class_names") or []
        shown = f": {first_few(names, 5)}" if names else ""
        rows.append(("classes", f"{found.num_classes}{shown}"))
    return rows


def _tensor_rows(tensors: Mapping[str, Tensor]) -> list[InfoRow]:
    total = sum(tensor.numel() for tensor in tensors.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    rows = [
        ("values", f"{total:,} in {len(tensors)} tensors"),
        ("dtype", ", ".join(kinds) if len(kinds) == 1 else ", ".join(f"{kind} ({n})" for kind, n in kinds.items())),
    ]
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _finite(tensor)]
    if broken:
        rows.append(("NOT FINITE", f"{len(broken)} tensors hold NaN or infinity: {first_few(broken, 3)}"))
    return rows


def _our_rows(metadata: Mapping[str, Any]) -> list[InfoRow]:
    recipe = metadata.get("recipe") or {}
    told = metadata.get("recipe_hash")
    parts = [recipe.get("name"), metadata.get("stage"), f"hash {told}" if told else None]
    rows = [("written by", "this project: " + (", ".join(part for part in parts if part) or "recipe not told"))]
    rows += [("step", f"{metadata['step']:,}")] if "step" in metadata else []
    results = metadata.get("results") or {}
    rows += [("results", ", ".join(f"{key} {value:.6g}" for key, value in results.items()))] if results else []
    rows += [("commit", metadata["commit"])] if "commit" in metadata else []
    return rows


def _record_rows(stage: Path) -> list[InfoRow]:
    record = RunRecord.load(stage)
    schedule = record.schedule
    return [
        ("run", f"{record.name}, {record.stage}: {record.method}, {record.size}, seed {record.seed}"),
        ("status", f"{record.status}, step {schedule.steps_done:,} of {schedule.steps:,}"),
    ]


def _checkpoint_blocks(checkpoints: list[Path]) -> list[str]:
    """Raises UserError if one is not whole, naming those that are."""
    blocks, damaged = {}, []
    for checkpoint in checkpoints:
        try:
            blocks[checkpoint.name] = _block(str(checkpoint), _checkpoint_rows(checkpoint))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"{'; '.join(damaged)}. Whole: {', '.join(blocks) or 'none'}")
    return list(blocks.values())


def _checkpoint_rows(checkpoint: Path) -> list[InfoRow]:
    """Raises UserError if a file of it is missing or cut off."""
    from mrmae_ds.training.checkpoint.manifest import check_contents, check_sizes, read_manifest

    manifest = read_manifest(checkpoint)
    wrong = check_sizes(checkpoint, manifest) or check_contents(checkpoint, manifest, manifest.files)
    if wrong:
        raise UserError("; ".join(wrong))
    processes, identity = manifest.layout.world_size, manifest.identity
    return [
        ("kind", "training state (DeepSpeed), to go on from: --resume " + str(checkpoint)),
        ("step", f"{manifest.step:,}, by {processes} process{'es' * (processes != 1)}"),
        ("recipe", f"hash {identity.recipe_hash}, seed {identity.seed}"),
        ("files", f"{len(manifest.files)}, {manifest.size / 2**20:,.1f} MiB, whole by their checksums"),
    ]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _block(title: str, rows: list[InfoRow]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {text}" for label, text in rows)])


def _plain(value: Any) -> str:
    """A number as one writes it, and several separated by slashes."""
    if isinstance(value, (tuple, list)):
        return "/".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_plain, value)) + "]"
    return _plain(value)
