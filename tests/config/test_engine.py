from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.config.engine import (
    EngineConfig,
    accumulation_steps,
    check_compiled_teachers,
    check_ranks,
    default_recipe,
    load_engine_config,
    validate_sections,
)
from mrmae_ds.config.files import json_text, merge
from mrmae_ds.config.kernels import KernelSettings
from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.config.zero import check_averages
from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.planning.cost_report import describe_cost
from mrmae_ds.training.job import TrainArgs, load_configs

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


# Decisions of docs/engine_configs.md, with their reasons.
LARGE = {"tiny": 16, "small": 128, "base": 128, "large": 128, "huge": 64, "huge392": 16, "huge448": 16}
SMALL = {"tiny": 16, "small": 16, "base": 16, "large": 8, "huge": 8, "huge392": 8, "huge448": 8}
DECIDED: dict[str, dict[str, Any]] = {
    "": {"micro_batch": LARGE, "overlap_comm": True, "contiguous_gradients": False},
    "zero1": {"micro_batch": LARGE, "overlap_comm": True, "contiguous_gradients": True},
    "offload": {"micro_batch": SMALL, "overlap_comm": True, "contiguous_gradients": True},
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_every_engine_config_of_the_project_is_good(path: Path) -> None:
    config = load_engine_config(path)
    validate_sections(config)
    assert config.declared_accumulation is None and 1024 % (8 * config.micro_batch) == 0
    size, _, variant = path.stem.partition("-")
    assert default_recipe(path) == CONFIGS / f"{size}.yaml"
    assert config.zero.stage == (1 if variant == "zero1" else 3)
    assert config.offloads_optimizer == (variant == "offload")
    assert (config.checkpointing != CheckpointPlan()) == (variant == "offload" or path.stem == "tiny")
    decided = {name: DECIDED[variant][name] for name in ("overlap_comm", "contiguous_gradients")}
    decided = {} if path.stem == "tiny-zero1" else decided
    zero = config.as_written()["zero_optimization"]
    assert {name: zero[name] for name in decided.keys() | (zero.keys() & DECIDED[""].keys())} == decided
    assert config.micro_batch == DECIDED[variant]["micro_batch"][size]


@pytest.mark.parametrize("path", sorted((CONFIGS / "detection").glob("*.json")), ids=lambda path: path.name)
def test_every_engine_config_of_detectors_is_good(path: Path) -> None:
    config = load_engine_config(path)
    validate_sections(config)
    assert config.declared_accumulation is None and default_recipe(path) == path.with_suffix(".yaml")
    assert config.for_deepspeed(1)["gradient_clipping"] == (1.0 if path.stem == "demo" else 0.0)


def test_every_size_has_its_variants() -> None:
    names = {path.stem for path in CONFIGS.glob("*.json")}
    sizes = {"tiny", "small", "base", "large", "huge", "huge392", "huge448"}
    assert names == sizes | {f"{size}-{variant}" for size in sizes for variant in ("zero1", "offload")}


def test_readme_says_of_every_engine_config_when_to_take_it() -> None:
    named = set()
    for line in (CONFIGS / "README.md").read_text().splitlines():
        if line.startswith("|") and ".json`" in line:
            _, files, micro_batch, *_ = line.split("|")
            named |= {(name, micro_batch.strip()) for name in re.findall(r"`([\w-]+)\.json`", files)}
    assert named == {(path.stem, str(load_engine_config(path).micro_batch)) for path in CONFIGS.glob("*.json")}


@pytest.mark.parametrize("variant", ["tiny", "tiny-zero1", "tiny-offload"])
def test_a_variant_trains_and_costs_the_recipe_of_its_size(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, counted = CONFIGS / f"{variant}.json", []
    recipe, config = load_configs(TrainArgs(path))
    assert recipe.name == "tiny" and config.path == path
    monkeypatch.setattr(
        "mrmae_ds.planning.cost_report.stage_costs", lambda recipe, _: counted.append(recipe.name) or []
    )
    monkeypatch.setattr("mrmae_ds.planning.cost_report.cost_table", lambda _: "")
    monkeypatch.setattr("mrmae_ds.planning.cost_report.cost_line", lambda *_: "")
    describe_cost(path, None)
    assert counted == ["tiny"]


def test_a_recipe_of_the_variants_own_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert default_recipe(tmp_path / "mine-offload.json") == tmp_path / "mine.yaml"
    (tmp_path / "mine-offload.yaml").touch()
    assert default_recipe(tmp_path / "mine-offload.json") == tmp_path / "mine-offload.yaml"
    assert default_recipe(tmp_path / "mine.json") == tmp_path / "mine.yaml"


def test_missing_recipe_error_lists_recipes_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"my-zero1\.json: no such file$"):
        default_recipe(tmp_path / "my-zero1.json")
    for number in (1, 2):
        (tmp_path / f"my-zero{number}.json").touch()
    with pytest.raises(UserError, match=r"my-zero1\.json: no recipe my-zero1\.yaml nor my\.yaml beside it; name one"):
        default_recipe(tmp_path / "my-zero1.json")
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "other.yaml").touch()
    with pytest.raises(
        UserError, match=r"no recipe my-zero2\.yaml beside it.*--recipe; there are mine\.yaml, other\.ya"
    ):
        default_recipe(tmp_path / "my-zero2.json")


