"""Identification of weights files from names and shapes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import FusionSpec
from mrmae_ds.models.sizes import ARCHITECTURES, EncoderSpec, ViTSpec, encoder_spec
from mrmae_ds.weights.identify import identify
from mrmae_ds.weights.names import canonical
from mrmae_ds.weights.shapes import nearest_architecture
from tests.support.reference import MCMAE, pixel_model
from tests.support.released import (
    file_of,
    hugging_face_clip,
    released_shapes,
    tiny_clip,
    tiny_vit,
    without_decoder,
)

BASE_SIZES = {"dims": (256, 384, 768), "depths": (2, 2, 11), "mlp_ratios": (4, 4, 4), "patches": (4, 2, 2)}


def on_meta(spec: EncoderSpec, num_classes: int = 0) -> dict[str, Tensor]:
    """The tensors of an encoder of this project at 224 pixels, without data."""
    with torch.device("meta"):
        return build_encoder(spec, 224, num_classes).state_dict()


def test_identifies_released_mcmae_and_renames_every_tensor() -> None:
    shapes = released_shapes("mcmae_base_pretrain")
    assert len(shapes) == 313
    found = identify(file_of(shapes))
    assert (found.kind, found.family, found.ours) == ("pretrain", "cvit", False)
    assert (found.grid, found.prefix_rows, found.num_classes) == ((14, 14), 0, 0)
    assert found.title == "CViT with its decoder, MCMAE pre-training as released"
    assert found.sizes == BASE_SIZES
    with torch.device("meta"):
        encoder = build_encoder(ARCHITECTURES["cvit_base"], 224)
        model = pixel_model(encoder, FusionSpec(stages=(1, 2)), DecoderSpec(), "standardize")
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {found.names[name]: shape for name, shape in shapes.items()} == ours


def test_identifies_released_mae_and_renames_every_tensor() -> None:
    shapes = released_shapes("mae_base_pretrain")
    assert len(shapes) == 254
    found = identify(file_of(shapes))
    assert (found.kind, found.family, found.grid, found.prefix_rows) == ("pretrain", "vit", (14, 14), 1)
    assert found.title == "plain ViT with its decoder, MAE pre-training as released"
    assert found.sizes == {"dim": 768, "depth": 12, "mlp_ratio": 4, "patch": 16}
    with torch.device("meta"):
        model = pixel_model(build_encoder(ARCHITECTURES["vit_base"], 224), FusionSpec(), DecoderSpec(), "standardize")
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {found.names[name]: shape for name, shape in shapes.items()} == ours


@pytest.mark.parametrize(("method", "count", "width"), [("MILAN", 270, 512), ("DMAE", 256, 1024)])
def test_identifies_released_files_of_other_methods_and_renames_every_tensor(
    method: str, count: int, width: int
) -> None:
    shapes = released_shapes(f"{method.lower()}_base_pretrain")
    assert len(shapes) == count
    found = identify(file_of(shapes))
    assert (found.kind, found.family, found.problem, found.extras) == ("pretrain", "vit", "", ())
    assert found.title == f"plain ViT with its decoder, {method} pre-training as released"
    recipe = load_recipe(Path(f"ds_configs/methods/{method.lower()}_base.yaml"))
    assert recipe.stages.pretrain is not None
    teacher = SimpleNamespace(width=width, has_class_token=True)
    with torch.device("meta"):
        model, _ = build_pretraining(recipe, recipe.stages.pretrain, lambda *_: teacher)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {found.names[name]: shape for name, shape in shapes.items()} == ours


def test_first_release_without_decoder() -> None:
    shapes = released_shapes("mcmae_base_pretrain")
    kept = {name: shapes[name] for name in without_decoder(shapes)}
    assert len(kept) == 205
    found = identify(file_of(kept))
    assert (found.kind, found.family, found.sizes, found.title) == ("encoder", "cvit", BASE_SIZES, "CViT encoder")
    bare = {f"encoder.{name}" for name in on_meta(ARCHITECTURES["cvit_base"])}
    assert set(found.names.values()) == bare | {"fusion.norm.weight", "fusion.norm.bias"}


def test_released_classifier_is_identified_and_every_tensor_mapped() -> None:
    shapes = released_shapes("cvit_base_classifier")
    found = identify(file_of(shapes))
    assert (found.kind, found.family, found.num_classes, found.grid) == ("classifier", "cvit", 1000, (14, 14))
    assert (found.sizes, found.title) == (BASE_SIZES, "CViT classifier, mean-pooled")
    ours = {f"encoder.{name}": tuple(t.shape) for name, t in on_meta(ARCHITECTURES["cvit_base"], 1000).items()}
    assert {found.names[name]: shape for name, shape in shapes.items()} == ours


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("cvit_small", {}),
        ("cvit_large", {}),
        ("cvit_large", {"mlp_ratios": (8, 8, 4)}),
        ("cvit_large", {"depths": (2, 2, 20), "mlp_ratios": (8, 8, 4)}),
        ("cvit_huge", {}),
        ("cvit_huge", {"mlp_ratios": (8, 8, 4)}),
        ("vit_large", {}),
        ("vit_huge", {}),
        ("vit_base", {"depth": 10}),
    ],
    ids=str,
)
def test_sizes_are_read_off_shapes(arch: str, overrides: dict[str, Any]) -> None:
    spec = encoder_spec(arch, overrides)
    found = identify(file_of(on_meta(spec)))
    expected = asdict(spec)
    del expected["num_heads"]  # no shape depends on it
    expected.pop("positions", None)  # nor on initialization
    assert found.sizes == expected
    assert nearest_architecture(found.family, found.sizes) == (arch, overrides)


@pytest.mark.parametrize(("rows", "grid", "prefix"), [(196, (14, 14), 0), (197, (14, 14), 1), (198, None, 0)])
def test_position_rows_of_cvit(rows: int, grid: tuple[int, int] | None, prefix: int) -> None:
    found = identify(file_of({**released_shapes("cvit_base_classifier"), "pos_embed": (1, rows, 768)}))
    assert (found.grid, found.prefix_rows) == (grid, prefix)


@pytest.mark.parametrize(
    ("settings", "kind", "title", "extras"),
    [
        ({}, "classifier", "plain ViT classifier, on the class token", ()),
        ({"global_pool": "avg"}, "classifier", "plain ViT classifier, mean-pooled", ()),
        ({"num_classes": 0}, "encoder", "plain ViT encoder", ()),
        ({"init_values": 1e-5}, "classifier", None, ("blocks.*.ls1.gamma", "blocks.*.ls2.gamma")),
        ({"reg_tokens": 4}, "classifier", None, ("reg_token",)),
        ({"pre_norm": True}, "classifier", None, ("norm_pre.weight", "norm_pre.bias")),
    ],
    ids=str,
)
def test_vits_of_timm_are_identified_with_pooling_and_extras(
    settings: dict[str, Any], kind: str, title: str | None, extras: tuple[str, ...]
) -> None:
    found = identify(file_of(tiny_vit(**settings).state_dict()))
    assert (found.kind, found.family, found.extras) == (kind, "vit", extras)
    pool = settings.get("global_pool", "token") if kind == "classifier" else ""
    assert found.pool == pool
    assert title is None or found.title == title
    assert found.sizes == {"dim": 24, "depth": 2, "mlp_ratio": 4, "patch": 8}
    assert found.num_classes == (5 if kind == "classifier" else 0)


def test_a_cvit_with_its_norm_before_the_head() -> None:
    """MCMAE's code can also build this one, whose head has an unsupported input."""
    shapes = {name.replace("fc_norm", "norm"): s for name, s in released_shapes("cvit_base_classifier").items()}
    found = identify(file_of(shapes))
    assert (found.kind, found.pool, found.title) == ("classifier", "", "CViT classifier")


