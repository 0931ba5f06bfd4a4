"""Windowed encoders and the feature pyramid against the authors' and Detectron2's classes, and against CViT and ViT."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pyramid import LayerNorm2d, SimplePyramid
from mrmae_ds.models.sizes import ARCHITECTURES, CViTSpec, EncoderSpec, ViTSpec, encoder_spec
from mrmae_ds.models.window_attention import (
    WindowAttention,
    attend_folded,
    attend_masked,
    join_windows,
    relative_table,
    split_windows,
)
from mrmae_ds.models.windowed import WindowedCViT, build_windowed
from mrmae_ds.profiling.flops import flop_counter
from tests.fixtures import load_reference, part
from tests.support.reference import perturb, random_images

CVIT = CViTSpec((16, 24, 32), (1, 1, 4), 4)
VIT = ViTSpec(32, 4, 4)
BASE = {"cvit_base": (1, 4, 7, 10), "vit_base": (2, 5, 8, 11)}


@pytest.fixture(scope="module")
def vitdet() -> dict[str, Tensor]:
    return load_reference("vitdet")


def reference_pyramid(spec: EncoderSpec, state: dict[str, Tensor]) -> SimplePyramid:
    """The pyramid with Detectron2's weights, by its names: windows of 5, global blocks 1 and 3, positions of 64."""
    model = SimplePyramid(build_windowed(spec, 192, 5, (1, 3), 64), 16)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("spec", "weights", "image", "case"),
    [
        (CVIT, "convmae", "convmae", "convmae"),
        (CVIT, "convmae", "oblong", "oblong"),
        (VIT, "vit", "convmae", "vit"),
    ],
)
def test_maps_equal_detectron2s(
    vitdet: dict[str, Tensor], spec: EncoderSpec, weights: str, image: str, case: str
) -> None:
    model = reference_pyramid(spec, part(vitdet, f"{weights}/state/"))
    expected, images = part(vitdet, f"{case}/output/"), vitdet[f"{image}/input"]
    with torch.no_grad():
        found = dict(zip(("p2", "p3", "p4", "p5", "p6"), model(images), strict=True))
        found["last_feat"] = model.net(images)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name].flatten()[::11], values, atol=1e-4, rtol=0, msg=lambda m, n=name: n + m)


def test_gradients_equal_detectron2s(vitdet: dict[str, Tensor]) -> None:
    model = reference_pyramid(CVIT, part(vitdet, "convmae/state/"))
    loss = torch.stack([level.square().mean() for level in model(vitdet["convmae/input"])]).sum()
    loss.backward()
    torch.testing.assert_close(loss, vitdet["convmae/loss"], atol=0, rtol=1e-5)
    norms = part(vitdet, "convmae/grad_norm/")
    assert norms.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.norm(), norms[name], atol=0, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("arch", BASE)
def test_base_at_1024(arch: str) -> None:
    with torch.device("meta"):
        model = SimplePyramid(build_windowed(ARCHITECTURES[arch], 1024, 14, BASE[arch]))
        images = torch.empty(2, 3, 1024, 1024)
    assert [tuple(x.shape) for x in model(images)] == [(2, 256, s, s) for s in (256, 128, 64, 32, 16)]
    assert model.net(images).shape == (2, 768, 64, 64)
    sizes = {"net": 0, "simfp": 0}
    for name, parameter in model.named_parameters():
        sizes["net" if name.startswith("net.") else "simfp"] += parameter.numel()
    assert sizes == {"net": {"cvit_base": 84_693_504, "vit_base": 85_889_024}[arch], "simfp": 5_560_000}
    blocks = model.net.transformer_blocks
    tables = [tuple(block.attn.rel_pos_h.shape) for block in blocks]
    assert tables == [((127 if i in BASE[arch] else 27), 64) for i in range(len(blocks))]
    normalized = 0

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal normalized
        normalized += output.numel()

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(add)
    with flop_counter() as count, torch.no_grad():
        model(images[:1])
    # The expected numbers are fvcore's, which counts five operations per normalized value.
    found = (count.get_total_flops() / 2 + 5 * normalized) / 1e9
    assert found == pytest.approx({"cvit_base": 670.4, "vit_base": 554.9}[arch], abs=0.05)


