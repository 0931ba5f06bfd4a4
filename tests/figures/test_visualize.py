from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from mrmae_ds.cli.main import main
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.errors import UserError
from mrmae_ds.figures import plots as figures
from mrmae_ds.figures.image_grid import GridRow
from mrmae_ds.figures.select_images import SelectedImages
from mrmae_ds.figures.visualize import show_run, show_runs
from mrmae_ds.models.masking import TokenMask
from mrmae_ds.models.objectives import unpatchify
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.weights.load import load_model
from mrmae_ds.weights.model_file import read_metadata, read_tensors, save_weights
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.jpegs import stored_jpegs
from tests.support.record_runs import CVIT, MEAN, PIXELS, STD, VIT, make_recipe, save_finetuning, save_pretraining
from tests.support.released import tiny_vit
from tests.support.sample_data import Photographs, photograph
from tests.support.sample_teachers import normalize, timm_attention

SIDE, GRID, COUNT = 16, 4, 16
ATTENDED = "last block's attention, received by each patch on average (there is no class token)"
GUIDE = "Teacher guide\nmae/pretrain"
FROM_CLASS = "last block's attention, class token to patches"


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of many sizes and shapes: 0 to 7 from the middle, 8 to 15 from the corner of a photograph."""
    path = tmp_path_factory.mktemp("show") / "val.beton"
    options = WriteOptions(quality=95, workers=1)
    write_beton(Photographs(), path, options, class_names=["wide", "tall"], name="photographs", source="a test")
    return path


class Runs:
    """A teacher (MAE, which is a run of its own), an MR-MAE that it guides, and that one's classifier."""

    def __init__(self, folder: Path, val: Path) -> None:
        self.mae, self.mrmae = folder / "mae" / "pretrain", folder / "mrmae" / "pretrain"
        self.finetuned = folder / "mrmae" / "finetune"
        self.teacher = save_pretraining(folder / "mae", make_recipe(val, "MAE", VIT, SIDE, None), seed=1)
        recipe = make_recipe(val, "MR-MAE", CVIT, SIDE, self.mae)
        self.student = save_pretraining(folder / "mrmae", recipe, seed=2)
        self.classifier = save_finetuning(folder / "mrmae", recipe, seed=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, val: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), val)


class Page:
    """Rows and texts that were drawn into one PNG."""

    def __init__(self, rows: list[GridRow], texts: dict) -> None:
        self.rows = {row.label: row for row in rows}
        self.labels = [row.label for row in rows]
        self.captions, self.title = list(texts["captions"]), texts["title"]
        self.legend = list(texts["legend"])


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Page]]:
    """The figures by file name, not drawn."""
    drawn: dict[str, Page] = {}
    monkeypatch.setattr(
        figures, "draw_grid", lambda rows, path, **texts: drawn.__setitem__(path.name, Page(rows, texts))
    )
    yield drawn


def evaluated(val: Path, row: int, side: int = SIDE) -> Tensor:
    """torchvision's evaluation of a stored image: [3, side, side] in 0 to 1."""
    with Image.open(io.BytesIO(stored_jpegs(val)[row][0])) as image:
        return evaluated_image(image, side)


