"""Python API: equal to what training computes, and to computations by other means."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mrmae_ds
from mrmae_ds.api import MRMAE, ImageEncoder
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.pretrain import PretrainTask
from mrmae_ds.weights.export import export_run
from tests.support.jobs import make_batch
from tests.support.processes import REPOSITORY, run
from tests.support.record_runs import CVIT, MEAN, STD, VIT, make_recipe, save_finetuning, save_pretraining
from tests.support.reference import perturb, reference_mae
from tests.support.released import mae_state, write_released

SIDE, COUNT = 16, 3
KEY = MicroBatchKey(seed=1, step=2, index=0, rank=0, world_size=1, micro_batch=COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: ``mae``, the teacher, and ``mrmae`` with its classifier."""
    folder = tmp_path_factory.mktemp("runs")
    val = folder / "val.beton"
    save_pretraining(folder / "mae", make_recipe(val, "MAE", VIT, SIDE, None), seed=1)
    recipe = make_recipe(val, "MR-MAE", CVIT, SIDE, folder / "mae" / "pretrain")
    save_pretraining(folder / "mrmae", recipe, seed=2)
    save_finetuning(folder / "mrmae", recipe, seed=3)
    return folder


@pytest.fixture
def recipe(folder: Path) -> Recipe:
    return make_recipe(folder / "val.beton", "MR-MAE", CVIT, SIDE, folder / "mae" / "pretrain")


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def _task(model: MRMAE, recipe: Recipe) -> PretrainTask:
    return PretrainTask(model.student, model.teachers, model.config, recipe.data)


