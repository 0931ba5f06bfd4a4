from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.api import MRMAE
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import MaskingConfig, PretrainConfig
from mrmae_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD, Rgb
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.hog import hog_tokens
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.models.moving_average import MovingAverage
from mrmae_ds.models.objectives import Objective, objective_loss
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import ViTSpec, encoder_spec
from mrmae_ds.teachers import Teacher
from mrmae_ds.teachers.base import TeacherOutput, TeacherSpec
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.finetune import FinetuneTask
from mrmae_ds.training.tasks.pretrain import PretrainTask
from tests.support.jobs import finetune_config, make_batch, pretrain_config
from tests.support.sample_data import photograph

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.4)
TEACHER_MEAN, TEACHER_STD = (0.6, 0.5, 0.4), (0.2, 0.3, 0.7)
DATA = DataConfig(train="train.beton", val="val.beton", mean=MEAN, std=STD)
KEY = MicroBatchKey(seed=1, step=2, index=0, rank=0, world_size=1, micro_batch=4)
SPEC = encoder_spec("cvit_tiny", {"dims": [8, 12, 16], "depths": [1, 1, 1], "num_heads": 2})
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _random_states_are_put_back() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


class OwnTeacher(Teacher):
    """Tokens are the mean colors of 4x4 cells; the importance is given, one row for all images."""

    def __init__(self, importance: Tensor) -> None:
        statistics = {"mean": TEACHER_MEAN, "std": TEACHER_STD}
        spec = TeacherSpec(grid=(8, 8), width=3, image_size=32, dtype=torch.float32, sha256="0", **statistics)
        super().__init__(nn.Identity(), spec)
        self.importance = importance
        self.seen: Tensor

    def encode(self, images: Tensor) -> TeacherOutput:
        self.seen = images
        tokens = nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return TeacherOutput(tokens, self.importance.expand(len(images), -1))


class Spy(nn.Module):
    """Stand-in for the engine: keeps its arguments."""

    def __init__(self, logits: Tensor | None = None) -> None:
        super().__init__()
        self.output = logits
        self.images: Tensor
        self.visible: VisibleSet
        self.targets: dict[str, Tensor]

    def forward(self, images: Tensor, *rest: object) -> object:
        self.images = images
        if self.output is not None:
            return self.output
        self.visible, self.targets = rest
        return {"loss": images.float().sum()}


def _pretrain_task(config: PretrainConfig, teacher: OwnTeacher | None, drop_path: float = 0.0) -> PretrainTask:
    torch.manual_seed(0)
    teachers: dict[str, Teacher] = {} if teacher is None else {"own": teacher}
    encoder = build_encoder(SPEC, 32, drop_path_rate=drop_path)
    decoder = DecoderSpec(dim=8, depth=1, num_heads=2)
    model = PretrainModel(encoder, FusionSpec(stages=(1, 2)), decoder, config.objectives, {"own": 3})
    return PretrainTask(model, teachers, config, DATA)


def _mimic(mode: str) -> PretrainConfig:
    mimic = {"target": "own", "tap": "encoder", "tokens": "visible", "normalize": "none", "weight": 0.5}
    pixels = pretrain_config().objectives["pixels"]
    masking = MaskingConfig(mode=mode, teacher="own")
    return pretrain_config(teachers=("own",), masking=masking, objectives={"pixels": pixels, "mimic": mimic})


def _stir() -> None:
    """Change the state of every global generator."""
    torch.rand(7)
    np.random.rand(3)
    random.random()


def _values(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


# ---- the key of a micro-batch


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 196])
def test_noise_depends_only_on_the_position_in_the_global_batch(num_tokens: int) -> None:
    total = 24
    whole = MicroBatchKey(5, 9, 0, 0, 1, total).noise(num_tokens)
    assert whole.shape == (total, num_tokens) and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() < 1
    for world, micro_batch in [(1, 1), (1, 6), (2, 12), (2, 3), (3, 4), (4, 6), (8, 1), (24, 1)]:
        accumulation = total // (world * micro_batch)
        places = itertools.product(range(accumulation), range(world))
        parts = [MicroBatchKey(5, 9, micro, rank, world, micro_batch).noise(num_tokens) for micro, rank in places]
        assert torch.equal(torch.cat(parts), whole), (world, micro_batch)


