"""Preparing a training stage: the origin of its weights, and its entry in the run record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.records.sections import Parameters, Results
from mrmae_ds.training.job import PreparedStage, TrainArgs, prepare_stage
from mrmae_ds.training.run_logger import new_record
from mrmae_ds.weights.model_file import encoder_metadata, read_metadata, save_weights
from tests.support.jobs import ALONE
from tests.support.records import make_record
from tests.support.sample_data import write_sample_beton

ENGINE, RECIPE = Path("ds_configs/tiny.json"), Path("ds_configs/baselines/mae_tiny.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    train, val = write_sample_beton(tmp_path_factory.mktemp("job"), train=64, val=20)
    return f"data.train={train}", f"data.val={val}"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A pre-training of RECIPE's model that ran 30 epochs: its stage folder."""
    folder, recipe = tmp_path / "earlier" / "pretrain", load_recipe(RECIPE)
    assert recipe.stages.pretrain is not None
    torch.manual_seed(99)
    model, _ = build_pretraining(recipe, recipe.stages.pretrain)
    save_weights(
        folder / "model.safetensors", model.state_dict(), {"kind": "pretrain", **encoder_metadata(model.encoder)}
    )
    record = make_record("MAE", stage="pretrain", pretrain=None, results=Results())
    record.schedule.epochs = 30
    record.write(folder)
    return folder


def _prepare(data: tuple[str, str], folder: Path, stage: str, *overrides: str) -> PreparedStage:
    return prepare_stage(TrainArgs(ENGINE, stage, RECIPE, folder / "run", "auto", (*data, *overrides)), ALONE)


def _weights(job: PreparedStage) -> dict[str, torch.Tensor]:
    return job.task.model.state_dict()


def test_pretraining_starts_from_random_weights_of_the_seed(data: tuple[str, str], tmp_path: Path) -> None:
    first, again, other = (_prepare(data, tmp_path, "pretrain", f"seed={seed}") for seed in (3, 3, 4))
    name = "decoder.blocks.0.attn.qkv.weight"
    assert torch.equal(_weights(first)[name], _weights(again)[name])
    assert not torch.equal(_weights(first)[name], _weights(other)[name])
    assert (first.task.init, first.task.init_report) == (None, "")


@pytest.mark.parametrize("whole_path", [False, True])
def test_pretraining_starts_from_given_weights(
    whole_path: bool, data: tuple[str, str], tmp_path: Path, earlier: Path
) -> None:
    file = earlier / "model.safetensors"
    job = _prepare(data, tmp_path, "pretrain", f"stages.pretrain.init={file if whole_path else earlier}", "seed=3")
    random = _weights(_prepare(data, tmp_path, "pretrain", "seed=3"))
    recipe = load_recipe(RECIPE)
    assert recipe.stages.pretrain is not None
    torch.manual_seed(99)
    model, _ = build_pretraining(recipe, recipe.stages.pretrain)
    for name, tensor in model.state_dict().items():
        assert torch.equal(_weights(job)[name], tensor), name
        fixed = name.endswith(("bias", "pos_embed")) or "norm" in name  # the same in every new model
        assert fixed or not torch.equal(random[name], tensor), name
    report = job.task.init_report
    assert job.task.init == file and report.startswith(f"{file}: loaded ") and "missing 0" in report
    init = new_record(job, Parameters(total=1, trainable=1, encoder=1), "cpu").init
    assert init is not None and init.pretrain is not None and init.sha256
    assert (init.file, init.pretrain.method, init.pretrain.epochs) == ("model.safetensors", "MAE", 30)


