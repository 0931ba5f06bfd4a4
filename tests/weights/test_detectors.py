"""Weights of whole detectors, and pre-trained encoders in windowed ones."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mrmae_ds.detection.saved import open_detector
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from mrmae_ds.models.windowed import build_windowed
from mrmae_ds.weights.detectors import detector_of, from_detectron2
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.resolve import model_metadata, resolve
from tests.fixtures import load_reference, part
from tests.support.detectors import CONFIG, NUM_CLASSES, SIDE, SPEC, load_whole, reference_batch, small_detector
from tests.support.reference import perturb

CVIT = CViTSpec((16, 24, 32), (1, 1, 4), 4)
VIT = ViTSpec(32, 4, 4)
State = dict[str, Tensor]
LOGITS = "proposal_generator.rpn_head.objectness_logits.weight"


@pytest.fixture(scope="module")
def reference() -> State:
    return load_reference("mask_rcnn")


@pytest.fixture
def released(reference: State, tmp_path: Path) -> Path:
    """A file as the authors' ViTDet-style code writes it."""
    path = tmp_path / "model_final.pth"
    torch.save({"model": part(reference, "state/") | {"pixel_mean": torch.zeros(3, 1, 1)}}, path)
    return path


def changed(path: Path, change: Callable[[State], State]) -> Path:
    """Return a copy of a released file with other tensors."""
    copy = path.with_name("changed.pth")
    torch.save({"model": change(torch.load(path)["model"])}, copy)
    return copy


def with_value(value: float) -> Callable[[State], State]:
    return lambda state: state | {LOGITS: torch.full_like(state[LOGITS], value)}


def test_released_detector_is_identified_and_loads_whole(reference: State, released: Path) -> None:
    weights = resolve(released)
    assert weights.identity.title == "CViT encoder of a ViTDet-style detector in Detectron2's names"
    assert (weights.identity.kind, weights.problem) == ("encoder", "")
    detector = small_detector()
    report = load_whole(detector, released)
    assert len(report.loaded) == len(detector.state_dict()) and report.missing == []
    assert report.unexpected == ["pixel_mean"]
    assert report.notes == ["names and classes converted from a ViTDet-style detector in Detectron2's names"]
    images, sizes, _ = reference_batch(reference)
    with torch.no_grad():
        found = detector.eval()(images, sizes)
    assert torch.equal(found[0]["labels"], reference["det0/classes"].long() + 1)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_detector_of_detectron2s_model_zoo_loads_whole(released: Path, protocol: int, tmp_path: Path) -> None:
    """A pickle of numpy arrays, which names its author."""
    arrays = {name: tensor.numpy() for name, tensor in torch.load(released)["model"].items()}
    path = tmp_path / "model_final_61ccd1.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=protocol))
    ours, theirs = small_detector(0), small_detector(1)
    assert load_whole(ours, path).notes == load_whole(theirs, released).notes
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_sizes_are_those_of_the_tensors(released: Path) -> None:
    file = detector_of(resolve(released))
    assert file is not None and file.sizes() == (CONFIG, SIDE) and file.num_classes == NUM_CLASSES


def test_encoder_alone_is_chosen_by_its_prefix(released: Path, reference: State) -> None:
    """It is that of the whole detector; models without relative positions refuse it."""
    path = Path(f"{released}#backbone.net")
    weights = resolve(path)
    assert detector_of(weights) is None and weights.identity.relative
    encoder = small_detector().encoder
    report = load_encoder(encoder, path)
    assert report.missing == [] and set(encoder.state_dict()) == set(report.loaded)
    name = "blocks3.0.attn.rel_pos_h"
    assert torch.equal(encoder.state_dict()[name], reference[f"state/backbone.net.{name}"])
    for refused in (lambda: load_encoder(build_encoder(SPEC, 64), path), lambda: model_metadata(weights)):
        with pytest.raises(UserError, match="windows and relative positions"):
            refused()


