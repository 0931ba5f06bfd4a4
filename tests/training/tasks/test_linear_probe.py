"""Linear probing: LARS against its formula, the stage against a plain loop, and its outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.optimizers import LarsConfig, lr_at_epoch
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import ProbeConfig
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.models.encoders import build_encoder, init_classifier
from mrmae_ds.models.sizes import encoder_spec
from mrmae_ds.records.metrics import read_metrics
from mrmae_ds.records.record import RunRecord
from mrmae_ds.training.tasks.linear_probe import LinearClassifier, ProbeTask
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.model_file import read_metadata, read_tensors, spec_from_metadata
from tests.support.loaders import open_loader
from tests.support.ranks import start
from tests.support.sample_data import write_sample_beton

pytestmark = pytest.mark.multi_process

ENGINE = Path("ds_configs/tiny.json")
TRAIN, VAL, EPOCHS, BATCH, RATE, DECAY = 96, 90, 4, 32, 3.0, 1e-3
VOTERS = 37  # of the training images, for the nearest-neighbor evaluation
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
DATA = DataConfig(train=Path("t"), val=Path("v"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def lars_step(weight: Tensor, grad: Tensor, velocity: Tensor, rate: float, decay: float, adapt: bool) -> None:
    """MAE's LARS: the norm of a weight's update is lr / 1000 times the weight's; a bias uses plain momentum."""
    update = grad + decay * weight
    if adapt:
        trust = 0.001 * weight.norm() / (grad.norm() + decay * weight.norm())
        update = update * trust
    velocity.mul_(0.9).add_(update)
    weight.sub_(rate * velocity)


