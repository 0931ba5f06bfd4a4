"""Description of weights files of any origin, stage folders and training checkpoints, for ``mrmae check``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mrmae_ds.config.detection import DetectorConfig
from mrmae_ds.errors import UserError
from mrmae_ds.files import split_choice
from mrmae_ds.models.sizes import ARCHITECTURES
from mrmae_ds.records.record import RECORD_FILE, RunRecord
from mrmae_ds.teachers.sources.gelu import gelu_of_file
from mrmae_ds.training.checkpoint.folder import FOLDER, list_checkpoints
from mrmae_ds.training.checkpoint.manifest import MANIFEST, check_contents, check_sizes, read_manifest
from mrmae_ds.units import counted, first_few, printable
from mrmae_ds.weights.changed import changed_weights
from mrmae_ds.weights.detectors import STRIDE as ENCODER_STRIDE
from mrmae_ds.weights.detectors import DetectorFile, detector_of
from mrmae_ds.weights.export import input_statistics, timm_line
from mrmae_ds.weights.finished_run import with_present_keys
from mrmae_ds.weights.formats import verify_checksums
from mrmae_ds.weights.identify import WeightIdentity
from mrmae_ds.weights.names import describe_names
from mrmae_ds.weights.paths import HUB, INDEX_SUFFIX, MODEL_FILE, find_weights, refuse_run_folder, weights_sha256
from mrmae_ds.weights.resolve import Weights, model_metadata, resolve, unusable_tensors
from mrmae_ds.weights.shapes import nearest_architecture

FORMATS = {"safetensors": "safetensors", "pickle": "torch pickle without code", "torchscript": "TorchScript archive"}
# Training options to print, of those in a released file.
OPTIONS = ("model", "input_size", "mask_ratio", "norm_pix_loss", "nb_classes", "epochs", "batch_size", "blr")
InfoRow = tuple[str, str]


def describe(path: Path) -> str:
    """Describe a file or folder in aligned lines.

    Args:
        path: a weights file (``FILE#KEY`` for one of several sets of weights), a stage folder, its folder
            ``checkpoints``, or a checkpoint ``step_N`` in it.

    Raises:
        UserError: if it does not exist, is damaged, contains code, or is none of these.
    """
    if str(path).startswith(HUB):
        path = find_weights(path)
    if split_choice(path)[0].is_file():
        return _block(str(path), describe_file(path))
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    if (path / MANIFEST).is_file():
        return _block(str(path), _checkpoint_rows(path))
    if path.name == FOLDER:
        blocks = _checkpoint_blocks(list_checkpoints(path.parent))
    else:
        blocks = [_block(str(path), _record_rows(path))] if (path / RECORD_FILE).is_file() else []
        blocks += _checkpoint_blocks(list_checkpoints(path))
        files = [file for file in (path / MODEL_FILE, *path.glob(f"*{INDEX_SUFFIX}")) if file.is_file()]
        others = [] if blocks or files else list(path.glob("*.safetensors"))  # as open_clip names its file
        files += others if len(others) == 1 else []
        blocks += [_block(str(file), describe_file(file)) for file in files]
    if not blocks:
        refuse_run_folder(path, str(path), RECORD_FILE, "stage")
        raise UserError(
            f"{path}: neither a stage folder (runs/NAME/STAGE) nor a checkpoint in one (checkpoints/step_N with a "
            f"{MANIFEST}); a checkpoint without {MANIFEST} is incomplete; if it holds other weights, name a file in it"
        )
    return "\n\n".join(blocks)


def describe_file(path: Path) -> list[InfoRow]:
    """Describe a weights file as the loaders resolve it.

    Args:
        path: the file, ``FILE#KEY`` for one of several sets of weights.

    Returns:
        Rows of label and text.

    Raises:
        UserError: if it is damaged, contains code, contains no weights, or several sets of them and none is chosen.
    """
    weights = resolve(path)
    if detector := detector_of(weights):
        return _detector_rows(detector, path)
    file, identity = weights.file, weights.identity
    verify_checksums(file.path)
    rows = [("kind", identity.title), ("format", FORMATS[file.format])]
    if chosen := describe_names(file):
        rows.append(("taken", "; ".join(chosen)))
    if identity.family:
        rows += _encoder_rows(identity)
    rows += _clip_rows(weights) if identity.kind == "clip" else []
    rows += _tensor_rows(file.tensors, weights.unusable)
    rows += _file_rows(weights, path)
    if weights.problem:
        return [*rows, ("NOT USABLE", weights.problem)]
    if identity.kind == "clip":
        return rows + _clip_uses(weights, path)
    rows.append(("use it", usage(identity, path)))
    return rows + (_other_uses(weights) if identity.family and not identity.extras else [])


def _file_rows(weights: Weights, path: Path) -> list[InfoRow]:
    """Return checksum and origin of a file."""
    file, identity = weights.file, weights.identity
    is_index = file.path.name.endswith(INDEX_SUFFIX)
    rows = [("sha256", weights_sha256(path) + " (of the checksums of index and shards)" * is_index)]
    rows += _our_rows(with_present_keys(dict(identity.metadata))) if identity.ours else []
    options = [f"{key} {file.args[key]}" for key in OPTIONS if file.args.get(key) is not None]
    return rows + ([("made with", ", ".join(options))] if options else [])


def _detector_rows(detector: DetectorFile, path: Path) -> list[InfoRow]:
    """Describe a file of a whole detector, and say how to use all of it, or its encoder alone."""
    from mrmae_ds.detection.saved import detector_problem, saved_detector

    weights = detector.weights
    verify_checksums(weights.raw.path)
    rows = [("kind", f"whole {weights.identity.title.split(' of ')[-1].removeprefix('a ')}, Mask R-CNN")]
    rows += [("format", FORMATS[weights.raw.format]), *_encoder_rows(weights.identity)]
    if not detector.problem:
        config, side = detector.sizes()
        sizes = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in config)
        rows.append(("detector", f"{detector.num_classes} classes, image {side}, {sizes}"))
    rows += _tensor_rows(weights.raw.tensors, unusable_tensors(detector.tensors))
    rows += [("not used", first_few(detector.unused, 6))] if detector.unused else []
    rows += _file_rows(weights, path)
    alone = [] if weights.problem else [("its encoder", f"stages.detect.init={detector.encoder_alone}")]
    if problem := detector_problem(detector):
        return [*rows, ("NOT USABLE", problem), *alone]
    rows.append(("use it", detector_usage(detector, path)))
    try:
        names = saved_detector(detector).metadata["class_names"]
    except UserError as error:
        reason = str(error).removeprefix(f"{weights.where}: ")
        return [*rows, *alone, ("refused yet", f"detect, evaluation and export: it {reason}")]
    rows.append(("classes", first_few(names, 5)))
    rows.append(("detect by it", f"mrmae detect {path} IMAGE... --out FOLDER"))
    return [*rows, ("evaluate it", f"stages.evaluate.members=[{path}]"), *alone]


def detector_usage(detector: DetectorFile, path: Path) -> str:
    """Return the settings of a recipe that fine-tunes a whole detector.

    Args:
        detector: usable file.
        path: the file.
    """
    identity, (config, side) = detector.weights.identity, detector.sizes()
    default = DetectorConfig(global_blocks=config.global_blocks)
    changed = {key: value for key, value in config if key == "global_blocks" or value != getattr(default, key)}
    grid = identity.grid or (0, 0)
    settings = [f"stages.detect.init={path} with {_model_settings(identity)}"]
    settings += [f"model.image_size={grid[0] * ENCODER_STRIDE}", f"stages.detect.image_size={side}"]
    return " ".join([*settings, *(f"stages.detect.detector.{key}={_yaml(value)}" for key, value in changed.items())])


def usage(identity: WeightIdentity, path: Path) -> str:
    """Return the setting or line of Python that loads a weights file, unless it is a CLIP's.

    Args:
        identity: identity of the file.
        path: the file.
    """
    if identity.extras:
        return (
            f"as a teacher: teachers.NAME={{kind: timm, source: MODEL, weights: {path}}}, MODEL as in timm; "
            f"this project's plain ViT has no {', '.join(identity.extras[:3])}"
        )
    if not identity.family:
        return f"as a teacher, if timm has the model: teachers.NAME={{kind: timm, source: MODEL, weights: {path}}}"
    if "create_model" in identity.metadata:
        return timm_line(identity.metadata, path)
    stage, pool = "finetune", " stages.finetune.pool=token" if identity.pool == "token" else ""
    if identity.relative:
        stage = "detect"
    return f"stages.{stage}.init={path} with {_model_settings(identity, pool)}"


def _model_settings(identity: WeightIdentity, pool: str = "") -> str:
    """Return the settings of a recipe's model for an encoder."""
    arch, changes = nearest_architecture(identity.family, identity.sizes)
    settings = [f"model.arch={arch}", *(f"model.overrides.{key}={_yaml(value)}" for key, value in changes.items())]
    return f"{' '.join(settings)}{pool}{_heads(identity, arch, changes)}"


def _clip_rows(weights: Weights) -> list[InfoRow]:
    """Return what no tensor of a CLIP shows."""
    gelu, origin = gelu_of_file(weights.file), weights.identity.origin
    rows = [("GELU", str(gelu) if gelu else "not recorded; a teacher needs the key quickgelu: true or false")]
    rows += [("heads", f"{origin.num_heads}, by {origin.heads_by}")] if origin.num_heads is not None else []
    if origin.statistics is not None:
        mean, std = origin.statistics
        rows.append(("input", f"{input_statistics({'mean': mean, 'std': std})}, by {origin.statistics_by}"))
    return rows


def _clip_uses(weights: Weights, path: Path) -> list[InfoRow]:
    """Return the teacher that takes a CLIP's image tower, or the reason why none does."""
    setting = f"as a teacher: teachers.NAME={{kind: clip, source: MODEL, weights: {path}}}"
    if not weights.identity.sizes:
        return [("use it", f"{setting}, MODEL as in open_clip, if it has the model (not checked)")]
    from mrmae_ds.teachers.sources.clip_loading import source_of, statistics_of_name  # imports open_clip, which is slow

    try:
        source = source_of(weights)
    except UserError as error:
        return [("refused yet", f"teachers of kind clip: {error}")]
    known = weights.identity.origin.statistics or statistics_of_name(source)
    rows = [] if known else [("input", "not recorded; a teacher needs the keys mean and std")]
    return [*rows, ("use it", setting.replace("MODEL", source))]


def _heads(identity: WeightIdentity, arch: str, changes: Mapping[str, Any]) -> str:
    """Return the override of the number of heads or advice on it, which only this project's files contain."""
    if "num_heads" in identity.sizes:
        return ""
    known = identity.origin.num_heads
    if known and ("dims" in changes or "dim" in changes or known != ARCHITECTURES[arch].num_heads):
        return f" model.overrides.num_heads={known}"
    if "dims" in changes or "dim" in changes:
        return " model.overrides.num_heads=N (N: number of heads, which the file does not contain)"
    other = "" if known else ", else model.overrides.num_heads=N"
    return f", if it has {ARCHITECTURES[arch].num_heads} heads{other} (the file does not contain their number)"


def _other_uses(weights: Weights) -> list[InfoRow]:
    """Return the setting that evaluates a classifier, and the reason why uses without a recipe's sizes are refused."""
    classifier = weights.identity.kind == "classifier"
    try:
        names = model_metadata(weights).get("class_names")
    except UserError as error:
        uses = f"{'evaluation, ' if classifier else ''}export, show and teachers of kind checkpoint"
        return [("refused yet", f"{uses}: it {str(error).removeprefix(f'{weights.where}: ')}")]
    if classifier and not weights.identity.pool:
        return [("refused yet", "evaluation and export: the input of its head is unknown")]
    known = "" if names else ", once a config.json beside it names its classes (id2label)"
    return [("evaluate it", f"stages.evaluate.members=[{weights.where}]{known}")] if classifier else []


def _encoder_rows(identity: WeightIdentity) -> list[InfoRow]:
    sizes = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in identity.sizes.items())
    rows = [("encoder", sizes)]
    stride = math.prod(identity.sizes["patches"]) if identity.family == "cvit" else identity.sizes["patch"]
    if identity.grid is not None:
        height, width = (side * stride for side in identity.grid)
        pixels = f"{height}" if height == width else f"{height} x {width}"
        rows.append(("image", f"{pixels} pixels, grid {identity.grid[0]} x {identity.grid[1]}, patch {stride}"))
    if identity.family == "cvit" and identity.prefix_rows:
        rows.append(("class token", "present with its own position; left out, unless the pooling is token"))
    origin = identity.origin
    if statistics := input_statistics(identity.metadata):
        rows.append(("input", statistics))
    elif origin.statistics is not None:
        mean, std = origin.statistics
        rows.append(("input", f"{input_statistics({'mean': mean, 'std': std})}, by {origin.statistics_by}"))
    if origin.num_heads is not None and not identity.ours:
        rows.append(("heads", f"{origin.num_heads}, by {origin.heads_by}"))
    rows += [("not verified", "; ".join(origin.unverified()))] if origin.unverified() else []
    if identity.num_classes:
        names = origin.class_names
        shown = f": {first_few(names, 5)}" if names else ""
        rows.append(("classes", f"{identity.num_classes}{shown}"))
    return rows