def test_minimal_engine_config_is_float32_without_zero(load: Load) -> None:
    config = load()
    assert (config.micro_batch, config.declared_accumulation, config.zero.stage) == (4, None, 0)
    assert config.model_dtype == torch.float32
    assert config.checkpointing == CheckpointPlan(0, 0, 0)


def test_parses_every_setting(load: Load) -> None:
    config = load(
        gradient_accumulation_steps=3,
        zero_optimization={"stage": 2},
        bf16={"enabled": True},
        data_types={"grad_accum_dtype": "fp32"},
        activation_checkpointing={"conv_stages": "all", "transformer": 2, "decoder": "none"},
        compile={"blocks": True, "teachers": True},
        attention_backend="efficient",
        deterministic=True,
        float32_matmul_precision="high",
    )
    assert config.kernels == KernelSettings("efficient", True, "high")
    assert (config.declared_accumulation, config.zero.stage) == (3, 2)
    assert config.model_dtype == torch.bfloat16
    assert config.compile_blocks and config.compile_teachers and not config.offloads_optimizer
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
def test_refuses_keys_of_the_recipe(load: Load, key: str) -> None:
    assert f"{key} does not belong here; it is the recipe's stages.STAGE." in _error(load, **{key: {}})


def test_half_precision_is_not_supported(load: Load) -> None:
    assert "fp16 does not belong here" in _error(load, fp16={"enabled": True})


def test_clipping_must_be_stated(load: Load) -> None:
    assert "gradient_clipping is required" in _error(load, gradient_clipping=None)


def test_the_recipes_clipping_fills_the_files(load: Load) -> None:
    config = load(gradient_clipping=0.0)
    assert config.with_clipping(None) is config
    assert config.with_clipping(0.02).for_deepspeed(1)["gradient_clipping"] == 0.02
    assert load(gradient_clipping=3.0).with_clipping(3.0).as_used(1)["gradient_clipping"] == 3.0
    with pytest.raises(UserError, match="1 contradicts the recipe's optimizer"):
        load(gradient_clipping=1.0).with_clipping(3.0)


@pytest.mark.parametrize("value", [None, "auto"])
def test_the_micro_batch_must_be_stated(load: Load, value: str | None) -> None:
    assert "train_micro_batch_size_per_gpu is required" in _error(load, train_micro_batch_size_per_gpu=value)


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -1, True, False, 4.0, "4", [4]])
def test_counts_are_whole_numbers_above_0(load: Load, key: str, value: Any) -> None:
    assert f"{key} must be a whole number above 0, got {json_text(value)}" in _error(load, **{key: value})


def test_an_automatic_accumulation_is_derived(load: Load) -> None:
    assert load(gradient_accumulation_steps="auto").declared_accumulation is None


