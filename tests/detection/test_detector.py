"""The detector against Detectron2's own classes, its gradients, and its independence of precision and objects."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from mrmae_ds.config.sections import ModelConfig
from mrmae_ds.detection.detector import LOSSES, Detector, build_detector
from mrmae_ds.detection.roi_heads import mask_targets
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.pretrain import set_checkpointing
from mrmae_ds.models.pyramid import LayerNorm2d
from mrmae_ds.weights.detectors import from_detectron2
from tests.fixtures import load_reference, part
from tests.support.detectors import (
    NUM_CLASSES,
    SIDE,
    detect_config,
    random_batch,
    reference_batch,
    small_detector,
)

DETECTRON2_LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")
COUNTS = [(2, 3), (0, 3), (0, 0)]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_reference("mask_rcnn")


@pytest.fixture
def detector(reference: dict[str, Tensor]) -> Detector:
    """The detector with Detectron2's weights."""
    model = small_detector()
    model.load_state_dict(from_detectron2(part(reference, "state/")))
    return model


def test_losses_and_gradients_equal_detectron2s(
    reference: dict[str, Tensor], detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
    losses = detector(*reference_batch(reference))
    for ours, theirs in zip(LOSSES, DETECTRON2_LOSSES, strict=True):
        torch.testing.assert_close(losses[ours], reference[f"loss/{theirs}"], atol=1e-5, rtol=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(losses[name].item() for name in LOSSES))
    losses["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    norms = from_detectron2({name: norm.reshape(1) for name, norm in part(reference, "grad_norm/").items()})
    assert gradients.keys() == norms.keys() and len(norms) > 150
    for name, norm in norms.items():
        found = gradients[name].norm()
        torch.testing.assert_close(found, norm.norm(), atol=1e-7, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_detections_equal_detectron2s(reference: dict[str, Tensor], detector: Detector) -> None:
    images, sizes, _ = reference_batch(reference)
    with torch.no_grad():
        found = detector.eval()(images, sizes)
    assert [len(image["boxes"]) for image in found] == [100] * 3
    for i, image in enumerate(found):
        assert torch.equal(image["labels"], reference[f"det{i}/classes"].long() + 1)
        torch.testing.assert_close(image["scores"], reference[f"det{i}/scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(image["boxes"], reference[f"det{i}/boxes"], atol=1e-3, rtol=0)
        masks = image["masks"]
        assert masks.shape == (100, 1, 28, 28)
        torch.testing.assert_close(masks.flatten()[::41], reference[f"det{i}/masks"], atol=1e-3, rtol=0)


def test_losses_of_fresh_heads() -> None:
    torch.manual_seed(0)
    detector = small_detector(num_classes=80)
    images, sizes, targets = random_batch((3, 4))
    losses = detector(images, sizes, targets)
    assert losses["loss_classifier"].item() == pytest.approx(math.log(81), abs=0.1)
    assert losses["loss_objectness"].item() == pytest.approx(math.log(2), abs=0.01)
    assert losses["loss_mask"].item() == pytest.approx(math.log(2), abs=0.01)


@pytest.mark.parametrize("counts", COUNTS)
def test_every_parameter_gets_a_gradient_without_objects_too(counts: tuple[int, int]) -> None:
    detector = small_detector()
    losses = detector(*random_batch(counts), seeds=[1, 2])
    assert all(value.isfinite() for value in losses.values())
    losses["loss"].backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []
    if counts == (0, 0):
        assert losses["positives"] == losses["loss_mask"] == losses["loss_box_reg"] == 0 and losses["recall"] == 1
        assert not any(p.grad.any() for p in detector.roi_heads.mask_head.parameters())
    else:
        assert losses["positives"] > 0


@pytest.mark.parametrize("size", [(1, 13), (13, 1), (1, 1)])
def test_an_image_smaller_than_a_patch_has_finite_losses(size: tuple[int, int]) -> None:
    """After jitter, with an object of its size and without one."""
    detector = small_detector()
    images = torch.zeros(2, 3, SIDE, SIDE)
    images[:, :, : size[0], : size[1]] = 1
    masks = torch.ones(1, *size, dtype=torch.uint8)
    whole = {"boxes": torch.tensor([[0.0, 0, size[1], size[0]]]), "labels": torch.tensor([2]), "masks": masks}
    losses = detector(images, [size] * 2, [whole, {name: values[:0] for name, values in whole.items()}], [1, 2])
    assert all(losses[name].isfinite() and losses[name].requires_grad for name in LOSSES)
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    with torch.no_grad():
        for found in detector.eval()(images, [size] * 2):
            assert (found["boxes"] <= torch.tensor([size[1], size[0]]).repeat(2)).all()


def test_a_mask_head_that_is_left_out_without_objects_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of ZeRO, removed: the mask head must run on no boxes."""
    detector = small_detector()
    nothing = torch.zeros(0, NUM_CLASSES + 1, 28, 28)
    monkeypatch.setattr(detector.roi_heads, "_masks", lambda *_: nothing)
    detector(*random_batch((0, 0)), seeds=[1, 2])["loss"].backward()
    missing = {name.split(".")[1] for name, parameter in detector.named_parameters() if parameter.grad is None}
    assert missing == {"mask_head", "mask_predictor"}


def test_checkpointing_reaches_the_encoder_and_changes_no_gradient() -> None:
    detector, other = small_detector(), small_detector()
    set_checkpointing(other, CheckpointPlan(conv_stages=1, transformer=1))
    assert other.backbone.net.checkpointing.transformer == 1
    for model in (detector, other):
        model(*random_batch((2, 3)), seeds=[0, 1])["loss"].backward()
    for (name, one), two in zip(detector.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


def test_gradients_of_ten_steps_reach_every_tensor() -> None:
    detector = small_detector()
    total = {name: 0.0 for name, _ in detector.named_parameters()}
    for step in range(10):
        detector.zero_grad()
        detector(*random_batch((3, 4), seed=step), seeds=[2 * step, 2 * step + 1])["loss"].backward()
        for name, parameter in detector.named_parameters():
            total[name] += parameter.grad.norm().item()
    assert [name for name, norm in total.items() if norm == 0] == []


def test_draws_depend_on_the_seeds_of_the_images_alone() -> None:
    detector, (images, sizes, targets) = small_detector(), random_batch((3, 4))
    together = detector(images, sizes, targets, [7, 8])
    torch.manual_seed(99)
    again = detector(images, sizes, targets, [7, 8])
    assert all(torch.equal(together[name], again[name]) for name in LOSSES)
    alone = [detector(images[i : i + 1], sizes[i : i + 1], targets[i : i + 1], [7 + i]) for i in range(2)]
    for name in ("loss_objectness", "loss_rpn_box_reg", "positives"):
        both = sum(part[name] for part in alone) / (1 if name == "positives" else 2)
        torch.testing.assert_close(both, together[name], atol=1e-6, rtol=1e-6)
    assert detector(images, sizes, targets, [9, 8])["loss_objectness"] != together["loss_objectness"]


def test_an_image_without_proposals_has_losses_and_no_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, (images, sizes, targets) = small_detector(), random_batch((0, 2))
    none = [torch.zeros(0, 4)] * 2
    monkeypatch.setattr(detector.rpn, "filter_proposals", lambda *_: none)
    losses = detector(images, sizes, targets, [0, 1])
    assert all(value.isfinite() for value in losses.values()) and losses["positives"] == 2 and losses["recall"] == 0.5
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    found = detector.eval()(images, sizes)
    assert [image["masks"].shape for image in found] == [(0, 1, 28, 28)] * 2


def test_predictions_that_are_not_finite_make_the_loss_so() -> None:
    detector = small_detector()
    images, sizes, targets = random_batch((2, 3))
    with torch.no_grad():
        detector.rpn.head.bbox_pred.weight.fill_(math.inf)
    assert not detector(images, sizes, targets, [0, 1])["loss"].isfinite()
    assert len(detector.eval()(images, sizes)) == 2


def test_detections_are_selected_by_score_and_class_and_clipped() -> None:
    boxes = torch.tensor([[0.0, 0, 60, 60], [1, 0, 60, 60], [30, 30, 200, 200], [0, 0, 9, math.inf], [5, 5, 5.005, 50]])
    boxes = boxes[:, None].repeat(1, 3, 1)  # of the background and two classes
    scores = torch.tensor([[0.1, 0.9, 0], [0.1, 0.8, 0.1], [0.3, 0, 0.7], [0, 0, 1], [0.4, 0.6, 0.04]])
    found = small_detector().roi_heads._select(boxes, scores, (128, 100))
    # The second row is suppressed for the first class alone; a thin box remains, as in Detectron2.
    assert found[1].tolist() == pytest.approx([0.9, 0.7, 0.6, 0.1])
    assert found[2].tolist() == [1, 2, 1, 2]
    expected = torch.tensor([[0.0, 0, 60, 60], [30, 30, 100, 128], [5, 5, 5.005, 50], [1, 0, 60, 60]])
    assert torch.equal(found[0], expected)


def test_detections_and_proposals_lie_in_the_image(detector: Detector, reference: dict[str, Tensor]) -> None:
    images, sizes, _ = reference_batch(reference)
    detector.eval()
    with torch.no_grad():
        proposals, _ = detector.rpn(detector.backbone(images), sizes)
        found = [image["boxes"] for image in detector(images, sizes)]
    for boxes in (proposals, found):
        for of_image, (height, width) in zip(boxes, sizes, strict=True):
            assert of_image.min() >= 0 and of_image[:, 2].max() <= width and of_image[:, 3].max() <= height
            assert (of_image[:, 2:] > of_image[:, :2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_proposals_under_autocast_are_float32_with_fractions(
    detector: Detector, reference: dict[str, Tensor], dtype: torch.dtype
) -> None:
    images, sizes, targets = reference_batch(reference)
    with torch.autocast("cpu", dtype):
        levels = detector.backbone(images)
        proposals, losses = detector.rpn(levels, sizes, targets)
        assert {level.dtype for level in levels} == {dtype}
        assert all(value.dtype == torch.float32 for value in detector(images, sizes, targets).values())
        found = detector.eval()(images, sizes)
    assert {boxes.dtype for boxes in proposals} == {torch.float32}
    assert losses["loss_objectness"].dtype == torch.float32
    assert all(image[name].dtype == torch.float32 for image in found for name in ("boxes", "scores", "masks"))
    exact = torch.cat(proposals)
    assert (exact != exact.to(dtype).float()).float().mean() > 0.5


def test_a_model_in_bfloat16_has_losses_and_gradients() -> None:
    detector = small_detector().bfloat16()
    images, sizes, targets = random_batch((2, 0))
    losses = detector(images.bfloat16(), sizes, targets, [0, 1])
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


def test_mask_targets_are_hard_and_cell_exact() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[1, 8:16, 4:12] = 1
    boxes = torch.tensor([[0.0, 0, 16, 16], [4, 8, 12, 16]])
    targets = mask_targets(masks, boxes, torch.tensor([1, 1]), 8)
    expected = torch.zeros(8, 8)
    expected[4:, 2:6] = 1
    assert torch.equal(targets[0], expected) and targets[1].all()
    assert set(mask_targets(masks, boxes + 0.7, torch.tensor([1, 1]), 28).unique().tolist()) == {0, 1}
    assert mask_targets(masks[:0], boxes[:0], torch.zeros(0, dtype=torch.int64), 28).shape == (0, 28, 28)


def test_heads_take_those_of_torchvisions_mask_rcnn() -> None:
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91).state_dict()
        model = ModelConfig(arch="cvit_base", image_size=224)
        ours = build_detector(model, detect_config(), 90).state_dict()
    heads = {name: tensor.shape for name, tensor in ours.items() if not name.startswith("backbone.")}
    assert len(heads) == 42 and heads == {name: theirs[name].shape for name in heads}


def test_torchvisions_heads_load_and_compute_the_same() -> None:
    """The modules of ``maskrcnn_resnet50_fpn_v2`` in torchvision's own Mask R-CNN, with other norms and our pooling."""
    torch.manual_seed(3)
    body = nn.Conv2d(3, 16, 1)
    body.out_channels = 16
    theirs = MaskRCNN(
        body,
        rpn_anchor_generator=AnchorGenerator(((32,),) * 5, ((0.5, 1.0, 2.0),) * 5),
        rpn_head=RPNHead(16, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((16, 7, 7), [16] * 4, [32], norm_layer=LayerNorm2d),
        box_predictor=FastRCNNPredictor(32, NUM_CLASSES + 1),
        mask_head=MaskRCNNHeads(16, [16] * 4, 1, norm_layer=LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(16, 16, NUM_CLASSES + 1),
    ).eval()
    for parameter in (*theirs.rpn.parameters(), *theirs.roi_heads.parameters()):
        nn.init.normal_(parameter, std=0.2)
    ours = small_detector().eval()
    loaded = ours.load_state_dict(theirs.state_dict(), strict=False)
    for names in (loaded.missing_keys, loaded.unexpected_keys):
        assert names and all(name.startswith("backbone.") for name in names)
    levels = [torch.randn(2, 16, side, side) for side in (32, 16, 8, 4, 2)]
    pairs = zip(ours.rpn.head(levels), theirs.rpn.head(levels), strict=True)
    assert all(torch.equal(a, b) for mine, other in pairs for a, b in zip(mine, other, strict=True))
    for name in ("box_roi_pool", "mask_roi_pool"):
        setattr(theirs.roi_heads, name, _Pool(getattr(ours.roi_heads, name)))
    corners = torch.rand(2, 40, 2) * 60
    proposals = list(torch.cat([corners, corners + 4 + torch.rand(2, 40, 2) * 60], dim=2))
    sizes = [(SIDE, SIDE), (100, SIDE)]
    with torch.no_grad():
        mine, _ = ours.roi_heads(levels[:4], proposals, sizes)
        other, _ = theirs.roi_heads(dict(enumerate(levels[:4])), proposals, sizes)
    for found, expected in zip(mine, other, strict=True):
        assert len(found["boxes"]) > 20 and torch.equal(found["labels"], expected["labels"])
        for key in ("boxes", "scores", "masks"):
            torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)


class _Pool(nn.Module):
    """This project's pooling with torchvision's arguments."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, levels: dict[int, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        return self.pool(list(levels.values()), boxes)


@pytest.mark.parametrize(("arch", "parameters"), [("cvit_base", 109_704_629), ("vit_base", 110_900_149)])
def test_base_has_the_papers_parameters(arch: str, parameters: int) -> None:
    with torch.device("meta"):
        detector = build_detector(ModelConfig(arch=arch, image_size=224), detect_config(), 80)
    assert sum(parameter.numel() for parameter in detector.parameters()) == parameters
    # Detectron2 has neither box offsets nor a mask of the background.
    assert parameters - (1024 + 1) * 4 - (256 + 1) == {"cvit_base": 109_700_272, "vit_base": 110_895_792}[arch]


def test_the_square_must_be_a_multiple_of_32() -> None:
    with pytest.raises(ValueError, match="the nearest is"):
        small_detector()(torch.zeros(1, 3, SIDE - 16, SIDE), [(SIDE - 16, SIDE)])


def test_number_of_classes_is_kept() -> None:
    assert small_detector().num_classes == NUM_CLASSES
