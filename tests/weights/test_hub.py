"""The Hugging Face hub: huggingface_hub and timm, as they are, against a local server of the hub's HTTP API."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from mrmae_ds.cli.main import main
from mrmae_ds.errors import UserError
from mrmae_ds.records.sections import DataInfo
from mrmae_ds.weights.hub import model_card, push_to_hub
from tests.support.fake_hub import TOKEN, fake_hub
from tests.support.processes import environment, run
from tests.support.record_runs import CVIT, VIT, make_recipe, save_finetuning, save_pretraining
from tests.support.records import make_record

# huggingface_hub reads its variables when it is imported, so that a process of its own is needed.
CLIENT = """
import sys, timm, torch
from pathlib import Path
from mrmae_ds.api import ImageEncoder
from mrmae_ds.cli.main import main
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.weights.export import export_run
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.model_file import build_classifier, read_metadata, read_tensors
from mrmae_ds.weights.paths import find_weights

images = torch.rand(2, 3, 32, 32)
for family in ("cvit", "vit"):
    stage, name = Path(sys.argv[1]) / family, f"lab/{family}"
    assert main(["export", str(stage / "finetune"), "--to", f"hub:{name}"]) == 0
    assert main(["export", str(stage / "pretrain"), "--to", f"hub:{name}-encoder"]) == 0
    path = stage / "finetune" / "model.safetensors"
    expected = build_classifier(read_metadata(path)).eval()
    expected.load_state_dict(read_tensors(path))
    found = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
    assert torch.equal(found(images), expected(images))
    assert list(timm.data.resolve_model_data_config(found)["mean"]) == [0.4, 0.5, 0.6]
    assert timm.create_model(f"hf-hub:{name}", pretrained=True, num_classes=7)(images).shape == (2, 7)
    timm.create_model(f"hf-hub:{name}-encoder", pretrained=True)
    encoder = build_encoder(expected.spec, 32)
    load_encoder(encoder, find_weights(Path(f"hf:{name}-encoder"), "stages.finetune.init"))
    local = ImageEncoder.from_file(stage / "pretrain")
    assert torch.equal(encoder.forward_features(images), local.encoder.forward_features(images))
    hub = ImageEncoder.from_file(f"hf:{name}-encoder@main")
    assert torch.equal(hub.features(images).pooled, local.features(images).pooled)
    assert main(["check", f"hf:{name}"]) == 0
for bad in ("lab/none", "lab/empty", "a/b/c", "403/x", "503/x", "drop/x"):
    assert main(["check", f"hf:{bad}"]) == 2
for bad in ("-/x", "403/x", "404/x", "500/x", "drop/x"):
    assert main(["export", str(stage / "finetune"), "--to", f"hub:{bad}"]) == 2
import os
os.environ["HF_TOKEN"] = "wrong"
assert main(["export", str(stage / "finetune"), "--to", "hub:lab/vit"]) == 2
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for family, model in (("cvit", CVIT), ("vit", VIT)):
        recipe = make_recipe(tmp_path / "val.beton", "MR-MAE", model, 32, None)
        save_pretraining(tmp_path / family, recipe, seed=2)
        save_finetuning(tmp_path / family, recipe, seed=3)
    return tmp_path


@pytest.mark.multi_process
def test_runs_travel_over_the_hub(runs: Path) -> None:
    (runs / "client.py").write_text(CLIENT)
    with fake_hub() as (address, repositories):
        repositories["lab/empty"] = {"README.md": b"nothing"}
        variables = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(runs / "home"), "NO_PROXY": "127.0.0.1"}
        finished = run([sys.executable, runs / "client.py", runs], 240, environment(**variables))
    assert finished.status == 0, finished.stderr
    assert f"written: {address}/lab/cvit" in finished.stdout
    assert 'import mrmae_ds, timm; model = timm.create_model("hf-hub:lab/cvit", pretrained=True)' in finished.stdout
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    token, name = "check the name, and that HF_TOKEN is a token that may {} there", "check the name"
    later, network = "run the command again later", "check the network and HF_ENDPOINT, then run the command again"
    expected = {
        "hf:lab/none: cannot be downloaded (": token.format("read"),
        "hf:lab/empty: the repository has no model.safetensors": "download its weights file and name that",
        "hf:a/b/c: cannot be downloaded (": name,
        "hf:403/x: cannot be downloaded (": token.format("read"),
        "hf:503/x: cannot be downloaded (": later,
        "hf:drop/x: cannot be downloaded (": network,
        "--to hub:-/x: the upload failed (": name,
        "--to hub:403/x: the upload failed (": token.format("write"),
        "--to hub:404/x: the upload failed (": token.format("write"),
        "--to hub:500/x: the upload failed (": later,
        "--to hub:drop/x: the upload failed (": network,
        "--to hub:lab/vit: the upload failed (": token.format("write"),
    }
    for line, (start, fix) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"error: {start}") and line.endswith(f"; {fix}")
    files = repositories["lab/cvit"]
    names = ["README.md", "config.json", "model.safetensors", "recipe.yaml", "record.json"]
    assert sorted(file for file in files if file != ".gitattributes") == names
    assert yaml.safe_load(files["recipe.yaml"])["data"]["val"] == "val.beton"
    assert not [name for name, content in files.items() if str(runs).encode() in content]
    card = files["README.md"].decode()
    assert "its input is RGB in [0, 1], minus the mean 0.4 0.5 0.6" in card and "| top1 | 80 |" in card


def test_a_card_states_training_numbers_cost_and_limits() -> None:
    data = DataInfo(dataset="Photographs", file="t.beton", samples=60_000, classes=10, val_copies=12)
    record = make_record(data=data, wall_seconds=7200.0, pretrain=400)
    _, header, card = model_card(record, "import timm", ("a note",)).split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "image-classification"
    for line in (
        "# MR-MAE Tiny, finetune",
        "* a note",
        "| recipe | MR-MAE-Tiny, hash MR-MAE-Tiny-hash, seed 0 (recipe.yaml) |",
        "| data | Photographs, 60,000 images |",
        "| schedule | 10 epochs, batch 64 |",
        "| initial weights | MR-MAE, 400 epochs on Fashion-MNIST |",
        "| top1 | 80 |",
        "| finetune | 2.00 hours of CPU, all ranks together |",
        "* measured on 10,000 images of Photographs and on no other data",
        "* 12 validation images are exact copies of training images",
    ):
        assert f"\n{line}\n" in card


@pytest.mark.parametrize("to", ["hub:", "hub:name", "huub:a/b", "a/b", "onxx"])
def test_a_wrong_target_is_refused(to: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(runs / "vit" / "finetune"), "--to", to]) == 2
    assert capsys.readouterr().err == f"error: --to {to}: expected timm, safetensors, onnx, pt2 or hub:ORG/NAME\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hub:a/b", "--out", "x"], "--out: has no effect with"),
        (["--to", "hub:a/b", "--force"], "--force: has no effect with"),
        (["--to", "timm", "--private"], "--private: has no effect without"),
    ],
)
def test_options_of_other_targets_are_refused(
    options: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / "vit" / "finetune"), *options]) == 2
    assert capsys.readouterr().err == f"error: {message} --to hub:ORG/NAME; leave it out\n"


def test_a_file_without_a_record_has_no_card(runs: Path) -> None:
    (runs / "vit" / "finetune" / "record.json").unlink()
    with pytest.raises(UserError, match=r"has no record.json, from which the model card is made; name a finished run"):
        push_to_hub(runs / "vit" / "finetune", "lab/vit")
