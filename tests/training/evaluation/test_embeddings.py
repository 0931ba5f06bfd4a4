"""Embeddings of files: values by timm, names and classes in both formats, and accuracies by other formulas."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from mrmae_ds.cli.main import main
from mrmae_ds.errors import UserError
from mrmae_ds.training.evaluation.embeddings import fit_linear, list_files, quick_accuracy
from mrmae_ds.weights.export import export_run
from tests.fixtures import load_reference
from tests.support.record_runs import VIT, make_recipe, save_finetuning, save_pretraining
from tests.support.released import mae_state, write_released
from tests.support.sample_data import SIDE, Crops
from tests.weights.test_export import load_by


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty crops in CLASS/NUMBER.png; the classes are the top and the bottom of a photograph."""
    folder = tmp_path_factory.mktemp("tree")
    crops = Crops(30)
    for index in range(len(crops)):
        image, label = crops[index]
        path = folder / ("top" if label < 5 else "bottom") / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_pretraining(folder, make_recipe(folder / "val.beton", "MAE", VIT, SIDE, None), seed=1)
    return folder / "pretrain"


def _expected(stage: Path, paths: list[Path], folder: Path) -> np.ndarray:
    """Compute features by the model and the transform that timm makes of an export."""
    encoder = load_by(export_run(stage, "timm", folder / "timm.safetensors"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
    encoder.norm = torch.nn.Identity()  # it comes after the mean here
    with torch.no_grad():
        tokens = encoder.forward_features(torch.stack([transform(Image.open(path)) for path in paths]))
    means = tokens[:, 1:].mean(dim=1)
    return F.layer_norm(means, means.shape[-1:]).numpy()


@pytest.mark.parametrize("workers", [0, 2])
def test_npy_with_names(
    stage: Path, tree: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "features.npy"
    options = ["--out", str(out), "--batch-size", "8", "--workers", str(workers), "--device", "cpu"]
    assert main(["features", str(stage), str(tree / "top"), str(tree / "bottom"), *options]) == 0
    with out.with_suffix(".csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    paths = [*sorted((tree / "top").iterdir()), *sorted((tree / "bottom").iterdir())]
    assert header == ["file"] and [Path(name) for (name,) in rows] == paths
    found = np.load(out)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _expected(stage, paths, tmp_path), atol=1e-5)
    assert capsys.readouterr().out == f"30 images, 16 features each: {out}, {out.with_suffix('.csv')}\n"


def test_parquet_with_classes_and_accuracies(
    stage: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.parquet"
    assert main(["features", str(stage), str(tree), "--out", str(out), "--accuracy", "--device", "cpu"]) == 0
    table = pq.read_table(out).to_pydict()
    paths = [Path(name) for name in table["file"]]
    assert sorted(paths) == sorted(tree.glob("*/*.png")) and table["class"] == [path.parent.name for path in paths]
    assert table["part"].count("val") == table["part"][::-1].index("train") > 0
    np.testing.assert_allclose(np.array(table["features"]), _expected(stage, paths, tmp_path), atol=1e-5)
    first, knn, probe = capsys.readouterr().out.splitlines()
    assert str(out) in first and knn.startswith("knn/top1: ") and probe.startswith("probe/top1: ")
    assert all(line.endswith(f" of {table['part'].count('val')} images of 2 classes") for line in (knn, probe))


def test_released_weights(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_released(tmp_path / "mae.pth", mae_state(load_reference("mae")))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    out = tmp_path / "f.npy"
    assert main(["features", str(path), str(tree), "--accuracy", "--out", str(out), "--device", "cpu"]) == 0
    with out.with_suffix(".csv").open(newline="") as file:
        images = [Path(row["file"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(np.load(out), _expected(path, images, tmp_path), atol=1e-5)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["knn/top1", "probe/top1"]


@pytest.mark.parametrize("part", ["pretrain", "finetune"])
def test_exported_files_and_classifiers(part: str, tree: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "val.beton", "MAE", VIT, SIDE, None)
    save_pretraining(tmp_path, recipe, seed=1)
    save_finetuning(tmp_path, recipe, seed=2)
    stage, images, found = tmp_path / part, sorted(tree.glob("*/*.png"))[:3], []
    exports = [export_run(stage, layout, tmp_path / f"{layout}.safetensors").path for layout in ("timm", "safetensors")]
    for path in (stage, *exports):
        out = str(tmp_path / "f.npy")
        assert main(["features", str(path), *map(str, images), "--out", out, "--device", "cpu"]) == 0
        found.append(np.load(out))
    np.testing.assert_allclose(found[0], _expected(stage, images, tmp_path), atol=1e-5)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_is_no_image_is_left_out_and_named(
    stage: Path, tree: Path, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.png").write_text("notes")
    out = tmp_path / "features.npy"
    options = ["--out", str(out), "--workers", workers, "--device", "cpu", "--batch-size", "1"]
    assert main(["features", str(stage), str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/notes.png: cannot be read") and error.count("\n") == 1
    assert main(["features", str(stage), *2 * [str(tmp_path)], *options, "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 of 2 images left out, so nothing is written: ") and not out.exists()
    images = sorted((tree / "top").iterdir())[:3]
    names = [str(path) for path in (images[0], tmp_path / "notes.png", *images[1:])]
    for size in ("1", "3"):
        assert main(["features", str(stage), *names, *options[:-1], size]) == 2
        printed = capsys.readouterr()
        assert printed.out.startswith("3 images, ") and printed.err.startswith(
            f"error: 1 of 4 images left out, the others are written: {tmp_path}/notes.png: cannot be read"
        )
        np.testing.assert_allclose(np.load(out), _expected(stage, images, tmp_path), atol=1e-5)
        assert out.with_suffix(".csv").read_text().splitlines()[1:] == [*map(str, images)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "features.txt"], "--out: features.txt must end in .npy or .parquet"),
        (["--accuracy"], "--accuracy needs one folder with a folder per class"),
        (["--out", "/proc/features.npy"], "/proc/features.npy: cannot be written"),
        (["--batch-size", "0"], "--batch-size: 0 is less than 1"),
        (["--workers", "-1"], "--workers: -1 is less than 0"),
        (["--out", "features.parquet"], "--out: writing Parquet needs pyarrow; in the clone: pip install -e '.[parq"),
    ],
)
def test_errors_name_the_fix(
    stage: Path,
    tree: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["features", str(stage), str(tree / "top"), str(tree / "bottom"), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_accuracies_equal_other_formulas(tree: Path) -> None:
    files = list_files([tree], with_classes=True)
    is_val = np.array(files.parts) == "val"
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(files.paths), 6, generator=generator)
    features[:, 0] += files.labels  # the classes overlap
    units = features.double().numpy()
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    right = 0
    for query, label in zip(units[is_val], files.labels.numpy()[is_val], strict=True):
        cosines = units[~is_val] @ query
        nearest = np.argsort(-cosines)[:20]
        totals = [np.exp(cosines[nearest] / 0.07)[files.labels.numpy()[~is_val][nearest] == c].sum() for c in (0, 1)]
        right += int(np.argmax(totals)) == label
    assert quick_accuracy(files, features)["knn/top1"] == pytest.approx(100 * right / is_val.sum())


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_without_images_has_no_accuracy(part: str, tree: Path) -> None:
    files = list_files([tree], with_classes=True)
    rows = [row for row, other in enumerate(files.parts) if other != part]
    with pytest.raises(UserError, match=rf"--accuracy: {part}/ has too few images that can be read"):
        quick_accuracy(files.select(rows), torch.zeros(len(rows), 4))


def test_the_linear_probe_is_the_optimum_of_its_loss() -> None:
    """The loss is convex, so a vanishing gradient, computed here by its formula, is the optimum."""
    generator = torch.Generator().manual_seed(0)
    features = 3 + 2 * torch.randn(200, 5, generator=generator)
    labels = torch.randint(0, 3, (200,), generator=generator)
    norm, linear = fit_linear(features, labels, 3)  # type: ignore[misc]
    inputs = ((features - features.mean(dim=0)) / features.std(dim=0)).double()
    torch.testing.assert_close(norm(features).double(), inputs, atol=1e-5, rtol=0)
    residual = (inputs @ linear.weight.double().T + linear.bias.double()).softmax(dim=1) - F.one_hot(labels, 3)
    gradient = residual.T @ inputs / 200 + 1e-4 * linear.weight.double()
    assert gradient.abs().max() < 1e-4 < linear.weight.abs().max()