def test_encoder_of_vitdet_has_neither_class_token_nor_norm(tmp_path: Path) -> None:
    saved, loaded = (build_windowed(VIT, 192, 5, (1, 3), 96) for _ in range(2))
    perturb(saved, 0)
    path = tmp_path / "vitdet.pth"
    state = {f"backbone.net.{name}": tensor for name, tensor in saved.state_dict().items()}
    torch.save({"model": state | {"proposal_generator.x.weight": torch.zeros(1)}}, path)
    assert load_encoder(loaded, path).missing == []
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_own_detector_loads_bit_by_bit(tmp_path: Path) -> None:
    path, saved, loaded = tmp_path / "model.safetensors", small_detector(0), small_detector(1)
    save_file(saved.state_dict(), path)
    assert resolve(path).identity.title == "CViT encoder of a detector in torchvision's names"
    report = load_whole(loaded, path)
    assert report.notes == [] and len(report.loaded) == len(saved.state_dict())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_background_and_dummy_class_move_to_the_front() -> None:
    scores, offsets = torch.arange(3.0)[:, None], torch.arange(8.0)[:, None]
    found = from_detectron2(
        {"roi_heads.box_predictor.cls_score.weight": scores, "roi_heads.box_predictor.bbox_pred.weight": offsets}
    )
    assert found["roi_heads.box_predictor.cls_score.weight"].flatten().tolist() == [2, 0, 1]
    assert found["roi_heads.box_predictor.bbox_pred.weight"].flatten().tolist() == [0, 0, 0, 0, *range(8)]


def test_detector_of_the_other_code_base_is_refused_and_its_encoder_loads(released: Path) -> None:
    def with_fpn(state: State) -> State:
        encoder = {name: tensor for name, tensor in state.items() if ".net." in name}
        renamed = {name.replace(".net.", ".bottom_up."): tensor for name, tensor in encoder.items()}
        return renamed | {"backbone.fpn_lateral2.weight": torch.zeros(1), "roi_heads.mask_head.x": torch.zeros(1)}

    path = changed(released, with_fpn)
    assert resolve(path).identity.title == "CViT encoder of an FPN detector in Detectron2's names"
    with pytest.raises(
        UserError, match=r"changed.pth: holds no whole detector \(CViT encoder of an FPN detector in Det"
    ):
        open_detector(path)
    report = load_encoder(small_detector().backbone.net, path)
    assert report.missing == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if "anchor_deltas" not in n}, "differs .* in 2 tensors .*bbox_pred"),
        (lambda s: {n: t for n, t in s.items() if "box_predictor" not in n}, "has no whole detector"),
        (lambda s: {n: t for n, t in s.items() if "simfp_3.0" not in n}, "differs .* in 2 tensors .*simfp_3.0.weight"),
        (lambda s: s | {"backbone.net.blocks3.3.norm1.weight": torch.zeros(24)}, "tensors are missing: 11"),
        (lambda s: s | {"backbone.simfp_9.weight": torch.zeros(1)}, "differs .* in 1 tensor "),
        (with_value(torch.nan), r"1 tensor with NaN or infinity: rpn\.head\.cls_logits\.weight"),
        (with_value(torch.inf), r"1 tensor with NaN or infinity: rpn\.head\.cls_logits\.weight"),
        (lambda s: s | {LOGITS: s[LOGITS].to(torch.int8)}, r"1 tensor quantized \(int8\): rpn\.head\.cls_logits"),
        (lambda s: s | {"backbone.net.pos_embed": torch.zeros(1, 4, 24)}, "pos_embed is .* change model.image_size"),
    ],
)
def test_detectors_that_differ_are_refused(released: Path, change: Callable[[State], State], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_whole(small_detector(), changed(released, change))


def test_another_number_of_classes_is_named(released: Path) -> None:
    with pytest.raises(UserError, match="detects 5 classes, but the data set has 7"):
        load_whole(small_detector(num_classes=7), released)


@pytest.mark.parametrize("spec", [CVIT, VIT])
def test_pretrained_encoder_loads_without_relative_positions_alone(spec: EncoderSpec, tmp_path: Path) -> None:
    path, pretrained = tmp_path / "encoder.safetensors", build_encoder(spec, 64)
    perturb(pretrained, 0)
    extra = {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    save_file(pretrained.state_dict() | extra, path)
    encoder = build_windowed(spec, 192, 5, (1, 3), 96)
    report = load_encoder(encoder, path)
    stage = "blocks3" if isinstance(spec, CViTSpec) else "blocks"
    assert report.missing == [f"{stage}.{i}.attn.rel_pos_{axis}" for i in range(4) for axis in "hw"]
    assert report.resized == ["pos_embed"]
    assert sorted(set(report.unexpected) - {"cls_token"}) == ["norm.bias", "norm.weight"]
    state = encoder.state_dict()
    for name, tensor in pretrained.state_dict().items():
        assert name in ("pos_embed", "cls_token") or torch.equal(state[name], tensor), name

    incomplete = {name: tensor for name, tensor in pretrained.state_dict().items() if "2.norm2.bias" not in name}
    save_file(incomplete, path)
    with pytest.raises(UserError, match="encoder tensors are missing"):
        load_encoder(encoder, path)