def _tensor_rows(tensors: Mapping[str, Tensor], unusable: str) -> list[InfoRow]:
    total = sum(tensor.numel() for tensor in tensors.values())
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    rows = [
        ("values", f"{total:,} in {counted(len(tensors), 'tensor')}"),
        ("dtype", ", ".join(kinds) if len(kinds) == 1 else ", ".join(f"{kind} ({n})" for kind, n in kinds.items())),
    ]
    return rows + ([("UNUSABLE", unusable)] if unusable else [])


def _our_rows(metadata: Mapping[str, Any]) -> list[InfoRow]:
    recipe = metadata.get("recipe") or {}
    recipe_hash = metadata.get("recipe_hash")
    parts = [recipe.get("name"), metadata.get("stage"), f"hash {recipe_hash}" if recipe_hash else None]
    rows = [("written by", "this project: " + (", ".join(part for part in parts if part) or "unknown recipe"))]
    rows += [("step", f"{metadata['step']:,}")] if "step" in metadata else []
    results = metadata.get("results") or {}
    rows += [("results", ", ".join(f"{key} {value:.6g}" for key, value in results.items()))] if results else []
    rows += [("commit", metadata["commit"])] if "commit" in metadata else []
    return rows


def _record_rows(stage: Path) -> list[InfoRow]:
    record = RunRecord.load(stage)
    schedule = record.schedule
    changed = [
        ("OTHER WEIGHTS", f"{path} was made over since this run read it: start this one over with --resume never")
        for path in changed_weights(stage, record)
    ]
    return [
        *changed,
        ("run", f"{record.name}, {record.stage}: {record.method}, {record.size}, seed {record.seed}"),
        ("status", f"{record.status}, step {schedule.steps_done:,} of {schedule.steps:,}"),
    ]


