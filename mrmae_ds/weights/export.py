"""Export weights of a finished run or of another project: the whole model, or a file that timm loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import check_writable
from mrmae_ds.imagenet import crop_share
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.sizes import height_width
from mrmae_ds.records.record import RECORD_FILE, RunRecord
from mrmae_ds.weights.finished_run import with_present_keys
from mrmae_ds.weights.load import load_encoder_weights
from mrmae_ds.weights.model_file import (
    is_ours,
    read_metadata,
    read_tensors,
    run_folder_name,
    save_weights,
    size_from_metadata,
    spec_from_metadata,
)
from mrmae_ds.weights.paths import MODEL_FILE, find_weights
from mrmae_ds.weights.resolve import RELATIVE, model_metadata, resolve
from mrmae_ds.weights.shapes import nearest_architecture

WeightLayout = Literal["timm", "safetensors"]
PortableLayout = Literal["onnx", "pt2"]
ENDINGS = {"timm": "-timm.safetensors", "safetensors": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}
TIMM_VITS = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}
TIMM_BEITS = {"beit_base": "beit_base_patch16_224"}
TIMM_VIT_FIELDS = {
    "dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "patch": "patch_size",
    "layer_scale": "init_values",
}


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        path: path of the file, or address of the hub's repository.
        line: line of Python that loads it.
        notes: remarks for its user.
    """

    path: Path | str
    line: str
    notes: tuple[str, ...] = ()


def export_run(source: Path, layout: WeightLayout = "timm", out: Path | None = None, force: bool = False) -> Exported:
    """Export the weights of a finished run, or of a CViT or plain ViT of another project.

    Args:
        source: stage folder (runs/NAME/STAGE) or its model.safetensors, or a weights file of known origin.
        layout: ``safetensors`` exports the whole model. ``timm`` exports a file that ``timm.create_model`` loads
            strictly: a classifier, or the bare encoder of a pre-training (for a plain ViT with the norm after its last
            block).
        out: output file or folder; None writes a file named after run and stage to the working directory.
        force: replace an existing file that this project did not write.

    Raises:
        UserError: if ``source`` is not a finished run, its heads or statistics are not known, or ``out`` must not be
            written.
    """
    path = finished_weights(source)
    metadata, tensors = _content(path, layout)
    if metadata.get("layout") in ("timm", layout):
        raise UserError(f"{path}: is itself an export; give the run's folder or its {MODEL_FILE}")
    metadata |= {"layout": layout, **provenance(path)}
    statistics = input_statistics(metadata)
    notes = (f"its input is {statistics}",) if statistics else ()
    if layout == "timm":
        if metadata["kind"] == "pretrain":
            tensors, notes = _bare(tensors, metadata), (_bare_note(metadata), *notes)
            metadata["kind"] = "encoder"
        notes = (*notes, f"evaluation takes {_describe_crop(metadata)}")
        metadata["create_model"] = f"timm.create_model({timm_call(metadata)})"
    target = export_target(path, metadata, layout, out, force)
    save_weights(target, tensors, metadata)
    if layout == "safetensors":
        return Exported(target, f"from mrmae_ds.weights.load import load_model; model = load_model({str(target)!r})")
    modules = "mrmae_ds, timm" if metadata["family"] == "cvit" else "timm"
    return Exported(target, f"import {modules}; model = {timm_line(metadata, target)}", notes)


