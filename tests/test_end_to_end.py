"""The main job on a few hundred real images: two processes, ZeRO-3, FFCV, a frozen teacher, the user's commands."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mrmae_ds.records.metrics import read_metrics
from mrmae_ds.records.record import RunRecord
from mrmae_ds.training.checkpoint.folder import list_checkpoints
from mrmae_ds.weights.export import export_run
from tests.support.jpegs import stored_jpegs
from tests.support.loaders import open_loader
from tests.support.processes import SRUN, deepspeed_train, finish, rank_processes, run
from tests.support.ranks import Ranks, start
from tests.support.sample_data import write_sample_beton

TRAIN, VAL = 320, 90
BATCH = 32
LIMIT_S = 240
TINY = ("--ds_config", "ds_configs/tiny.json")
MAE = (*TINY, "--recipe", "ds_configs/baselines/mae_tiny.yaml")
pytestmark = [pytest.mark.timeout(900), pytest.mark.multi_process]


@dataclass(frozen=True)
class Workspace:
    """A folder with a small data set and the runs made from it."""

    folder: Path

    def settings(self, *extra: str) -> tuple[str, ...]:
        """Recipe values that point at the small set and keep runs short."""
        data = (f"data.train={self.folder / 'train.beton'}", f"data.val={self.folder / 'val.beton'}")
        return (*data, "logging.every_steps=2", *extra)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def teacher(self) -> str:
        return f"teachers.mae.source={self.run('mae') / 'pretrain'}"

    def start(self, world_size: int, *arguments: str | Path, fault: str = "") -> Ranks:
        """Start ranks that need not import everything again, as a launcher's ranks do."""
        return start(world_size, arguments, self.folder / "logs", fault)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("end_to_end")
    write_sample_beton(folder, train=TRAIN, val=VAL)
    return Workspace(folder)


@pytest.fixture(scope="module")
def mae(workspace: Workspace) -> Path:
    """The baseline: the teacher of the runs below."""
    settings = workspace.settings("stages.pretrain.epochs=3")
    ranks = workspace.start(2, *MAE, "--run", workspace.run("mae"), *settings)
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    return workspace.run("mae") / "pretrain"


@pytest.fixture(scope="module")
def mrmae(workspace: Workspace, mae: Path) -> Path:
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=3")
    done = deepspeed_train(*TINY, "--run", workspace.run("tiny"), *settings)
    assert done.status == 0, done.stderr
    assert "step 30/30" in done.stderr and "images/s" in done.stderr
    return workspace.run("tiny") / "pretrain"


@pytest.fixture(scope="module")
def finetuned(workspace: Workspace, mrmae: Path) -> Path:
    settings = workspace.settings(workspace.teacher(), "stages.finetune.epochs=15", "stages.finetune.mixup=0.1")
    ranks = workspace.start(2, *TINY, "--stage", "finetune", "--run", workspace.run("tiny"), *settings)
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    assert "missing 4 (fc_norm.weight, fc_norm.bias, head.weight, head.bias)" in ranks.text(0)
    return workspace.run("tiny") / "finetune"


def test_pretraining_learns_both_objectives(mrmae: Path) -> None:
    lines = read_metrics(mrmae)
    assert [line["step"] for line in lines] == [1, *range(2, 31, 2)]
    for name in ("loss", "loss/pixels", "loss/mimic"):
        assert lines[-1][name] < 0.8 * lines[0][name], name
    assert all(
        line["loss"] == pytest.approx((line["loss/pixels"] + line["loss/mimic"]) / 2, rel=1e-5) for line in lines
    )
    assert all(line["gather_gib"] > 0 and line["peak_memory_gib"] > 0 and "mfu" not in line for line in lines)


