"""Weights files of BEiT's encoder: released ones, shared tables in fine-tuning, exports to timm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from mrmae_ds.cli.inspect import describe_file
from mrmae_ds.errors import UserError
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import TokenMask
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import BeitSpec, ViTSpec
from mrmae_ds.teachers.sources.checkpoint import CheckpointTeacher, encoder_attention
from mrmae_ds.teachers.sources.timm import TimmTeacher
from mrmae_ds.weights.export import export_run
from mrmae_ds.weights.identify import identify
from mrmae_ds.weights.load import load_encoder, load_model, load_pretrained
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from mrmae_ds.weights.names import canonical
from mrmae_ds.weights.paths import MODEL_FILE
from mrmae_ds.weights.resolve import resolve
from tests.fixtures import load_reference, part
from tests.support.reference import perturb, random_images
from tests.support.released import file_of, released_shapes, write_released
from tests.support.sample_teachers import options

SPEC = BeitSpec(16, 2, 2, mlp_ratio=2, patch=8)
TABLE = "relative_position_bias_table"
RELEASED = {
    "beit_base_pretrain": ("BEiT encoder, BEiT pre-training as released", "encoder", "shared"),
    "beitv2_base_pretrain": ("BEiT encoder, BEiT v2 pre-training as released", "encoder", "shared"),
    "data2vec_base_pretrain": ("BEiT encoder, data2vec pre-training as released", "encoder", "shared"),
    "simmim_vit_base_pretrain": ("BEiT encoder, SimMIM pre-training as released", "encoder", "shared"),
    "beit_base_finetune": ("BEiT classifier, mean-pooled", "classifier", "blocks"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_identified_and_the_whole_encoder_is_mapped(name: str) -> None:
    file = canonical(file_of(released_shapes(name)))
    found, (title, kind, tables) = identify(file), RELEASED[name]
    assert (found.title, found.kind, found.family, found.problem, found.grid) == (title, kind, "beit", "", (14, 14))
    sizes = {"dim": 768, "depth": 12, "mlp_ratio": 4, "patch": 16, "num_heads": 12}
    assert found.sizes == sizes | {"relative_positions": tables}
    classes = 1000 if kind == "classifier" else 0
    with torch.device("meta"):
        encoder = build_encoder(BeitSpec(768, 12, 12), 224, classes, mask_token=not classes)
    ours = {f"encoder.{key}": tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    shapes = {found.names[key]: tuple(tensor.shape) for key, tensor in file.tensors.items() if key in found.names}
    assert {key: shape for key, shape in shapes.items() if key.startswith("encoder.")} == ours


def pretraining(folder: Path, spec: BeitSpec | ViTSpec = SPEC) -> PretrainModel:
    """Write a finished pre-training, and return its model."""
    pixels = {
        "target": "pixels",
        "tap": "encoder",
        "tokens": "masked",
        "loss": "l1",
        "normalize": "none",
        "weight": 1.0,
    }
    encoder = build_encoder(spec, 32, mask_token=True)
    model = PretrainModel(encoder, FusionSpec(), DecoderSpec(), {"pixels": Objective(**pixels)}, {})
    perturb(model, seed=1)
    recipe = {"name": "small", "model": {"fusion": {}, "decoder": {}}}
    recipe |= {"stages": {"pretrain": {"objectives": {"pixels": pixels}}}}
    metadata = {
        "kind": "pretrain",
        **encoder_metadata(encoder),
        "num_classes": 0,
        "stage": "pretrain",
        "recipe": recipe,
    }
    save_weights(folder / MODEL_FILE, model.state_dict(), metadata | {"mean": [0.5] * 3, "std": [0.5] * 3})
    return model.eval()


def classifier(folder: Path) -> torch.nn.Module:
    model = build_encoder(SPEC, 32, 3).eval()
    perturb(model, seed=2)
    metadata = {"kind": "classifier", **encoder_metadata(model), "num_classes": 3, "stage": "finetune"}
    save_weights(folder / MODEL_FILE, model.state_dict(), metadata | {"mean": [0.5] * 3, "std": [0.5] * 3})
    return model


@pytest.mark.parametrize("spec", [SPEC, ViTSpec(16, 2, 2, patch=8, positions="learned")], ids=["beit", "vit"])
def test_a_pretraining_with_a_mask_token_is_rebuilt(spec: BeitSpec | ViTSpec, tmp_path: Path) -> None:
    model = pretraining(tmp_path, spec)
    images, mask = random_images(2, 32, seed=3), TokenMask(torch.rand(2, 16) < 0.5, (4, 4))
    loaded = load_model(tmp_path / MODEL_FILE)
    assert isinstance(loaded, PretrainModel)
    with torch.no_grad():
        assert torch.equal(loaded.predict(images, mask)["pixels"], model.predict(images, mask)["pixels"])
    assert resolve(tmp_path / MODEL_FILE).problem == ""
    report = load_encoder(build_encoder(spec, 32, 3), tmp_path / MODEL_FILE)
    assert "encoder.mask_token" in report.unexpected
    assert {name.split(".")[0] for name in report.missing} == {"fc_norm", "head"}


def test_the_shared_table_is_copied_into_each_block_and_resized(tmp_path: Path) -> None:
    model = pretraining(tmp_path)
    table = model.encoder.rel_pos_bias.relative_position_bias_table.detach()
    same, larger = build_encoder(SPEC, 32, 3), build_encoder(SPEC, 48, 3)
    load_encoder(same, tmp_path / MODEL_FILE)
    report = load_encoder(larger, tmp_path / MODEL_FILE)
    assert report.resized == [f"blocks.{i}.attn.{TABLE}" for i in range(2)]
    expected = resize_rel_pos_bias_table(table, (6, 6), (124, 2))
    for i in range(2):
        assert torch.equal(getattr(same.blocks[i].attn, TABLE).detach(), table)
        assert torch.equal(getattr(larger.blocks[i].attn, TABLE).detach(), expected)
    images = random_images(2, 32, seed=3)
    with torch.no_grad():
        tokens = same.eval()._run(same.patch_embed(images))
        torch.testing.assert_close(tokens, model.encoder(images))


def test_a_table_is_interpolated_between_distances_that_grow(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """BEiT's rule: old entries lie at 1, 1 + q, 1 + q + q^2 = 4 from the center, new ones at each whole distance."""
    old = pretraining(tmp_path).encoder.rel_pos_bias.relative_position_bias_table.detach().double()
    larger = build_encoder(SPEC, 40, 3)
    load_encoder(larger, tmp_path / MODEL_FILE)
    q = (math.sqrt(13) - 1) / 2
    known = np.array([-4, -1 - q, -1, 0, 1, 1 + q, 4])
    wanted = np.arange(-4.0, 5.0)
    for head in range(2):
        grid = old[:49, head].reshape(7, 7).numpy()
        rows = np.stack([np.interp(wanted, known, row) for row in grid])
        expected = np.stack([np.interp(wanted, known, column) for column in rows.T], axis=1)
        found = getattr(larger.blocks[1].attn, TABLE)[:, head].detach()
        np.testing.assert_allclose(found[:81].reshape(9, 9).numpy(), expected, atol=1e-5)
        assert torch.equal(found[81:].double(), old[49:, head])
    assert not recwarn.list


