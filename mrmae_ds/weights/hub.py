"""Upload finished runs to the Hugging Face hub: weights that timm loads, and a model card from the run's record.

The client is ``huggingface_hub``, which timm depends on; its variables hold (``HF_TOKEN``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RECIPE_FILE, RECORD_FILE, RunRecord, stage_cost
from mrmae_ds.records.sections import PretrainSummary, StageCost
from mrmae_ds.units import PETA, significant
from mrmae_ds.weights.export import Exported, export_run, load_exported
from mrmae_ds.weights.model_file import is_ours, read_metadata, read_tensors, save_weights
from mrmae_ds.weights.paths import MODEL_FILE, describe_hub_failure, find_weights


def push_to_hub(source: Path, repository: str, private: bool = False) -> Exported:
    """Export a finished run for timm and upload it.

    Args:
        source: stage folder (runs/NAME/STAGE) or its model.safetensors.
        repository: ``ORG/NAME``; created if it does not exist.
        private: visibility of a repository that is created.

    Returns:
        The repository's address, and the line of Python that loads it.

    Raises:
        UserError: if ``source`` is not a finished run, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        exported = write_repository(source, folder, repository)
        try:
            api = HfApi(library_name="mrmae_ds")
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by mrmae export")
        except Exception as error:  # of the client, and of the HTTP library under it, as in paths.py
            failure = describe_hub_failure(error, "write")
            raise UserError(f"--to hub:{repository}: the upload failed {failure}") from None
    return Exported(str(address), exported.line, exported.notes)


def write_repository(source: Path, folder: Path, repository: str) -> Exported:
    """Write the content of a repository: weights, timm's config.json, the model card, recipe and record of the run.

    The weights are an export with its metadata, so that ``init: hf:ORG/NAME`` knows heads and statistics. Paths in
    recipe and metadata are shortened to the file's name.

    Args:
        source: stage folder of a finished run, or its model file.
        folder: output folder.
        repository: ``ORG/NAME``, for the line of Python.

    Raises:
        UserError: if ``source`` is not a finished run with a record.
    """
    import timm

    path = find_weights(source)
    if not is_ours(path) or not (path.parent / RECORD_FILE).is_file():
        raise UserError(f"{source}: has no {RECORD_FILE}, from which the model card is made; name a finished run")
    record = RunRecord.load(path.parent)
    folder.mkdir(parents=True)
    exported = export_run(path, "timm", folder / "exported.safetensors")
    metadata = read_metadata(folder / "exported.safetensors")
    model = load_exported(folder / "exported.safetensors")
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    metadata = _without_folders(metadata)
    save_weights(folder / MODEL_FILE, read_tensors(folder / "exported.safetensors"), metadata)
    (folder / "exported.safetensors").unlink()
    modules = "mrmae_ds, timm" if metadata["family"] == "cvit" else "timm"
    line = f'import {modules}; model = timm.create_model("hf-hub:{repository}", pretrained=True)'
    record.write(folder)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(metadata.get("recipe", {}), sort_keys=False), encoding="utf-8")
    (folder / "README.md").write_text(model_card(record, line, exported.notes), encoding="utf-8")
    return Exported(folder, line, exported.notes)


def model_card(record: RunRecord, line: str, notes: tuple[str, ...]) -> str:
    """Return a repository's README.md: use, training, numbers, cost and limits, all from the run's record.

    Args:
        record: record of the run.
        line: line of Python that loads the model.
        notes: remarks on its input.
    """
    task = "image-feature-extraction" if record.stage == "pretrain" else "image-classification"
    header = {"library_name": "timm", "pipeline_tag": task, "tags": ["timm", "masked-image-modeling"]}
    numbers = record.results.model_dump(exclude_none=True)
    sections = {
        "Use": f"```python\n{line}\n```\n\n" + "\n".join(f"* {note}" for note in notes),
        "Training": _table(_training(record)),
        "Numbers": _table({key: f"{value:.6g}" for key, value in numbers.items()}),
        "Cost": _table(_costs(record)),
        "Limits": "\n".join(f"* {limit}" for limit in _limits(record)),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    title = f"{record.method} {record.size}, {record.stage}"
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {title}\n\n{text}\n"


def _training(record: RunRecord) -> dict[str, str]:
    """Return recipe and data by name."""
    rows = {"recipe": f"{record.name}, hash {record.recipe_hash}, seed {record.seed} ({RECIPE_FILE})"}
    if record.git:
        rows["code"] = record.git.commit + (" with changes" if record.git.dirty else "")
    if record.model:
        rows["encoder"] = f"{record.model.arch}, {record.model.image_size} pixels"
    data, schedule = record.data, record.schedule
    rows["data"] = f"{data.dataset}, {data.samples:,} images"
    rows["schedule"] = f"{schedule.epochs_done:g} epochs, batch {schedule.global_batch}"
    rows |= {f"teacher {name}": f"{teacher.kind} {teacher.source}" for name, teacher in record.teachers.items()}
    if before := _pretraining(record):
        epochs = "unknown" if before.epochs is None else f"{before.epochs:g}"
        rows["initial weights"] = f"{before.method}, {epochs} epochs on {before.dataset or 'unknown data'}"
    return rows


def _pretraining(record: RunRecord) -> PretrainSummary | None:
    return record.init.pretrain if record.init else None


def _costs(record: RunRecord) -> dict[str, str]:
    """Return the cost of the stage and of the pre-training before it."""
    before = _pretraining(record)
    spent = {record.stage: stage_cost(record)} | ({"pre-training": before.spent} if before and before.spent else {})
    return {stage: _describe_cost(cost) for stage, cost in spent.items()}


def _describe_cost(cost: StageCost) -> str:
    text = f"{significant(cost.device_hours)} hours of {cost.device}, all ranks together"
    return text if cost.operations is None else f"{text}; {significant(cost.operations / PETA)} PFLOP"


def _limits(record: RunRecord) -> list[str]:
    """Return what the numbers do not show."""
    limits = [f"one run, seed {record.seed}: the spread over seeds is not known from it"]
    if record.results.eval_samples:
        limits.append(
            f"measured on {record.results.eval_samples:,} images of {record.data.dataset} and on no other data"
        )
    if record.data.val_copies:
        limits.append(f"{record.data.val_copies:,} validation images are exact copies of training images")
    if record.git and record.git.dirty:
        limits.append("the code had changes that are in no commit")
    if record.init is not None and record.init.pretrain is None:
        limits.append("the origin of the initial weights is unknown")
    return [*limits, "the license of weights and data is for the publisher of this repository to state"]


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "none recorded"


def _without_folders(value: Any) -> Any:
    """Shorten absolute paths in nested values to the file's name."""
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
