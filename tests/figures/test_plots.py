from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mrmae_ds.errors import UserError
from mrmae_ds.figures import plots, style
from mrmae_ds.records.metrics import MetricsWriter

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def _box(pixels: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return top, left, bottom, right (exclusive) of the box that the pixels of this color fill."""
    rows, columns = np.nonzero((pixels == color).all(axis=-1))
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    assert len(rows) == (bottom - top) * (right - left)
    return int(top), int(left), int(bottom), int(right)


def _plain(color: tuple[int, int, int], count: int = 1, side: int = 32) -> np.ndarray:
    image = np.asarray(color, np.float32).reshape(1, 3, 1, 1) / 255
    return np.broadcast_to(image, (count, 3, side, side)).copy()


@pytest.mark.parametrize("side", [32, 224, 448])
def test_reconstruction_rows_are_in_order(tmp_path: Path, side: int) -> None:
    path = tmp_path / "images" / "r.png"
    masked = torch.from_numpy(_plain(GREEN, side=side))
    plots.reconstruction_grid(_plain(RED, side=side), masked, _plain(BLUE, side=side), path, title="T", captions=["c"])
    boxes = [_box(_pixels(path), color) for color in (RED, GREEN, BLUE)]
    assert boxes[0][2] < boxes[1][0] and boxes[1][2] < boxes[2][0]
    assert len({(left, right) for _, left, _, right in boxes}) == 1
    top, left, bottom, right = boxes[0]
    # Small images are enlarged by a whole factor, those of about 200 pixels stay, large ones are reduced.
    assert (bottom - top, right - left) == {32: (192, 192), 224: (224, 224), 448: (256, 256)}[side]


def test_small_pixels_are_square_and_in_place(tmp_path: Path) -> None:
    originals = _plain((0, 0, 0), count=2)
    originals[1, :, 3, 30] = (0, 1, 0)  # second image, row 3, column 30
    plots.reconstruction_grid(originals, _plain(BLUE, 2), _plain(RED, 2), tmp_path / "r.png")
    pixels = _pixels(tmp_path / "r.png")
    top, left, bottom, right = _box(pixels, GREEN)
    assert (bottom - top, right - left) == (6, 6)
    black = (pixels == 0).all(axis=-1)
    cell_top = np.nonzero(black.sum(axis=1) > 200)[0].min()
    assert top - cell_top == 3 * 6
    # The second image's right edge is where the masked row's blue ends.
    assert np.nonzero((pixels == BLUE).all(axis=-1))[1].max() + 1 - right == (32 - 31) * 6


def test_clips_reconstructions_outside_the_range(tmp_path: Path) -> None:
    far = np.stack([np.full((32, 32), value, np.float32) for value in (1.7, -0.4, math.nan)])[None]
    plots.reconstruction_grid(_plain(GREEN), _plain(BLUE), far, tmp_path / "r.png")
    _box(_pixels(tmp_path / "r.png"), RED)


def test_attention_shows_hot_patches_and_kept_patches(tmp_path: Path) -> None:
    heat = np.zeros((1, 4, 4), np.float32)
    heat[0, 1, 2] = 0.2  # the hottest there is, whatever its value
    visible = np.zeros((1, 4, 4), bool)
    visible[0, 3, 0] = True
    path = tmp_path / "a.png"
    plots.attention_grid(_plain(RED), {"Model": torch.from_numpy(heat)}, visible, path)
    pixels = _pixels(path)
    red = (pixels == RED).all(axis=-1)
    rows, columns = np.nonzero(red)
    top, left = int(rows.min()), int(columns.min())
    assert red[top : top + 192, left : left + 192].all()
    kept = _box(pixels[top + 210 : top + 595], RED)
    assert (kept[2] - kept[0], kept[3] - kept[1]) == (48, 48)
    assert kept[1] == left  # column 0 of the grid, in the third row of images, its row 3
    assert kept[0] + top + 210 == top + 2 * 200 + 3 * 48
    # inferno's last color (252, 255, 164) at 65 % over the gray of pure red, 85.
    expected = 0.65 * np.array([252, 255, 164]) + 0.35 * 85
    np.testing.assert_allclose(pixels[top + 200 + 72, left + 120], expected, atol=2)
    cell = pixels[top + 200 : top + 200 + 192, left : left + 192].sum(axis=-1)
    hot = np.nonzero(cell > cell.max() - 30)
    assert (hot[0].min(), hot[0].max() + 1, hot[1].min(), hot[1].max() + 1) == (48, 96, 96, 144)


def test_a_constant_map_is_uniform_and_kept_patches_are_optional(tmp_path: Path) -> None:
    flat = np.full((1, 2, 2), 0.5, np.float32)
    plots.attention_grid(_plain(RED), {"Flat": flat}, None, tmp_path / "a.png")
    pixels = _pixels(tmp_path / "a.png")
    _, left, bottom, right = _box(pixels, RED)
    assert len(np.unique(pixels[bottom + 20 : bottom + 150, left:right].reshape(-1, 3), axis=0)) == 1


def test_fine_grids_are_interpolated(tmp_path: Path) -> None:
    """Compare with torch's bicubic interpolation, which shares no code with matplotlib's."""
    heat = np.random.default_rng(0).random((1, 14, 14), np.float32)
    plots.attention_grid(_plain(RED, side=224), {"Model": heat}, None, tmp_path / "a.png")
    pixels = _pixels(tmp_path / "a.png")
    _, left, bottom, right = _box(pixels, RED)
    cell = pixels[bottom + 8 : bottom + 8 + 224, left:right]
    scaled = torch.from_numpy((heat - heat.min()) / (heat.max() - heat.min()))[:, None]
    smooth = torch.nn.functional.interpolate(scaled, size=(224, 224), mode="bicubic", antialias=True)
    colors = matplotlib.colormaps["inferno"](smooth[0, 0].clamp(0, 1).numpy())[..., :3]
    # Matplotlib works in 8 bits, which a steep color map enlarges.
    np.testing.assert_allclose(cell, 255 * 0.65 * colors + 0.35 * 85, atol=10)
    assert np.abs(cell - (255 * 0.65 * colors + 0.35 * 85)).mean() < 1.5


def test_kept_and_removed_patches_make_up_the_image_on_grids_that_do_not_divide() -> None:
    visible = np.array([[[1, 0, 0], [0, 0, 0], [0, 0, 1]]])
    _, kept, removed = plots.attention_rows(_plain(RED, side=8), {}, visible)
    assert (kept.label, removed.label) == ("Kept (22 %)", "Removed (78 %)")
    is_red = [(row.images[0, 0] == 1) & (row.images[0, 1] == 0) for row in (kept, removed)]
    expected = np.zeros((8, 8), bool)
    for row in range(8):
        for column in range(8):
            expected[row, column] = bool(visible[0, row * 3 // 8, column * 3 // 8])
    assert (is_red[0] == expected).all() and (is_red[1] == ~expected).all()


def test_several_reconstructions_are_stacked(tmp_path: Path) -> None:
    several = {"MAE": _plain(BLUE), "MR-MAE\ntiny": _plain((255, 0, 255))}
    rows = plots.reconstruction_rows(_plain(RED), _plain(GREEN), several, keep_ratio=0.5)
    assert [row.label for row in rows] == ["Original", "Visible (50 %)", "MAE", "MR-MAE\ntiny"]
    assert [tuple(row.images[0, :, 0, 0]) for row in rows] == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]


def test_text_stays_on_the_page_and_is_not_math(tmp_path: Path) -> None:
    """A mistake in TeX between dollar signs would raise; a margin that text ran into would not be white."""
    words = "a long sentence about $\\frac{ of " * 12
    path = tmp_path / "r.png"
    texts = {"title": words, "captions": ["a caption far wider than its image"], "legend": [words, words]}
    label = "Model\nwith a second line that is longer than the first"
    plots.attention_grid(_plain(RED), {label: np.eye(4)[None]}, None, path, **texts)
    pixels = _pixels(path)
    assert pixels.shape[1] == 900
    for margin in (pixels[:, :8], pixels[:, -8:], pixels[:8], pixels[-8:]):
        assert (margin == 255).all()


def test_denormalize_inverts_normalization() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    colors = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    normalized = (colors - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    np.testing.assert_allclose(plots.denormalize(normalized, mean, std), colors.numpy(), atol=1e-6)
    assert plots.denormalize(torch.full((1, 3, 1, 1), 99.0, dtype=torch.bfloat16), mean, std).max() == 1


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (0, 3, 32, 32)])
def test_error_names_the_row_with_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        plots.reconstruction_grid(np.zeros(shape), np.zeros(shape), np.zeros(shape), tmp_path / "r.png")
    with pytest.raises(ValueError, match=r"Model: expected \[1, h, w\]"):
        plots.attention_grid(_plain(RED), {"Model": np.zeros((2, 4, 4))}, None, tmp_path / "a.png")
    with pytest.raises(ValueError, match="Reconstructed: shape"):
        plots.reconstruction_grid(_plain(RED), _plain(RED), _plain(RED, side=16), tmp_path / "r.png")


def _colors(path: Path) -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in color) for color in np.unique(_pixels(path).reshape(-1, 3), axis=0)}


def _rgb(name: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(name[1:]))


@pytest.mark.parametrize("steps", [3, 300])
def test_loss_curves_plot_every_series(tmp_path: Path, steps: int) -> None:
    run = tmp_path / "tiny" / "pretrain"
    with MetricsWriter(run) as writer:
        for step in range(1, steps + 1):
            numbers = {"loss": 1 / step, "loss/mimic": 2 / step, "loss/pixels": 0.5 / step, "lr": 1e-3}
            writer.write(step, numbers | ({"val/top1": 50.0} if step == 2 else {}))
    path = run / "images" / "loss.png"
    plots.loss_curves(run, path)
    assert {_rgb(style.INK), _rgb(style.PALETTE[1]), _rgb(style.PALETTE[2])} <= _colors(path)
    with Image.open(path) as image:
        assert image.size[0] == 8 * style.DPI


def test_names_of_runs_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    names = ["_old/pretrain", "$a_{x$/pretrain", "a/pretrain"]
    lines = [{"step": step, "loss": 1.0} for step in range(3)]
    plots.compare_curves(dict.fromkeys(names, lines), "loss", tmp_path / "x.png")
    assert [text.get_text().strip() for text in drawn[0].legends[0].get_texts()] == names


def test_loss_curves_of_a_run_that_ends_in_nan(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan})
    plots.loss_curves(tmp_path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_loss_curves_need_a_loss(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"lr": 0.1})
    with pytest.raises(UserError, match="no loss was logged"):
        plots.loss_curves(tmp_path, tmp_path / "loss.png")