@pytest.mark.parametrize("value", [{"stage": 4}, {"stage": -1}, {"stage": "3"}, {"stage": None}, {"stage": True}])
def test_zero_stages_are_0_to_3(load: Load, value: Any) -> None:
    message = _error(load, zero_optimization=value)
    assert f"zero_optimization.stage must be 0, 1, 2 or 3, got {json_text(value['stage'])}" in message


@pytest.mark.parametrize("part", ["conv_stages", "transformer", "decoder"])
@pytest.mark.parametrize("value", ["some", -1, True, 1.5, None, [1]])
def test_activation_checkpointing_is_all_none_or_every_nth(load: Load, part: str, value: Any) -> None:
    message = _error(load, activation_checkpointing={part: value})
    assert f'activation_checkpointing.{part} must be "all", "none" or n' in message
    assert message.endswith(f"got {json_text(value)}")


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("attention_backend", "flush", "one of flash, efficient, cudnn, math, auto"),
        ("attention_backend", None, "one of flash, efficient, cudnn, math, auto"),
        ("deterministic", 1, "true or false"),
        ("float32_matmul_precision", "low", "one of highest, high, medium"),
    ],
)
def test_kernels_are_one_of_the_choices(tmp_path: Path, key: str, value: Any, choices: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(SMALLEST | {key: value}))
    with pytest.raises(UserError, match=rf"engine\.json: {key} must be {choices}, got {json_text(value)}"):
        load_engine_config(path)


def test_a_linear_classifier_runs_on_the_same_kernels(load: Load) -> None:
    config = load(deterministic=True, attention_backend="math").for_probe()
    assert config.kernels == KernelSettings("math", True)
    assert load(**config.as_used(2)).kernels == config.kernels


@pytest.mark.parametrize("name", ["tiny", "base-zero1", "base-offload", "small"])
def test_written_and_default_keys_are_together_the_same_config(load: Load, name: str) -> None:
    config = load_engine_config(CONFIGS / f"{name}.json")
    written, defaults = config.as_written(), config.defaults()
    assert defaults["attention_backend"] == "flash" and defaults["compile"] == {"blocks": False, "teachers": False}
    both = merge(written, defaults, keep_null=True)
    assert merge(defaults, written, keep_null=True) == both  # no key is in both
    again = load(**both)
    validate_sections(again)
    assert replace(again, path=config.path, _raw=written) == config
    assert again.defaults() == {}