def test_run_record_and_files_are_complete(mrmae: Path, mae: Path) -> None:
    record = RunRecord.load(mrmae)
    assert (record.status, record.stage, record.method, record.size) == ("finished", "pretrain", "MR-MAE", "Tiny")
    assert record.hardware.world_size == 2
    assert record.schedule.steps_done == 30 and record.images_seen == 30 * BATCH
    assert record.teachers["mae"].sha256 and record.data.sha256
    facts = {"importance": "last block's attention, class token to patches", "placement": "device"}
    assert record.teachers["mae"].facts == facts
    assert record.operations is not None
    needed = record.operations.training - record.operations.recomputed
    assert all(
        line["tflops"] == pytest.approx(line["images_per_s"] * needed / 2 / 1e12) for line in read_metrics(mrmae)
    )
    engine = json.loads((mrmae / "engine.json").read_text())
    assert engine["zero_optimization"]["stage"] == 3 and engine["gradient_accumulation_steps"] == 1
    assert "mode: sample" in (mrmae / "recipe.yaml").read_text()
    assert [path.name for path in list_checkpoints(mrmae)] == ["step_000000020", "step_000000030"]
    events = EventAccumulator(str(mrmae / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/mimic")] == [1, *range(2, 31, 2)]
    for name in ("images/reconstructions.png", "images/attention.png", "loss_curves.png"):
        with Image.open(mrmae / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 30, name


def test_the_teacher_is_not_in_the_students_file(mrmae: Path) -> None:
    names = load_file(mrmae / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"encoder", "fusion", "decoder", "heads"}


def test_the_teacher_is_not_in_a_checkpoint(mrmae: Path) -> None:
    """A checkpoint holds the student's parameters and AdamW's two moments of the trained ones, nothing else."""
    parts = {name: shape.numel() for name, shape in _saved_shapes(list_checkpoints(mrmae)[-1]).items()}
    names = load_file(mrmae / "model.safetensors")
    assert parts == {name: tensor.numel() for name, tensor in names.items()}
    size = sum(file.stat().st_size for file in list_checkpoints(mrmae)[-1].glob("*optim_states.pt"))
    assert size < 1.1 * 12 * sum(parts.values())


def _saved_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    state = torch.load(checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    trained = {name: shape for group in state["param_shapes"] for name, shape in group.items()}
    buffers = {name: state["module"][name].shape for name in state["buffer_names"]}
    return {**trained, **(state["frozen_param_shapes"] or {}), **buffers}


def test_finetuning_starts_from_the_encoder_and_beats_chance(finetuned: Path, mrmae: Path) -> None:
    record = RunRecord.load(finetuned)
    assert record.results.eval_samples == VAL
    assert record.results.top1 is not None and record.results.top1 > 16  # chance is 10, one standard error 3
    assert record.init is not None and record.init.pretrain is not None
    assert record.init.pretrain.method == "MR-MAE" and record.init.pretrain.epochs == 3
    before = load_file(mrmae / "model.safetensors")["encoder.blocks3.0.attn.qkv.weight"]
    after = load_file(finetuned / "model.safetensors")["blocks3.0.attn.qkv.weight"]
    assert 0 < (after - before).norm() < 0.7 * before.norm()


def test_evaluation_equals_one_plain_process(finetuned: Path, workspace: Workspace) -> None:
    """Top-1 again from the exported file, image by image, without DeepSpeed."""
    from mrmae_ds.models.encoders import build_encoder
    from mrmae_ds.weights.model_file import read_metadata, read_tensors, spec_from_metadata

    path = finetuned / "model.safetensors"
    metadata = read_metadata(path)
    model = build_encoder(spec_from_metadata(metadata), metadata["image_size"], metadata["num_classes"])
    model.load_state_dict(read_tensors(path))
    model.eval()
    loader = open_loader(workspace.folder / "val.beton", micro_batch=1)
    correct = 0
    with torch.no_grad():
        for batch in loader.epoch(0):
            correct += int(model((batch.images.float() / 255 - 0.5) / 0.5).argmax() == batch.labels[0])
    assert RunRecord.load(finetuned).results.top1 == pytest.approx(100 * correct / VAL, abs=1e-9)


def test_timm_measures_the_accuracy_of_the_exported_model(
    finetuned: Path, workspace: Workspace, tmp_path: Path
) -> None:
    """By the printed line and timm's own transform; the run's backend, FFCV, rounds a few pixels otherwise."""
    names: dict[str, Any] = {}
    exec(export_run(finetuned, out=tmp_path / "x.safetensors").line, names)
    model = names["model"].eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = [Image.open(io.BytesIO(jpeg)) for jpeg, _, _ in stored_jpegs(workspace.folder / "val.beton")]
    batch = next(open_loader(workspace.folder / "val.beton", "pillow", micro_batch=VAL).epoch(0))
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image in images]))
        torch.testing.assert_close(logits, model((batch.images.float() / 255 - 0.5) / 0.5), atol=1e-4, rtol=1e-4)
    top1 = 100 * float((logits.argmax(1) == batch.labels).float().mean())
    assert RunRecord.load(finetuned).results.top1 == pytest.approx(top1, abs=1.2 * 100 / VAL)


def test_table_contains_the_measured_accuracies(finetuned: Path, workspace: Workspace) -> None:
    done = run(["mrmae", "table", workspace.folder / "runs", "--out", workspace.folder / "table"], 60)
    assert done.status == 0, done.stderr
    top1 = RunRecord.load(finetuned).results.top1
    assert top1 is not None and f"**{top1:.2f}**" in done.stdout
    assert "MR-MAE, paper (200 ep, ImageNet-1K)" in done.stdout
    with (workspace.folder / "table" / "table.csv").open() as file:
        ours = [row for row in csv.DictReader(file) if row["source"] == "ours"]
    assert [float(row["value"]) for row in ours if row["value"]] == [pytest.approx(top1, abs=0.01)]
    assert (workspace.folder / "table" / "table.png").stat().st_size > 10_000


def test_rerunning_a_finished_stage_changes_nothing(mrmae: Path, workspace: Workspace) -> None:
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=3")
    before = (mrmae / "record.json").read_bytes()
    rank = workspace.start(1, *TINY, "--run", workspace.run("tiny"), *settings)
    assert rank.wait() == [0] and "already finished" in rank.text()
    assert (mrmae / "record.json").read_bytes() == before


def test_figures_interrupted_by_a_kill_are_drawn_again(mrmae: Path, workspace: Workspace) -> None:
    curves, torn = mrmae / "loss_curves.png", mrmae / ".loss_curves.png.torn.tmp"
    before = curves.read_bytes()
    curves.unlink()
    torn.write_bytes(before[:100])
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=3")
    rank = workspace.start(1, *TINY, "--run", workspace.run("tiny"), *settings)
    assert rank.wait() == [0] and "already finished" in rank.text()
    assert curves.read_bytes() == before and not torn.exists()


def test_one_process_and_two_have_equal_losses(mrmae: Path, workspace: Workspace) -> None:
    """ZeRO-3 over two processes against one process without it: the same images, masks and losses."""
    engine = json.loads(Path("ds_configs/tiny.json").read_text())
    engine["zero_optimization"] = {"stage": 0}
    del engine["activation_checkpointing"]
    plain = workspace.folder / "plain.json"
    plain.write_text(json.dumps(engine))
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=3")
    command = ["--ds_config", plain, "--recipe", "ds_configs/tiny.yaml", "--run", workspace.run("one")]
    rank = workspace.start(1, *command, *settings)
    assert rank.wait(LIMIT_S) == [0], rank.text()
    ours, theirs = read_metrics(workspace.run("one") / "pretrain"), read_metrics(mrmae)
    for name in ("loss/pixels", "loss/mimic"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=2e-3)
    # The first losses are equal to float32 precision, because Adam has not yet amplified rounding.
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)


