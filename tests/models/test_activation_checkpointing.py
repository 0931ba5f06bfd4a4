"""Activation checkpointing changes neither outputs nor gradients."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.models.activation_checkpointing import CheckpointPlan, run_blocks
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from tests.support.reference import perturb, pixel_objective, random_images, random_noise

CVIT = CViTSpec((8, 12, 16), (2, 2, 3), 4, patches=(2, 2, 1))
ALL = CheckpointPlan(conv_stages=1, transformer=1, decoder=1)
SOME = CheckpointPlan(conv_stages=2, transformer=2, decoder=2)


class Counted(nn.Module):
    """x * weight, counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x * self.weight).sin()


@pytest.mark.parametrize(
    ("every", "calls"),
    [(0, [1, 1, 1, 1, 1]), (1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1])],
)
def test_every_nth_block_is_computed_twice(every: int, calls: list[int]) -> None:
    blocks = nn.ModuleList(Counted() for _ in range(5))
    collected: list[Tensor] = []
    out = run_blocks(blocks, torch.ones(2), every, collect=collected)  # no input that needs a gradient
    out.sum().backward()
    assert [block.calls for block in blocks] == calls
    assert collected[-1] is out
    assert len(collected) == 5
    assert all(block.weight.grad is not None for block in blocks)


def test_evaluation_recomputes_nothing() -> None:
    blocks = nn.ModuleList(Counted() for _ in range(3)).eval()
    run_blocks(blocks, torch.ones(2), 1).sum().backward()
    assert [block.calls for block in blocks] == [1, 1, 1]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["mae", "prompting"])
@pytest.mark.parametrize("spec", [CVIT, ViTSpec(16, 3, 4, patch=4)], ids=["cvit", "vit"])
def test_pretraining_is_identical(spec: EncoderSpec, kind: str, plan: CheckpointPlan) -> None:
    torch.manual_seed(0)
    objectives = {
        "pixels": pixel_objective(),
        "mimic": Objective(target="t", tap="encoder", tokens="visible", normalize="layer_norm", weight=0.5),
        "inner": Objective(target="t", tap="encoder", block=1, tokens="visible", normalize="none", weight=0.5),
    }
    fusion = FusionSpec(stages=(1, 2) if isinstance(spec, CViTSpec) else (), blocks=(1,))
    decoder = DecoderSpec(kind=kind, dim=16, depth=3, num_heads=4)
    model = PretrainModel(build_encoder(spec, 16), fusion, decoder, objectives, {"t": 6})
    perturb(model, seed=1)
    visible = choose_visible(random_noise(2, 16, seed=2), (4, 4), 0.25)
    images, targets = random_images(2, 16, seed=3), {"t": torch.randn(2, 16, 6)}

    plain = model(images, visible, targets)["loss"]
    expected = gradients(model, plain)
    model.encoder.checkpointing, model.decoder.checkpoint_every = plan, plan.decoder
    loss = model(images, visible, targets)["loss"]
    assert torch.equal(loss, plain)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(expected) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("spec", [CVIT, ViTSpec(16, 3, 4, patch=4)], ids=["cvit", "vit"])
def test_every_plan_recomputes_its_blocks_and_changes_no_gradient(spec: EncoderSpec) -> None:
    torch.manual_seed(0)
    decoder = DecoderSpec(dim=16, depth=3, num_heads=4)
    model = PretrainModel(build_encoder(spec, 16), FusionSpec(), decoder, {"pixels": pixel_objective()}, {})
    perturb(model, seed=1)
    visible, images = choose_visible(random_noise(2, 16, seed=2), (4, 4), 0.25), random_images(2, 16, seed=3)
    assert model.decoder is not None
    stacks = {"transformer": model.encoder.transformer_blocks, "decoder": model.decoder.blocks}
    if isinstance(model.encoder, CViT):
        stacks |= {"conv_stages 1": model.encoder.blocks1, "conv_stages 2": model.encoder.blocks2}
    calls: Counter[nn.Module] = Counter()
    for block in (block for stack in stacks.values() for block in stack):
        block.register_forward_pre_hook(lambda module, _: calls.update([module]))
    expected = gradients(model, model(images, visible, {})["loss"])
    for conv, transformer, decode in product((0, 1, 2), repeat=3):
        plan = CheckpointPlan(conv, transformer, decode)
        model.encoder.checkpointing, model.decoder.checkpoint_every = plan, decode
        calls.clear()
        found = gradients(model, model(images, visible, {})["loss"])
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        for name, stack in stacks.items():
            every = getattr(plan, name.split()[0])
            twice = [bool(every) and i % every == 0 for i in range(len(stack))]
            assert [calls[block] for block in stack] == [1 + again for again in twice], (plan, name)


@pytest.mark.parametrize("spec", [CVIT, ViTSpec(16, 3, 4, patch=4)], ids=["cvit", "vit"])
def test_finetuning_with_drop_path_is_identical(spec: EncoderSpec) -> None:
    """The recomputation must draw the same random paths."""
    model = build_encoder(spec, 16, num_classes=3, drop_path_rate=0.5).train()
    perturb(model, seed=1)
    images, labels = random_images(4, 16, seed=3), torch.tensor([0, 1, 2, 0])

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(7)
        loss = nn.functional.cross_entropy(model(images), labels)
        return loss, gradients(model, loss)

    plain, expected = run()
    model.checkpointing = ALL
    loss, found = run()
    assert torch.equal(loss, plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