class PlainProbe:
    """Probe in float64, from torch functions and the formulas above."""

    def __init__(self, weight: Tensor, bias: Tensor, decay: float) -> None:
        self.weight, self.bias = weight.double().clone(), bias.double().clone()
        self.velocities = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.mean, self.var = torch.zeros(weight.shape[1]).double(), torch.ones(weight.shape[1]).double()
        self.decay = decay

    def step(self, features: Tensor, labels: Tensor, rate: float) -> float:
        x = features.double()
        mean, var = x.mean(0), x.var(0, unbiased=False)
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.var = 0.9 * self.var + 0.1 * x.var(0, unbiased=True)
        inputs = (x - mean) / (var + 1e-6).sqrt()
        probabilities = (inputs @ self.weight.T + self.bias).softmax(dim=1)
        loss = -probabilities[range(len(labels)), labels].log().mean()
        error = (probabilities - F.one_hot(labels, len(self.bias))) / len(labels)  # of the logits, by hand
        lars_step(self.weight, error.T @ inputs, self.velocities[0], rate, self.decay, adapt=True)
        lars_step(self.bias, error.sum(0), self.velocities[1], rate, 0.0, adapt=False)
        return float(loss)

    def logits(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / (self.var + 1e-6).sqrt() @ self.weight.T + self.bias


def _task(**changes: Any) -> ProbeTask:
    torch.manual_seed(1)
    encoder = build_encoder(encoder_spec("cvit_tiny", {"dims": [8, 12, 16], "depths": [1, 1, 1]}), 16, 5)
    config = ProbeConfig(**changes)
    return ProbeTask(encoder, config, DATA, load_engine_config(ENGINE))


def test_the_defaults_are_the_published_ones() -> None:
    stage = load_recipe(Path("ds_configs/base.yaml")).stages.probe
    assert (stage.epochs, stage.batch_size, stage.optimizer.warmup_epochs) == (90, 4096, 10)
    assert stage.optimizer == LarsConfig(base_lr=0.1, momentum=0.9, weight_decay=0.0)
    assert stage.optimizer.peak_lr(4096) == pytest.approx(1.6)
    assert LarsConfig(lr=0.3).peak_lr(4096) == 0.3


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_optimizer_is_lars_by_its_formula(decay: float) -> None:
    task = _task(optimizer={"lr": RATE, "weight_decay": decay})
    optimizer = task.make_optimizer(task.param_groups(), False)
    plain = PlainProbe(task.model.linear.weight.detach(), task.model.linear.bias.detach(), decay)
    generator = torch.Generator().manual_seed(2)
    task.model.train()
    for step in range(6):
        features = torch.randn(24, 16, generator=generator) + step
        labels = torch.randint(0, 5, (24,), generator=generator)
        rate = 3.0 * (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(task.model(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(plain.step(features, labels, rate), rel=1e-5)
    torch.testing.assert_close(task.model.linear.weight.detach().double(), plain.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(task.model.linear.bias.detach().double(), plain.bias, rtol=1e-4, atol=1e-6)


def test_the_encoder_is_frozen_and_the_features_are_mean_pooled() -> None:
    task = _task()
    assert not any(p.requires_grad for p in task.encoder.parameters()) and not task.encoder.training
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    task.to(torch.device("cpu"))
    features = task.features(images)
    tokens = task.encoder.forward_features((images.float() / 255 - 0.5) / 0.5)
    wanted = F.layer_norm(tokens.mean(dim=1), (16,), eps=1e-6)
    torch.testing.assert_close(features, wanted)
    assert not features.requires_grad


def test_exported_classifier_has_the_logits_of_the_probe() -> None:
    task = _task()
    task.to(torch.device("cpu"))
    torch.manual_seed(3)
    for _ in range(3):
        task.model(torch.randn(64, 16) * 2 + 1)
    task.model.linear.bias.data.normal_()
    task.model.eval()
    whole = build_encoder(task.encoder.spec, 16, 5)
    whole.load_state_dict(task.export_state(task.model.state_dict()))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    ours = task.logits(task.model, images)
    torch.testing.assert_close(whole.eval()((images.float() / 255 - 0.5) / 0.5), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [BF16, AUTOCAST])
def test_engine_holds_unpartitioned_float32_parameters(precision: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(json.loads(ENGINE.read_text()) | precision))
    config = _task().adapt_engine_config(load_engine_config(path))
    assert config.for_deepspeed(2) == {
        "train_micro_batch_size_per_gpu": 16, "gradient_clipping": 0.0, "zero_optimization": {"stage": 0},
        "gradient_accumulation_steps": 2, "steps_per_print": 2**31 - 1,
    }  # fmt: skip
    assert config.model_dtype == torch.float32 and config.zero.stage == 0


def _train(folder: Path, world_size: int, *arguments: str | Path) -> None:
    ranks = start(world_size, arguments, folder / "logs")
    assert ranks.wait(300) == [0] * world_size, ranks.text()


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that two processes pre-trained under ZeRO-3, looking at its features after each of its two
    steps, and probed; and of one that a single process pre-trained without looking."""
    folder = tmp_path_factory.mktemp("probe")
    write_sample_beton(folder, train=TRAIN, val=VAL)
    common = ("--ds_config", ENGINE, "--recipe", "ds_configs/baselines/mcmae_tiny.yaml", "--run", folder / "run")
    data = (f"data.train={folder / 'train.beton'}", f"data.val={folder / 'val.beton'}", "data.backend=pillow")
    short = ("stages.pretrain.epochs=2", "stages.pretrain.batch_size=96", "stages.pretrain.optimizer.warmup_epochs=0")
    short = (*short, "logging.num_images=0", "logging.every_steps=1")
    knn = f"stages.pretrain.knn={{every_epochs: 1, k: 5, samples: {VOTERS}}}"
    _train(folder, 2, *common, *data, *short, knn)
    plain = folder / "plain.json"
    plain.write_text(json.dumps(json.loads(ENGINE.read_text()) | {"zero_optimization": {"stage": 0}}))
    alone = ("--ds_config", plain, "--recipe", "ds_configs/baselines/mcmae_tiny.yaml", "--run", folder / "alone")
    _train(folder, 1, *alone, *data, *short)
    probe = (f"stages.probe.epochs={EPOCHS}", f"stages.probe.batch_size={BATCH}")
    rates = f"stages.probe.optimizer={{lr: {RATE}, warmup_epochs: 1, weight_decay: {DECAY}}}"
    settings = (*common, *data, "logging.every_steps=1", "--stage", "probe", *probe, rates)
    _train(folder, 2, *settings)
    return folder


@pytest.mark.timeout(900)
def test_two_ranks_equal_a_plain_loop(probed: Path) -> None:
    """The same images in one process, features from the pre-trained file, the formulas above."""
    torch.manual_seed(0)  # as the stage: encoder, its head, then the probe's weights
    recipe = load_recipe(Path("ds_configs/baselines/mcmae_tiny.yaml"))
    encoder = build_encoder(recipe.model.spec(), 32, 10)
    init_classifier(encoder)
    load_encoder(encoder, probed / "run/pretrain/model.safetensors", "test")
    head = LinearClassifier(96, 10)
    plain = PlainProbe(head.linear.weight.detach(), head.linear.bias.detach(), DECAY)

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = encoder.eval().forward_features((images.float() / 255 - 0.5) / 0.5)
            return F.layer_norm(tokens.mean(dim=1), (96,), eps=1e-6)

    crop = CropSettings(scale=(0.08, 1.0), flip=0.5)
    loader = open_loader(probed / "train.beton", "pillow", crop=crop, micro_batch=BATCH)
    steps, losses = TRAIN // BATCH, []
    for epoch in range(EPOCHS):
        for number, batch in enumerate(loader.epoch(epoch)):
            at = epoch + number / steps
            rate = lr_at_epoch(at, peak=RATE, floor=0.0, warmup_epochs=1, epochs=EPOCHS)
            losses.append(plain.step(features(batch.images), batch.labels, rate))
    lines = read_metrics(probed / "run/probe")
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert max(abs(loss - losses[0]) for loss in losses) > 0.05
    written = read_tensors(probed / "run/probe/model.safetensors")
    scale = (plain.var + 1e-6).rsqrt()
    torch.testing.assert_close(written["head.weight"].double(), plain.weight * scale, rtol=1e-3, atol=1e-4)
    val = open_loader(probed / "val.beton", "pillow", micro_batch=1)
    right = sum(int(plain.logits(features(batch.images)).argmax() == batch.labels[0]) for batch in val.epoch(0))
    record = RunRecord.load(probed / "run/probe")
    assert record.results.top1 == pytest.approx(100 * right / VAL, abs=1e-9) and record.results.eval_samples == VAL


@pytest.mark.timeout(900)
def test_feature_evaluation_counts_every_image_once(probed: Path) -> None:
    """After the last step: one process, image by image, from the weights that were written."""
    metadata = read_metadata(probed / "run/pretrain/model.safetensors")
    encoder = build_encoder(spec_from_metadata(metadata), 32)
    load_encoder(encoder, probed / "run/pretrain/model.safetensors", "test")

    def features(part: str) -> tuple[Tensor, Tensor]:
        batches = list(open_loader(probed / f"{part}.beton", "pillow", micro_batch=1).epoch(0))
        with torch.no_grad():
            tokens = [encoder.eval()((batch.images.float() / 255 - 0.5) / 0.5) for batch in batches]
        means = torch.cat([F.layer_norm(t.mean(dim=1), (96,), eps=1e-6) for t in tokens]).double()
        return means / means.norm(dim=1, keepdim=True), torch.cat([batch.labels for batch in batches])

    (bank, labels), (queries, wanted) = features("train"), features("val")
    chosen = [i * TRAIN // VOTERS for i in range(VOTERS)]
    right = 0
    for query, label in zip(queries, wanted, strict=True):
        cosines = [(float(query @ bank[i]), int(labels[i])) for i in chosen]
        weights = [0.0] * 10
        for cosine, voted in sorted(cosines, reverse=True)[:5]:
            weights[voted] += math.exp(cosine / 0.07)
        right += max(range(10), key=lambda c: weights[c]) == int(label)
    lines = read_metrics(probed / "run/pretrain")
    assert len(lines) == 2 and all("knn/top1" in line for line in lines)
    assert lines[-1]["knn/top1"] == pytest.approx(100 * right / VAL, abs=1e-4)
    assert RunRecord.load(probed / "run/pretrain").results.model_extra["knn/top1"] == lines[-1]["knn/top1"]


@pytest.mark.timeout(900)
def test_feature_evaluation_does_not_affect_training(probed: Path) -> None:
    looked, alone = (read_metrics(probed / name / "pretrain") for name in ("run", "alone"))
    assert [line["loss"] for line in looked] == pytest.approx([line["loss"] for line in alone], rel=1e-4)
    assert all("knn/top1" not in line for line in alone)
    hashes = [RunRecord.load(probed / name / "pretrain").recipe_hash for name in ("run", "alone")]
    assert hashes[0] == hashes[1]


@pytest.mark.timeout(900)
def test_run_record_of_a_probe(probed: Path) -> None:
    record = RunRecord.load(probed / "run/probe")
    assert (record.stage, record.status, record.data.classes) == ("probe", "finished", 10)
    assert record.init is not None and record.init.pretrain is not None and record.init.pretrain.method == "MCMAE"
    assert record.parameters.trainable == 96 * 10 + 10 < record.parameters.total == record.parameters.encoder
    assert record.operations is not None and record.operations.training == record.operations.forward
    metadata = read_metadata(probed / "run/probe/model.safetensors")
    assert (metadata["kind"], metadata["stage"], metadata["num_classes"]) == ("classifier", "probe", 10)
    assert spec_from_metadata(metadata) == load_recipe(Path("ds_configs/baselines/mcmae_tiny.yaml")).model.spec()
    assert json.loads((probed / "run/probe/engine.json").read_text())["zero_optimization"] == {"stage": 0}


@pytest.mark.timeout(900)
def test_a_probe_is_evaluated_as_any_classifier(probed: Path) -> None:
    members = f"stages.evaluate.members=[{probed / 'run/probe'}]"
    data = (f"data.train={probed / 'train.beton'}", f"data.val={probed / 'val.beton'}", "data.backend=pillow")
    command = ["--ds_config", ENGINE, "--recipe", "ds_configs/baselines/mcmae_tiny.yaml", "--run", probed / "run"]
    _train(probed, 1, *command, "--stage", "evaluate", members, *data)
    evaluated, probe = RunRecord.load(probed / "run/evaluate"), RunRecord.load(probed / "run/probe")
    assert evaluated.results.top1 == probe.results.top1