@pytest.mark.parametrize(
    ("rows", "size", "grid", "prefix"),
    [
        (8, [16, 32], (2, 4), 0),
        (16, [64, 16], (8, 2), 0),  # as many as of 4 x 4
        (9, [16, 32], (2, 4), 1),  # as many as of 3 x 3
        (16, 32, (4, 4), 0),
        (17, [16, 32], (4, 4), 1),  # contradicts the record: inferred from the rows
    ],
)
def test_grid_of_this_projects_files(rows: int, size: int | list[int], grid: tuple[int, int], prefix: int) -> None:
    spec = ViTSpec(12, 1, 2, patch=8)
    with torch.device("meta"):
        tensors = build_encoder(spec, 32).state_dict() | {"pos_embed": torch.empty(1, rows, 12)}
    metadata = {"kind": "encoder", "family": "vit", "spec": asdict(spec), "image_size": size}
    found = identify(file_of(tensors, {"mrmae": json.dumps(metadata)}))
    assert (found.grid, found.prefix_rows) == (grid, prefix)


def test_a_mask_token_alone_is_no_decoder() -> None:
    state = tiny_vit(num_classes=0).state_dict() | {"mask_token": torch.zeros(1, 24)}  # as DINOv2's files have it
    assert identify(file_of(state)).title == "plain ViT encoder"


