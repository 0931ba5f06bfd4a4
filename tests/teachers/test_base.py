"""The base class of teachers, and class attention against plain loops and the authors' values."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.functional as tvf
from timm.layers import attention as timm_attention
from torch import Tensor, nn

from mrmae_ds.models.objectives import Objective
from mrmae_ds.teachers.base import LastBlockInput, Teacher, TeacherOutput, TeacherSpec, class_attention, targets_of
from tests.fixtures import load_reference
from tests.support.sample_teachers import MEAN, STD, normalize, pixels_of


class Mirror(Teacher):
    """Tokens are the normalized pixels through one linear layer; remembers its input."""

    def __init__(self, dtype: torch.dtype = torch.float32, mean: tuple[float, ...] = tuple(MEAN)) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        super().__init__(network, TeacherSpec((8, 3), 8, 8, mean, tuple(STD), dtype, sha256="none"))

    def encode(self, images: Tensor) -> TeacherOutput:
        self.seen = images
        tokens = self.network(images.reshape(images.shape[0], 24, 8))
        return TeacherOutput(tokens, tokens[..., 0].abs())


def test_stays_frozen_and_in_eval_mode() -> None:
    teacher = Mirror()
    assert not any(p.requires_grad for p in teacher.parameters())
    parent = nn.ModuleList([teacher])
    assert teacher.train() is teacher
    parent.train()
    assert not any(module.training for module in teacher.modules())
    first, second = teacher(pixels_of(2, 8)), teacher(pixels_of(2, 8))
    assert torch.equal(first.tokens, second.tokens)  # the dropout does nothing


def test_targets_carry_no_gradient() -> None:
    output = Mirror()(pixels_of(2, 8).requires_grad_())
    assert not output.tokens.requires_grad
    assert not output.importance.requires_grad


def test_pixels_are_normalized_with_its_statistics() -> None:
    teacher = Mirror()
    teacher(pixels_of(2, 8))
    torch.testing.assert_close(teacher.seen, normalize(pixels_of(2, 8), MEAN, STD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_computes_in_the_teachers_precision(dtype: torch.dtype) -> None:
    teacher = Mirror(dtype)
    assert {p.dtype for p in teacher.network.parameters()} == {dtype}
    plain = teacher(pixels_of(2, 8))
    assert teacher.seen.dtype == dtype
    assert plain.tokens.dtype == plain.importance.dtype == torch.float32
    with torch.autocast("cpu", torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        inside = teacher(pixels_of(2, 8))
    assert torch.equal(inside.tokens, plain.tokens)


def test_bf16_normalizes_before_it_rounds() -> None:
    teacher = Mirror(torch.bfloat16)
    teacher(pixels_of(2, 8))
    assert torch.equal(teacher.seen, normalize(pixels_of(2, 8), MEAN, STD).bfloat16())


@pytest.mark.parametrize("side", [5, 12])
def test_images_of_another_size_are_resized(side: int) -> None:
    teacher = Mirror()
    teacher(pixels := (pixels_of(2, side) > 0.5).float())  # hard edges overshoot
    bicubic = tvf.resize(pixels, [8, 8], tvf.InterpolationMode.BICUBIC, antialias=True)
    assert bicubic.max() > 1
    torch.testing.assert_close(teacher.seen, normalize(bicubic.clamp(0, 1), MEAN, STD))


def test_statistics_move_with_it_and_are_not_saved() -> None:
    teacher = Mirror()
    assert not any("mean" in name or "std" in name for name in teacher.state_dict())
    assert teacher.to("meta").mean.device.type == "meta"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("prefix", "from_class"), [(0, True), (1, True), (3, True), (0, False), (2, False)])
def test_class_attention_is_the_formula(prefix: int, from_class: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    heads, head_dim, tokens = 2, 3, prefix + 4
    dim = heads * head_dim
    x = torch.randn(1, tokens, dim, generator=generator)
    weight = torch.randn(3 * dim, dim, generator=generator)
    offsets = torch.randn(3 * dim, generator=generator) if bias else None
    found = class_attention(x, weight, offsets, heads, prefix, from_class=from_class)

    def project(token: int, channel: int) -> float:
        value = sum(a * b for a, b in zip(x[0, token].tolist(), weight[channel].tolist(), strict=True))
        return value + (offsets[channel].item() if offsets is not None else 0.0)

    queries = [0] if prefix and from_class else list(range(prefix, tokens))
    received = [0.0] * tokens
    for head in range(heads):
        channels = range(head * head_dim, (head + 1) * head_dim)
        for query in queries:
            scores = [
                sum(project(query, c) * project(key, dim + c) for c in channels) / math.sqrt(head_dim)
                for key in range(tokens)
            ]
            exponentials = [math.exp(score - max(scores)) for score in scores]
            for key in range(tokens):
                received[key] += exponentials[key] / sum(exponentials) / heads / len(queries)
    assert found.shape == (1, 4)
    assert found[0].tolist() == pytest.approx(received[prefix:], abs=1e-6)


def test_class_attention_norms_queries_and_keys_per_head() -> None:
    torch.manual_seed(2)
    layer = timm_attention.Attention(8, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm).eval()
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            norm.weight.copy_(torch.randn(4))
            norm.bias.copy_(torch.randn(4))
    x, seen = torch.randn(2, 6, 8), []
    layer.fused_attn = False
    layer.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        layer(x)
        found = class_attention(x, layer.qkv.weight, None, 2, 1, q_norm=layer.q_norm, k_norm=layer.k_norm)
    torch.testing.assert_close(found, seen[0].mean(1)[:, 0, 1:])


def test_class_attention_is_float32_from_bf16() -> None:
    x, weight = torch.randn(2, 5, 8).bfloat16(), torch.randn(24, 8).bfloat16()
    found = class_attention(x, weight, None, 2, prefix=1)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    torch.testing.assert_close(found, class_attention(x.float(), weight.float(), None, 2, 1), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "norm", "attention", "eps"),
    [
        ("clip", "transformer.resblocks.0.ln_1", "transformer.resblocks.0.attn.in_proj_", 1e-5),
        ("dino", "blocks.0.norm1", "blocks.0.attn.qkv.", 1e-6),
    ],
)
def test_class_attention_equals_the_authors(name: str, norm: str, attention: str, eps: float) -> None:
    reference = load_reference(name)
    state = {key.removeprefix("state/"): value for key, value in reference.items()}
    x = reference["last_block_input"]
    x = nn.functional.layer_norm(x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"], eps)
    found = class_attention(x, state[f"{attention}weight"], state[f"{attention}bias"], 4, prefix=1)
    torch.testing.assert_close(found, reference["importance"], atol=1e-6, rtol=0)


def test_last_block_input_is_kept_during_one_forward_only() -> None:
    block = nn.Linear(2, 2)
    with LastBlockInput(block) as seen:
        block(x := torch.ones(1, 2))
    assert seen.x is x
    block(torch.zeros(1, 2))
    assert seen.x is x
    with pytest.raises(RuntimeError), LastBlockInput(block):
        block(torch.ones(1, 3))
    assert not block._forward_pre_hooks


def test_targets_are_cut_by_layer_and_begin_with_the_class_token_where_it_is_used() -> None:
    def objective(target: str, class_token: bool = False) -> Objective:
        values = {"target": target, "tap": "encoder", "tokens": "visible", "normalize": "none", "weight": 1}
        return Objective(**values, class_token=class_token)

    several, one = Mirror(), Mirror()
    several.layers = (3, 7)
    tokens, class_token, importance = torch.randn(2, 24, 16), torch.randn(2, 1, 16), torch.rand(2, 24)
    outputs = {"several": TeacherOutput(tokens, importance, class_token), "one": TeacherOutput(tokens, importance)}
    objectives = {
        "a": objective("several.7", class_token=True),
        "b": objective("several.3"),
        "c": objective("one"),
        "d": objective("several.7"),
    }
    found = targets_of(objectives, {"several": several, "one": one}, outputs, torch.rand(2, 3, 16, 24), 4)
    assert list(found) == ["several.7", "several.3", "one"]
    assert torch.equal(found["several.7"], torch.cat([class_token, tokens], dim=1)[..., 8:])
    assert torch.equal(found["several.3"], tokens[..., :8])
    assert found["one"] is tokens