def test_defaults_are_keys_with_an_effect(load: Load) -> None:
    plain = load().defaults()
    assert plain["zero_optimization"] == {"stage": 0}
    assert plain["activation_checkpointing"] == {"conv_stages": 0, "transformer": 0, "decoder": 0}
    stage_1 = load(zero_optimization={"stage": 1}, deterministic=True).defaults()
    assert "deterministic" not in stage_1 and not any("stage3" in key for key in stage_1["zero_optimization"])
    assert stage_1["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_a_recipe_is_no_engine_config() -> None:
    with pytest.raises(UserError, match=r"tiny\.yaml: a YAML file.*NAME\.json to --ds_config, a recipe to --recipe"):
        load_engine_config(CONFIGS / "tiny.yaml")


def test_an_unknown_key_of_activation_checkpointing(load: Load) -> None:
    assert "'transformer'" in _error(load, activation_checkpointing={"transfomer": "all"})


@pytest.mark.parametrize(
    ("section", "nearest"),
    [
        ({"bf16": {"enable": True}}, "enabled"),
        ({"torch_autocast": {"enabled": True, "dtyp": "x"}}, "dtype"),
        ({"compile": {"block": True}}, "blocks"),
        ({"data_types": {"grad_accum_type": "fp32"}}, "grad_accum_dtype"),
    ],
)
def test_an_unknown_key_of_another_section(load: Load, section: dict[str, Any], nearest: str) -> None:
    assert f"did you mean {nearest!r}" in _error(load, **section)


@pytest.mark.parametrize(
    "key",
    [
        "partition_activations",
        "cpu_checkpointing",
        "contiguous_memory_optimization",
        "number_checkpoints",
        "synchronize_checkpoint_boundary",
        "profile",
    ],
)
def test_refuses_deepspeeds_checkpointing_keys_without_effect(load: Load, key: str) -> None:
    message = _error(load, activation_checkpointing={"transformer": "all", key: True})
    assert f"activation_checkpointing.{key} would have no effect" in message and "conv_stages" in message


@pytest.mark.parametrize(
    "key",
    [
        "disable_allgather",
        "gradient_predivide_factor",
        "prescale_gradients",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ],
)
def test_refused_keys_state_the_reason(load: Load, key: str) -> None:
    assert f"{key} leave it out; " in _error(load, **{key: True})


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def test_both_kinds_of_mixed_precision(load: Load) -> None:
    load(**AUTOCAST)
    load(**BF16, zero_optimization={"stage": 1})
    load(**AUTOCAST, bf16={"enabled": False})
    message = _error(load, **AUTOCAST, **BF16)
    assert "bf16 and torch_autocast are both enabled" in message and "keep torch_autocast" in message
    assert "bf16.enabled must be true or false, got 'yes'" in _error(load, bf16={"enabled": "yes"})


@pytest.mark.parametrize("dtype", ["float16", None, "bf"])
def test_autocast_is_to_bfloat16(load: Load, dtype: str | None) -> None:
    section = {"enabled": True} | ({"dtype": dtype} if dtype else {})
    assert f'torch_autocast.dtype must be "bfloat16", got {json_text(dtype)}' in _error(load, torch_autocast=section)


def test_bf16_requires_the_type_of_accumulated_gradients(load: Load) -> None:
    message = _error(load, bf16={"enabled": True}, zero_optimization={"stage": 1})
    assert "data_types.grad_accum_dtype is required with bf16" in message and '{"grad_accum_dtype": "fp32"}' in message
    load(bf16={"enabled": True}, data_types={"grad_accum_dtype": "bf16"}, zero_optimization={"stage": 1})
    load(data_types={"grad_accum_dtype": "fp32"})
    assert "'bf16' needs bf16" in _error(load, data_types={"grad_accum_dtype": "bf16"})


def test_bf16_needs_a_stage_with_float32_masters(load: Load) -> None:
    assert "bf16 needs zero_optimization.stage 1, 2 or 3" in _error(load, **BF16)


@pytest.mark.parametrize("key", ["bf16_master_weights_and_grads", "bf16_optimizer_states"])
def test_keys_of_bfloat16_master_weights_are_unknown(load: Load, key: str) -> None:
    bf16 = {"bf16": {"enabled": True, key: True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert f"bf16.{key}: unknown key" in _error(load, **bf16, zero_optimization={"stage": 1})


def test_communication_data_type_is_refused_with_autocast(load: Load) -> None:
    load(communication_data_type="fp32")
    assert "communication_data_type would have no effect" in _error(load, **AUTOCAST, communication_data_type="fp32")


STAGE_3 = {"stage": 3, "memory_efficient_linear": False}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "section",
    [
        {"offload_param": {"device": "cpu"}},
        {"zero_hpz_partition_size": 2},
        {"leaf_module": {"classes": ["Block"]}},
        {"stage3_max_live_parameters": 1},
        {"memory_efficient_linear": False},
    ],
    ids=lambda section: next(iter(section)),
)
def test_keys_of_stage_3_only(load: Load, section: dict[str, Any], stage: int) -> None:
    load(zero_optimization=STAGE_3 | section)
    message = _error(load, zero_optimization={"stage": stage} | section)
    assert f"zero_optimization.{next(iter(section))} has an effect at stage 3 only, and the stage is {stage}" in message


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("key", ["allgather_bucket_size", "round_robin_gradients"])
def test_keys_of_stages_1_and_2_only(load: Load, key: str, stage: int) -> None:
    load(zero_optimization={"stage": 1, key: 1})
    section = (STAGE_3 if stage else {"stage": 0}) | {key: 1}
    assert f"zero_optimization.{key} has an effect at stages 1 and 2 only" in _error(load, zero_optimization=section)


@pytest.mark.parametrize("section", [{"stage": 3}, {"stage": 3, "memory_efficient_linear": True}])
def test_refuses_deepspeeds_replacement_of_torch_functions(load: Load, section: dict[str, Any]) -> None:
    message = _error(load, zero_optimization=section)
    assert "memory_efficient_linear must be false: left out, DeepSpeed replaces torch.nn.functional.linear" in message


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients", "zenflow", "cpu_offload"])
def test_refuses_keys_that_change_results_or_were_renamed(load: Load, key: str) -> None:
    assert f"zero_optimization.{key} " in _error(load, zero_optimization=STAGE_3 | {key: True})


def test_compiled_blocks_are_gathered_whole(load: Load) -> None:
    blocks = {"compile": {"blocks": True}}
    assert load(**blocks, zero_optimization={"stage": 2}).compile_blocks
    leaves = {"leaf_module": {"classes": ["Block", "ConvBlock"]}}
    assert load(**blocks, zero_optimization=STAGE_3 | leaves).compile_blocks
    for section in (STAGE_3, STAGE_3 | {"leaf_module": {"classes": ["Block"]}}):
        assert "compile.blocks at stage 3 needs whole blocks" in _error(load, **blocks, zero_optimization=section)
    for key in ("blocks", "teachers"):
        assert f"compile.{key} must be true or false, got 'all'" in _error(load, compile={key: "all"})


def test_only_teachers_that_stay_on_the_device_are_compiled(load: Load) -> None:
    config = load(compile={"teachers": True})
    assert config.compile_teachers and not config.compile_blocks
    placements = {"dino": PlacementConfig(), "clip": PlacementConfig(kind="stream")}
    check_compiled_teachers(load(), placements)
    check_compiled_teachers(config, {"dino": placements["dino"]})
    with pytest.raises(
        UserError, match=r"json: compile\.teachers needs .*placement: device, and that of clip is stream; "
    ):
        check_compiled_teachers(config, placements)


KEPT = STAGE_3 | {"stage3_param_persistence_threshold": 0}
STALE = {
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}},
    "stage3_param_persistence_threshold 100000": {"zero_optimization": STAGE_3},
    "stage3_param_persistence_threshold 1": {"zero_optimization": KEPT | {"stage3_param_persistence_threshold": 1}},
    "zero_hpz_partition_size": {"zero_optimization": KEPT | {"zero_hpz_partition_size": 2}},
    "offload_param": {"zero_optimization": KEPT | {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
}


@pytest.mark.parametrize("key", STALE)
def test_engines_that_leave_moving_averages_behind_are_refused(key: str, load: Load) -> None:
    config = load(**STALE[key])
    check_averages(config.path, config.zero, [])
    with pytest.raises(UserError, match=rf"json: teachers\.ema is a moving average: .*{key} "):
        check_averages(config.path, config.zero, ["ema"])


def test_other_engines_update_moving_averages(load: Load) -> None:
    for section in ({"stage": 0}, {"stage": 2}, KEPT, KEPT | {"offload_param": {"device": "cpu"}}):
        config = load(torch_autocast={"enabled": True, "dtype": "bfloat16"}, zero_optimization=section)
        check_averages(config.path, config.zero, ["ema"])


def test_offloading_needs_zero_and_a_supported_optimizer(load: Load) -> None:
    cpu = {"device": "cpu", "pin_memory": True}
    for stage in (1, 2, 3):
        section = (STAGE_3 if stage == 3 else {"stage": stage}) | {"offload_optimizer": cpu}
        config = load(zero_optimization=section)
        assert config.offloads_optimizer and config.for_deepspeed(1)["zero_force_ds_cpu_optimizer"] is False
    off = load(zero_optimization=STAGE_3 | {"offload_param": cpu, "offload_optimizer": {"device": "none"}})
    assert not off.offloads_optimizer and "zero_force_ds_cpu_optimizer" not in off.for_deepspeed(1)
    message = _error(load, zero_optimization={"stage": 0, "offload_optimizer": cpu})
    assert "offload_optimizer needs stage 1, 2 or 3" in message
    message = _error(load, zero_optimization=STAGE_3 | {"offload_optimizer": cpu | {"ratio": 0.5}})
    assert "offload_optimizer.ratio works with DeepSpeed's own Adam only" in message
    assert "must be a section" in _error(load, zero_optimization=STAGE_3 | {"offload_param": "cpu"})


def test_offloading_to_nvme_needs_stage_3_a_path_and_libaio(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    message = _error(load, zero_optimization={"stage": 2, "offload_optimizer": nvme})
    assert "offload_optimizer.device nvme needs stage 3, and the stage is 2; use cpu" in message
    message = _error(load, zero_optimization=STAGE_3 | {"offload_param": {"device": "nvme"}})
    assert "offload_param.nvme_path is required" in message
    assert "aio has an effect only where something is offloaded to nvme" in _error(load, aio={"thread_count": 2})
    config = load(zero_optimization=STAGE_3 | {"offload_optimizer": nvme}, aio={"thread_count": 2})
    builder = "deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible"
    monkeypatch.setattr(builder, lambda self: False)
    with pytest.raises(UserError, match=r"offload_optimizer\.device: nvme needs the library libaio.*libaio-dev"):
        validate_sections(config)
    monkeypatch.setattr(builder, lambda self: True)
    validate_sections(config)
    gone = load(zero_optimization=STAGE_3 | {"offload_param": nvme | {"nvme_path": str(tmp_path / "gone")}})
    with pytest.raises(UserError, match=r"offload_param\.nvme_path: .*gone is not a folder that can be written to"):
        validate_sections(gone)


@pytest.mark.parametrize(("size", "world", "local", "good"), [(1, 3, 3, 1), (2, 4, 2, 1), (8, 64, 8, 1), (4, 64, 8, 1)])
def test_hpz_divides_the_ranks(load: Load, size: int, world: int, local: int, good: bool) -> None:
    check_ranks(load(zero_optimization=STAGE_3 | {"zero_hpz_partition_size": size}), world, local)


@pytest.mark.parametrize(("size", "world", "local"), [(2, 3, 3), (4, 4, 2), (3, 64, 8), (16, 64, 8)])
def test_hpz_that_does_not_divide_the_ranks_is_an_error(load: Load, size: int, world: int, local: int) -> None:
    config = load(zero_optimization=STAGE_3 | {"zero_hpz_partition_size": size})
    with pytest.raises(UserError, match=rf"hpz_partition_size {size} must divide the {world} .* {local} of a node"):
        check_ranks(config, world, local)


@pytest.mark.parametrize(
    "section", [{"bf16": True}, {"activation_checkpointing": "all"}, {"zero_optimization": 3}, {"compile": True}]
)
def test_section_that_is_not_a_mapping_is_an_error(load: Load, section: dict[str, Any]) -> None:
    _error(load, **section)


@pytest.mark.parametrize("value", [-1.0, "one", [1.0], True])
def test_clipping_is_a_number(load: Load, value: Any) -> None:
    assert "gradient_clipping" in _error(load, gradient_clipping=value)


def test_deepspeeds_own_models_validate_the_zero_section(load: Load) -> None:
    validate_sections(load(zero_optimization=STAGE_3 | {"stage3_param_persistence_threshold": 0}))
    with pytest.raises(UserError, match=r"zero_optimization\.overlap_com: .*; did you mean 'overlap_comm'\?"):
        validate_sections(load(zero_optimization=STAGE_3 | {"overlap_com": True}))
    with pytest.raises(UserError, match=r"zero_optimization\.offload_optimizer\.device: .*'cpu'"):
        validate_sections(load(zero_optimization=STAGE_3 | {"offload_optimizer": {"device": "gpu"}}))


def test_zero_key_suggestion_uses_deepspeeds_spelling(load: Load) -> None:
    with pytest.raises(UserError, match="'stage3_prefetch_bucket_size'"):
        validate_sections(load(zero_optimization=STAGE_3 | {"stage3_prefetch_bucket_siz": 1}))


def test_deepspeed_gets_its_own_keys_and_the_accumulation(load: Load) -> None:
    section = {"transformer": "all", "conv_stages": 2, "decoder": "none"}
    zero = STAGE_3 | {"leaf_module": {"classes": ["Block", "ConvBlock"]}}
    kernels = {"attention_backend": "math", "deterministic": True, "float32_matmul_precision": "high"}
    config = load(activation_checkpointing=section, zero_optimization=zero, compile={"blocks": True}, **kernels)
    before = json.dumps(config.as_written())
    given = config.for_deepspeed(6)
    assert given["gradient_accumulation_steps"] == 6
    assert not {"activation_checkpointing", "compile", *kernels} & given.keys()
    assert given["zero_optimization"] == zero
    assert given["train_micro_batch_size_per_gpu"] == 4 and given["gradient_clipping"] == 0.0
    assert given["steps_per_print"] > 10**9
    assert json.dumps(config.as_written()) == before
    assert load(steps_per_print=10).for_deepspeed(1)["steps_per_print"] == 10


def test_the_recorded_config_is_an_engine_config(load: Load) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    changes = {"activation_checkpointing": {"transformer": 2}, "deterministic": True}
    config = load(**changes, zero_optimization={"stage": 1} | offload)
    again = load(**config.as_used(6))
    assert again.declared_accumulation == 6
    assert (again.checkpointing, again.offloads_optimizer) == (config.checkpointing, True)
    assert again.kernels == config.kernels == KernelSettings(deterministic=True)
    assert again.for_deepspeed(6) == config.for_deepspeed(6)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [(4, 4, 1, 1), (1024, 4, 1, 256), (1024, 64, 16, 1), (1024, 8, 16, 8), (48, 8, 3, 2), (1, 1, 1, 1), (30, 5, 2, 3)],
)
def test_accumulation_follows_from_batch_size_and_ranks(
    load: Load, batch: int, micro: int, ranks: int, expected: int
) -> None:
    config = load(train_micro_batch_size_per_gpu=micro)
    assert accumulation_steps(config, batch, ranks, "r.yaml") == expected
    declared = load(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=expected)
    assert accumulation_steps(declared, batch, ranks, "r.yaml") == expected


def _suggested(message: str, after: str) -> list[int]:
    found = re.search(rf"{after} (\d+)(?: or (\d+))?", message.split("the nearest that fit:")[1])
    return [int(number) for number in found.groups() if number] if found else []


@pytest.mark.parametrize(
    ("batch", "micro", "ranks"),
    [(1000, 16, 4), (1024, 48, 8), (100, 7, 2), (6, 16, 2), (50, 16, 2), (97, 4, 1), (64, 16, 3), (5, 8, 4)],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(load: Load, batch: int, micro: int, ranks: int) -> None:
    config = load(train_micro_batch_size_per_gpu=micro)
    with pytest.raises(UserError) as caught:
        accumulation_steps(config, batch, ranks, "r.yaml")
    message = str(caught.value)
    assert f"batch_size {batch}" in message and "in r.yaml" in message and str(micro * ranks) in message
    fitting = [size for size in range(1, 3 * batch + 2 * micro * ranks) if size % (micro * ranks) == 0]
    below, above = [s for s in fitting if s < batch], [s for s in fitting if s > batch]
    assert _suggested(message, "batch_size") == [*below[-1:], above[0]]
    micros = [m for m in range(1, batch + 1) if batch % (m * ranks) == 0]
    found = _suggested(message, "train_micro_batch_size_per_gpu")
    assert len(found) == min(2, len(micros)) and set(found) <= set(micros)
    for other in set(micros) - set(found):
        assert all(abs(other - micro) >= abs(m - micro) for m in found)
    for fixed in found:
        assert accumulation_steps(load(train_micro_batch_size_per_gpu=fixed), batch, ranks, "r.yaml") >= 1


def test_an_accumulation_for_another_number_of_ranks(load: Load) -> None:
    config = load(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=2)
    assert accumulation_steps(config, 128, 8, "r.yaml") == 2
    with pytest.raises(UserError, match=r"meant for 8 ranks, but 4 are running.*it becomes 4"):
        accumulation_steps(config, 128, 4, "r.yaml")
    odd = load(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=3)
    with pytest.raises(UserError, match=r"meant for no whole number of ranks, but 4 are running"):
        accumulation_steps(odd, 128, 4, "r.yaml")
