"""Sets of weights in a checkpoint: copies at any depth, names of wrappers, entries without tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.cli.inspect import describe
from mrmae_ds.errors import UserError
from mrmae_ds.weights.load import LoadReport
from tests.support.released import tiny_vit
from tests.weights.test_names import IMAGES, load_into_vit


def logits(path: Path | str) -> tuple[Tensor, LoadReport]:
    model, report = load_into_vit(Path(path))
    assert report.missing == []
    with torch.no_grad():
        return model(IMAGES), report


def pair() -> tuple[nn.Module, nn.Module]:
    """A model and its average, which differ."""
    model, average = tiny_vit(), tiny_vit()
    nn.init.ones_(average.head.bias)
    return model, average


def assert_logits(path: Path | str, source: nn.Module) -> LoadReport:
    found, report = logits(path)
    with torch.no_grad():
        torch.testing.assert_close(found, source(IMAGES))
    return report


def lit_ema(state: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Any]:
    """As latent diffusion's scripts save both: the average without the dots of its names."""
    content = {f"model.{name}": tensor for name, tensor in state.items()}
    content |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in average.items()}
    return {"state_dict": content | {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}}


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (
            lambda s, e: {"state_dict": s, "callbacks": {"EMA": {"ema_state_dict": e, "decay": 0.99}}},
            ("state_dict", "callbacks.EMA.ema_state_dict"),
        ),
        (lambda s, e: {"model": s, "shadow_params": list(e.values())}, ("model", "shadow_params")),
        (lambda s, e: {"model": s, "averages": [{"decay": 0.9, "params": e}]}, ("model", "averages.0.params")),
        (lit_ema, ("model", "model_ema")),
    ],
    ids=["callback", "list", "dictionaries in a list", "names without dots"],
)
def test_an_average_is_found_wherever_it_is(make: Callable[..., Any], keys: tuple[str, str], tmp_path: Path) -> None:
    (model, average), path = pair(), tmp_path / "x.pth"
    torch.save(make(model.state_dict(), average.state_dict()), path)
    for refuse in (logits, describe):
        with pytest.raises(UserError, match=rf"contains 2 (sets of weights|networks): {keys[0]}, {keys[1]}; choose"):
            refuse(path)
    for key, source in zip(keys, (model, average), strict=True):
        assert_logits(f"{path}#{key}", source)


def test_averages_whose_names_are_not_known_are_reported(tmp_path: Path) -> None:
    model, path = tiny_vit(), tmp_path / "x.pth"
    trained = [tensor for name, tensor in model.state_dict().items() if name != "pos_embed"]
    torch.save({"model": model.state_dict(), "shadow_params": trained}, path)
    with pytest.raises(UserError, match=rf"2 sets of weights: model, shadow_params; choose one: {path}#model$"):
        logits(path)
    with pytest.raises(UserError, match=r"shadow_params holds no layers, only 0, 1, 2"):
        logits(f"{path}#shadow_params")
    assert_logits(f"{path}#model", model)
    torch.save({"model": model.state_dict(), "losses": [torch.tensor(0.1), torch.tensor(0.2)]}, path)
    assert_logits(path, model)


@pytest.mark.parametrize("key", ["optimizer", "optimizer_states", "optim"])
def test_an_optimizers_moments_are_no_weights(key: str, tmp_path: Path) -> None:
    model = tiny_vit()
    moments: Any = {"exp_avg": model.state_dict(), "exp_avg_sq": model.state_dict()}
    for optimizer in (moments, [moments]):
        torch.save({"model": model.state_dict(), key: optimizer}, tmp_path / "x.pth")
        assert_logits(tmp_path / "x.pth", model)


@pytest.mark.parametrize(
    "word", ["_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module."]
)
def test_names_of_wrappers_within_a_model_are_removed(word: str, tmp_path: Path) -> None:
    model = tiny_vit()
    state = {name.replace("blocks.0.", f"blocks.0.{word}"): t for name, t in model.state_dict().items()}
    for prefix in ("", "module.", word):
        torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "x.pth")
        report = assert_logits(tmp_path / "x.pth", model)
        assert any(note.startswith("names without ") and word in note for note in report.notes)


def test_a_tensor_with_and_without_a_wrapper_is_not_merged(tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    torch.save(state | {f"_orig_mod.{name}": tensor + 1 for name, tensor in state.items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"contains 2 networks: \(no prefix\), _orig_mod; choose"):
        logits(tmp_path / "x.pth")


def test_a_choice_may_have_the_prefix_of_wrappers(tmp_path: Path) -> None:
    (model, other), path = pair(), tmp_path / "m.pth"
    networks = {"base_encoder": model, "momentum_encoder": other}
    state = {f"module.{key}.{n}": t for key, net in networks.items() for n, t in net.state_dict().items()}
    torch.save({"state_dict": state}, path)
    save_file(state, tmp_path / "m.safetensors")
    for key, source in networks.items():
        for choice in (key, f"module.{key}"):
            assert_logits(f"{path}#{choice}", source)
            assert_logits(f"{tmp_path}/m.safetensors#{choice}", source)
        assert_logits(f"{path}#state_dict.module.{key}", source)


def test_entries_without_tensors_are_reported_and_left_out(tmp_path: Path) -> None:
    model, path = tiny_vit(), tmp_path / "x.pth"
    torch.save({**model.state_dict(), "epoch": 3, "note": "x"}, path)
    report = assert_logits(path, model)
    assert "2 keys without tensors left out (epoch, note)" in report.notes
    assert "2 keys without tensors left out (epoch, note)" in describe(path)
    torch.save({"model": {**model.state_dict(), "_extra_state": None}}, path)
    assert "1 key without tensors left out (_extra_state)" in assert_logits(path, model).notes
    torch.save({"epoch": 3, "model": {"lr": 0.1}}, path)
    with pytest.raises(UserError, match="no weights found"):
        logits(path)


def test_weights_without_elements_name_deepspeeds_script(tmp_path: Path) -> None:
    state = {name: torch.zeros(0) for name in tiny_vit().state_dict()}
    torch.save({"module": state, "ds_version": "0.19"}, tmp_path / "mp_rank_00_model_states.pt")
    message = r"mp_rank_00_model_states.pt: \d+ weights have no elements, first patch_embed.*zero_to_fp32.py"
    for refuse in (logits, describe):
        with pytest.raises(UserError, match=message):
            refuse(tmp_path / "mp_rank_00_model_states.pt")


def test_dinov2s_chunks_of_blocks(tmp_path: Path) -> None:
    model = tiny_vit()
    for numbers in ((0, 1), (0, 0)):  # of the whole model; of each chunk, which would replace the first block
        state = {
            re.sub(r"blocks\.(\d)\.", lambda found: f"blocks.{found[1]}.{numbers[int(found[1])]}.", name): tensor  # noqa: B023
            for name, tensor in model.state_dict().items()
        }
        torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, tmp_path / "x.pth")
        if numbers == (0, 1):
            assert "names converted from DINOv2's chunks of blocks" in assert_logits(tmp_path / "x.pth", model).notes
            continue
        with pytest.raises(UserError):
            logits(tmp_path / "x.pth")


def test_an_index_names_all_shards(tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    parts = [dict(list(state.items())[:10]), dict(list(state.items())[10:])]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    whole = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index.write_text(json.dumps({"weight_map": whole}))
    logits(index)
    index.write_text(json.dumps({"weight_map": {key: names[0] for key in parts[0]}}))
    with pytest.raises(UserError, match=r"index.json: names 1 of 2 shards, not number 00002; download it again"):
        logits(index)