def evaluated_image(image: Image.Image, side: int = SIDE) -> Tensor:
    steps = [v2.Resize(int(side / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(side), v2.PILToTensor()]
    return v2.Compose(steps)(image) / 255


def scaled_attention(model: nn.Module, images: Tensor) -> np.ndarray:
    """The last block's attention, from the class token or else the mean over patches, stretched to 0..1."""
    encoder = model.encoder if isinstance(model, PretrainModel) else model
    attention = timm_attention(encoder.transformer_blocks[-1], encoder.forward_features, images).mean(1)
    maps = attention[:, 0, 1:] if encoder.num_prefix_tokens else attention.mean(1)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return ((maps - low) / (high - low)).unflatten(1, encoder.grid).numpy()


def test_attention_of_another_projects_file(runs: Runs, pages: dict[str, Page], tmp_path: Path) -> None:
    source = tiny_vit()
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"x.pth: does not record its number of attention heads"):
        show_runs([tmp_path / "x.pth"], [str(tmp_path / "a.png")], out=tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    (tmp_path / "preprocessor_config.json").write_text(f'{{"image_mean": {list(MEAN)}, "image_std": {list(STD)}}}')
    with pytest.raises(UserError, match=r"--images: give image files or folders; weights of other projects name no"):
        show_runs([tmp_path / "x.pth"], out=tmp_path)
    written = show_runs([tmp_path / "x.pth"], [str(tmp_path / "a.png")], out=tmp_path)
    assert written == [tmp_path / "attention.png"]
    page = pages["attention.png"]
    row = page.rows["plain ViT classifier\nx.pth"]
    images = normalize(evaluated_image(image, 32)[None], MEAN, STD)
    maps = timm_attention(source.blocks[-1], source.forward_features, images).mean(1)[:, 0, 1:]
    expected = ((maps - maps.min()) / (maps.max() - maps.min())).unflatten(1, (4, 4)).numpy()
    np.testing.assert_allclose(row.heat, expected, atol=1e-4)


def test_rows_of_a_pretraining(runs: Runs, pages: dict[str, Page], val: Path, tmp_path: Path) -> None:
    written = show_runs([runs.mrmae], ["3", "12"], out=tmp_path)
    assert written == [tmp_path / "attention.png", tmp_path / "reconstructions.png"]
    page, student = pages["attention.png"], "MR-MAE\nmrmae\n4 epochs, photographs"
    assert page.labels == ["Image", GUIDE, student, "Kept (25 %)", "Removed (75 %)"]
    assert page.title == "Attention of mrmae (MR-MAE, cvit_tiny, 4 epochs, photographs)"
    assert page.captions == ["3: wide", "12: tall"]
    assert page.legend == [
        f"Teacher guide: {FROM_CLASS}.",
        f"MR-MAE mrmae: {ATTENDED}.",
        "Patches are kept as those to which teacher guide gives most importance.",
    ]
    sources = torch.stack([evaluated(val, 3), evaluated(val, 12)])
    np.testing.assert_array_equal(page.rows["Image"].images, sources.numpy())
    images = normalize(sources, MEAN, STD)
    for label, model in ((GUIDE, runs.teacher), (student, runs.student)):
        heat = page.rows[label].heat
        assert heat is not None
        np.testing.assert_allclose(heat, scaled_attention(model, images), atol=1e-4, err_msg=label)
    page = pages["reconstructions.png"]
    assert page.labels == ["Original", "Visible (25 %)", "Reconstructed", "Output alone"]
    assert page.title == "Reconstructions by mrmae (MR-MAE, cvit_tiny, 4 epochs, photographs)"
    np.testing.assert_array_equal(page.rows["Original"].images, sources.numpy())


def test_kept_and_removed_patches_make_up_the_image(runs: Runs, pages: dict[str, Page], tmp_path: Path) -> None:
    show_runs([runs.mrmae], ["0", "5", "9"], out=tmp_path)
    rows = pages["attention.png"].rows
    image = rows["Image"].images
    kept, removed = ((rows[label].images == image).all(1) for label in ("Kept (25 %)", "Removed (75 %)"))
    assert (kept ^ removed).all()
    cells = kept.reshape(3, GRID, 4, GRID, 4).transpose(0, 1, 3, 2, 4).reshape(3, GRID * GRID, 16)
    assert (cells.all(-1) == cells.any(-1)).all() and (cells.all(-1).sum(1) == 4).all()
    heat = rows[GUIDE].heat
    assert heat is not None
    most = np.sort(heat.reshape(3, -1), axis=1)[:, -4:]
    np.testing.assert_array_equal(np.sort(heat.reshape(3, -1)[cells.all(-1)].reshape(3, 4), axis=1), most)
    visible = pages["reconstructions.png"].rows["Visible (25 %)"].images
    np.testing.assert_allclose(visible, rows["Kept (25 %)"].images, atol=1e-7)


@pytest.mark.parametrize("how", ["standardize", "none"])
def test_reconstructions_are_denormalized(how: str, val: Path, pages: dict[str, Page], tmp_path: Path) -> None:
    """A head that says 0.5 everywhere: a known color, or half a deviation above each patch's own mean."""
    recipe = make_recipe(val, "MAE", VIT, SIDE, None)
    assert recipe.stages.pretrain is not None
    object.__setattr__(recipe.stages.pretrain.objectives["pixels"], "normalize", how)
    save_pretraining(tmp_path / "flat", recipe)
    path = tmp_path / "flat" / "pretrain" / MODEL_FILE
    tensors = read_tensors(path)
    tensors["heads.pixels.weight"].zero_()
    tensors["heads.pixels.bias"].fill_(0.5)
    save_weights(path, tensors, read_metadata(path))
    show_runs([tmp_path / "flat" / "pretrain"], ["6"], out=tmp_path)
    page = pages["reconstructions.png"]
    assert any("true patch's" in line for line in page.legend) == (how == "standardize")
    colors = evaluated(val, 6).double().numpy()
    hidden = (page.rows["Visible (25 %)"].images[0] != colors.astype(np.float32)).any(0)
    assert hidden.sum() == 12 * 16
    expected = np.empty_like(colors)
    mean, std = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    for top in range(0, SIDE, 4):
        for left in range(0, SIDE, 4):
            patch = (colors[:, top : top + 4, left : left + 4] - mean) / std
            value = patch.mean() + 0.5 * patch.std(ddof=1) if how == "standardize" else 0.5
            expected[:, top : top + 4, left : left + 4] = np.clip(value * std + mean, 0, 1)
    np.testing.assert_allclose(page.rows["Output alone"].images[0], expected, atol=1e-5)
    pasted = np.where(hidden, expected, colors)
    np.testing.assert_allclose(page.rows["Reconstructed"].images[0], pasted, atol=1e-5)


def test_draws_several_runs_on_the_same_images(runs: Runs, pages: dict[str, Page], val: Path, tmp_path: Path) -> None:
    larger = make_recipe(val, "MCMAE", CVIT, 2 * SIDE, None)
    model = save_pretraining(tmp_path / "larger", larger)
    # Of the three pre-trainings the last has a teacher, and so the mask.
    sources = [runs.mae, tmp_path / "larger" / "pretrain", runs.mrmae, runs.finetuned]
    show_runs(sources, ["2"], out=tmp_path / "out")
    page = pages["attention.png"]
    names = ["MAE\nmae\n4", "MCMAE\nlarger\n4", "MR-MAE\nmrmae\n4", "MR-MAE\nmrmae\nfine-tuned 2"]
    labels = [f"{name} epochs, photographs" for name in names]
    assert page.labels == ["Image", GUIDE, *labels, "Kept (25 %)\nMR-MAE\nmrmae", "Removed (75 %)\nMR-MAE\nmrmae"]
    assert page.title == "Attention of 4 runs on the same images"
    assert page.legend == [
        f"Teacher guide, MAE mae: {FROM_CLASS}.",
        f"MCMAE larger, MR-MAE mrmae: {ATTENDED}.",
        "The mask is that of MR-MAE mrmae alone. "
        "Patches are kept as those to which teacher guide gives most importance.",
    ]
    images = evaluated(val, 2)[None]
    np.testing.assert_array_equal(page.rows["Image"].images, images.numpy())
    for label, student in zip((labels[0], *labels[2:]), (runs.teacher, runs.student, runs.classifier), strict=True):
        heat = page.rows[label].heat
        assert heat is not None and heat.shape == (1, GRID, GRID)
        np.testing.assert_allclose(heat, scaled_attention(student, normalize(images, MEAN, STD)), atol=1e-4)
    with Image.open(io.BytesIO(stored_jpegs(val)[2][0])) as image:
        # 50 x 300, whose 16 pixels are of 18 x 108: from 1/18 to 17/18 of its width and 46/108 to 62/108 of its height.
        box = (50 / 18, 300 * 46 / 108, 50 * 17 / 18, 300 * 62 / 108)
        cut = image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC, box=box)
    own = normalize(torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None] / 255, MEAN, STD)
    heat = page.rows[labels[1]].heat
    assert heat is not None and heat.shape == (1, 2 * GRID, 2 * GRID)
    np.testing.assert_allclose(heat, scaled_attention(model, own), atol=1e-4)
    page = pages["reconstructions.png"]
    assert page.title == "Reconstructions by 2 runs on the same images"
    reconstructed = [f"Reconstructed\n{labels[0]}", f"Reconstructed\n{labels[2]}"]
    assert page.labels == ["Original", "Visible (25 %)\nMR-MAE\nmrmae", *reconstructed]
    assert page.legend[-1] == "The visible patches are those that MR-MAE mrmae keeps."


