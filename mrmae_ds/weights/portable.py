"""Export of a model to ONNX or to a program of ``torch.export``, compared with PyTorch's outputs before it is written.

Shape legend: B images, H x W their pixels.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.sizes import height_width
from mrmae_ds.weights.export import (
    Exported,
    PortableLayout,
    export_run,
    export_target,
    finished_weights,
    load_exported,
    timm_overlay,
)
from mrmae_ds.weights.identify import METADATA_KEY
from mrmae_ds.weights.model_file import is_ours, read_metadata, size_from_metadata

TOLERANCE = 1e-4  # of the largest output, float32
ONNX_EXTRA = "onnx needs onnx, onnxscript and onnxruntime; in the clone: pip install -e '.[onnx]' -c constraints.txt"


def export_portable(source: Path, layout: PortableLayout, out: Path | None = None, force: bool = False) -> Exported:
    """Export the model that ``--to timm`` exports as a file that needs neither timm nor this project.

    Its input ``images`` is [B, 3, H, W] for any B, normalized by the statistics in the file's metadata. Its output is
    ``logits`` [B, classes] of a classifier, or ``tokens`` [B, L, C] of the encoder of a pre-training.

    Args:
        source: stage folder or weights file, as for :func:`~mrmae_ds.weights.export.export_run`, or a file that was
            exported for timm.
        layout: ``onnx`` or ``pt2``.
        out: output file or folder; None writes a file named after run and stage to the working directory.
        force: replace an existing file that this project did not write.

    Raises:
        UserError: as for ``export_run``, without the extra ``onnx``, or if the outputs differ from PyTorch's.
    """
    if layout == "onnx":
        _check_onnx()
    path = file = finished_weights(source)
    notes: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as temporary:
        if not is_ours(path) or read_metadata(path).get("layout") != "timm":
            exported = export_run(path, "timm", Path(temporary) / "timm.safetensors")
            file, notes = Path(exported.path), exported.notes
        metadata, model = read_metadata(file), load_exported(file)
        overlay = timm_overlay(metadata, file)
    preprocessing = {key: value for key, value in overlay.items() if key not in ("file", "num_classes")}
    metadata |= {"layout": layout, "preprocessing": preprocessing}
    target = export_target(path, metadata, layout, out, force, _is_portable)
    # Beside the target: large weights of ONNX are a second file, NAME.onnx.data, which the first one names.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / target.name
        difference = _write_and_compare(model, metadata, written)
        if not difference <= TOLERANCE:
            raise UserError(
                f"--to {layout}: outputs of the exported model differ from PyTorch's by {difference:.1e} of the "
                f"largest, more than {TOLERANCE:g}; nothing was written, --to timm exports the weights"
            )
        for part in sorted(Path(folder).iterdir(), reverse=True):  # the file itself last
            os.replace(part, target.parent / part.name)
    notes = (*notes, f"its outputs for random images equal PyTorch's to {difference:.0e} of the largest")
    if layout == "onnx":
        return Exported(target, f'import onnxruntime; session = onnxruntime.InferenceSession("{target}")', notes)
    return Exported(target, f'import torch; model = torch.export.load("{target}").module()', notes)


def _check_onnx() -> None:
    if not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UserError(f"--to {ONNX_EXTRA}")


@torch.no_grad()
def _write_and_compare(model: nn.Module, metadata: dict[str, Any], path: Path) -> float:
    """Write the file and return the largest difference of its outputs, as a share of the largest output."""
    size = height_width(size_from_metadata(metadata))
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    # Traced with two images, since torch.export fixes a batch of one.
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if path.suffix == ".onnx":
        output = "logits" if metadata["kind"] == "classifier" else "tokens"
        computed = _write_onnx(program, output, json.dumps(metadata), path)
    else:
        torch.export.save(program, path, extra_files={METADATA_KEY: json.dumps(metadata)})
        computed = torch.export.load(path).module()
    difference = torch.tensor(0.0)
    for batch in (images, images[:1]):
        expected = model(batch)
        # Not Python's max: it drops NaN.
        difference = torch.maximum(difference, (computed(batch) - expected).abs().max() / expected.abs().max())
    return difference.item()


def _write_onnx(
    program: torch.export.ExportedProgram, output: str, metadata: str, path: Path
) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    converted = torch.onnx.export(program, input_names=["images"], output_names=[output], dynamo=True, verbose=False)
    assert converted is not None
    converted.model.metadata_props[METADATA_KEY] = metadata
    converted.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _is_portable(path: Path) -> bool:
    """Return True for a file that :func:`export_portable` wrote."""
    try:
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(f"/extra/{METADATA_KEY}") for name in archive.namelist())
        import onnx

        properties = onnx.load(path, load_external_data=False).metadata_props
        return any(entry.key == METADATA_KEY for entry in properties)
    except Exception:  # of the readers, for other files
        return False