def test_clip_models_are_identified_by_their_image_tower() -> None:
    model = tiny_clip()
    for state in (model.state_dict(), model.visual.state_dict(), hugging_face_clip(model)):
        found = identify(canonical(file_of(state)))
        assert (found.kind, found.family, found.problem) == ("clip", "", "")
        assert found.title == "CLIP model, image tower 64 wide, patch 8"
        for lost in list(state):
            if re.search(r"visual.*(resblocks.1|class_emb)|vision.*(layers.1|class_emb)", lost):
                part = {name: tensor for name, tensor in state.items() if name != lost}
                problem = identify(canonical(file_of(part))).problem
                assert problem.startswith(("encoder tensors are missing", "tensors of the image tower are missing"))


@pytest.mark.parametrize(
    "shapes",
    [
        {"conv1.weight": (64, 3, 7, 7), "layer1.0.conv1.weight": (64, 64, 3, 3)},
        {"patch_embed.proj.weight": (96, 3, 4, 4), "layers.0.blocks.0.mlp.fc1.weight": (384, 96)},  # Swin
        {"patch_embed1.proj.weight": (16, 3, 4, 4)},
        {"patch_embed.proj.weight": (96,)},
    ],
)
def test_unknown_models_have_no_family_and_no_names(shapes: dict[str, tuple[int, ...]]) -> None:
    found = identify(file_of(shapes))
    assert (found.kind, found.family, found.names) == ("unknown", "", {})


def test_identifies_this_projects_files_by_metadata_and_names() -> None:
    model = pixel_model(build_encoder(MCMAE, 64), FusionSpec(), DecoderSpec(dim=32, depth=1, num_heads=4), "none")
    metadata = {"kind": "pretrain", "family": "cvit", "spec": asdict(MCMAE)}
    found = identify(file_of(model.state_dict(), {"mrmae": json.dumps(metadata)}))
    assert (found.ours, found.kind, found.sizes["num_heads"]) == (True, "pretrain", 4)
    assert found.metadata["family"] == "cvit"
    bare = identify(file_of(model.state_dict()))
    assert (bare.ours, bare.kind, bare.grid) == (False, "pretrain", (4, 4))
    assert "num_heads" not in bare.sizes
    assert found.title == bare.title == "CViT, pre-training of this project"
    assert found.names == bare.names == {name: name for name in model.state_dict()}


@pytest.mark.parametrize("text", ["{", "[1]", '{"kind": "pretrain"}', '{"spec": null}'])
def test_refuses_damaged_metadata(text: str) -> None:
    with pytest.raises(UserError, match=r"^some.file: its metadata entry mrmae is damaged"):
        identify(file_of(released_shapes("cvit_base_classifier"), {"mrmae": text}))