@pytest.mark.parametrize("spec", [CVIT, VIT])
def test_without_windows_and_relative_positions_it_is_the_encoder(spec: EncoderSpec) -> None:
    plain, model = build_encoder(spec, 96), build_windowed(spec, 96, 0, range(4), 96)
    if isinstance(spec, CViTSpec):
        assert isinstance(model, WindowedCViT) and model.blocks1[0].norm1.eps == model.blocks2[0].norm2.eps == 1e-6
        model = WindowedCViT(spec, 96, 0, range(4), 96, conv_eps=1e-5)  # pre-training's
    perturb(plain, 0)
    state = {name: value for name, value in plain.state_dict().items() if name != "cls_token"}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert len(missing) == 8 and all("rel_pos" in name for name in missing)
    images = random_images(2, 96, 1)
    if isinstance(spec, CViTSpec):
        expected = plain(images)
    else:
        tokens = plain.patch_embed(images) + plain.pos_embed[:, 1:]
        expected = plain.blocks(tokens)  # without the class token
    torch.testing.assert_close(model(images).flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def plain_attention(attention: WindowAttention, x: Tensor) -> Tensor:
    """Attention over a map by loops over pairs of cells, float64."""
    batch, height, width, dim = x.shape
    heads, d = attention.num_heads, attention.head_dim
    qkv = attention.qkv(x).reshape(batch, height, width, 3, heads, d)
    out = torch.zeros(batch, height, width, heads, d, dtype=x.dtype)
    for y in range(height):
        for column in range(width):
            q = qkv[:, y, column, 0]
            logits = torch.einsum("bmd,bijmd->bijm", q, qkv[:, :, :, 1]) * d**-0.5
            for i in range(height):
                for j in range(width):
                    rows = attention.rel_pos_h[y - i + height - 1] + attention.rel_pos_w[column - j + width - 1]
                    logits[:, i, j] += q @ rows
            weights = logits.flatten(1, 2).softmax(dim=1).unflatten(1, (height, width))
            out[:, y, column] = torch.einsum("bijm,bijmd->bmd", weights, qkv[:, :, :, 2])
    return attention.proj(out.reshape(batch, height, width, dim))


@pytest.mark.parametrize("attend", [attend_masked, attend_folded])
def test_attention_equals_the_formula(attend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrmae_ds.models.window_attention.attend_masked", attend)
    attention = WindowAttention(12, 2, 0, (3, 5)).double()
    perturb(attention, 0, 0.5)
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention(x), plain_attention(attention, x), atol=1e-12, rtol=0)


def test_windows_are_padded_with_zeros_and_joined_again() -> None:
    x = torch.randn(2, 7, 4, 3)
    windows, count = split_windows(x, 5)
    assert (windows.shape, count) == ((4, 5, 5, 3), (2, 1))
    assert torch.equal(windows[1, :2, :4], x[0, 5:]) and not windows[1, 2:].any() and not windows[:, :, 4:].any()
    assert torch.equal(join_windows(windows, 5, count, (7, 4)), x)


def test_tables_are_resized_linearly() -> None:
    table = torch.arange(7.0)[:, None].repeat(1, 2)
    assert torch.equal(relative_table(table, 4)[1, 3], torch.tensor([1.0, 1.0]))  # distance -2
    # Five rows of seven, align_corners False: row i is at (i + 0.5) * 7 / 5 - 0.5.
    torch.testing.assert_close(relative_table(table, 3)[0, 2], torch.tensor([0.2, 0.2]))


def test_gradients_reach_the_stored_positions() -> None:
    model = build_windowed(CVIT, 96, 5, (3,), 224)
    model(random_images(1, 96, 0)).square().sum().backward()
    assert model.pos_embed.shape == (1, 196, 32)
    assert (model.pos_embed.grad.norm(dim=2) > 0).all()


def test_norm_over_channels_computes_in_float32_and_keeps_the_type() -> None:
    norm, exact = LayerNorm2d(8), nn.LayerNorm(8, eps=1e-6)
    x = 100 + torch.randn(1, 8, 2, 2)  # in bfloat16 the variance would be off by 2e-2
    found = norm.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    expected = exact(x.bfloat16().float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.float(), expected, atol=0, rtol=2**-8)


@pytest.mark.parametrize("arch", ["cvit_huge", "cvit_tiny", "vit_huge"])
def test_another_stride_is_refused(arch: str) -> None:
    message = r"model.overrides: the encoder's stride is \d+ pixels, but detection needs 16"
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_windowed(ARCHITECTURES[arch], 224, 14, ())
    assert build_windowed(encoder_spec("cvit_tiny", {"patches": [4, 2, 2]}), 64, 2, ()).stride == 16


def test_a_beit_is_refused() -> None:
    with pytest.raises(UserError, match="relative positions of one size and no windows; use a CViT or a plain ViT"):
        build_windowed(ARCHITECTURES["beit_base"], 224, 14, ())


def test_blocks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"detector.global_blocks: there is no block 4; .* numbered 0 to 3"):
        build_windowed(CVIT, 96, 5, (1, 4, 7))


def test_a_window_above_the_grid_makes_all_blocks_global() -> None:
    with pytest.warns(UserWarning, match=r"detector.window: 14 covers the grid \(6, 6\): all blocks are global"):
        model = build_windowed(CVIT, 96, 14, ())
    assert [block.attn.window for block in model.blocks3] == [0] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_windowed(CVIT, 96, 5, ())


@pytest.mark.parametrize("spec", [CVIT, VIT])
def test_sizes_that_are_no_multiple_of_32_are_refused(spec: EncoderSpec) -> None:
    with pytest.raises(UserError, match=r"\(96, 80\) pixels, .* multiples of 32; the nearest is \(96, 64\)"):
        build_windowed(spec, 96, 5, ())(torch.zeros(1, 3, 96, 80))
