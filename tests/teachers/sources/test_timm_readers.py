"""Readers of timm networks against the networks' own attention and feature maps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.sources.timm_readers import BlockReader, MapReader, timm_reader
from tests.support.reference import perturb
from tests.support.sample_teachers import options, timm_attention

# Families, each at a size that a test can bear: the name, what is made smaller, prefix tokens, whether one is a class.
SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4}
NO_CLASS = {"class_token": False, "global_pool": "avg"}
TRANSFORMERS = {
    "class token": ("vit_tiny_patch16_224", {}, 1, True),
    "class and distillation token": ("deit_tiny_distilled_patch16_224", {}, 2, True),
    "class and registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, 5, True),
    "registers alone": ("vit_tiny_patch16_224", NO_CLASS | {"reg_tokens": 3}, 3, False),
    "neither, pooled by attention": ("vit_base_patch16_siglip_224", {}, 0, False),
    "normed queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}, 1, True),
    "DINOv3: rotary positions": ("vit_small_patch16_dinov3", {}, 5, True),
    "EVA-02": ("eva02_tiny_patch14_224", {"patch_size": 16}, 1, True),
    "rotary positions, a register alone": ("vit_base_patch16_rope_reg1_gap_256", {}, 1, False),
    "relative positions": ("beit_base_patch16_224", {}, 1, True),
    "mixed rotary positions": ("vit_small_patch16_rope_mixed_224", {}, 1, True),
}


def network_of(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **changes).eval()
    perturb(network, seed=7, scale=0.1)
    return network


def images_of(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("features", ["raw", "ln_post"])
@pytest.mark.parametrize("family", list(TRANSFORMERS))
def test_tokens_and_attention_of_transformers(family: str, features: str) -> None:
    name, changes, prefix, has_class = TRANSFORMERS[family]
    network, images = network_of(name, **SMALL | changes), images_of(64)
    attention = timm_attention(network.blocks[-1], network.forward_features, images).mean(1)
    assert attention.shape[1:] == (prefix + 16, prefix + 16)
    outputs: list[Tensor] = []
    watched = network.norm if features == "ln_post" else network.blocks[-1]
    handle = watched.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        network.forward_features(images)
    handle.remove()
    reader = timm_reader(network, options("t", name, features=features))
    assert isinstance(reader, BlockReader)
    assert (reader.grid, reader.width) == ((4, 4), 48)
    assert ("class token to patches" in reader.importance) == has_class
    with torch.no_grad():
        tokens, importance, _ = reader(network, images)
    torch.testing.assert_close(tokens, outputs[0][:, prefix:], atol=1e-5, rtol=1e-4)
    queries = attention[:, :1] if has_class else attention[:, prefix:]
    torch.testing.assert_close(importance, queries.mean(1)[:, prefix:], atol=1e-6, rtol=1e-4)
    assert importance.std() > 1e-4


def test_only_the_last_block_materializes_its_attention_and_only_if_needed() -> None:
    rotary, plain = network_of("vit_small_patch16_dinov3", **SMALL), network_of("vit_tiny_patch16_224", **SMALL)
    for network in (rotary, plain):
        timm_reader(network, options("t", "name"))
    assert [block.attn.fused_attn for block in rotary.blocks] == [True, False]
    assert [block.attn.fused_attn for block in plain.blocks] == [True, True]


def test_dinov3_in_bf16_is_near_fp32() -> None:
    network, images = network_of("vit_small_patch16_dinov3", **SMALL), images_of(64)
    reader = timm_reader(network, options("t", "name", features="ln_post"))
    with torch.no_grad():
        tokens, importance, _ = reader(network, images)
        rounded, rounded_importance, _ = reader(network.bfloat16(), images.bfloat16())
    assert nn.functional.cosine_similarity(tokens, rounded.float(), dim=-1).min() > 0.99
    torch.testing.assert_close(rounded_importance, importance, atol=0.003, rtol=0.05)


# A name of each layout, its input, and the stage that has 1/16 of it.
MAPS = {
    "efficientnet_lite0": ({}, 3),
    "test_resnet": ({}, 3),
    "test_convnext": ({}, 2),
    # Its maps are [B, H, W, C].
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24}, 2),
    "hiera_tiny_224": ({"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 24}, 2),
}


@pytest.mark.parametrize("name", list(MAPS))
def test_selects_the_stage_on_the_students_grid(name: str) -> None:
    changes, stage = MAPS[name]
    network, images = network_of(name, **changes), images_of(64)
    with torch.no_grad():
        expected = network.forward_intermediates(images, intermediates_only=True)[stage]
    reader = timm_reader(network, options("t", name))
    assert isinstance(reader, MapReader)
    assert (reader.stage, reader.grid) == (stage, (4, 4))
    assert reader.importance.startswith(f"feature norm of stage {stage} (of 0 to ")
    with torch.no_grad():
        tokens, importance, _ = reader(network, images)
    assert expected.shape == (2, reader.width, 4, 4)
    for row in range(4):
        for column in range(4):
            found = tokens[:, row * 4 + column]
            torch.testing.assert_close(found, expected[:, :, row, column], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, expected.square().sum(1).sqrt().flatten(1), atol=1e-4, rtol=1e-4)


def test_stages_are_those_of_timms_feature_models() -> None:
    """Compare with timm's ``features_only``."""
    network, images = network_of("efficientnet_lite0"), images_of(64)
    features = timm.create_model("efficientnet_lite0", features_only=True).eval()
    features.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        expected = features(images)
        for stage, grid in enumerate((32, 16, 8, 4, 2)):
            whole = network_of("efficientnet_lite0")
            reader = timm_reader(whole, options("t", "name", student_grid=(grid, grid)))
            torch.testing.assert_close(reader(whole, images)[0], expected[stage].flatten(2).transpose(1, 2))