def test_resumes_a_killed_run_with_equal_losses(mrmae: Path, workspace: Workspace) -> None:
    """A run killed after its first checkpoint and resumed logs exactly the losses of an uninterrupted run.

    It hangs in its sixteenth step, so that it does not end before it is killed.
    """
    folder = workspace.run("killed")
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=3")
    arguments = (*TINY, "--run", folder, *settings)
    ranks = workspace.start(2, *arguments, fault="sleep:rank=1,step=15")
    try:
        deadline = time.monotonic() + LIMIT_S
        while not list_checkpoints(folder / "pretrain"):
            assert time.monotonic() < deadline and ranks.alive(), ranks.text()
            time.sleep(0.02)
    finally:
        ranks.kill()
    ranks = workspace.start(2, *arguments)
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    assert "resuming after step 10" in ranks.text(0)
    ignored = {"images_per_s", "data_wait", "peak_memory_gib", "gather_gib", "tflops"}

    def numbers(run_dir: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if k not in ignored} for line in read_metrics(run_dir)]

    assert numbers(folder / "pretrain") == numbers(mrmae)
    resumed, whole = load_file(folder / "pretrain/model.safetensors"), load_file(mrmae / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("autocast", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        ("bf16", {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    ],
)
@pytest.mark.slow
def test_bfloat16_by_engine_config(name: str, section: dict[str, object], workspace: Workspace, mrmae: Path) -> None:
    config = workspace.folder / f"{name}.json"
    config.write_text(json.dumps(json.loads(Path("ds_configs/tiny.json").read_text()) | section))
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=2", "logging.num_images=0")
    arguments = ("--ds_config", config, "--recipe", "ds_configs/tiny.yaml", "--run", workspace.run(name))
    results = finish(rank_processes(2, *arguments, *settings), 240)
    assert [result.status for result in results] == [0, 0], results[0].stderr
    reduced, full = read_metrics(workspace.run(name) / "pretrain"), read_metrics(mrmae)
    # The same images, masks and learning rates as the float32 run: close while the loss falls steeply, and not equal.
    assert [line["loss"] for line in reduced[:5]] == pytest.approx([line["loss"] for line in full[:5]], rel=0.06)
    assert reduced[0]["loss"] != full[0]["loss"]
    assert reduced[-1]["loss"] < 0.85 * reduced[0]["loss"]
    weights = load_file(workspace.run(name) / "pretrain" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_dry_run_writes_nothing(stage: str, workspace: Workspace, mrmae: Path, tmp_path: Path) -> None:
    settings = workspace.settings(workspace.teacher(), f"stages.finetune.init={mrmae}")
    before = sorted(workspace.folder.rglob("*"))
    ranks = start(2, [*TINY, "--stage", stage, "--dry-run", "--run", workspace.run("dry"), *settings], tmp_path)
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    assert "dry run: tiny" in ranks.text(0) and "images/s" in ranks.text(0) and "GiB" in ranks.text(0)
    assert sorted(workspace.folder.rglob("*")) == before


@pytest.mark.slow
def test_dry_run_under_torchrun_succeeds(workspace: Workspace, mae: Path) -> None:
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=2")
    launcher = ["torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    done = run([*launcher, "train.py", *TINY, "--dry-run", *settings], 180)
    assert done.status == 0 and "dry run" in done.stdout, done.stderr


def test_dry_run_under_srun_prints_on_one_rank_only(workspace: Workspace, mae: Path) -> None:
    settings = workspace.settings(workspace.teacher(), "stages.pretrain.epochs=2")
    results = finish(rank_processes(2, *TINY, "--dry-run", *settings, names=SRUN), 180)
    assert [result.status for result in results] == [0, 0], results[0].stderr
    assert "dry run" in results[0].stdout and "dry run" not in results[1].stdout
