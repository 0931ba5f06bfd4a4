"""CLIP's image tower as a teacher: against open_clip itself and the authors' CLIP."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.cli.inspect import describe_file
from mrmae_ds.errors import UserError
from mrmae_ds.teachers.sources import clip_loading
from mrmae_ds.teachers.sources.clip import ClipTeacher, build_meta
from tests.fixtures import load_reference, part
from tests.support.reference import perturb
from tests.support.released import hugging_face_clip, tiny_clip
from tests.support.sample_teachers import normalize, options, pixels_of, timm_attention

# OpenAI's, from its repository.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16}
TIMM_TOWER = {"image_size": 64, "timm_model_name": "mrmae_test_clip_tower", "timm_pool": "map", "timm_proj": "none"}
TOWERS: dict[str, dict[str, Any]] = {
    "mrmae-test": VISION,
    "mrmae-test-one-block": VISION | {"layers": 1},
    "mrmae-test-qk-norm": VISION | {"qk_norm": True},
    "mrmae-test-average": VISION | {"pool_type": "avg", "no_ln_pre": True},
    "mrmae-test-coca": VISION | {"attentional_pool": True, "attn_pooler_heads": 4},
    "mrmae-test-cosine": VISION | {"scaled_cosine_attn": True},
    "mrmae-test-siglip": TIMM_TOWER,
    "mrmae-test-resnet": VISION | {"layers": [1, 1, 1, 1], "width": 16},
}


def config_of(name: str, quick_gelu: bool = False) -> dict[str, Any]:
    siglip = name.endswith("siglip")
    # A timm tower without projection has the width of its trunk.
    return {
        "embed_dim": 48 if siglip else 24,
        "quick_gelu": quick_gelu,
        "custom_text": siglip,
        "vision_cfg": TOWERS[name],
        "text_cfg": TEXT,
    }


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Register tiny models with open_clip, two of them with weights."""
    from timm.models import register_model
    from timm.models.vision_transformer import _create_vision_transformer

    @register_model
    def mrmae_test_clip_tower(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        size = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4, "class_token": False, "img_size": 64}
        return _create_vision_transformer("vit_base_patch16_siglip_224", pretrained, **size | kwargs)

    folder = tmp_path_factory.mktemp("open_clip")
    for name in TOWERS:
        (folder / f"{name}.json").write_text(json.dumps(config_of(name)))
    (folder / "mrmae-test-quickgelu.json").write_text(json.dumps(config_of("mrmae-test", quick_gelu=True)))
    open_clip.add_model_config(folder)


def build(weights: Path | str | None, source: str = "mrmae-test", **changes: Any) -> ClipTeacher:
    return ClipTeacher(options("clip", source, weights=weights, **changes))


def model_of(name: str = "mrmae-test", *, quick_gelu: bool) -> nn.Module:
    """A whole model with random weights, the same whatever its GELU."""
    torch.manual_seed(0)
    config = config_of(name)
    custom = config.pop("custom_text")
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config | {"quick_gelu": quick_gelu}).eval()
    perturb(model, seed=3, scale=0.1)
    return model


def save_model(path: Path, name: str = "mrmae-test", *, quick_gelu: bool = True) -> nn.Module:
    """Write random weights in OpenAI's naming, in the format that the file's name says; return the tower."""
    model = model_of(name, quick_gelu=quick_gelu)
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model.visual


def gelus(teacher: ClipTeacher) -> set[type[nn.Module]]:
    return {type(block.mlp.gelu) for block in teacher.network.transformer.resblocks}


# ---- what it computes


