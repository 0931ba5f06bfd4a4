"""ONNX files in ONNX Runtime and programs of torch.export, read as another program reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.cli.main import main
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN
from mrmae_ds.models.sizes import EncoderSpec
from mrmae_ds.weights import portable
from mrmae_ds.weights.export import PortableLayout, export_run
from mrmae_ds.weights.portable import export_portable
from tests.fixtures import part
from tests.support.released import mae_state, write_released
from tests.weights.test_export import BOTH, CVIT, VIT, classifier_run, load_by, pretraining_run

SLOW = pytest.mark.slow
LAYOUTS = pytest.mark.parametrize("layout", ["onnx", pytest.param("pt2", marks=SLOW)])
# Classifiers by their pooling. Since tracing takes seconds, all but two are slow.
FAST = ((VIT, "token", "onnx"), (CVIT, "encoder", "pt2"))
CASES = [
    pytest.param(spec, kind, layout, marks=() if (spec, kind, layout) in FAST else SLOW, id=f"{name}-{kind}-{layout}")
    for name, spec in (("cvit", CVIT), ("vit", VIT))
    for kind in ("avg", "token", "encoder")
    for layout in ("onnx", "pt2")
]


def open_portable(path: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Return a function of images and the metadata, by onnxruntime or torch alone."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map["mrmae"]
        (given,) = session.get_inputs()
        assert given.name == "images" and isinstance(given.shape[0], str)
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), json.loads(metadata)
    extra = {"mrmae": ""}
    program = torch.export.load(path, extra_files=extra).module()
    return program, json.loads(extra["mrmae"])


def assert_equal_outputs(path: Path, model: nn.Module, size: tuple[int, int] = (24, 24)) -> None:
    """Compare for two numbers of images that the export has not seen."""
    computed, _ = open_portable(path)
    for count in (1, 5):
        images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            torch.testing.assert_close(computed(images), model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("spec", "kind", "layout"), CASES)
def test_a_run(
    spec: EncoderSpec, kind: str, layout: PortableLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "encoder":
        pretraining_run(tmp_path, spec)
        model = load_by(export_run(tmp_path, "timm", tmp_path / "timm.safetensors"))
    else:
        model = classifier_run(tmp_path, spec, 24, kind)
    out = tmp_path / "new" / f"x.{layout}"
    assert main(["export", str(tmp_path), "--to", layout, "--out", str(out)]) == 0
    assert_equal_outputs(out, model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"written: {out}" and "its outputs for random images equal PyTorch's to" in lines[-3]
    exec(lines[-1].strip())
    assert main(["check", str(out)]) == 2  # of the program, not of the archive that holds it
    assert capsys.readouterr().err.startswith(f"error: {out}: a program ")
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@LAYOUTS
def test_metadata_holds_the_preprocessing(layout: PortableLayout, tmp_path: Path) -> None:
    model = classifier_run(tmp_path, VIT, (24, 32))
    exported = export_portable(tmp_path, layout, tmp_path)
    assert exported.path == tmp_path / f"small-finetune.{layout}"
    assert_equal_outputs(tmp_path / f"small-finetune.{layout}", model, (24, 32))
    _, metadata = open_portable(tmp_path / f"small-finetune.{layout}")
    assert metadata["preprocessing"] == {
        "input_size": [3, 24, 32],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": [0.5, 0.25, 0.125],
        "std": [0.1, 0.2, 0.3],
    }
    assert (metadata["kind"], metadata["num_classes"], metadata["results"]["top1"]) == ("classifier", 3, 80.0)


@SLOW
@LAYOUTS
@pytest.mark.parametrize("family", ["mcmae", "mae"])
def test_released_files(family: str, layout: PortableLayout, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    reference = request.getfixturevalue(family)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    state = part(reference, "finetune/") if family == "mcmae" else mae_state(reference)
    released = write_released(tmp_path / "x.pth", state)
    path = Path(export_portable(released, layout, tmp_path).path)
    computed, metadata = open_portable(path)
    if family == "mcmae":
        found, expected = computed(reference["image"]), reference["logits"]
    else:
        images = torch.randn(3, 3, metadata["image_size"], metadata["image_size"])
        with torch.no_grad():
            expected = load_by(export_run(released, "timm", tmp_path / "timm.safetensors"))(images)
        found = computed(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert metadata["preprocessing"]["mean"] == list(IMAGENET_MEAN)


@SLOW
@BOTH
@pytest.mark.parametrize("first", ["timm", "safetensors"])
def test_exported_files(spec: EncoderSpec, first: Any, tmp_path: Path) -> None:
    pretraining_run(tmp_path, spec)
    model = load_by(export_run(tmp_path, "timm", tmp_path / "timm.safetensors"))
    (tmp_path / "elsewhere").mkdir()
    exported = export_run(tmp_path, first, tmp_path / "elsewhere" / "exported.safetensors")
    path = Path(export_portable(Path(exported.path), "pt2", tmp_path / "elsewhere").path)
    assert path.name == "small-pretrain.pt2"
    assert_equal_outputs(path, model)


@LAYOUTS
def test_a_model_with_other_outputs_is_not_written(
    layout: PortableLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier_run(tmp_path, VIT)
    load = portable.load_exported

    class Wrong(nn.Module):
        """A model that computes something else while it is traced."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images) * (1.001 if torch.compiler.is_exporting() else 1.0)

    monkeypatch.setattr(portable, "load_exported", lambda path: Wrong(load(path)).eval())
    message = rf"--to {layout}: outputs of the exported model differ from PyTorch's by 1.0e-03 of the largest"
    with pytest.raises(UserError, match=message):
        export_portable(tmp_path, layout, tmp_path / "out" / f"x.{layout}")
    assert list((tmp_path / "out").iterdir()) == []


@LAYOUTS
def test_overwrites_only_its_own_files_unless_forced(layout: PortableLayout, tmp_path: Path) -> None:
    classifier_run(tmp_path, VIT)
    out = tmp_path / f"x.{layout}"
    out.write_text("someone's notes")
    with pytest.raises(UserError, match=rf"--out: {out} exists and was not written by this project.*--force"):
        export_portable(tmp_path, layout, out)
    export_portable(tmp_path, layout, out, force=True)
    export_portable(tmp_path, layout, out)  # now one of ours
    with pytest.raises(UserError, match=rf"--out: .*x.bin must end in .{layout}"):
        export_portable(tmp_path, layout, tmp_path / "x.bin")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_the_missing_extra_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier_run(tmp_path, VIT)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", str(tmp_path), "--to", "onnx"]) == 2
    assert capsys.readouterr().err == (
        "error: --to onnx needs onnx, onnxscript and onnxruntime; in the clone: "
        "pip install -e '.[onnx]' -c constraints.txt\n"
    )


@SLOW
def test_large_weights_are_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protocol buffers end at 2 GB, so that Huge has one."""
    model = classifier_run(tmp_path, VIT)
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1)
    export_portable(tmp_path, "onnx", tmp_path / "out" / "x.onnx")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.onnx", "x.onnx.data"]
    assert_equal_outputs(tmp_path / "out" / "x.onnx", model)