def test_prunes_unused_layers() -> None:
    network = network_of("efficientnet_lite0")
    timm_reader(network, options("t", "efficientnet_lite0"))
    assert len(network.blocks) == 5
    assert not any(name.startswith("conv_head") for name, _ in network.named_parameters())


def test_a_named_stage_must_exist_and_fit() -> None:
    for stage, error in ((2, "stage 2 does not have the student's 4x4 grid"), (9, r"stage: no stage 9; the stages")):
        with pytest.raises(UserError, match=error) as found:
            timm_reader(network_of("test_resnet"), options("t", "test_resnet", stage=stage))
        assert "0 32x32 (stride 2), 1 16x16 (stride 4), 2 8x8 (stride 8), 3 4x4 (stride 16)" in str(found.value)
    network = network_of("test_resnet")
    assert timm_reader(network, options("t", "test_resnet", stage=3)).stage == 3


def test_of_several_stages_with_the_grid_the_deepest_is_taken() -> None:
    network = network_of("test_resnet", output_stride=16)
    assert timm_reader(network, options("t", "test_resnet")).stage == 4
    network = network_of("test_resnet", output_stride=16)
    assert timm_reader(network, options("t", "test_resnet", stage=3)).stage == 3


def test_no_stage_on_the_grid_lists_them() -> None:
    with pytest.raises(UserError) as error:
        timm_reader(network_of("test_resnet"), options("t", "test_resnet", student_grid=(14, 14)))
    message = str(error.value)
    assert message.startswith("teachers.t: no stage has the student's 14x14 grid; the stages of test_resnet at 64 ")
    assert "4 2x2 (stride 32)" in message and "teachers.t.image_size to 14 times the stride" in message


@pytest.mark.parametrize("name", ["efficientnet_lite0", "vit_tiny_patch16_224"])
def test_an_input_that_is_not_tiled_is_refused_even_if_the_grid_is_right(name: str) -> None:
    size = {} if name.startswith("eff") else SMALL | {"img_size": 60}
    grid = (4, 4) if name.startswith("eff") else (3, 3)
    fits = f"use {16 * grid[0]}, which gives the student's {grid[0]}x{grid[0]} tokens"
    with pytest.raises(UserError, match=rf"teachers.t.image_size: patches of 16 do not tile 60 pixels; {fits}"):
        timm_reader(network_of(name, **size), options("t", name, image_size=60, student_grid=grid))


@pytest.mark.parametrize("wrong", [32, 100])
def test_the_first_recommended_size_fits(wrong: int) -> None:
    """DINOv2's patches of 14 for a student of 8x8 tokens at 32 pixels."""
    name, small, eight = "vit_small_patch14_dinov2", SMALL | {"dynamic_img_size": False}, {"student_grid": (8, 8)}
    with pytest.raises(UserError, match=r"patches of 14 do not tile .*; use 112, which gives the student's 8x8 tokens"):
        timm_reader(network_of(name, **small | {"img_size": wrong}), options("t", name, image_size=wrong, **eight))
    fits = network_of(name, **small | {"img_size": 112})
    assert timm_reader(fits, options("t", name, image_size=112, **eight)).grid == (8, 8)


def test_strides_of_stages_that_do_not_tile_are_the_networks() -> None:
    with pytest.raises(UserError, match=r"4 2x2 \(stride 32\). Set teachers.t.image_size to 14 times"):
        timm_reader(network_of("test_resnet"), options("t", "test_resnet", image_size=60, student_grid=(14, 14)))


def test_maps_have_no_final_norm() -> None:
    with pytest.raises(UserError, match=r"teachers.t.features: a feature map of test_resnet is raw"):
        timm_reader(network_of("test_resnet"), options("t", "test_resnet", features="ln_post"))


def test_channel_attention_is_not_used_as_patch_attention() -> None:
    """XCiT's blocks have an ``attn`` of another meaning; the norm of its tokens is their importance."""
    network = network_of("xcit_nano_12_p16_224", depth=2, img_size=64)
    assert isinstance(timm_reader(network, options("t", "xcit")), MapReader)


def test_a_network_without_features_is_refused() -> None:
    with pytest.raises(UserError, match=r"teachers.t.source: timm returns no features of name"):
        timm_reader(nn.Linear(2, 2), options("t", "name"))
