"""Sizes, as data: parameter counts of the table, grids, overrides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import FusionSpec
from mrmae_ds.models.sizes import ARCHITECTURES, CViTSpec, ViTSpec, encoder_spec, make_spec, token_grid
from tests.support.reference import pixel_model


@pytest.fixture
def on_meta() -> Iterator[None]:
    """Parameters without memory: Huge would need 2.6 GB."""
    with torch.device("meta"):
        yield


def count(model: nn.Module, trainable_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


@pytest.mark.parametrize(
    ("arch", "image_size", "parameters"),
    [
        ("cvit_small", 224, 22_327_528),
        ("cvit_base", 224, 85_374_824),
        ("cvit_large", 224, 311_171_688),
        ("cvit_huge", 224, 652_303_592),
        # The well-known counts of ViT-S/16 and B/16; fc_norm has the size of the final norm.
        ("vit_small", 224, 22_050_664),
        ("vit_base", 224, 86_567_656),
    ],
)
@pytest.mark.usefixtures("on_meta")
def test_parameters_with_a_head_of_1000(arch: str, image_size: int, parameters: int) -> None:
    assert count(build_encoder(ARCHITECTURES[arch], image_size, 1000)) == parameters


@pytest.mark.usefixtures("on_meta")
def test_parameters_of_pretraining_base() -> None:
    encoder = build_encoder(ARCHITECTURES["cvit_base"], 224)
    model = pixel_model(encoder, FusionSpec(stages=(1, 2)), DecoderSpec(), "standardize")
    assert count(model) == 115_041_408
    assert count(model, trainable_only=True) == 114_790_528
    # The authors count the final norm to the encoder, and the prediction to the decoder.
    assert count(model.encoder) + count(model.fusion.norm) == 84_605_824
    assert count(model.fusion.stage_convs) == 4_326_912
    assert model.decoder is not None
    assert count(model.decoder) + count(model.heads) == 26_108_672


@pytest.mark.usefixtures("on_meta")
def test_parameters_of_pretraining_plain_mae_base() -> None:
    model = pixel_model(build_encoder(ARCHITECTURES["vit_base"], 224), FusionSpec(), DecoderSpec(), "standardize")
    assert count(model) == 111_907_840
    assert count(model, trainable_only=True) == 111_655_680


@pytest.mark.parametrize(
    ("arch", "image_size", "side"),
    [
        ("cvit_base", 224, 14),
        ("cvit_huge", 224, 16),
        ("cvit_huge", 392, 28),
        ("cvit_huge", 448, 32),
        ("vit_huge", 224, 16),
    ],
)
def test_grids_are_computed(arch: str, image_size: int, side: int) -> None:
    assert token_grid(ARCHITECTURES[arch], image_size) == (side, side)


@pytest.mark.parametrize(("image_size", "grid"), [((224, 448), (14, 28)), ([64, 16], (4, 1)), ((16, 16), (1, 1))])
def test_grids_of_rectangles(image_size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert token_grid(ARCHITECTURES["cvit_base"], image_size) == grid


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        ((224, 230), "image_size: 230 .* 224 and 240$"),
        ((230, 224), "image_size: 230 .* 224 and 240$"),
        (0, "image_size: 0 .* are 16$"),
        (-16, "image_size: -16 .* are 16$"),
    ],
)
def test_the_side_that_does_not_fit_is_named(image_size: int | tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_grid(ARCHITECTURES["vit_base"], image_size)


def test_patches_that_do_not_tile_name_the_sizes_that_fit() -> None:
    with pytest.raises(UserError, match=r"image_size: 392 is not a multiple of the patch stride 16.*384 and 400"):
        CViT(CViTSpec((8, 8, 8), (1, 1, 1), 2), 392)
    with pytest.raises(UserError, match=r"sizes that fit are 16$"):
        token_grid(ViTSpec(8, 1, 2), 8)


def test_overrides_replace_single_fields() -> None:
    spec = encoder_spec("cvit_large", {"depths": [2, 2, 20], "mlp_ratios": [8, 8, 4]})
    assert spec == CViTSpec((384, 768, 1024), (2, 2, 20), 16, (8, 8, 4))
    assert encoder_spec("cvit_base") == ARCHITECTURES["cvit_base"]


@pytest.mark.parametrize(
    ("arch", "overrides", "message"),
    [
        ("cvit_bas", {}, "arch: 'cvit_bas' is unknown; known are .*cvit_base"),
        ("cvit_base", {"width": 8}, "overrides.width: cvit_base has no such field; it has dims"),
        ("cvit_base", {"depths": "many"}, r"overrides.depths: .*got 'many'"),
        ("cvit_base", {"dims": [8, 8]}, r"overrides.dims"),
        ("vit_base", {"dims": [8, 8, 8]}, "overrides.dims: vit_base has no such field"),
        ("vit_base", {"depth": 0}, "overrides.depth: .*got 0"),
        ("cvit_base", {"patches": [4, -2, 2]}, "overrides.patches.1: .*got -2"),
        ("vit_base", {"num_heads": 5}, "overrides: .* width 768 must be a multiple of num_heads 5"),
        ("cvit_base", {"dims": [8, 8, 18], "num_heads": 3}, "width 18 .* and of 4"),
    ],
)
def test_wrong_sizes_are_named(arch: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_spec(arch, overrides)


def test_spec_from_lists_is_the_spec() -> None:
    values = {"dims": [16, 24, 32], "depths": [1, 1, 2], "num_heads": 4}
    assert make_spec(CViTSpec, values, "file") == CViTSpec((16, 24, 32), (1, 1, 2), 4)