def _checkpoint_blocks(checkpoints: list[Path]) -> list[str]:
    """Describe checkpoints.

    Raises:
        UserError: if one is damaged; the message names the intact ones.
    """
    blocks, damaged = {}, []
    for checkpoint in checkpoints:
        try:
            blocks[checkpoint.name] = _block(str(checkpoint), _checkpoint_rows(checkpoint))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"{'; '.join(damaged)}. Intact: {', '.join(blocks) or 'none'}")
    return list(blocks.values())


def _checkpoint_rows(checkpoint: Path) -> list[InfoRow]:
    """Describe a checkpoint and verify its files.

    Raises:
        UserError: if a file is missing, truncated or changed.
    """
    manifest = read_manifest(checkpoint)
    problems = check_sizes(checkpoint, manifest) or check_contents(checkpoint, manifest, manifest.files)
    if problems:
        raise UserError("; ".join(problems))
    ranks, identity = manifest.layout.world_size, manifest.identity
    return [
        ("kind", f"training state (DeepSpeed); resume with --resume {checkpoint}"),
        ("step", f"{manifest.step:,}, on {counted(ranks, 'rank')}"),
        ("recipe", f"hash {identity.recipe_hash}, seed {identity.seed}"),
        ("files", f"{len(manifest.files)}, {manifest.size / 2**20:,.1f} MiB, checksums verified"),
    ]


def _block(title: str, rows: list[InfoRow]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {printable(text)}" for label, text in rows)])


def _plain(value: Any) -> str:
    """Format a number, or several separated by slashes."""
    if isinstance(value, (tuple, list)):
        return "/".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_plain, value)) + "]"
    return _plain(value)