@pytest.mark.parametrize("mode", ["topk", "sample", "random"])
def test_losses_are_those_of_training(mode: str, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    model = MRMAE.from_recipe(path, [f"stages.pretrain.masking.mode={mode}"])
    perturb(model.student, seed=4, scale=0.3)
    batch = make_batch(COUNT, SIDE)
    expected = _task(model, recipe).losses(model.student, batch, KEY)
    losses = model(batch.images, noise=KEY.noise(16))
    assert losses.keys() == expected.keys() == {"loss", "pixels", "mimic"}
    assert all(torch.equal(losses[name], expected[name]) for name in losses)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("masking", ["{mode: random, keep_ratio: 0.4}", "{mode: block, masked: 6, min_block: 2}"])
def test_losses_with_mask_tokens_are_those_of_training(masking: str, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    settings = ["encoder_input=mask_tokens", "masking=null", f"masking={masking}"]
    settings += ["objectives.pixels.tap=encoder", "objectives.mimic.tokens=masked"]
    model = MRMAE.from_recipe(
        path,
        ["model.arch=beit_tiny", "model.overrides=null", "model.fusion=null"]
        + [f"stages.pretrain.{setting}" for setting in settings],
    )
    batch, noise = make_batch(COUNT, SIDE), KEY.noise(16)
    expected = _task(model, recipe).losses(model.student, batch, KEY)
    stage = model.config.masking
    assert stage is not None
    drawn = stage.draw_blocks(KEY.image_seeds("mask"), (4, 4)) if stage.mode == "block" else noise
    losses = model(batch.images, noise=drawn)
    assert all(torch.equal(losses[name], expected[name]) for name in losses)
    assert torch.equal(model(batch.images, noise=noise)["loss"], model(batch.images, noise=noise)["loss"])
    assert model.attention(batch.images).student.shape == (COUNT, 4, 4)


def test_losses_by_another_path(folder: Path, images: Tensor) -> None:
    """Statistics, targets and losses computed with numpy from the two models' predictions."""
    model = MRMAE.from_run(folder / "mrmae" / "pretrain")
    noise = torch.rand(COUNT, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = model(images, noise=noise)
        pixels = images.numpy().astype(np.float64) / 255
        inputs = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        teacher = model.teachers["guide"]
        normalized = torch.from_numpy(inputs).float()  # the teacher was trained with the same statistics
        tokens, importance = (part.numpy().astype(np.float64) for part in teacher.encode(normalized)[:2])
        order = np.argsort(-importance, axis=1, kind="stable")
        visible = model._draw_mask(torch.from_numpy(pixels).float(), {"guide": teacher(images / 255)}, noise, None)
        assert np.array_equal(order[:, :4], visible.ids_keep.numpy())
        predicted = {name: p.double().numpy() for name, p in model.student.predict(normalized, visible).items()}
    total = {"pixels": [], "mimic": []}
    for i in range(COUNT):
        for token in order[i, 4:]:
            row, column = divmod(int(token), 4)
            patch = inputs[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].transpose(1, 2, 0).reshape(-1)
            target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            total["pixels"].append(np.mean((predicted["pixels"][i, token] - target) ** 2))
        for place, token in enumerate(order[i, :4]):
            target = tokens[i, token] - tokens[i, token].mean()
            target = target / np.sqrt(tokens[i, token].var() + 1e-6)
            total["mimic"].append(np.mean((predicted["mimic"][i, place] - target) ** 2))
    for name, values in total.items():
        assert losses[name].item() == pytest.approx(np.mean(values), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(losses["pixels"].item() + losses["mimic"].item(), rel=1e-6)


def test_float_images_equal_uint8_images(folder: Path, images: Tensor) -> None:
    model = MRMAE.from_run(folder / "mrmae" / "pretrain")
    for given in (images, images.float() / 255):
        losses = model(given, generator=torch.Generator().manual_seed(3))
        other = model(images, noise=torch.rand(COUNT, 16, generator=torch.Generator().manual_seed(3)))
        assert losses == other


def test_features_are_those_of_a_classifier_with_the_same_weights(folder: Path, images: Tensor) -> None:
    model = MRMAE.from_run(folder / "mrmae" / "pretrain")
    classifier = build_encoder(model.student.encoder.spec, SIDE, 10).eval()
    classifier.load_state_dict(model.student.encoder.state_dict(), strict=False)
    inputs = (images.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        tokens = classifier.forward_features(inputs)
        pooled = classifier.forward_head(tokens, pre_logits=True)
    features = model.features(images)
    assert features.tokens.shape == (COUNT, 16, 16)
    torch.testing.assert_close(features.tokens, tokens)
    torch.testing.assert_close(features.pooled, pooled)


def test_reconstruction_by_another_path(folder: Path, images: Tensor) -> None:
    """Patches denormalized and placed one at a time, by numpy."""
    model = MRMAE.from_run(folder / "mae" / "pretrain")
    noise = torch.rand(COUNT, 16, generator=torch.Generator().manual_seed(2))
    result = model.reconstruct(images, noise=noise)
    pixels = images.numpy() / 255.0
    mean, std = np.reshape(MEAN, (3, 1, 1)), np.reshape(STD, (3, 1, 1))
    inputs = (pixels - mean) / std
    visible = model._draw_mask(images, {}, noise, None)
    with torch.no_grad():
        predicted = model.student.predict(torch.from_numpy(inputs).float(), visible)["pixels"].numpy()
    keep = np.argsort(noise.numpy(), axis=1)[:, :4]
    for i in range(COUNT):
        for token in range(16):
            row, column = divmod(token, 4)
            window = (slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            patch = inputs[i][window]
            values = predicted[i, token].reshape(4, 4, 3).transpose(2, 0, 1)
            values = values * np.sqrt(patch.var(ddof=1) + 1e-6) + patch.mean()
            values = np.clip(values * std + mean, 0, 1)
            removed = token not in keep[i]
            np.testing.assert_allclose(result.prediction[i].numpy()[window], values, atol=1e-5)
            expected = values if removed else pixels[i][window]
            np.testing.assert_allclose(result.reconstruction[i].numpy()[window], expected, atol=1e-5)
            np.testing.assert_allclose(
                result.masked[i].numpy()[window], 0.5 if removed else pixels[i][window], atol=1e-6
            )


def test_attention_by_another_path(folder: Path, images: Tensor) -> None:
    """Attention of the last block, head by head, from the input that its hook captures."""
    model = MRMAE.from_run(folder / "mrmae" / "pretrain")
    attention = model.attention(images)
    assert attention.student.shape == attention.teachers["guide"].shape == (COUNT, 4, 4)
    inputs = (images.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    encoder = model.student.encoder
    block = encoder.transformer_blocks[-1]
    captured: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        encoder.forward_features(inputs)
        handle.remove()
        x = F.layer_norm(captured[0], (16,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
        query, key, _ = (x @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(16, dim=2)
        width = 16 // block.attn.num_heads
        received = torch.zeros(COUNT, 16)
        for head in range(block.attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
            received += scores.softmax(dim=2).mean(dim=1) / block.attn.num_heads
    torch.testing.assert_close(attention.student.flatten(1), received)


def test_state_is_that_of_the_student(folder: Path, recipe: Recipe, images: Tensor) -> None:
    model = MRMAE.from_recipe(recipe)
    assert model.training and not any(teacher.training for teacher in model.teachers.values())
    assert model.state_dict().keys() == {f"student.{name}" for name in model.student.state_dict()}
    finished = MRMAE.from_run(str(folder / "mrmae" / "pretrain" / "model.safetensors"))
    assert not finished.training
    model.load_state_dict(finished.state_dict())
    noise = torch.rand(COUNT, 16)
    assert torch.equal(model(images, noise=noise)["loss"], finished(images, noise=noise)["loss"])
    model.to("meta")
    tensors = [*model.parameters(), *model.buffers(), *model.teachers["guide"].parameters()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_starts_from_weights_that_the_recipe_names(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    model = MRMAE.from_recipe(path, [f"stages.pretrain.init={folder / 'mrmae' / 'pretrain'}"])
    finished = MRMAE.from_run(folder / "mrmae" / "pretrain", teachers=False)
    for name, tensor in finished.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_run_without_teachers_has_features_but_no_losses(folder: Path, images: Tensor) -> None:
    model = MRMAE.from_run(folder / "mrmae" / "pretrain", teachers=False)
    assert model.features(images).pooled.shape == (COUNT, 16)
    assert model.attention(images).teachers == {}
    for call in (model, model.reconstruct):
        with pytest.raises(UserError, match=r"teacher guide is not loaded; use from_run\(..., teachers=True\)"):
            call(images)


EMA = (
    "teachers.ema={kind: ema, decay: 0.5}",
    "stages.pretrain.teachers=[guide, ema]",
    "stages.pretrain.objectives.latent={target: ema, tap: encoder, tokens: visible, normalize: none, weight: 1.0}",
)


def test_a_moving_average_starts_at_the_initial_weights_and_is_updated(
    recipe: Recipe, folder: Path, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    model = MRMAE.from_recipe(path, [f"stages.pretrain.init={folder / 'mrmae' / 'pretrain'}", *EMA])
    average = model.student.averages["ema"]
    for name, tensor in model.student.encoder.state_dict().items():
        assert torch.equal(average.network.state_dict()[name], tensor), name
    losses = model(images)
    assert losses.keys() == {"loss", "pixels", "mimic", "latent"} and losses["latent"] > 0
    perturb(model.student, seed=1)
    expected = (average.network.token_projection.weight + model.student.encoder.token_projection.weight) / 2
    model.student.update_averages(epoch=1.0)
    assert torch.allclose(average.network.token_projection.weight, expected)


def test_runs_do_not_keep_moving_averages(recipe: Recipe, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    save_pretraining(tmp_path, load_recipe(path, list(EMA)), seed=1)
    model = MRMAE.from_run(tmp_path / "pretrain")
    assert model.attention(images).teachers.keys() == {"guide"} and model.features(images).pooled.shape == (COUNT, 16)
    with pytest.raises(UserError, match=r"teacher ema is not loaded; .* which runs do not keep"):
        model(images)


def test_wrong_images_runs_and_overrides_are_refused(
    folder: Path, recipe: Recipe, images: Tensor, tmp_path: Path
) -> None:
    model = MRMAE.from_run(folder / "mrmae" / "pretrain")
    with pytest.raises(UserError, match=r"images have shape \[3, 3, 8, 8\], expected \[B, 3, 16, 16\]"):
        model(images[:, :, :8, :8])
    with pytest.raises(UserError, match=r"images are torch.int64, expected torch.uint8"):
        model.features(images.long())
    with pytest.raises(UserError, match="a classifier, not a pre-training"):
        MRMAE.from_run(folder / "mrmae" / "finetune")
    with pytest.raises(UserError, match="overrides"):
        MRMAE.from_recipe(recipe, ["seed=1"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(UserError, match="no stage pretrain"):
        MRMAE.from_recipe(tmp_path / "recipe.yaml", ["stages.pretrain=null"])


def test_a_teacher_keeps_its_precision(recipe: Recipe, images: Tensor) -> None:
    model = MRMAE.from_recipe(recipe)
    before = {name: teacher(images.float() / 255).tokens for name, teacher in model.teachers.items()}
    losses = model.to(torch.bfloat16)(images)
    assert before and torch.isfinite(losses["loss"])
    for name, teacher in model.teachers.items():
        assert torch.equal(teacher(images.float() / 255).tokens, before[name])


def test_a_model_in_bfloat16_keeps_its_statistics(recipe: Recipe, images: Tensor) -> None:
    model = MRMAE.from_recipe(recipe).to(torch.bfloat16)
    assert torch.equal(model.mean.flatten(), torch.tensor(MEAN)) and torch.equal(model.std.flatten(), torch.tensor(STD))
    pixels, mean, std = images.double() / 255, model.mean.double(), model.std.double()
    torch.testing.assert_close(model._normalize(images / 255).double(), (pixels - mean) / std, rtol=0, atol=1e-6)
    assert model.to("meta").mean.is_meta


@pytest.mark.parametrize("form", ["0 to 255", "normalized"])
def test_float_images_of_another_range_are_refused(form: str, recipe: Recipe, images: Tensor) -> None:
    model = MRMAE.from_recipe(recipe)
    given = images.float() if form == "0 to 255" else (images / 255 - 0.45) / 0.225
    for method in (model, model.features, model.reconstruct, model.attention):
        with pytest.raises(UserError, match=r"values of .* expected floats in 0 to 1; divide .* by 255 or .*uint8"):
            method(given)
    model.features(images / 255 * 1.2 - 0.1)  # as an interpolation overshoots


def test_no_images_and_no_tensor_are_refused(recipe: Recipe, images: Tensor) -> None:
    model = MRMAE.from_recipe(recipe)
    with pytest.raises(UserError, match="no images"):
        model(images[:0])
    with pytest.raises(UserError, match="a ndarray, expected a tensor"):
        model(images.numpy())


def test_public_names_are_imported_on_access() -> None:
    code = "import sys, mrmae_ds; print('torch' in sys.modules, [getattr(mrmae_ds, name) for name in mrmae_ds.__all__])"
    finished = run([sys.executable, "-c", code], 120)
    assert finished.stdout.startswith("False [") and "MRMAE" in finished.stdout, finished.stderr
    assert set(mrmae_ds.__all__) <= set(dir(mrmae_ds))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mrmae_ds.nothing  # noqa: B018


def _prepare_demo(folder: Path) -> None:
    """Make a folder like the repository after ``make demo``: recipes, and the teacher with random weights."""
    (folder / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    recipe = mrmae_ds.load_recipe(REPOSITORY / "ds_configs" / "baselines" / "mae_tiny.yaml")
    model = save_pretraining(folder / "runs" / "mae_tiny", recipe)
    assert isinstance(model, PretrainModel)


def test_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _prepare_demo(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(REPOSITORY / "examples" / "quickstart.py"))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and all(
        re.match(r"\{'loss': [\d.]+, 'pixels': [\d.]+, 'mimic': [\d.]+\}", line) for line in out[:3]
    )
    found = names["features"]
    shapes = f".tokens {list(found.tokens.shape)}, .pooled {list(found.pooled.shape)}"
    for page in ("examples/quickstart.py", "README.md"):
        assert shapes in (REPOSITORY / page).read_text(encoding="utf-8")
    assert names["rebuilt"].masked.shape == (8, 3, 32, 32)
    assert names["attention"].teachers["mae"].shape == (8, 8, 8)


def test_python_example_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match = re.search(r"^## Python API\n.*?^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.S | re.M)
    if match is None:
        pytest.skip("README.md has no Python example after the heading Python API")
    _prepare_demo(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(match[1], "README.md", "exec"), {})


def test_features_of_a_released_file(mae: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_released(tmp_path / "x.pth", mae_state(mae))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = ImageEncoder.from_file(path).features(images)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        tokens = reference_mae(mae).eval().encoder.forward_features((images / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(found.tokens, tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooled, F.layer_norm(tokens.mean(1), (32,), eps=1e-6), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=r"images have shape .* expected \[B, 3, 64, 64\]"):
        ImageEncoder.from_file(path).features(images[:, :, :32])


@pytest.mark.parametrize("exported", [False, True], ids=["run", "export"])
def test_features_of_a_run_by_file(exported: bool, folder: Path, tmp_path: Path) -> None:
    run_folder = folder / "mrmae" / "pretrain"
    path = export_run(run_folder, out=tmp_path).path if exported else run_folder
    images = torch.rand(2, 3, SIDE, SIDE)
    found = ImageEncoder.from_file(path).features(images)
    expected = MRMAE.from_run(run_folder, teachers=False).features(images)
    torch.testing.assert_close(found.tokens, expected.tokens)
    torch.testing.assert_close(found.pooled, expected.pooled)