def test_a_classifiers_own_tables_do_not_become_a_shared_one(tmp_path: Path) -> None:
    classifier(tmp_path)
    with pytest.raises(UserError, match="relative_positions blocks instead of shared"):
        load_encoder(build_encoder(SPEC, 32), tmp_path / MODEL_FILE)
    bare = replace(SPEC, relative_positions="blocks")
    report = load_encoder(build_encoder(bare, 32), tmp_path / MODEL_FILE)
    assert (len(report.unexpected), report.missing) == (4, [])  # norm and head


@pytest.mark.parametrize("blocks", [[0, 1], [1]])
def test_a_shared_table_beside_those_of_blocks_is_refused(blocks: list[int], tmp_path: Path) -> None:
    state, path = part(load_reference("beit"), "state/"), tmp_path / "both.pth"
    shared = f"rel_pos_bias.{TABLE}"
    own = {f"blocks.{i}.attn.{TABLE}": state[shared] + 1 for i in blocks}
    write_released(path, state | own)
    expected = [shared, f"tables in {len(blocks)}", next(iter(own)), "adds both"]
    shown = dict(describe_file(path))["NOT USABLE"]
    assert all(text in shown for text in expected)
    tables: tuple[Literal["shared", "blocks"], ...] = ("shared", "blocks")
    for spec in (replace(SPEC, relative_positions=kind) for kind in tables):
        with pytest.raises(UserError) as error:
            load_encoder(build_encoder(spec, 32, 3), path)
        assert str(error.value) == f"{path}: {shown}"
        encoder = build_encoder(spec, 32, mask_token=True)
        pixels = Objective(target="pixels", tap="encoder", tokens="masked", normalize="none", weight=1.0)
        with pytest.raises(UserError) as error:
            load_pretrained(PretrainModel(encoder, FusionSpec(), DecoderSpec(), {"pixels": pixels}, {}), path)
        assert str(error.value) == f"{path}: {shown}"
    for build, source in ((CheckpointTeacher, str(path)), (TimmTeacher, "beit_base_patch16_224")):
        with pytest.raises(UserError) as error:
            build(options("t", source, weights=None if source == str(path) else path))
        assert str(error.value).endswith(f"{path}: {shown}")