def test_missing_or_incompatible_weights_name_the_key(data: tuple[str, str], tmp_path: Path, earlier: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.pretrain\.init: .*nowhere does not exist"):
        _prepare(data, tmp_path, "pretrain", f"stages.pretrain.init={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"stages\.pretrain\.init: .*model.safetensors: its encoder differs.*depth"):
        _prepare(data, tmp_path, "pretrain", f"stages.pretrain.init={earlier}", "model.overrides={depth: 2}")


def test_fine_tuned_weights_keep_their_pretraining_summary(
    data: tuple[str, str], tmp_path: Path, earlier: Path
) -> None:
    make_record("MR-MAE", pretrain=70).write(earlier)
    job = _prepare(data, tmp_path, "finetune", f"stages.finetune.init={earlier}")
    init = new_record(job, Parameters(total=1, trainable=1, encoder=1), "cpu").init
    assert init is not None and init.pretrain is not None
    assert (init.pretrain.method, init.pretrain.epochs) == ("MR-MAE", 70)


def test_the_class_token_can_be_finetuned(data: tuple[str, str], tmp_path: Path, earlier: Path) -> None:
    options = (f"stages.finetune.init={earlier}", "stages.finetune.pool=token")
    job = _prepare(data, tmp_path, "finetune", *options)
    assert job.task.model.global_pool == "token"
    assert "missing 2 (head.weight, head.bias)" in job.task.init_report
    with pytest.raises(UserError, match=r"stages\.finetune\.init: .*model.safetensors: its encoder differs.*depth"):
        _prepare(data, tmp_path, "finetune", *options, "model.overrides={depth: 2}")


def test_a_dry_run_of_a_single_step_is_refused_while_preparing(data: tuple[str, str], tmp_path: Path) -> None:
    overrides = (*data, "stages.pretrain.epochs=1", "stages.pretrain.batch_size=64")
    overrides += ("stages.pretrain.optimizer.warmup_epochs=0",)
    with pytest.raises(UserError, match=r"--dry-run runs two steps, and stages\.pretrain has one; raise its epochs"):
        prepare_stage(TrainArgs(ENGINE, "pretrain", RECIPE, tmp_path, overrides=overrides, dry_run=True), ALONE)


def test_leaf_modules_are_checked_while_preparing(data: tuple[str, str], tmp_path: Path) -> None:
    engine = json.loads(ENGINE.read_text())
    engine["zero_optimization"]["leaf_module"]["classes"] = ["Blok"]
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    with pytest.raises(UserError, match=r"engine\.json: .*the model has no Blok"):
        prepare_stage(TrainArgs(tmp_path / "engine.json", "pretrain", RECIPE, tmp_path, overrides=data), ALONE)


def test_missing_wandb_package_is_reported_before_data_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrmae_ds.training.callbacks.build.find_spec", lambda name: None)
    absent = ("data.train=absent.beton", "data.val=absent.beton")
    with pytest.raises(UserError, match="wandb: the package is not installed"):
        _prepare(absent, tmp_path, "pretrain", "wandb={project: p}")


def test_a_fine_tuning_of_weights_that_were_made_over_is_refused(
    data: tuple[str, str], tmp_path: Path, earlier: Path
) -> None:
    """Its result is of a pre-training that does not exist any longer, whether it has finished or not."""
    option = f"stages.finetune.init={earlier}"
    job = _prepare(data, tmp_path, "finetune", option)
    record = new_record(job, Parameters(total=1, trainable=1, encoder=1), torch.device("cpu"))
    assert record.init is not None and record.init.sha256 == job.identity.init
    record.write(job.stage_dir)
    assert _prepare(data, tmp_path, "finetune", option).start.action == "fresh"
    other = load_file(earlier / "model.safetensors")
    save_weights(earlier / "model.safetensors", other, read_metadata(earlier / "model.safetensors") | {"step": 7})
    message = rf"changed since: initial weights: sha256 {job.identity.init[:12]} -> sha256 \w+\. .*--resume never"
    with pytest.raises(UserError, match=message):
        _prepare(data, tmp_path, "finetune", option)


def test_shared_memory_is_checked_while_preparing(
    data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the process group and the engine, for whose ranks a late error would be a failure of one of them."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 16, 0, 1 << 16))
    with pytest.raises(UserError, match=r"/dev/shm: the Pillow reader needs"):
        _prepare(data, tmp_path, "pretrain", "data.backend=pillow")
    _prepare(data, tmp_path, "pretrain")