def test_noise_differs_with_step_seed_and_image_only() -> None:
    noise = KEY.noise(64)
    torch.manual_seed(99)
    assert torch.equal(KEY.noise(64), noise)
    others = [MicroBatchKey(1, 3, 0, 0, 1, 4).noise(64), MicroBatchKey(2, 2, 0, 0, 1, 4).noise(64), noise]
    rows = torch.cat(others)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_seeds_are_one_for_each_micro_batch_of_each_rank() -> None:
    places = itertools.product((0, 1), (0, 1, 2), (0, 1), (0, 1, 2), ("model", "other"))
    seeds = [
        MicroBatchKey(seed, step, micro, rank, 3, 4).seed_for(purpose) for seed, step, micro, rank, purpose in places
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 2 * 3 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert MicroBatchKey(1, 2, 0, 0, 1, 4).seed_for("model") == KEY.seed_for("model")


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_same_part_of_the_batch_has_the_same_seed_on_any_number_of_processes(world_size: int) -> None:
    keys = [MicroBatchKey(1, 2, m, rank, world_size, 4) for m in range(6 // world_size) for rank in range(world_size)]
    assert [key.seed_for("model") for key in keys] == [
        MicroBatchKey(1, 2, m, 0, 1, 4).seed_for("model") for m in range(6)
    ]


def test_shared_seed_is_equal_on_all_ranks() -> None:
    keys = [MicroBatchKey(1, 2, micro, rank, 3, 4) for micro in range(2) for rank in range(3)]
    assert len({key.seed_for("mask", per_part=False) for key in keys}) == 1
    assert MicroBatchKey(1, 3, 0, 0, 3, 4).seed_for("mask", per_part=False) != keys[0].seed_for("mask", per_part=False)
    assert keys[0].seed_for("mask", per_part=False) != keys[0].seed_for("mask")


# ---- pre-training


def test_pretraining_losses_are_a_function_of_the_key() -> None:
    task = _pretrain_task(_mimic("sample"), OwnTeacher(torch.rand(64) + 0.1), drop_path=0.5)
    task.model.train()
    batch = make_batch(4)
    first = _values(task.losses(task.model, batch, KEY))
    assert first.keys() == {"loss", "pixels", "mimic"}
    assert first["loss"] == pytest.approx(0.5 * first["pixels"] + 0.5 * first["mimic"], rel=1e-5)
    _stir()
    assert _values(task.losses(task.model, batch, KEY)) == first
    for other in (MicroBatchKey(1, 3, 0, 0, 1, 4), MicroBatchKey(7, 2, 0, 0, 1, 4)):
        assert _values(task.losses(task.model, batch, other)) != first


def test_a_moving_average_follows_the_encoder_and_is_not_exported() -> None:
    task = _pretrain_task(pretrain_config(), None)
    plain, state = task.count_parameters(), task.model.state_dict()
    task.model.averages["ema"] = MovingAverage(task.encoder, lambda epoch: epoch)
    assert task.count_parameters() == plain
    assert task.export_state(task.model.state_dict()).keys() == state.keys()
    before = task.encoder.pos_embed + 1
    with torch.no_grad():
        for parameter in task.encoder.parameters():
            parameter += 1
    task.after_step(0.25)
    (average,) = task.model.averages.values()
    assert torch.allclose(average.network.pos_embed, before - 0.25)
    task.model.reset_averages()
    assert torch.equal(average.network.pos_embed, task.encoder.pos_embed)


def test_drop_path_differs_between_ranks() -> None:
    """Images and masks are equal on both ranks, so only the model's own randomness can differ."""
    task = _pretrain_task(pretrain_config(), None, drop_path=0.9)
    task.model.train()
    batch, losses = make_batch(4), []
    for rank in range(2):
        key = MicroBatchKey(1, 2, 0, rank, 2, 4)
        noise = KEY.noise(64)
        object.__setattr__(key, "noise", lambda num_tokens, noise=noise: noise)
        losses.append(task.losses(task.model, batch, key)["loss"].item())
    assert losses[0] != losses[1]


def test_loss_does_not_depend_on_ranks_and_micro_batches() -> None:
    task = _pretrain_task(_mimic("sample"), OwnTeacher(torch.rand(64) + 0.1))
    whole = make_batch(4)
    expected = _values(task.losses(task.model, whole, KEY))
    parts = []
    for rank in range(2):
        half = slice(2 * rank, 2 * rank + 2)
        part = type(whole)(
            whole.images[half], whole.labels[half], whole.indices[half], whole.valid[half], whole.keys[half]
        )
        parts.append(_values(task.losses(task.model, part, MicroBatchKey(1, 2, 0, rank, 2, 2))))
    for name, value in expected.items():
        assert (parts[0][name] + parts[1][name]) / 2 == pytest.approx(value, rel=1e-4)


def test_topk_masking_keeps_what_the_teacher_finds_important() -> None:
    importance = torch.rand(64, generator=torch.Generator().manual_seed(4))
    task, spy = _pretrain_task(_mimic("topk"), OwnTeacher(importance)), Spy()
    expected = set(np.argsort(importance.numpy())[-16:].tolist())
    for step in range(3):
        task.losses(spy, make_batch(4), MicroBatchKey(1, step, 0, 0, 1, 4))
        assert spy.visible.grid == (8, 8)
        assert all(set(row) == expected for row in spy.visible.ids_keep.tolist())


def test_sampled_masking_draws_by_importance() -> None:
    importance = torch.zeros(64)
    importance[10:26] = 1.0
    task, spy = _pretrain_task(_mimic("sample"), OwnTeacher(importance)), Spy()
    task.losses(spy, make_batch(4), KEY)
    assert all(set(row) == set(range(10, 26)) for row in spy.visible.ids_keep.tolist())


def test_random_masking_takes_the_smallest_noise() -> None:
    task, spy = _pretrain_task(_mimic("random"), OwnTeacher(torch.arange(64.0))), Spy()
    task.losses(spy, make_batch(4), KEY)
    for kept, noise in zip(spy.visible.ids_keep.tolist(), KEY.noise(64).numpy(), strict=True):
        assert kept == np.argsort(noise, kind="stable")[:16].tolist()


def test_student_and_teacher_each_get_their_own_statistics() -> None:
    teacher, spy = OwnTeacher(torch.rand(64)), Spy()
    task, batch = _pretrain_task(_mimic("sample"), teacher), make_batch(4)
    task.losses(spy, batch, KEY)
    pixels = batch.images.numpy().astype(np.float64) / 255
    expected = {}
    for who, mean, std in (("student", MEAN, STD), ("teacher", TEACHER_MEAN, TEACHER_STD)):
        expected[who] = (pixels - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    np.testing.assert_allclose(spy.images.numpy(), expected["student"], atol=1e-5)
    np.testing.assert_allclose(teacher.seen.numpy(), expected["teacher"], atol=1e-5)
    assert spy.targets.keys() == {"own"}
    cells = expected["teacher"].reshape(4, 3, 8, 4, 8, 4).mean((3, 5)).reshape(4, 3, 64).transpose(0, 2, 1)
    np.testing.assert_allclose(spy.targets["own"].numpy(), cells, atol=1e-5)
    assert not spy.targets["own"].requires_grad


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize(
    "statistics", [(IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3)], ids=["imagenet", "half"]
)
def test_hog_targets_are_those_of_the_8_bit_levels(
    statistics: tuple[Rgb, Rgb], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounding error of a vertical gradient, which a photograph has many of, would move it from bin 0 to bin 8."""
    hog = {"target": "hog", "tap": "decoder", "tokens": "masked", "normalize": "none", "weight": 1.0}
    config = pretrain_config(objectives={"hog": hog})
    decoder = DecoderSpec(dim=8, depth=1, num_heads=2)
    model = PretrainModel(build_encoder(ViTSpec(16, 1, 2, patch=16), 224), FusionSpec(), decoder, config.objectives, {})
    model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    mean, std = statistics
    task = PretrainTask(model, {}, config, DataConfig(train="train.beton", val="val.beton", mean=mean, std=std))
    api = MRMAE(model, {}, config, mean, std)
    levels = torch.from_numpy(np.array(photograph().resize((224, 224)))).permute(2, 0, 1)[None]
    seen: list[Tensor] = []

    def spy(spec: Objective, prediction: Tensor, target: Tensor, visible: VisibleSet) -> Tensor:
        seen.append(target)
        return objective_loss(spec, prediction, target, visible)

    monkeypatch.setattr("mrmae_ds.models.pretrain.objective_loss", spy)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        task.losses(model, replace(make_batch(1), images=levels), replace(KEY, micro_batch=1))
        api(levels)
        api(levels * (1 / 255))
    assert len(seen) == 3
    for target in seen:
        torch.testing.assert_close(target.double(), hog_tokens(levels.double(), 16), atol=1e-6, rtol=0)


# ---- fine-tuning


def _finetune_task(drop_path: float = 0.0, **changes: object) -> FinetuneTask:
    torch.manual_seed(0)
    model = build_encoder(SPEC, 32, num_classes=10, drop_path_rate=drop_path)
    task = FinetuneTask(model, finetune_config(**changes), DATA, torch.float32)
    task.to(CPU)
    return task


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"random_erasing": 0.9},
        {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5},
    ],
    ids=str,
)
def test_fine_tuning_losses_are_a_function_of_the_key(changes: dict[str, float]) -> None:
    task = _finetune_task(drop_path=0.5, label_smoothing=0.1, **changes)
    task.model.train()
    batch = make_batch(4)
    first = task.losses(task.model, batch, KEY)["loss"].item()
    _stir()
    assert task.losses(task.model, batch, KEY)["loss"].item() == first
    keys = [MicroBatchKey(1, step, micro, rank, 2, 4) for step in (2, 3) for micro in (0, 1) for rank in (0, 1)]
    values = [task.losses(task.model, batch, key)["loss"].item() for key in keys]
    assert len(set(values)) > 4


def _soft_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    log_sums = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return float((targets * (log_sums[:, None] - logits)).sum(1).mean())


def _smoothed(labels: Tensor, smoothing: float) -> np.ndarray:
    return np.eye(10)[labels.numpy()] * (1 - smoothing) + smoothing / 10


def test_plain_fine_tuning_is_cross_entropy_with_smoothed_labels() -> None:
    logits, batch = torch.randn(4, 10), make_batch(4)
    spy = Spy(logits)
    loss = _finetune_task(label_smoothing=0.2).losses(spy, batch, KEY)["loss"].item()
    assert loss == pytest.approx(_soft_cross_entropy(logits.numpy(), _smoothed(batch.labels, 0.2)), rel=1e-5)
    expected = (batch.images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(spy.images.double(), expected, atol=1e-5, rtol=0)


def test_mixup_mixes_each_image_with_its_partner_and_their_labels_alike() -> None:
    logits, batch = torch.randn(4, 10), make_batch(4)
    spy, plain = Spy(logits), Spy(logits)
    loss = _finetune_task(mixup=0.8, label_smoothing=0.1).losses(spy, batch, KEY)["loss"].item()
    _finetune_task().losses(plain, batch, KEY)
    own, partner = plain.images.double(), plain.images.double().flip(0)
    share = (((spy.images - partner) * (own - partner)).sum() / (own - partner).square().sum()).item()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(spy.images.double(), share * own + (1 - share) * partner, atol=1e-4, rtol=0)
    targets = share * _smoothed(batch.labels, 0.1) + (1 - share) * _smoothed(batch.labels.flip(0), 0.1)
    assert loss == pytest.approx(_soft_cross_entropy(logits.numpy(), targets), rel=1e-4)


def test_erasing_replaces_a_part_of_each_image() -> None:
    logits, batch = torch.randn(4, 10), make_batch(4)
    spy, plain = Spy(logits), Spy(logits)
    _finetune_task(random_erasing=1.0).losses(spy, batch, KEY)
    _finetune_task().losses(plain, batch, KEY)
    changed = (spy.images != plain.images).any(1).flatten(1).float().mean(1)
    assert ((changed > 0.01) & (changed < 0.6)).all()


def test_evaluation_sees_the_images_as_they_are() -> None:
    task, batch = _finetune_task(mixup=0.8, cutmix=1.0, random_erasing=1.0), make_batch(4)
    spy = Spy(torch.randn(4, 10).bfloat16())
    state = torch.get_rng_state()
    logits = task.logits(spy, batch.images)
    assert logits.dtype == torch.float32 and torch.equal(torch.get_rng_state(), state)
    plain = Spy(torch.randn(4, 10))
    _finetune_task().losses(plain, batch, KEY)
    assert torch.equal(spy.images, plain.images)


def test_parameter_groups_follow_the_stage() -> None:
    scales = sorted({round(group["lr_scale"], 6) for group in _finetune_task().param_groups()})
    assert scales == [round(0.65**2, 6), 0.65, 1.0]
    groups = _pretrain_task(pretrain_config(), None).param_groups()
    assert {(group["lr_scale"], group["weight_decay"]) for group in groups} == {(1.0, 0.0), (1.0, 0.05)}
