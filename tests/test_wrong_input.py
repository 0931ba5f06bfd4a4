"""Wrong input before training: one clear error, a non-zero exit of every rank, no process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import deepspeed_train
from tests.support.ranks import start
from tests.support.sample_data import write_sample_beton

pytestmark = [pytest.mark.timeout(300), pytest.mark.multi_process]
SCRATCH = ("--recipe", "ds_configs/baselines/scratch_tiny.yaml", "--stage", "finetune")
MCMAE = ("--recipe", "ds_configs/baselines/mcmae_tiny.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    train, val = write_sample_beton(tmp_path_factory.mktemp("wrong"), train=64, val=20)
    return f"data.train={train}", f"data.val={val}"


def _engine(path: Path, **changes: object) -> Path:
    content = json.loads(Path("ds_configs/tiny.json").read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))
    return path


def _write_teacher(folder: Path) -> Path:
    """A stage folder as a pre-training leaves it: a ViT with 8x8 tokens at 32 pixels."""
    from mrmae_ds.models.encoders import build_encoder
    from mrmae_ds.models.sizes import ViTSpec
    from mrmae_ds.weights.model_file import encoder_metadata, save_weights

    encoder = build_encoder(ViTSpec(32, 1, 2, patch=4), 32)
    folder.mkdir()
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    metadata = {"kind": "pretrain", **encoder_metadata(encoder), "mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(folder / "model.safetensors", tensors, metadata)
    return folder


CASES = {
    "missing .beton": (
        (*SCRATCH, "data.train=nowhere/train.beton"),
        {},
        ["nowhere/train.beton", "data/fashion_mnist.py"],
    ),
    "recipe typo": ((*SCRATCH, "stages.finetune.layer_decai=0.5"), {}, ["layer_decai", "did you mean 'layer_decay'"]),
    "indivisible batch": ((*SCRATCH, "stages.finetune.batch_size=50"), {}, ["50", "batch_size 32 or 64", "25"]),
    "untiled size": ((*MCMAE, "model.image_size=30"), {}, ["30", "28 and 32"]),
    "teacher's grid": (("teachers.mae.image_size=64",), {}, ["16x16", "8x8", "teachers.mae.image_size to 32"]),
    "teacher missing": (("teachers.mae.source=nowhere/pretrain",), {}, ["teachers.mae.source", "nowhere/pretrain"]),
    "engine for more": (
        SCRATCH,
        {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1},
        ["meant for 4 ranks", "2 are running"],
    ),
    "engine key": (SCRATCH, {"gradient_cliping": 0.0}, ["gradient_cliping", "did you mean 'gradient_clipping'"]),
    "no clipping key": (SCRATCH, {"gradient_clipping": None}, ["gradient_clipping is required"]),
    "zero key": (
        SCRATCH,
        {"zero_optimization": {"stage": 3, "memory_efficient_linear": False, "overlap_com": True}},
        ["overlap_com", "did you mean 'overlap_comm'"],
    ),
    "no such stage": ((*SCRATCH[:2], "--stage", "pretrain"), {}, ["scratch_tiny", "no stage pretrain"]),
    "no pre-training yet": ((*MCMAE, "--stage", "finetune"), {}, ["stages.finetune.init", "run that stage first"]),
    "set too small": ((*SCRATCH, "stages.finetune.batch_size=96"), {}, ["64 samples", "96"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error_and_status_2(case: str, data: tuple[str, str], tmp_path: Path) -> None:
    """Start the first of two ranks only; no check before training waits for the other."""
    arguments, changes, expected = CASES[case]
    teacher = () if "--recipe" in arguments else (f"teachers.mae.source={_write_teacher(tmp_path / 'teacher')}",)
    config = _engine(tmp_path / "engine.json", **changes)
    recipe = () if "--recipe" in arguments else ("--recipe", "ds_configs/tiny.yaml")
    command = ("--ds_config", config, "--run", tmp_path / "run", *recipe, *data, *teacher, *arguments)
    ranks = start(2, command, tmp_path / "logs", count=1)
    statuses, text = ranks.wait(), ranks.text()
    assert statuses == [2], text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    for part in expected:
        assert part in errors[0]
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_every_rank_reports_and_exits(data: tuple[str, str], tmp_path: Path) -> None:
    """No launcher ends the others after the first report; tests/distributed/test_exit_status.py has the order."""
    command = ("--ds_config", "ds_configs/tiny.json", "--run", tmp_path / "run", *SCRATCH, *data, "seed=-1")
    ranks = start(2, command, tmp_path / "logs")
    assert ranks.wait() == [2, 2]
    assert all("seed: Input should be greater" in ranks.text(rank) for rank in range(2))


def test_the_launcher_passes_the_failure_on(data: tuple[str, str], tmp_path: Path) -> None:
    command = ("--ds_config", "ds_configs/tiny.json", "--run", tmp_path / "run", *SCRATCH, *data, "seed=-1")
    done = deepspeed_train(*command, limit_s=120)
    assert done.status != 0
    assert "seed: Input should be greater than or equal to 0 (got -1)" in done.stderr