@pytest.mark.parametrize("kind", ["pretraining", "classifier"])
def test_an_export_gives_the_same_results_in_timm(kind: str, tmp_path: Path) -> None:
    model = pretraining(tmp_path) if kind == "pretraining" else classifier(tmp_path)
    exported = export_run(tmp_path, "timm", tmp_path / "out.safetensors")
    names: dict[str, torch.nn.Module] = {}
    exec(exported.line, names)
    loaded, images = names["model"].eval(), random_images(2, 32, seed=3)
    assert type(loaded) is timm.models.beit.Beit
    with torch.no_grad():
        expected = model.fusion.norm(model.encoder(images)) if isinstance(model, PretrainModel) else model(images)
        assert torch.equal(loaded(images), expected)


def test_the_authors_file_gives_their_logits(tmp_path: Path) -> None:
    reference = load_reference("beit")
    path = write_released(tmp_path / "beit.pth", part(reference, "finetune/"))
    model = build_encoder(SPEC, 32, 5).eval()
    report = load_encoder(model, path)
    assert (report.missing, report.unexpected) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(model(reference["finetune_images"]), reference["finetune_logits"])


def test_the_option_of_beits_scripts_says_the_statistics(tmp_path: Path) -> None:
    state = part(load_reference("beit"), "state/")
    for default, mean in ((True, 0.485), (False, 0.5)):
        args = {"imagenet_default_mean_and_std": default, "layer_decay": 0.9}
        torch.save({"model": state, "args": args}, tmp_path / "beit.pth")
        statistics = resolve(tmp_path / "beit.pth").identity.origin.statistics
        assert statistics is not None and statistics[0][0] == mean


def by_hand(encoder: torch.nn.Module, x: Tensor) -> Tensor:
    """Return the class token's attention to the patches in the last block, from its input, mean over heads."""
    block, heads = encoder.blocks[-1], SPEC.num_heads
    bias = torch.cat([block.attn.q_bias, torch.zeros_like(block.attn.q_bias), block.attn.v_bias])
    q, k, _ = (torch.nn.functional.linear(block.norm1(x), block.attn.qkv.weight, bias)).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + encoder.rel_pos_bias()
    return scores.softmax(-1)[:, :, 0, 1:].mean(1)


def test_attention_has_the_relative_positions(tmp_path: Path) -> None:
    encoder, images = pretraining(tmp_path).encoder, random_images(2, 32, seed=3)
    seen: list[Tensor] = []
    encoder.blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found = encoder_attention(encoder, images)
        torch.testing.assert_close(found.importance, by_hand(encoder, seen[0]))