@pytest.mark.parametrize("features", ["raw", "ln_post", "proj"])
def test_last_block_of_the_authors_clip(features: str, tmp_path: Path) -> None:
    reference = load_reference("clip")
    last = {f"visual.{name}": value for name, value in part(reference, "state/").items()}
    torch.save(model_of("mrmae-test-one-block", quick_gelu=True).state_dict() | last, tmp_path / "clip.pt")
    teacher = build(tmp_path / "clip.pt", "mrmae-test-one-block", features=features, quickgelu=True)
    # What enters the last block is the authors' value, whatever the image.
    teacher.network.ln_pre.register_forward_hook(lambda *_: reference["last_block_input"])
    tokens, importance, _ = teacher(pixels_of(2, 64))
    torch.testing.assert_close(tokens, reference[features], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, reference["importance"], atol=1e-6, rtol=0)
    assert teacher.width == reference[features].shape[-1]


def tower_by_hand(visual: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last block's output [B, 1 + L, C] and its whole attention by torch, averaged over heads."""
    seen: list[Tensor] = []
    block = visual.transformer.resblocks[-1]
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        block.register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    with torch.no_grad():
        visual(normalize(pixels, CLIP_MEAN, CLIP_STD))
        x = block.ln_1(seen[0])
        plain = nn.MultiheadAttention(len(block.ln_1.weight), 4, batch_first=True)
        plain.load_state_dict({n: t for n, t in block.attn.state_dict().items() if not n.startswith("ln_")})
        attention = plain(x, x, x, need_weights=True)[1]
    for handle in handles:
        handle.remove()
    return seen[1], attention


@pytest.mark.parametrize("features", ["raw", "ln_post", "proj"])
def test_whole_tower_is_open_clips(features: str, tmp_path: Path) -> None:
    visual = save_model(tmp_path / "clip.pt")
    pixels = pixels_of(2, 64)
    tokens, importance, class_token = build(tmp_path / "clip.pt", features=features, quickgelu=True)(pixels)
    expected, attention = tower_by_hand(visual, pixels)
    with torch.no_grad():
        pooled = visual(normalize(pixels, CLIP_MEAN, CLIP_STD))
        expected = expected if features == "raw" else visual.ln_post(expected)
        if features == "proj":
            expected = expected @ visual.proj
            torch.testing.assert_close(expected[:, 0], pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(class_token, expected[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, attention[:, 0, 1:], atol=1e-6, rtol=1e-5)


def test_layers_of_a_tower(tmp_path: Path) -> None:
    visual, pixels = save_model(tmp_path / "clip.pt"), pixels_of(2, 64)
    blocks, outputs = visual.transformer.resblocks, []
    for block in blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        visual(normalize(pixels, CLIP_MEAN, CLIP_STD))
    last = build(tmp_path / "clip.pt", quickgelu=True)(pixels)
    found = build(tmp_path / "clip.pt", quickgelu=True, layers=tuple(range(len(blocks))))(pixels)
    expected = torch.cat(outputs, dim=-1)
    assert len(outputs) == len(blocks) > 1
    torch.testing.assert_close(found.tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.class_token, expected[:, :1], atol=1e-5, rtol=1e-4)
    assert torch.equal(found.importance, last.importance)
    with pytest.raises(UserError, match=rf"teachers.clip.layers: .* has no block {len(blocks)}; it has 0 to"):
        build(tmp_path / "clip.pt", quickgelu=True, layers=(len(blocks),))


def test_a_tower_pooled_by_averaging_has_no_trained_class_token(tmp_path: Path) -> None:
    visual = save_model(tmp_path / "clip.pt", "mrmae-test-average")
    teacher = build(tmp_path / "clip.pt", "mrmae-test-average", quickgelu=True)
    tokens, importance, class_token = teacher(pixels_of(2, 64))
    expected, attention = tower_by_hand(visual, pixels_of(2, 64))
    torch.testing.assert_close(tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, attention[:, 1:, 1:].mean(1), atol=1e-6, rtol=1e-5)
    assert class_token is None and not teacher.has_class_token
    assert "on average" in teacher.details["importance"]


def test_normed_queries_and_keys(tmp_path: Path) -> None:
    visual = save_model(tmp_path / "clip.pt", "mrmae-test-qk-norm")
    _, importance, _ = build(tmp_path / "clip.pt", "mrmae-test-qk-norm", quickgelu=True)(pixels_of(2, 64))
    seen: list[Tensor] = []
    attn = visual.transformer.resblocks[-1].attn
    attn.ln_q.register_forward_hook(lambda module, args, output: seen.append(output))
    attn.ln_k.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        visual(normalize(pixels_of(2, 64), CLIP_MEAN, CLIP_STD))
    q, k = seen
    # The library's own kernel gives its weights as the output for values that are the identity.
    identity = torch.eye(17).expand(2, 4, 17, 17)
    attention = nn.functional.scaled_dot_product_attention(q, k, identity).mean(1)
    torch.testing.assert_close(importance, attention[:, 0, 1:], atol=1e-6, rtol=1e-5)


def test_attention_pooling_leaves_raw_tokens_only(tmp_path: Path) -> None:
    visual = save_model(tmp_path / "clip.pt", "mrmae-test-coca")
    tokens, *_ = build(tmp_path / "clip.pt", "mrmae-test-coca", quickgelu=True)(pixels_of(2, 64))
    torch.testing.assert_close(tokens, tower_by_hand(visual, pixels_of(2, 64))[0][:, 1:], atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=r"features: mrmae-test-coca pools by attention .* no ln_post; use raw"):
        build(tmp_path / "clip.pt", "mrmae-test-coca", quickgelu=True, features="ln_post")


@pytest.mark.parametrize("side", [64, 96])
def test_a_tower_of_timms_without_class_token(side: int, tmp_path: Path) -> None:
    visual = save_model(tmp_path / "siglip.safetensors", "mrmae-test-siglip")
    teacher = build(tmp_path / "siglip.safetensors", "mrmae-test-siglip", image_size=side, features="ln_post")
    tokens, importance, _ = teacher(pixels_of(2, side))
    if side != 64:
        visual.set_input_size(side)
    images = normalize(pixels_of(2, side), CLIP_MEAN, CLIP_STD)
    attention = timm_attention(visual.trunk.blocks[-1], visual.trunk.forward_features, images).mean(1)
    with torch.no_grad():
        torch.testing.assert_close(tokens, visual.trunk.forward_features(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, attention.mean(1), atol=1e-6, rtol=1e-4)
    assert (teacher.grid, teacher.width) == ((side // 16, side // 16), 48)
    assert teacher.details["GELU"] == "as timm's mrmae_test_clip_tower has it"
    with pytest.raises(UserError, match=r"clip.features: mrmae-test-siglip projects only its pooled output"):
        build(tmp_path / "siglip.safetensors", "mrmae-test-siglip", features="proj")
    with pytest.raises(UserError, match=r"clip.quickgelu: mrmae-test-siglip is a timm tower"):
        build(tmp_path / "siglip.safetensors", "mrmae-test-siglip", quickgelu=False)


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    exact = build(tmp_path / "clip.pt", features="proj", quickgelu=True)(pixels_of(2, 64))
    teacher = build(tmp_path / "clip.pt", features="proj", quickgelu=True, dtype=torch.bfloat16)
    rounded = teacher(pixels_of(2, 64))
    assert {p.dtype for p in teacher.network.parameters()} == {torch.bfloat16}
    assert rounded.tokens.dtype == torch.float32
    assert nn.functional.cosine_similarity(exact.tokens, rounded.tokens, dim=-1).min() > 0.99


# ---- files of weights


def save_openai_archive(path: Path, *, quick_gelu: bool = True) -> nn.Module:
    """A traced module in half precision with OpenAI's scalars among its buffers; return its tower."""

    class OpenAi(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            for name, child in model.named_children():
                self.add_module(name, child)
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, value in (("input_resolution", 64), ("context_length", 8), ("vocab_size", 32)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, images: Tensor) -> Tensor:
            return self.visual(images)

    model = OpenAi(model_of(quick_gelu=quick_gelu)).eval()
    torch.jit.trace(model, torch.rand(1, 3, 64, 64), check_trace=False).half().save(str(path))
    return model.visual.float()  # what the archive holds: its parameters were rounded in place


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_openai_archive_is_read_and_determines_the_gelu(tmp_path: Path) -> None:
    visual = save_openai_archive(tmp_path / "ViT-B-16.pt")
    for source in ("mrmae-test", "mrmae-test-quickgelu"):
        teacher = build(tmp_path / "ViT-B-16.pt", source)
        assert gelus(teacher) == {QuickGELU}
        tokens, importance, _ = teacher(pixels_of(2, 64))
        expected, attention = tower_by_hand(visual, pixels_of(2, 64))
        torch.testing.assert_close(tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(importance, attention[:, 0, 1:], atol=1e-6, rtol=1e-5)
        assert teacher.details["GELU"] == "QuickGELU, by the archive's code"
    with pytest.raises(UserError, match=r"clip.quickgelu: false in the recipe, but the weights are of QuickGELU"):
        build(tmp_path / "ViT-B-16.pt", quickgelu=False)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_an_archive_whose_code_and_scalars_disagree_is_refused(tmp_path: Path) -> None:
    save_openai_archive(tmp_path / "a.pt", quick_gelu=False)
    with pytest.raises(UserError, match=r"a.pt: contradictory evidence for its GELU"):
        build(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["clip.pt", "clip.bin", "clip.safetensors"])
@pytest.mark.parametrize("layout", ["whole", "wrapped", "tower alone"])
def test_formats_and_layouts_of_files(name: str, layout: str, tmp_path: Path) -> None:
    visual = save_model(tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    if layout == "wrapped":
        state = {f"module.{key}": value for key, value in state.items()}
    elif layout == "tower alone":
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"epoch": 3, "state_dict": state} if layout == "wrapped" else state, tmp_path / name)
    tokens, *_ = build(tmp_path / name, quickgelu=True)(pixels_of(1, 64))
    torch.testing.assert_close(tokens, tower_by_hand(visual, pixels_of(1, 64))[0][:, 1:], atol=1e-5, rtol=1e-4)


def test_half_precision_files_load(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    half = {name: tensor.half() for name, tensor in torch.load(tmp_path / "clip.pt", weights_only=True).items()}
    torch.save(half, tmp_path / "half.pt")
    torch.save({name: tensor.float() for name, tensor in half.items()}, tmp_path / "same.pt")
    found, expected = (build(tmp_path / f"{n}.pt", quickgelu=True, image_size=96) for n in ("half", "same"))
    assert torch.equal(found(pixels_of(1, 96)).tokens, expected(pixels_of(1, 96)).tokens)


def test_positions_are_resized_as_open_clip_does(tmp_path: Path) -> None:
    visual = save_model(tmp_path / "clip.pt")
    teacher = build(tmp_path / "clip.pt", quickgelu=True, image_size=96)
    assert teacher.grid == (6, 6)
    assert teacher(pixels_of(1, 64)).tokens.shape == (1, 36, 64)
    positions = visual.positional_embedding[1:].detach().T.reshape(1, 64, 4, 4)
    expected = nn.functional.interpolate(positions, (6, 6), mode="bicubic", antialias=True)
    found = teacher.network.positional_embedding
    torch.testing.assert_close(found[1:], expected[0].flatten(1).T, atol=1e-6, rtol=1e-5)
    assert torch.equal(found[0], visual.positional_embedding[0])


def test_sha256_is_of_the_file(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    expected = hashlib.sha256((tmp_path / "clip.pt").read_bytes()).hexdigest()
    assert build(tmp_path / "clip.pt", quickgelu=True).sha256 == expected


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    """Refuse a file with more blocks, although its first blocks would fit."""
    state = model_of(quick_gelu=True).state_dict()
    torch.save({n: t for n, t in state.items() if n != "visual.ln_post.weight"}, tmp_path / "partial.pt")
    with pytest.raises(UserError, match=r"partial.pt: tensors of the image tower are missing: 1 \(visual.ln_post.w"):
        build(tmp_path / "partial.pt", quickgelu=True)
    torch.save(state, tmp_path / "deep.pt")
    with pytest.raises(UserError, match=r"the model has no visual.transformer.resblocks.1.attn.in_proj_bias \(24 such"):
        build(tmp_path / "deep.pt", "mrmae-test-one-block", quickgelu=True)
    torch.save(state | {"visual.proj": torch.zeros(64, 5)}, tmp_path / "wide.pt")
    with pytest.raises(UserError, match=r"of another shape is visual.proj"):
        build(tmp_path / "wide.pt", quickgelu=True)


# ---- towers that open_clip has no name for


def save_custom(folder: Path, layout: str = "whole", lost: str = "nothing") -> nn.Module:
    """Write the weights of a tower of unknown sizes, with Hugging Face's configurations beside it; return the tower."""
    model = tiny_clip(width=48, head_width=12)
    tensors = {name: tensor for name, tensor in hugging_face_clip(model).items() if lost not in name}
    if layout == "vision alone":  # as CLIPVisionModel has it
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    vision: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 4, "hidden_act": "gelu"}
    config = vision if layout == "vision alone" else {"vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": CLIP_MEAN, "image_std": CLIP_STD}))
    return model.visual


@pytest.mark.parametrize("layout", ["whole", "vision alone"])
def test_a_tower_without_a_name_is_built_from_its_file(layout: str, tmp_path: Path) -> None:
    visual = save_custom(tmp_path, layout)
    path = tmp_path / "model.safetensors"
    advice = dict(describe_file(path))["use it"]
    assert advice == f"as a teacher: teachers.NAME={{kind: clip, source: file, weights: {path}}}"
    teacher = build(path, "file", image_size=32)
    assert teacher.details["heads"] == "4, by config.json beside it"
    pixels = pixels_of(2, 32)
    x, attention = tower_by_hand(visual, pixels)
    torch.testing.assert_close(teacher(pixels).tokens, x[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(teacher(pixels).importance, attention[:, 0, 1:], atol=1e-6, rtol=1e-5)
    with torch.device("meta"):
        meta = build_meta(options("clip", "file", weights=path, image_size=32))
    assert (meta.grid, meta.width) == (teacher.grid, teacher.width)
    if layout == "whole":
        assert build(path, "file", image_size=32, features="proj").width == 16
    else:
        with pytest.raises(UserError, match=r"is not an image tower of OpenAI's form: it lacks visual.proj"):
            build(path, "file", image_size=32, features="proj")


def test_what_check_says_of_a_tower_is_what_loading_says(tmp_path: Path) -> None:
    """Compare the advice on a tower with loading: heads that are unknown or others, other tensors, statistics."""
    path = tmp_path / "model.safetensors"
    save_custom(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert dict(describe_file(path))["input"] == "not recorded; a teacher needs the keys mean and std"
    with pytest.raises(UserError, match=r"teachers.clip.mean: the statistics of the input"):
        build(path, "file", image_size=32)
    for lost, message in (("pre_layrnorm", "it lacks visual.ln_pre"), ("heads", "does not record its number of at")):
        save_custom(tmp_path, lost=lost)
        if lost == "heads":
            (tmp_path / "config.json").unlink()
        with pytest.raises(UserError, match=message) as refused:
            build(path, "file", image_size=32, quickgelu=None)
        refusal = str(refused.value).removeprefix("teachers.clip.weights: ")
        assert dict(describe_file(path))["refused yet"] == f"teachers of kind clip: {refusal}"


def test_a_named_tower_is_advised_and_its_heads_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path)
    assert "source: mrmae-test, weights" in dict(describe_file(path))["use it"]
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 8}))
    with pytest.raises(UserError, match=r"has 8 attention heads \(by config.json beside it\), mrmae-test has 4"):
        build(path, quickgelu=True)
    assert "source: file, weights" in dict(describe_file(path))["use it"]


# ---- which GELU


def test_file_without_gelu_evidence_needs_the_recipe_key(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    for source in ("mrmae-test", "mrmae-test-quickgelu"):  # the name has no effect
        with pytest.raises(UserError, match=r"teachers.clip.quickgelu: .*clip.pt does not record the GELU"):
            build(tmp_path / "clip.pt", source)
        assert gelus(build(tmp_path / "clip.pt", source, quickgelu=True)) == {QuickGELU}
        plain = build(tmp_path / "clip.pt", source, quickgelu=False)
        assert gelus(plain) == {nn.GELU}
        assert plain.details["GELU"] == "GELU, by the recipe"


@pytest.mark.parametrize("quick", [True, False])
def test_configuration_beside_the_file_determines_the_gelu(quick: bool, tmp_path: Path) -> None:
    save_model(tmp_path / "clip.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config_of("mrmae-test", quick)}))
    assert gelus(build(tmp_path / "clip.safetensors")) == {QuickGELU if quick else nn.GELU}
    with pytest.raises(UserError, match=r"clip.quickgelu: .* in the recipe, but the weights .*config.json beside"):
        build(tmp_path / "clip.safetensors", quickgelu=not quick)


@pytest.fixture
def tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register two tags of the tiny model, one per GELU, whose download is a local file."""
    save_model(tmp_path / "tag.pt")
    known: dict[str, dict[str, Any]] = {
        "openai": {"quick_gelu": True, "mean": CLIP_MEAN, "std": CLIP_STD},
        "laion": {"mean": (0.5,) * 3, "std": (0.25,) * 3},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "mrmae-test", known)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "mrmae-test-quickgelu", {"openai": known["openai"]})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(tmp_path / "tag.pt"))


@pytest.mark.usefixtures("tags")
@pytest.mark.filterwarnings("error:QuickGELU mismatch")
@pytest.mark.parametrize("source", ["mrmae-test", "mrmae-test-quickgelu"])
def test_the_tag_determines_the_gelu_for_any_name(source: str) -> None:
    openai, laion = build("openai", source), build("laion", source)
    assert gelus(openai) == {QuickGELU}
    assert gelus(laion) == {nn.GELU}
    assert openai.details["GELU"] == "QuickGELU, by open_clip's entry for openai"
    assert laion.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert laion.std.flatten().tolist() == [0.25, 0.25, 0.25]
    assert openai.mean.flatten().tolist() == pytest.approx(CLIP_MEAN)
    assert len(openai.sha256) == 64
    with pytest.raises(UserError, match=r"clip.quickgelu: true in the recipe, but the weights are of GELU"):
        build("laion", source, quickgelu=True)


@pytest.mark.parametrize(
    ("source", "tag", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B-16-quickgelu", "openai", True),
        ("ViT-B-16", "metaclip_400m", True),
        ("ViT-B-16", "dfn2b", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", False),
    ],
)
def test_tags_of_open_clip(source: str, tag: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def create(name: str, **kwargs: Any) -> None:
        asked.append({"name": name, **kwargs})
        raise RuntimeError("nothing is downloaded here")

    monkeypatch.setattr(clip_loading.open_clip, "create_model", create)
    with pytest.raises(UserError, match="nothing is downloaded here"):
        build(tag, source)
    gelu = {"force_quick_gelu": True} if quick else {"quick_gelu": False}
    expected = {"name": "ViT-B-16", "pretrained": tag, "force_image_size": 64, "require_pretrained": True}
    assert asked == [expected | gelu]


# ---- sources that name their files, statistics, mistakes


def test_a_local_folder_is_a_source(tmp_path: Path) -> None:
    visual = save_model(tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": config_of("mrmae-test", True), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    teacher = build(None, f"local-dir:{tmp_path}")
    assert gelus(teacher) == {QuickGELU}
    assert teacher.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    std, mean = torch.tensor(CLIP_STD).view(3, 1, 1), torch.tensor(CLIP_MEAN).view(3, 1, 1)
    seen = (pixels_of(1, 64) - 0.5) / 0.25 * std + mean
    tokens = teacher(pixels_of(1, 64)).tokens
    torch.testing.assert_close(tokens, tower_by_hand(visual, seen)[0][:, 1:], atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match=r"clip.weights: local-dir:.* names its files itself; remove the key"):
        build(tmp_path / "open_clip_model.safetensors", f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"teachers.clip: open_clip model 'local-dir:.* could not be loaded"):
        build(None, f"local-dir:{tmp_path}")
    with pytest.raises(UserError, match=r"teachers.clip: open_clip model 'local-dir:.*nowhere' .*could not be loaded"):
        build(None, f"local-dir:{tmp_path / 'nowhere'}")


def test_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"'hf-hub:someone/model' .*could not be loaded .*no route to the hub"):
        build(None, "hf-hub:someone/model")


def test_statistics_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics come from the file's origin, from all weights of that name, from the recipe, or are open_clip's."""
    save_model(tmp_path / "clip.pt")
    teacher = build(tmp_path / "clip.pt", quickgelu=True)
    assert teacher.mean.flatten().tolist() == pytest.approx(CLIP_MEAN)
    assert teacher.std.flatten().tolist() == pytest.approx(CLIP_STD)
    assert teacher.details["statistics"] == "open_clip's default, since it has no weights of mrmae-test"
    known = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "mrmae-test", {"a": known, "b": known})
    teacher = build(tmp_path / "clip.pt", quickgelu=True)
    assert teacher.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert teacher.details["statistics"] == "all of open_clip's weights of mrmae-test"
    other = {"mean": (0.4, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "mrmae-test", {"a": known, "b": other})
    with pytest.raises(UserError, match=r"teachers.clip.mean: the statistics .* are not known; give mean and std"):
        build(tmp_path / "clip.pt", quickgelu=True)
    build(tmp_path / "clip.pt", quickgelu=True, statistics=((0.1, 0.1, 0.1), (2.0, 2.0, 2.0)))
    config = {"model_cfg": config_of("mrmae-test"), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    teacher = build(tmp_path / "clip.pt")
    assert teacher.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    given = build(tmp_path / "clip.pt", statistics=((0.1, 0.1, 0.1), (2.0, 2.0, 2.0)))
    assert given.std.flatten().tolist() == [2.0, 2.0, 2.0]
    assert "statistics" not in given.details


def test_errors_name_the_key(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    for match, weights, source in (
        (r"clip.weights: a CLIP teacher needs a tag \(openai\) or a local file", None, "mrmae-test"),
        (r"absent.pt is neither a file nor a tag of mrmae-test \(its tags: none\)", "absent.pt", "mrmae-test"),
        (r"absent.pt is neither .* \(its tags: openai, laion400m_e31", "absent.pt", "ViT-B-16"),
        (r"clip.source: open_clip has no model 'no-such-model'", "clip.pt", "no-such-model"),
        (r"clip.weights: .*broken.pt: not a readable weights file", "broken.pt", "mrmae-test"),
    ):
        with pytest.raises(UserError, match=rf"teachers.*{match}"):
            build(weights and tmp_path / weights, source, quickgelu=True)
    with pytest.raises(UserError, match=r"clip.image_size: patches of 16 do not tile 70 pixels; use 64,"):
        build(tmp_path / "clip.pt", quickgelu=True, image_size=70)
    with pytest.raises(UserError, match=r"clip.stage: mrmae-test is a ViT"):
        build(tmp_path / "clip.pt", quickgelu=True, stage=1)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("mrmae-test-resnet", "is a ResNet, .* choose the weights of a ViT-"),
        ("mrmae-test-cosine", "has cosine attention"),
    ],
)
def test_refuses_unsupported_towers(source: str, match: str, tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt", source)
    with pytest.raises(UserError, match=rf"teachers.clip.(source|weights): .*{match}"):
        build(tmp_path / "clip.pt", source, quickgelu=True)
