from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.errors import UserError
from mrmae_ds.models.checkpointing import CheckpointPlan
from mrmae_ds.training.engine_config import (
    EngineConfig,
    accumulation_steps,
    load_engine_config,
    validate_sections,
)

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
SMALLEST = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0}
Load = Callable[..., EngineConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The smallest valid engine config with changes; a key given as None is left out."""

    def loaded(**changes: Any) -> EngineConfig:
        path = tmp_path / "engine.json"
        path.write_text(json.dumps({k: v for k, v in (SMALLEST | changes).items() if v is not None}))
        return load_engine_config(path)

    return loaded


def _error(load: Load, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(**changes)
    message = str(caught.value)
    assert "engine.json: " in message and "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda path: path.name)
def test_every_engine_config_of_the_project_is_good(path: Path) -> None:
    config = load_engine_config(path)
    validate_sections(config)
    assert config.zero_stage == 3
    assert config.declared_accumulation is None
    assert path.with_suffix(".yaml").is_file()


def test_the_smallest_one(load: Load) -> None:
    config = load()
    assert (config.micro_batch, config.declared_accumulation, config.zero_stage) == (4, None, 0)
    assert config.model_dtype == torch.float32
    assert config.checkpointing == CheckpointPlan(0, 0, 0)


def test_what_is_read_from_it(load: Load) -> None:
    config = load(
        gradient_accumulation_steps=3,
        zero_optimization={"stage": 2},
        bf16={"enabled": True},
        activation_checkpointing={"conv_stages": "all", "transformer": 2, "decoder": "none"},
    )
    assert (config.declared_accumulation, config.zero_stage) == (3, 2)
    assert config.model_dtype == torch.bfloat16
    assert config.checkpointing == CheckpointPlan(conv_stages=1, transformer=2, decoder=0)
    assert load(bf16={"enabled": False}).model_dtype == torch.float32


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text('{"a": 1')
    with pytest.raises(UserError, match=r"tin\.json: no such file; did you mean 'tiny\.json'"):
        load_engine_config(tmp_path / "tin.json")
    with pytest.raises(UserError, match=r"tiny\.json: .*line 1"):
        load_engine_config(tmp_path / "tiny.json")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("bfloat16", "bf16"),
    ],
)
def test_an_unknown_key_names_the_nearest(load: Load, key: str, nearest: str) -> None:
    assert f"{key}: unknown key; did you mean {nearest!r}?" in _error(load, **{key: {}})


@pytest.mark.parametrize("key", ["train_batch_size", "optimizer", "scheduler"])
def test_what_belongs_to_the_recipe(load: Load, key: str) -> None:
    assert f"{key} does not belong here; it is the recipe's stages.STAGE." in _error(load, **{key: {}})


def test_half_precision_is_not_supported(load: Load) -> None:
    assert "fp16 does not belong here" in _error(load, fp16={"enabled": True})


def test_clipping_must_be_stated(load: Load) -> None:
    assert "gradient_clipping is required" in _error(load, gradient_clipping=None)


@pytest.mark.parametrize("value", [None, "auto"])
def test_the_micro_batch_must_be_stated(load: Load, value: str | None) -> None:
    assert "train_micro_batch_size_per_gpu is required" in _error(load, train_micro_batch_size_per_gpu=value)


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -1, True, False, 4.0, "4", [4]])
def test_counts_are_whole_numbers_above_0(load: Load, key: str, value: Any) -> None:
    assert f"{key} must be a whole number above 0, got {value!r}" in _error(load, **{key: value})


def test_an_automatic_accumulation_is_derived(load: Load) -> None:
    assert load(gradient_accumulation_steps="auto").declared_accumulation is None


@pytest.mark.parametrize("value", [{"stage": 4}, {"stage": -1}, {"stage": "3"}, {"stage": None}, {"stage": True}])
def test_zero_stages_are_0_to_3(load: Load, value: Any) -> None:
    assert "zero_optimization.stage must be 0, 1, 2 or 3" in _error(load, zero_optimization=value)


@pytest.mark.parametrize("part", ["conv_stages", "transformer", "decoder"])
@pytest.mark.parametrize("value", ["some", -1, True, 1.5, None, [1]])
def test_activation_checkpointing_is_all_none_or_every_nth(load: Load, part: str, value: Any) -> None:
    message = _error(load, activation_checkpointing={part: value})
    assert f'activation_checkpointing.{part} must be "all", "none" or n' in message
    assert message.endswith(f"got {value!r}")


def test_an_unknown_key_of_activation_checkpointing(load: Load) -> None:
    assert "'transformer'" in _error(load, activation_checkpointing={"transfomer": "all"})


@pytest.mark.parametrize("section", [{"bf16": {"enable": True}}, {"torch_autocast": {"enabled": True, "dtyp": "x"}}])
def test_an_unknown_key_of_another_section(load: Load, section: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        validate_sections(load(**section))


@pytest.mark.parametrize("section", [{"bf16": True}, {"activation_checkpointing": "all"}, {"zero_optimization": 3}])
def test_a_section_that_is_a_value(load: Load, section: dict[str, Any]) -> None:
    _error(load, **section)


@pytest.mark.parametrize("value", [-1.0, "one", [1.0], True])
def test_clipping_is_a_number(load: Load, value: Any) -> None:
    assert "gradient_clipping" in _error(load, gradient_clipping=value)


def test_deepspeeds_own_models_judge_the_zero_section(load: Load) -> None:
    validate_sections(load(zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0}))
    with pytest.raises(UserError, match=r"zero_optimization\.overlap_com: .*; did you mean 'overlap_comm'\?"):
        validate_sections(load(zero_optimization={"stage": 3, "overlap_com": True}))
    with pytest.raises(UserError, match=r"zero_optimization\.offload_optimizer\.device: .*'cpu'"):
        validate_sections(load(zero_optimization={"stage": 3, "offload_optimizer": {"device": "gpu"}}))


def test_the_nearest_zero_key_is_one_as_it_is_written(load: Load) -> None:
    with pytest.raises(UserError, match="'stage3_prefetch_bucket_size'"):
        validate_sections(load(zero_optimization={"stage": 3, "stage3_prefetch_bucket_siz": 1}))


def test_deepspeed_gets_its_own_keys_and_the_accumulation(load: Load) -> None:
    section = {"transformer": "all", "conv_stages": 2, "decoder": "none"}
    config = load(activation_checkpointing=section | {"partition_activations": True}, zero_optimization={"stage": 3})
    before = json.dumps(config.raw)
    given = config.for_deepspeed(6)
    assert given["gradient_accumulation_steps"] == 6
    assert given["activation_checkpointing"] == {"partition_activations": True}
    assert given["zero_optimization"] == {"stage": 3}
    assert given["train_micro_batch_size_per_gpu"] == 4 and given["gradient_clipping"] == 0.0
    assert given["steps_per_print"] > 10**9
    assert json.dumps(config.raw) == before
    assert "activation_checkpointing" not in load(activation_checkpointing=section).for_deepspeed(1)
    assert load(steps_per_print=10).for_deepspeed(1)["steps_per_print"] == 10


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(4, 4, 1, 1), (1024, 4, 1, 256), (1024, 64, 16, 1), (1024, 8, 16, 8), (48, 8, 3, 2), (1, 1, 1, 1), (30, 5, 2, 3)],
)
def test_the_accumulation_makes_up_the_batch(load: Load, batch: int, micro: int, processes: int, expected: int) -> None:
    config = load(train_micro_batch_size_per_gpu=micro)
    assert accumulation_steps(config, batch, processes, "r.yaml") == expected
    declared = load(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=expected)
    assert accumulation_steps(declared, batch, processes, "r.yaml") == expected


def _suggested(message: str, after: str) -> list[int]:
    found = re.search(rf"{after} (\d+)(?: or (\d+))?", message.split("the nearest that fit:")[1])
    return [int(number) for number in found.groups() if number] if found else []


@pytest.mark.parametrize(
    ("batch", "micro", "processes"),
    [(1000, 16, 4), (1024, 48, 8), (100, 7, 2), (6, 16, 2), (50, 16, 2), (97, 4, 1), (64, 16, 3), (5, 8, 4)],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(
    load: Load, batch: int, micro: int, processes: int
) -> None:
    config = load(train_micro_batch_size_per_gpu=micro)
    with pytest.raises(UserError) as caught:
        accumulation_steps(config, batch, processes, "r.yaml")
    message = str(caught.value)
    assert f"batch_size {batch}" in message and "in r.yaml" in message and str(micro * processes) in message
    fitting = [size for size in range(1, 3 * batch + 2 * micro * processes) if size % (micro * processes) == 0]
    below, above = [s for s in fitting if s < batch], [s for s in fitting if s > batch]
    assert _suggested(message, "batch_size") == [*below[-1:], above[0]]
    micros = [m for m in range(1, batch + 1) if batch % (m * processes) == 0]
    found = _suggested(message, "train_micro_batch_size_per_gpu")
    assert len(found) == min(2, len(micros)) and set(found) <= set(micros)
    for other in set(micros) - set(found):
        assert all(abs(other - micro) >= abs(m - micro) for m in found)
    for mended in found:
        assert accumulation_steps(load(train_micro_batch_size_per_gpu=mended), batch, processes, "r.yaml") >= 1


def test_an_accumulation_for_another_number_of_processes(load: Load) -> None:
    config = load(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=2)
    assert accumulation_steps(config, 128, 8, "r.yaml") == 2
    with pytest.raises(UserError, match=r"meant for 8 processes, but 4 are running.*it becomes 4"):
        accumulation_steps(config, 128, 4, "r.yaml")
    odd = load(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=3)
    with pytest.raises(UserError, match=r"meant for no whole number of processes, but 4 are running"):
        accumulation_steps(odd, 128, 4, "r.yaml")