def test_warns_of_a_run_with_another_grid(
    runs: Runs, pages: dict[str, Page], val: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pretraining(tmp_path / "larger", make_recipe(val, "MCMAE", CVIT, 2 * SIDE, None))
    show_runs([runs.mrmae, tmp_path / "larger" / "pretrain"], ["0"], out=tmp_path)
    assert pages["reconstructions.png"].labels[2:] == ["Reconstructed", "Output alone"]
    assert pages["reconstructions.png"].title == "Reconstructions by mrmae (MR-MAE, cvit_tiny, 4 epochs, photographs)"
    (message,) = caplog.messages
    assert str(tmp_path / "larger") in message and "no reconstructions" in message


WHOLE = {"encoder_input": "full", "masking": None}
SQUARES = {"encoder_input": "mask_tokens", "masking": {"mode": "random", "unit": 8}}


def at_the_encoder(folder: Path, val: Path, stage: dict[str, Any]) -> Path:
    """Save a pre-training that predicts the pixels of all tokens at the encoder."""
    pixels = PIXELS | {"tap": "encoder", "tokens": "all", "normalize": "none"}
    recipe = make_recipe(val, "pixels", VIT, SIDE, None).model_dump(mode="json")
    recipe["stages"]["pretrain"] |= stage | {"objectives": {"pixels": pixels}}
    save_pretraining(folder, Recipe.model_validate(recipe))
    return folder / "pretrain"


def test_reconstructions_by_encoders_of_all_tokens(
    runs: Runs, pages: dict[str, Page], val: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each takes the masks of its training, and of no other: a whole image, mask tokens, or visible tokens alone."""
    whole, squares = at_the_encoder(tmp_path / "w", val, WHOLE), at_the_encoder(tmp_path / "s", val, SQUARES)
    show_runs([whole], ["6"], out=tmp_path)
    page, image = pages["reconstructions.png"], normalize(evaluated(val, 6)[None], MEAN, STD)
    assert page.labels == ["Original", "Visible (100 %)", "Output"] and not caplog.messages
    model = load_model(whole / MODEL_FILE)
    with torch.no_grad():
        predicted = model.predict(image, TokenMask.whole(1, (GRID, GRID), image.device))["pixels"]
    expected = figures.denormalize(unpatchify(predicted, (GRID, GRID), 4), MEAN, STD)
    np.testing.assert_allclose(page.rows["Output"].images, expected, atol=1e-5)
    show_runs([squares], ["6"], out=tmp_path)
    assert pages["reconstructions.png"].labels == ["Original", "Visible (25 %)", "Reconstructed", "Output alone"]
    for lead, others in ((whole, [runs.mae]), (squares, [whole, runs.mae]), (runs.mae, [whole, squares])):
        caplog.clear()
        show_runs([lead, *others], ["6"], out=tmp_path)
        assert len(pages["reconstructions.png"].labels) == (3 if lead == whole else 4), "of the first alone"
        refused = [message for message in caplog.messages if "does not take the first pre-training's mask" in message]
        assert [str(other) in text for other, text in zip(others, refused, strict=True)] == [True] * len(others)


def test_crops_the_same_part_above_224_pixels(val: Path) -> None:
    """Evaluation at 256 sees the whole short side, at 224 seven eighths of it: a run at 256 is given these too."""
    across, down = np.meshgrid(np.arange(400), np.arange(320))
    ramp = np.stack([across * 255 / 399, down * 255 / 319, 0 * across], axis=-1)
    selection = SelectedImages((Image.fromarray(np.rint(ramp).astype(np.uint8)),), ("ramp",))
    small, large = (selection.crop(224, size)[0, :2] for size in (224, 256))
    for pixels in (small, large):
        left, right = pixels[0, 100, 0] * 400, pixels[0, 100, -1] * 400
        top, bottom = pixels[1, 0, 100] * 320, pixels[1, -1, 100] * 320
        # 280 of the 320 pixels of the short side are seen.
        assert [left, right, top, bottom] == pytest.approx([60, 340, 20, 300], abs=2)
    assert selection.crop(256, 256)[0, 1, 0, 100] * 320 == pytest.approx(0, abs=2)


def test_classifiers_have_neither_teacher_nor_mask(runs: Runs, pages: dict[str, Page], tmp_path: Path) -> None:
    assert show_runs([runs.finetuned], ["1"], out=tmp_path) == [tmp_path / "attention.png"]
    assert pages["attention.png"].labels == ["Image", "MR-MAE\nmrmae\nfine-tuned 2 epochs, photographs"]
    assert pages["attention.png"].legend == [f"MR-MAE mrmae: {ATTENDED}."]


def test_numbers_runs_with_equal_labels(runs: Runs, pages: dict[str, Page], tmp_path: Path) -> None:
    show_runs([runs.mae, runs.mae], ["1"], out=tmp_path)
    label = "MAE\nmae\n4 epochs, photographs"
    assert pages["attention.png"].labels[1:] == [
        label,
        f"{label} (2)",
        f"Kept (25 %)\n{label}",
        f"Removed (75 %)\n{label}",
    ]
    alone = "The mask is that of MAE mae 4 epochs, photographs alone."
    assert pages["attention.png"].legend[-1] == f"{alone} Patches are kept at random."


def test_the_seed_determines_the_mask(runs: Runs, pages: dict[str, Page], tmp_path: Path) -> None:
    kept = []
    for seed in (0, 0, 1):
        show_runs([runs.mae], ["3"], seed=seed, out=tmp_path)
        kept.append(pages["attention.png"].rows["Kept (25 %)"].images)
    assert (kept[0] == kept[1]).all() and (kept[0] != kept[2]).any()


def test_selects_evenly_spaced_images_by_default(runs: Runs, pages: dict[str, Page], val: Path, tmp_path: Path) -> None:
    show_runs([runs.mae], out=tmp_path)
    assert [caption.split(":")[0] for caption in pages["attention.png"].captions] == ["2", "8", "13"]
    show_runs([runs.mae], count=COUNT, out=tmp_path)
    assert [caption.split(":")[0] for caption in pages["attention.png"].captions] == [str(i) for i in range(COUNT)]
    heat = pages["attention.png"].rows["MAE\nmae\n4 epochs, photographs"].heat
    assert heat is not None
    images = torch.stack([evaluated(val, row) for row in range(COUNT)])
    np.testing.assert_allclose(heat, scaled_attention(runs.teacher, normalize(images, MEAN, STD)), atol=1e-4)


def test_image_files_and_samples_of_folders_are_drawn_upright(
    runs: Runs, pages: dict[str, Page], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    upright = photograph().crop((100, 100, 190, 160))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    folder = tmp_path / "some"
    for path in (*(folder / "class" / f"{letter}.png" for letter in "bcd"), folder / ".hidden.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        upright.save(path)
    turned.save(folder / "a.png", exif=exif)
    (folder / "notes.txt").write_text("no image")
    expected = evaluated_image(upright)
    show_runs([runs.mae], [str(folder), str(folder / "a.png")], out=tmp_path)
    page = pages["attention.png"]
    assert page.captions == ["a.png", "a.png", "c.png", "d.png"]  # the named one, and the default number
    assert f"3 of the 4 images of {folder}" in caplog.messages[-1]
    caplog.clear()
    for image in page.rows["Image"].images:
        np.testing.assert_array_equal(image, expected.numpy())
    show_runs([runs.mae], [str(folder)], count=1, out=tmp_path)
    assert pages["attention.png"].captions == ["c.png"]
    show_runs([runs.mae], [str(folder / "a.png")] * 4, out=tmp_path)
    assert pages["attention.png"].captions == ["a.png"] * 4
    assert caplog.messages == []


def test_unreadable_images_are_left_out_and_reported_at_the_end(
    runs: Runs, pages: dict[str, Page], tmp_path: Path
) -> None:
    photograph().save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"1 of 2 images left out, the others are in .*attention.png.*torn.png: cannot"):
        show_runs([runs.mae], [str(tmp_path)], out=tmp_path / "out")
    assert pages["attention.png"].captions == ["good.png"]


def test_no_validation_set_is_needed_for_files(pages: dict[str, Page], tmp_path: Path) -> None:
    save_pretraining(tmp_path / "moved", make_recipe(tmp_path / "gone.beton", "MAE", VIT, SIDE, None))
    photograph().save(tmp_path / "x.jpg")
    show_runs([tmp_path / "moved" / "pretrain"], [str(tmp_path / "x.jpg")])
    assert pages["attention.png"].captions == ["x.jpg"]
    with pytest.raises(UserError, match=r"gone.beton: no such file.*--images FILE_OR_FOLDER"):
        show_runs([tmp_path / "moved" / "pretrain"])


def test_omits_a_missing_teacher_with_a_warning(
    runs: Runs, pages: dict[str, Page], val: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(val, "MR-MAE", CVIT, SIDE, tmp_path / "gone")
    model = save_pretraining(tmp_path / "orphan", recipe)
    written = show_runs([tmp_path / "orphan" / "pretrain"], ["4"])
    assert [path.name for path in written] == ["attention.png", "reconstructions.png"]
    label = "MR-MAE\norphan\n4 epochs, photographs"
    assert pages["attention.png"].labels == ["Image", label, "Kept (25 %)", "Removed (75 %)"]
    heat = pages["attention.png"].rows[label].heat
    assert heat is not None
    np.testing.assert_allclose(heat, scaled_attention(model, normalize(evaluated_page(val), MEAN, STD)), atol=1e-4)
    lines = caplog.messages
    assert "drawn without teacher guide" in lines[0] and "gone" in lines[0]
    assert "at random, not by teacher guide" in lines[1] and len(lines) == 2
    assert pages["attention.png"].legend[-1] == "Patches are kept at random."


def evaluated_page(val: Path) -> Tensor:
    return evaluated(val, 4)[None]


def test_command_draws_the_selected_images(
    runs: Runs, val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(runs.mrmae), str(runs.mae), "--images", "10", "7", "--out", str(tmp_path)]) == 0
    names = ["attention.png", "reconstructions.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    for name in names:
        with Image.open(tmp_path / name) as image:
            page = np.asarray(image.convert("RGB"))
        corners = []
        for row in (10, 7):
            pixels = (evaluated(val, row) * 255).round().byte().permute(1, 2, 0).numpy()
            corners.append(_find(page, pixels.repeat(12, axis=0).repeat(12, axis=1)))
        assert corners[0][0] == corners[1][0] and corners[1][1] - corners[0][1] == 200


def _find(page: np.ndarray, block: np.ndarray) -> tuple[int, int]:
    """Top and left of the first place where a block of pixels stands."""
    height, width, _ = block.shape
    for top, left in np.argwhere((page[:-height, :-width] == block[0, 0]).all(-1)).tolist():
        if (page[top : top + height, left : left + width] == block).all():
            return top, left
    raise AssertionError("the image is not on the page")


def test_writes_beside_the_first_run(runs: Runs, pages: dict[str, Page]) -> None:
    assert show_run(runs.mrmae)[0] == runs.mrmae / "images" / "attention.png"
    assert len(pages["attention.png"].captions) == 3
    # A comparison must not overwrite the run's own images.
    assert show_runs([runs.mrmae, runs.mae])[0] == runs.mrmae / "images" / "compared" / "attention.png"


def test_draws_nothing_for_classifiers_and_without_images(runs: Runs, val: Path, tmp_path: Path) -> None:
    assert show_run(runs.finetuned) == []
    recipe = make_recipe(val, "MAE", VIT, SIDE, None)
    save_pretraining(
        tmp_path, recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"num_images": 0})})
    )
    assert show_run(tmp_path / "pretrain") == []
    assert not (tmp_path / "pretrain" / "images").exists()


MISTAKES = {
    "number beyond the end": (["--images", "3", "16"], "has no image 16; its 16 images are numbered 0 to 15"),
    "negative number": (["--images", "-1"], "has no image -1"),
    "number and file": (["--images", "3", "{0}/x.jpg"], "x.jpg is not a number"),
    "no such file": (["--images", "{0}/none.jpg"], "none.jpg: no such file or folder"),
    "not an image": (["--images", "{0}/notes.txt"], "notes.txt: cannot be read (no image"),
    "torn image": (["--images", "{0}/torn.jpg"], "torn.jpg: cannot be read"),
    "empty folder": (["--images", "{0}/empty"], "empty holds no images"),
    "no images": (["--num-images", "0"], "--num-images: at least 1"),
    "more than there are": (["--num-images", "17"], "17 is more than the 16 images of"),
    "count of numbers": (
        ["--images", "1", "--num-images", "1"],
        "--num-images: not allowed with numbers after --images",
    ),
    "count of files": (
        ["--images", "{0}/x.jpg", "--num-images", "1"],
        "--num-images: not allowed with files after --images",
    ),
    "too many": (["--images", *["0"] * 65], "65 images are too many for one figure; select 64 or fewer"),
    "no folder": (["--out", "{0}/notes.txt"], "{0}/notes.txt: cannot be made (File exists)"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_reports_one_clear_error(case: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph().save(tmp_path / "x.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:20_000])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    arguments, expected = MISTAKES[case]
    assert main(["show", str(runs.mae), *(argument.format(tmp_path) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and expected.format(tmp_path) in err


def test_rejects_files_that_are_not_runs(runs: Runs, val: Path, tmp_path: Path) -> None:
    path = runs.mae / MODEL_FILE
    tensors, metadata = read_tensors(path), read_metadata(path)
    save_weights(tmp_path / "bare", tensors, {name: metadata[name] for name in metadata if name != "recipe"})
    with pytest.raises(UserError, match=r"bare: its metadata lacks 'recipe'"):
        show_runs([tmp_path / "bare"])
    save_weights(tmp_path / "newer", tensors, {**metadata, "recipe": {**metadata["recipe"], "novelty": 1}})
    with pytest.raises(UserError, match=r"newer: novelty: unknown key"):
        show_runs([tmp_path / "newer"])
    save_weights(tmp_path / "encoder", tensors, {**metadata, "kind": "encoder"})
    with pytest.raises(UserError, match=r"--images: give image files or folders; weights of other projects name no"):
        show_runs([tmp_path / "encoder"], ["0"], out=tmp_path)
    assert show_run(tmp_path / "encoder") == []
    less = {name: tensor for name, tensor in tensors.items() if name != "decoder.mask_token"}
    save_weights(tmp_path / "less", less, metadata)
    with pytest.raises(UserError, match=r"less: its tensors do not match its recipe"):
        show_runs([tmp_path / "less"], ["0"], out=tmp_path)
    tensors["encoder.pos_embed"][0, 0, 0] = torch.nan
    save_weights(tmp_path / "nan", tensors, metadata)
    with pytest.raises(UserError, match=r"nan: 1 tensor with NaN or infinity: encoder.pos_embed"):
        show_runs([tmp_path / "nan"], ["0"], out=tmp_path)