def _content(path: Path, layout: WeightLayout) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return metadata and tensors of a file of this project, or of another's encoder by this project's names."""
    if is_ours(path):
        if read_metadata(path)["kind"] == "detector":
            raise UserError(f"{path}: {RELATIVE}")
        return with_present_keys(read_metadata(path)), read_tensors(path)
    weights = resolve(path)
    metadata = model_metadata(weights)
    classifier = metadata["kind"] == "classifier"
    if classifier and not metadata["pool"]:
        raise UserError(f"{path}: the input of its head is unknown, so that its outputs would differ here")
    if layout == "safetensors" and not classifier:
        raise UserError(f"{path}: only a run has a complete pre-training; export its encoder with --to timm")
    pool = metadata.get("pool") or "avg"
    size = size_from_metadata(metadata)
    model = build_encoder(spec_from_metadata(metadata), size, metadata.get("num_classes", 0), pool=pool)
    report = load_encoder_weights(model, weights)
    if report.missing:
        raise UserError(f"{path}: is incomplete: {report}")
    if classifier:
        return metadata, model.state_dict()
    tensors = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    norm = {ours: weights.file.tensors[name] for name, ours in weights.identity.names.items() if "fusion.norm" in ours}
    if metadata["family"] != "cvit" and not norm:
        raise UserError(f"{path}: lacks the norm after its last block (norm.weight), without which timm cannot load it")
    return metadata | {"kind": "pretrain"}, tensors | norm


def load_exported(path: Path) -> nn.Module:
    """Load a file that was exported for timm by ``timm.create_model``, in eval mode on the CPU."""
    import timm

    metadata = read_metadata(path)
    name, settings = timm_arguments(metadata)
    overlay = timm_overlay(metadata, path)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **settings).eval()


def timm_line(metadata: Mapping[str, Any], path: Path) -> str:
    """Return the call that loads a file exported for timm, with the input that its results were measured on.

    Args:
        metadata: metadata of the exported file.
        path: the file.
    """
    overlay = timm_overlay(metadata, path)
    return f"timm.create_model({timm_call(metadata)}, pretrained=True, pretrained_cfg_overlay={overlay!r})"


def timm_overlay(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return ``pretrained_cfg_overlay`` of a file exported for timm: the file and the input of the run's evaluation.

    ``pretrained=True`` with the file in the configuration, and not ``checkpoint_path``, so that ``num_classes``,
    ``img_size`` and ``features_only`` may be changed as for timm's own weights.

    Args:
        metadata: metadata of the exported file.
        path: the file.
    """
    height, width = height_width(size_from_metadata(metadata))
    classes = metadata["num_classes"] if metadata["kind"] == "classifier" else 0
    overlay: dict[str, Any] = {"file": str(path), "num_classes": classes, "input_size": (3, height, width)}
    overlay |= {"crop_pct": _crop_pct(metadata), "interpolation": "bicubic"}
    return overlay | {key: tuple(metadata[key]) for key in ("mean", "std") if key in metadata}


def _crop_pct(metadata: Mapping[str, Any]) -> float:
    """Return the side of evaluation's crop as a share of the resized short side."""
    return crop_share(max(height_width(size_from_metadata(metadata))))


def _describe_crop(metadata: Mapping[str, Any]) -> str:
    height, width = height_width(size_from_metadata(metadata))
    crop = f"the center crop of {height} x {width} pixels"
    return f"{crop}, the short side resized to {int(min(height, width) / _crop_pct(metadata))} (bicubic)"


def timm_call(metadata: Mapping[str, Any]) -> str:
    """Return the arguments of ``timm.create_model`` as text; see :func:`timm_arguments`."""
    name, settings = timm_arguments(metadata)
    return ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in settings.items())])


