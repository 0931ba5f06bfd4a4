"""A finished run's weights for use elsewhere: the whole model, or a file that timm loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RECORD_FILE, RunRecord
from mrmae_ds.weights.identify import nearest_architecture
from mrmae_ds.weights.model_file import (
    MODEL_FILE,
    find_weights,
    read_metadata,
    read_tensors,
    run_folder_name,
    save_weights,
    size_from_metadata,
    spec_from_metadata,
)

Layout = Literal["timm", "safetensors"]
LAYOUTS: tuple[Layout, ...] = ("timm", "safetensors")
SUFFIX = ".safetensors"
TIMM_VITS = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}
TIMM_VIT_FIELDS = {
    "dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "patch": "patch_size",
}


@dataclass(frozen=True)
class Exported:
    """What was written, the line of Python that loads it, and what its user should know besides."""

    path: Path
    line: str
    notes: tuple[str, ...] = ()


def export_run(source: Path, layout: Layout = "timm", out: Path | None = None, force: bool = False) -> Exported:
    """Write a finished run's weights for use elsewhere.

    Args:
        source: a stage folder (runs/NAME/STAGE), or its model.safetensors.
        layout: ``safetensors`` is the whole model; ``timm`` a file that ``timm.create_model`` loads strictly: a
            classifier, or of a pre-training the bare encoder (for a plain ViT with the norm after its last block).
        out: a file or folder; None is a file named for the run's folder and its stage in the working directory.
        force: replace an existing file that this project did not write.

    Raises:
        UserError: if the run has not finished or is no run, or ``out`` must not be written.
    """
    path = _finished(source)
    metadata = read_metadata(path)
    if "layout" in metadata:
        raise UserError(f"{path}: is itself an export; name the run's folder or its {MODEL_FILE}")
    metadata |= {"layout": layout, **_provenance(path)}
    tensors = read_tensors(path)
    statistics = input_statistics(metadata)
    notes = (f"its input is {statistics}",) if statistics else ()
    if layout == "timm":
        call = timm_call(metadata)
        if metadata["kind"] == "pretrain":
            tensors, notes = _bare(tensors, metadata), (_bare_note(metadata), *notes)
            metadata["kind"] = "encoder"
        metadata["create_model"] = f"timm.create_model({call})"
    target = _target(path, metadata, layout, out, force)
    save_weights(target, tensors, metadata)
    if layout == "safetensors":
        return Exported(target, f"from mrmae_ds.weights.load import load_model; model = load_model({str(target)!r})")
    modules = "mrmae_ds, timm" if metadata["family"] == "cvit" else "timm"
    line = f"import {modules}; model = timm.create_model({call}, checkpoint_path={str(target)!r})"
    return Exported(target, line, notes)


def timm_call(metadata: Mapping[str, Any]) -> str:
    """The arguments of ``timm.create_model`` that build the model of a weights file, or a pre-training's encoder."""
    sizes = asdict(spec_from_metadata(metadata))
    if metadata["family"] == "cvit":
        name, changes = nearest_architecture("cvit", sizes)
    else:
        arch, changes = nearest_architecture("vit", sizes, among=TIMM_VITS)
        name, changes = TIMM_VITS[arch], {TIMM_VIT_FIELDS[key]: value for key, value in changes.items()}
    settings: dict[str, Any] = {"img_size": size_from_metadata(metadata), **changes}
    if metadata["kind"] == "classifier":
        settings |= {"num_classes": metadata["num_classes"], "global_pool": metadata.get("pool", "avg")}
    else:
        settings |= {"num_classes": 0, "global_pool": ""}
    return ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in settings.items())])


def input_statistics(metadata: Mapping[str, Any]) -> str:
    """How images are normalized for the model of a weights file, in words; "" where it does not say."""
    if "mean" not in metadata or "std" not in metadata:
        return ""
    mean, std = (" ".join(f"{value:g}" for value in metadata[key]) for key in ("mean", "std"))
    return f"RGB in 0 to 1, less the mean {mean}, divided by {std}"


def _finished(source: Path) -> Path:
    """The weights of a stage folder or file; for a run that is not done, what to do."""
    if source.is_dir() and not (source / MODEL_FILE).is_file():
        if (source / RECORD_FILE).is_file():
            record = RunRecord.load(source)
            done = f"{record.schedule.steps_done} of {record.schedule.steps} steps, status {record.status}"
            raise UserError(
                f"{source}: not finished ({done}); {MODEL_FILE} is written at the end. Give its training command "
                "again, which goes on from the newest checkpoint, then export"
            )
        if stages := sorted(str(file.parent) for file in source.glob(f"*/{MODEL_FILE}")):
            raise UserError(f"{source}: holds {len(stages)} finished stages; name one: {', '.join(stages)}")
    return find_weights(source, "export")


def _provenance(path: Path) -> dict[str, Any]:
    """The commit and the results of the run that the weights lie in, if they still do."""
    if not (path.parent / RECORD_FILE).is_file():
        return {}
    record = RunRecord.load(path.parent)
    git = {"commit": record.git.commit + ("+changes" if record.git.dirty else "")} if record.git else {}
    return git | {"run": record.name, "results": record.results.model_dump(exclude_none=True)}


def _bare(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder of a pre-training by timm's names, which has the final norm for a plain ViT alone."""
    prefixes = {"encoder.": "", "fusion.norm.": "norm."} if metadata["family"] == "vit" else {"encoder.": ""}
    return {
        new + name.removeprefix(old): tensor
        for name, tensor in tensors.items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }


def _bare_note(metadata: Mapping[str, Any]) -> str:
    fused = metadata.get("recipe", {}).get("model", {}).get("fusion", {})
    if metadata["family"] == "cvit":
        return "it gives the tokens of its last block; decoder, fusion and heads are left out"
    if fused.get("blocks"):
        return f"its norm follows the last block alone; pre-training added blocks {fused['blocks']} before it"
    return "it gives the tokens after its norm; decoder and heads are left out"


def _target(source: Path, metadata: Mapping[str, Any], layout: Layout, out: Path | None, force: bool) -> Path:
    stage = metadata.get("stage", metadata["kind"])
    run = run_folder_name(source, stage) or metadata.get("recipe", {}).get("name", source.stem)
    name = f"{run}-{stage}{'-timm' if layout == 'timm' else ''}{SUFFIX}"
    target = Path(name) if out is None else out / name if out.is_dir() else out
    if target.suffix != SUFFIX:
        raise UserError(f"--out: {target} must end in {SUFFIX}, by which timm and others know the format")
    if target.exists():
        if target.samefile(source):
            raise UserError(f"--out: {target} is the run's own file; name another")
        if not force and not _is_ours(target):
            raise UserError(
                f"--out: {target} exists and was not written by this project; name another file, or replace it "
                "with --force"
            )
    return target


def _is_ours(path: Path) -> bool:
    try:
        read_metadata(path)
    except UserError:
        return False
    return True
