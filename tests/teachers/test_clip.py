"""CLIP's image tower as a teacher: against open_clip itself and the authors' CLIP."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.teachers import clip
from mrmae_ds.teachers.clip import ClipTeacher

from ..fixtures import load_reference, part
from ..models.reference import perturb
from .samples import normalize, pixels_of

# OpenAI's, from its repository.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}


def vision(layers: int) -> dict[str, int]:
    return {"image_size": 64, "layers": layers, "width": 64, "head_width": 16, "patch_size": 16}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny models under names that open_clip then knows."""
    folder = tmp_path_factory.mktemp("open_clip")
    for name, layers in (("mrmae-test", 3), ("mrmae-test-one-block", 1)):
        config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision(layers), "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def save_model(path: Path, name: str = "mrmae-test", **tensors: Tensor) -> torch.nn.Module:
    """Write random weights in OpenAI's naming, some tensors replaced."""
    model = open_clip.create_model(name).eval()
    perturb(model, seed=3, scale=0.1)
    torch.save(model.state_dict() | tensors, path)
    return model.visual


def build(
    weights: Path | str | None,
    source: str = "mrmae-test",
    features: str = "raw",
    image_size: int = 64,
    dtype: torch.dtype = torch.float32,
    statistics: Any = None,
) -> ClipTeacher:
    return ClipTeacher(
        source,
        None if weights is None else str(weights),
        "teachers.clip",
        image_size=image_size,
        features=features,
        statistics=statistics,
        dtype=dtype,
    )


@pytest.mark.parametrize("features", ["raw", "ln_post", "proj"])
def test_last_block_of_the_authors_clip(features: str, tmp_path: Path) -> None:
    reference = load_reference("clip")
    last = {f"visual.{name}": value for name, value in part(reference, "state/").items()}
    save_model(tmp_path / "clip.pt", "mrmae-test-one-block", **last)
    teacher = build(tmp_path / "clip.pt", "mrmae-test-one-block", features)
    # What enters the last block is the authors' value, whatever the picture.
    teacher.network.ln_pre.register_forward_hook(lambda *_: reference["last_block_input"])
    tokens, importance = teacher(pixels_of(2, 64))
    torch.testing.assert_close(tokens, reference[features], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, reference["importance"], atol=1e-6, rtol=0)
    assert teacher.width == reference[features].shape[-1]


@pytest.mark.parametrize("features", ["raw", "ln_post", "proj"])
def test_whole_tower_is_open_clips(features: str, tmp_path: Path) -> None:
    visual = save_model(tmp_path / "clip.pt")
    pixels = pixels_of(2, 64)
    tokens, importance = build(tmp_path / "clip.pt", features=features)(pixels)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    block = visual.transformer.resblocks[-1]
    block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        pooled = visual(normalize(pixels, CLIP_MEAN, CLIP_STD))
        x = block.ln_1(inputs[0])
        attention = block.attn(x, x, x, need_weights=True)[1]
        expected = outputs[0] if features == "raw" else visual.ln_post(outputs[0])
        if features == "proj":
            expected = expected @ visual.proj
            torch.testing.assert_close(expected[:, 0], pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, attention[:, 0, 1:], atol=1e-6, rtol=1e-5)


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    exact = build(tmp_path / "clip.pt", features="proj")(pixels_of(2, 64))
    teacher = build(tmp_path / "clip.pt", features="proj", dtype=torch.bfloat16)
    rounded = teacher(pixels_of(2, 64))
    assert {p.dtype for p in teacher.network.parameters()} == {torch.bfloat16}
    assert rounded.tokens.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact.tokens, rounded.tokens, dim=-1).min() > 0.99


def test_positions_are_resized_for_another_input(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    teacher = build(tmp_path / "clip.pt", image_size=96)
    assert teacher.grid == (6, 6)
    assert teacher(pixels_of(1, 64)).tokens.shape == (1, 36, 64)


def test_statistics_are_clips_or_the_given(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    teacher = build(tmp_path / "clip.pt")
    assert teacher.mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert teacher.std.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_STD)
    given = build(tmp_path / "clip.pt", statistics=((0.1, 0.1, 0.1), (2.0, 2.0, 2.0)))
    assert given.std.flatten().tolist() == [2.0, 2.0, 2.0]


def test_statistics_are_those_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every CLIP was trained with OpenAI's: open_clip notes each tag's (laion2b's ViT-L-14 has 0.5)."""
    save_model(tmp_path / "clip.pt")
    create = open_clip.create_model
    noted = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setattr(
        clip.open_clip,
        "create_model",
        lambda *args, **kwargs: create(*args, **kwargs, force_preprocess_cfg=noted),
    )
    teacher = build(tmp_path / "clip.pt")
    assert teacher.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert teacher.std.flatten().tolist() == [0.25, 0.25, 0.25]


def test_sha256_is_of_the_file(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    expected = hashlib.sha256((tmp_path / "clip.pt").read_bytes()).hexdigest()
    assert build(tmp_path / "clip.pt").sha256 == expected


def test_openai_weights_need_the_quickgelu_name() -> None:
    with pytest.raises(UserError, match=r"teachers.clip.source: .*the other GELU; use ViT-B-16-quickgelu"):
        build("openai", "ViT-B-16")


@pytest.mark.parametrize("tag", ["metaclip_400m", "dfn2b"])
def test_other_weights_trained_with_quickgelu_need_it_too(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip only warns."""

    def no_download(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("must be refused before anything is downloaded")

    monkeypatch.setattr(clip.open_clip, "create_model", no_download)
    with pytest.raises(UserError, match=r"teachers.clip.source: .*use ViT-B-16-quickgelu"):
        build(tag, "ViT-B-16")


def test_what_it_cannot_be_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "clip.pt")
    with pytest.raises(
        UserError, match=r"teachers.clip.weights: a CLIP teacher needs a tag \(openai\) or a local file"
    ):
        build(None)
    with pytest.raises(
        UserError, match=r"teachers.clip: .*'mrmae-test' with weights '.*absent.pt' could not be loaded"
    ):
        build(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"teachers.clip: open_clip model 'no-such-model'"):
        build(tmp_path / "clip.pt", "no-such-model")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"teachers.clip: .*broken.pt' could not be loaded"):
        build(tmp_path / "broken.pt")
    state = torch.load(tmp_path / "clip.pt", weights_only=True)
    del state["visual.ln_post.weight"]
    torch.save(state, tmp_path / "partial.pt")
    with pytest.raises(UserError, match=r"teachers.clip: .*partial.pt' could not be loaded"):
        build(tmp_path / "partial.pt")


def test_a_name_that_makes_open_clip_ignore_the_weights_is_refused(tmp_path: Path) -> None:
    """A folder without weights gives a random tower and only a log line."""
    save_model(tmp_path / "clip.pt")
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision(1), "text_cfg": TEXT}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"teachers\.clip"):
        build(tmp_path / "clip.pt", f"local-dir:{folder}")