def timm_arguments(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and settings for ``timm.create_model`` of a file's model, or of the encoder of a pre-training.

    Args:
        metadata: metadata of the model file.
    """
    sizes = asdict(spec_from_metadata(metadata))
    if metadata["family"] == "cvit":
        name, changes = nearest_architecture("cvit", sizes)
    else:
        names = TIMM_BEITS if metadata["family"] == "beit" else TIMM_VITS
        arch, changes = nearest_architecture(metadata["family"], sizes, among=names)
        name = names[arch]
        changes = {TIMM_VIT_FIELDS[key]: value for key, value in changes.items() if key in TIMM_VIT_FIELDS}
        if sizes.get("relative_positions") == "shared":
            changes |= {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    settings: dict[str, Any] = {"img_size": size_from_metadata(metadata), **changes}
    if metadata["kind"] == "classifier":
        return name, settings | {"num_classes": metadata["num_classes"], "global_pool": metadata.get("pool", "avg")}
    return name, settings | {"num_classes": 0, "global_pool": ""}


def input_statistics(metadata: Mapping[str, Any]) -> str:
    """Describe the normalization of a model's input images; "" if the metadata does not record it.

    Args:
        metadata: metadata of the model file.
    """
    if "mean" not in metadata or "std" not in metadata:
        return ""
    mean, std = (" ".join(f"{value:g}" for value in metadata[key]) for key in ("mean", "std"))
    return f"RGB in [0, 1], minus the mean {mean}, divided by {std}"


def finished_weights(source: Path) -> Path:
    """Return the model file of a stage; for an unfinished one, raise UserError with the remedy."""
    if source.is_dir() and not (source / MODEL_FILE).is_file() and (source / RECORD_FILE).is_file():
        record = RunRecord.load(source)
        done = f"{record.schedule.steps_done} of {record.schedule.steps} steps, status {record.status}"
        raise UserError(
            f"{source}: not finished ({done}); {MODEL_FILE} is written at the end. Resume it by "
            "running its training command again, then export"
        )
    return find_weights(source)


def provenance(path: Path) -> dict[str, Any]:
    """Return commit, name and results from the record beside the model file, if there is one."""
    if not (path.parent / RECORD_FILE).is_file():
        return {}
    record = RunRecord.load(path.parent)
    git = {"commit": record.git.commit + ("+changes" if record.git.dirty else "")} if record.git else {}
    return git | {"run": record.name, "results": record.results.model_dump(exclude_none=True)}


def _bare(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the encoder of a pre-training by timm's names, with the final norm unless it is a CViT."""
    prefixes = {"encoder.": ""} if metadata["family"] == "cvit" else {"encoder.": "", "fusion.norm.": "norm."}
    return {
        new + name.removeprefix(old): tensor
        for name, tensor in tensors.items()
        for old, new in prefixes.items()
        if name.startswith(old) and name != "encoder.mask_token"
    }


def _bare_note(metadata: Mapping[str, Any]) -> str:
    fused = metadata.get("recipe", {}).get("model", {}).get("fusion", {})
    if metadata["family"] == "cvit":
        return "it returns the tokens of its last block; decoder, fusion and heads are left out"
    if fused.get("blocks"):
        return f"its norm is applied to the last block only; pre-training added blocks {fused['blocks']} before it"
    return "it returns the tokens after its norm; decoder and heads are left out"


def export_target(
    source: Path,
    metadata: Mapping[str, Any],
    layout: WeightLayout | PortableLayout,
    out: Path | None,
    force: bool,
    is_export: Callable[[Path], bool] = is_ours,
) -> Path:
    """Return the file that an export is written to.

    Args:
        source: the weights file.
        metadata: its metadata, for the default name.
        layout: layout of the export, which determines its ending.
        out: output file or folder; None is the working directory.
        force: replace an existing file that this project did not write.
        is_export: recognizes files that this project wrote, by their path.

    Raises:
        UserError: if it must not be written.
    """
    stage = metadata.get("stage", metadata["kind"])
    run = run_folder_name(source, stage) or metadata.get("recipe", {}).get("name", source.stem)
    name = f"{run}-{stage}{ENDINGS[layout]}"
    target = Path(name) if out is None else out / name if out.is_dir() else out
    if target.suffix != Path(name).suffix:
        raise UserError(f"--out: {target} must end in {Path(name).suffix}, from which programs infer the format")
    if target.exists():
        if target.samefile(source):
            raise UserError(f"--out: {target} is the run's own file; choose another")
        if not force and not is_export(target):
            raise UserError(
                f"--out: {target} exists and was not written by this project; choose another file, or replace it "
                "with --force"
            )
    check_writable(target)
    return target
