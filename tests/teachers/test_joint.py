"""Several teachers at once (Table 4 of the paper): one head each, losses averaged, own sizes and statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.config.stages import MaskingConfig
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import encoder_spec
from mrmae_ds.teachers import Teacher, build_teacher
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.pretrain import PretrainTask
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.jobs import make_batch, pretrain_config
from tests.support.reference import perturb
from tests.support.sample_teachers import MEAN, STD, VIT, normalize, save_run

SIDE, GRID = 32, (8, 8)
STUDENT_MEAN, STUDENT_STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.4)
NET_MEAN, NET_STD = (0.3, 0.6, 0.2), (0.35, 0.45, 0.2)
DATA = DataConfig(train="train.beton", val="val.beton", mean=STUDENT_MEAN, std=STUDENT_STD)


@pytest.fixture
def teachers(tmp_path: Path) -> dict[str, Teacher]:
    """A ViT that this project trained, at the student's size, and a network's stage 2 at twice the size."""
    save_run(tmp_path, VIT, image_size=SIDE)
    torch.manual_seed(1)
    network = timm.create_model("test_resnet")
    perturb(network, seed=2, scale=0.1)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    sections = {
        "own": {"kind": "checkpoint", "source": str(tmp_path)},
        "net": {
            "kind": "timm",
            "source": "test_resnet",
            "weights": str(tmp_path / "net.pt"),
            "image_size": 64,
            "mean": NET_MEAN,
            "std": NET_STD,
        },
    }
    configs = {name: TeacherConfig(precision="fp32", **section) for name, section in sections.items()}
    return {name: build_teacher(name, config, DATA, SIDE, GRID) for name, config in configs.items()}


def targets_by_hand(folder: Path, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Each teacher's tokens by its own library and statistics, and the ViT's class attention."""
    pixels = batch.images.float() / 255
    encoder = build_encoder(VIT, SIDE).eval()
    load_encoder(encoder, folder / MODEL_FILE)
    network = timm.create_model("test_resnet").eval()
    network.load_state_dict(torch.load(folder / "net.pt", weights_only=True))
    larger = torch.nn.functional.interpolate(pixels, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    block = encoder.transformer_blocks[-1]
    block.attn.fused_attn = False
    seen: list[Tensor] = []
    block.attn.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        tokens = encoder.forward_features(normalize(pixels, MEAN, STD))[:, 1:]
        maps = network.forward_intermediates(normalize(larger, NET_MEAN, NET_STD), intermediates_only=True)
    return {"own": tokens, "net": maps[2].flatten(2).transpose(1, 2)}, seen[0].mean(1)[:, 0, 1:]


def layer_norm(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / np.sqrt(values.var() + 1e-5)


def mimic_loss(prediction: Tensor, target: Tensor, visible: VisibleSet) -> float:
    """Mean over images, visible tokens and channels, one token after the other."""
    losses = []
    for image, kept in enumerate(visible.ids_keep.tolist()):
        for place, token in enumerate(kept):
            wanted = layer_norm(target[image, token].double().numpy())
            losses.append(((prediction[image, place].double().numpy() - wanted) ** 2).mean())
    return float(np.mean(losses))


@pytest.mark.parametrize(("weights", "mode"), [((0.5, 0.5), "random"), ((0.2, 0.8), "topk")])
def test_the_losses_are_those_of_a_plain_loop(
    weights: tuple[float, float], mode: str, teachers: dict[str, Teacher], tmp_path: Path
) -> None:
    mimic = {"tap": "encoder", "tokens": "visible", "normalize": "layer_norm"}
    objectives = {
        name: {"target": name, **mimic, "weight": weight} for name, weight in zip(teachers, weights, strict=True)
    }
    masking = MaskingConfig(mode=mode, teacher=None if mode == "random" else "own")
    config = pretrain_config(teachers=tuple(teachers), masking=masking, objectives=objectives)
    spec = encoder_spec("cvit_tiny", {"dims": [8, 12, 16], "depths": [1, 1, 1], "num_heads": 2})
    widths = {name: teacher.width for name, teacher in teachers.items()}
    assert widths == {"own": 16, "net": 48}
    encoder = build_encoder(spec, SIDE)
    model = PretrainModel(encoder, FusionSpec(stages=(1, 2)), None, config.objectives, widths).eval()
    perturb(model, seed=8, scale=0.1)
    batch = make_batch(3, SIDE)
    key = MicroBatchKey(seed=1, step=2, index=0, rank=0, world_size=1, micro_batch=3)
    kept: list[VisibleSet] = []

    def engine(images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(visible)
        return model(images, visible, targets)

    task = PretrainTask(model, teachers, config, DATA)
    losses = task.losses(engine, batch, key)
    assert losses.keys() == {"loss", "own", "net"}

    targets, importance = targets_by_hand(tmp_path, batch)
    score = key.noise(64) if mode == "random" else -importance
    assert [sorted(row) for row in kept[0].ids_keep.tolist()] == [
        sorted(np.argsort(row.numpy(), kind="stable")[:16].tolist()) for row in score
    ]
    with torch.no_grad():
        predictions = model.predict(normalize(batch.images.float() / 255, STUDENT_MEAN, STUDENT_STD), kept[0])
    expected = {name: mimic_loss(predictions[name], targets[name], kept[0]) for name in teachers}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4)
    total = weights[0] * expected["own"] + weights[1] * expected["net"]
    assert losses["loss"].item() == pytest.approx(total, rel=1e-4)


def test_every_teachers_grid_is_checked(tmp_path: Path) -> None:
    save_run(tmp_path, VIT, image_size=SIDE)
    config = TeacherConfig(kind="checkpoint", source=str(tmp_path), image_size=48)
    with pytest.raises(UserError, match=r"teachers.second: its 12x12 tokens at 48 pixels do not match .* 8x8 at 32"):
        build_teacher("second", config, DATA, SIDE, GRID)
