"""Configurations beside a weights file: the right values are taken, contradictions are refused by file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mrmae_ds.cli.inspect import describe
from mrmae_ds.errors import UserError
from mrmae_ds.weights.resolve import model_metadata, resolve
from tests.support.released import hugging_face_clip, hugging_face_vit, tiny_clip, tiny_vit

HALF = [0.5, 0.5, 0.5]
VIT = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "patch_size": 8}
CLIP_VISION = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 8}
PROCESSOR = {"image_mean": HALF, "image_std": HALF, "do_normalize": True, "rescale_factor": 0.00392156862745098}


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def classifier(folder: Path, num_classes: int = 3) -> Path:
    torch.save(tiny_vit(num_classes=num_classes).state_dict(), folder / "x.pth")
    write(folder, "preprocessor_config.json", PROCESSOR)
    return folder / "x.pth"


def names_of(path: Path) -> list[str]:
    names: list[str] = model_metadata(resolve(path))["class_names"]
    return names


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
        {"id2label": ["a", "b", "c"]},
        {"label_names": ["a", "b", "c"], "label_descriptions": {"a": "an A"}},
        {"label_names": {"0": "a", "1": "b", "2": "c"}},
        {"pretrained_cfg": {"label_names": ["a", "b", "c"]}},
        {"pretrained_cfg": {"labels": ["a", "b", "c"]}},  # of older versions of timm
    ],
    ids=str,
)
def test_class_names_of_every_configuration(config: dict[str, Any], tmp_path: Path) -> None:
    path = classifier(tmp_path)
    write(tmp_path, "config.json", config | {"num_attention_heads": 3})
    assert names_of(path) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("key", ["id2label", "label_names"])
def test_names_of_another_number_than_the_outputs_are_refused(key: str, count: int, tmp_path: Path) -> None:
    path = classifier(tmp_path)
    write(tmp_path, "config.json", {key: {str(number): f"class {number}" for number in range(count)}})
    with pytest.raises(
        UserError, match=rf"x.pth: {key} in config.json beside it names {count} classes, .* 3 outputs; correct"
    ):
        resolve(path)
    torch.save(tiny_vit(num_classes=0).state_dict(), path)  # without a head nothing is named
    assert resolve(path).identity.kind == "encoder"


def test_imagenets_names_are_assumed_only_without_others_and_are_reported(tmp_path: Path) -> None:
    path = classifier(tmp_path, 1000)
    write(tmp_path, "config.json", {"num_attention_heads": 3, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    assert names_of(path)[0] == "n01440764"
    assert "its 1000 classes are assumed to be ImageNet-1K's: no names are recorded" in describe(path)
    own = [f"plant {number}" for number in range(1000)]
    write(tmp_path, "config.json", {"num_attention_heads": 3, "label_names": own})
    assert names_of(path) == own
    assert "assumed" not in describe(path)
    write(tmp_path, "config.json", {"id2label": {str(number): own[number] for number in range(999)}})
    with pytest.raises(UserError, match="names 999 classes, but its head has 1000 outputs"):
        resolve(path)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_one_shard_is_no_shallower_model(name: str, tmp_path: Path) -> None:
    state = {n: t for n, t in tiny_vit().state_dict().items() if not n.startswith("blocks.1.")}
    write_file(tmp_path / name, state)
    with pytest.raises(UserError, match=rf"{name}: one shard of several; download all .*safetensors.index.json"):
        resolve(tmp_path / name)
    whole = tmp_path / name.replace("00002.", "00001.")
    write_file(whole, tiny_vit().state_dict())
    assert resolve(whole).identity.sizes["depth"] == 2
    renamed = tmp_path / f"x{whole.suffix}"
    write_file(renamed, state)
    write(tmp_path, "config.json", VIT)
    with pytest.raises(UserError, match=r"gives num_hidden_layers 2, but its tensors have 1; it is a part of the mod"):
        resolve(renamed)


def write_file(path: Path, state: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 12}, "config.json beside it gives num_hidden_layers 12, but its tensors have 2"),
        ({"patch_size": 16}, "config.json beside it gives patch_size 16, but its tensors have 8"),
        ({"patch_size": [16, 16]}, r"config.json beside it gives patch_size \[16, 16\], but its tensors have 8"),
        ({"model_args": {"depth": 3}}, "config.json beside it gives depth 3, but its tensors have 2"),
        ({"model_args": {"patch_size": 4}}, "config.json beside it gives patch_size 4, but its tensors have 8"),
    ],
    ids=str,
)
def test_recorded_sizes_are_compared(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(hugging_face_vit(tiny_vit().state_dict()), tmp_path / "x.pth")
    write(tmp_path, "config.json", VIT | {"patch_size": [8, 8]})
    assert resolve(tmp_path / "x.pth").identity.origin.num_heads == 3
    write(tmp_path, "config.json", VIT | change)
    with pytest.raises(UserError, match=rf"x.pth: {message}; it is a part .* or config.json is another model's"):
        resolve(tmp_path / "x.pth")
    write(tmp_path, "config.json", VIT | change | {"hidden_size": 768})  # of another file
    assert resolve(tmp_path / "x.pth").identity.origin.num_heads is None


def test_recorded_sizes_of_a_clip_are_those_of_its_image_tower(tmp_path: Path) -> None:
    torch.save(hugging_face_clip(tiny_clip()), tmp_path / "x.pth")
    config = {"num_hidden_layers": 7, "text_config": {"num_hidden_layers": 5}, "vision_config": CLIP_VISION}
    write(tmp_path, "config.json", config)
    assert resolve(tmp_path / "x.pth").identity.origin.num_heads == 4
    write(tmp_path, "config.json", config | {"vision_config": CLIP_VISION | {"num_hidden_layers": 3}})
    with pytest.raises(UserError, match="gives num_hidden_layers 3, but its tensors have 2"):
        resolve(tmp_path / "x.pth")
    (tmp_path / "config.json").unlink()
    torch.save(tiny_clip().state_dict(), tmp_path / "x.pth")
    vision = {"width": 64, "layers": 2, "patch_size": 8, "head_width": 16}
    write(tmp_path, "open_clip_config.json", {"model_cfg": {"vision_cfg": vision}})
    assert resolve(tmp_path / "x.pth").identity.origin.num_heads == 4
    write(tmp_path, "open_clip_config.json", {"model_cfg": {"vision_cfg": vision | {"layers": 12}}})
    with pytest.raises(UserError, match=r"open_clip_config.json beside it gives layers 12, but its tensors have 2"):
        resolve(tmp_path / "x.pth")


def test_an_image_processor_that_does_not_normalize(tmp_path: Path) -> None:
    path = classifier(tmp_path)
    assert resolve(path).identity.origin.statistics == ((0.5,) * 3, (0.5,) * 3)
    for config in (PROCESSOR | {"do_normalize": False}, {"do_normalize": False}):
        write(tmp_path, "preprocessor_config.json", config)
        assert resolve(path).identity.origin.statistics == ((0.0,) * 3, (1.0,) * 3)
    write(tmp_path, "preprocessor_config.json", {"do_normalize": True})
    assert resolve(path).identity.origin.statistics is None


@pytest.mark.parametrize(
    "change",
    [
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": None},
        {"rescale_offset": True},
        {"offset": True},
        {"do_flip_channel_order": True},
    ],
    ids=str,
)
def test_an_image_processor_of_another_input_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = classifier(tmp_path)
    write(tmp_path, "preprocessor_config.json", PROCESSOR | change)
    ((key, value),) = change.items()
    with pytest.raises(UserError, match=rf"x.pth: preprocessor_config.json beside it has {key} {value}, so the input"):
        resolve(path)


@pytest.mark.parametrize("layer", [{"act_layer": "quick_gelu"}, {"act_layer": "gelu_tanh"}, {"norm_layer": "rmsnorm"}])
def test_another_activation_or_norm_of_timms_is_refused(layer: dict[str, str], tmp_path: Path) -> None:
    path = classifier(tmp_path)
    usual = {"num_heads": 3, "act_layer": "gelu", "norm_layer": "layernorm"}
    write(tmp_path, "config.json", {"model_args": usual, "label_names": ["a", "b", "c"]})
    assert names_of(path) == ["a", "b", "c"]
    write(tmp_path, "config.json", {"model_args": usual | layer})
    ((key, value),) = layer.items()
    with pytest.raises(UserError, match=rf"x.pth: has the {key} {value} \(model_args in config.json\), and encoders"):
        resolve(path)
    torch.save(tiny_vit(pre_norm=True).state_dict(), path)  # which no encoder here has anyway: a teacher of timm's
    assert resolve(path).identity.extras


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_hugging_face_clip_has_the_layers_of_open_clips(act: str, epsilon: float, tmp_path: Path) -> None:
    torch.save(hugging_face_clip(tiny_clip()), tmp_path / "x.pth")
    usual = CLIP_VISION | {"hidden_act": act, "layer_norm_eps": epsilon}
    write(tmp_path, "config.json", {"vision_config": usual})
    assert resolve(tmp_path / "x.pth").problem == ""
    for change, message in (
        ({"hidden_act": "gelu_pytorch_tanh"}, r"x.pth: has the activation gelu_pytorch_tanh \(hidden_act .*quick_gelu"),
        ({"layer_norm_eps": 0.01}, r"x.pth: has layer norms of epsilon 0.01 \(layer_norm_eps in config.json\)"),
    ):
        write(tmp_path, "config.json", {"vision_config": usual | change})
        with pytest.raises(UserError, match=message):
            resolve(tmp_path / "x.pth")


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    path = classifier(tmp_path)
    config = json.dumps({"num_attention_heads": 3, "label_names": ["a", "b", "c"]})
    (tmp_path / "config.json").write_text(config, encoding="utf-8-sig")  # with a mark of the byte order
    assert names_of(path) == ["a", "b", "c"]
    for name in ("config.json", "preprocessor_config.json", "open_clip_config.json"):
        for text in (config[:-1] + ",}", "[]"):
            (tmp_path / name).write_text(text)
            with pytest.raises(UserError, match=rf"{name}: not (JSON \(.*line 1|a JSON object).*; correct or"):
                resolve(path)
        (tmp_path / name).unlink()
