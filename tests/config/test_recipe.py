from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mrmae_ds.config.recipe import Recipe, load_recipe, run_and_stage
from mrmae_ds.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
PIXELS = {"target": "pixels", "tap": "decoder", "tokens": "masked", "normalize": "standardize", "weight": 0.5}
MIMIC = {"target": "clip", "tap": "encoder", "tokens": "visible", "normalize": "layer_norm", "weight": 0.5}
OPTIMIZER = {"base_lr": 1.5e-4, "warmup_epochs": 1, "betas": [0.9, 0.95]}
CONTENT: dict[str, Any] = {
    "name": "small",
    "method": "MR-MAE",
    "size": "Small",
    "model": {"arch": "cvit_small", "image_size": 224},
    "data": {"train": "train.beton", "val": "val.beton"},
    "teachers": {"clip": {"kind": "clip", "source": "ViT-B-16-quickgelu"}},
    "stages": {
        "pretrain": {
            "epochs": 4,
            "batch_size": 512,
            "optimizer": OPTIMIZER,
            "crop_scale": [0.2, 1.0],
            "teachers": ["clip"],
            "masking": {"mode": "sample", "teacher": "clip"},
            "objectives": {"pixels": PIXELS, "mimic": MIMIC},
        },
        "finetune": {
            "epochs": 2,
            "batch_size": 512,
            "optimizer": {**OPTIMIZER, "base_lr": None, "lr": 1e-3},
            "crop_scale": [0.08, 1.0],
            "layer_decay": 0.65,
        },
    },
}

HUGE, TINY, SEPARATE = (Path(f"ds_configs/{name}.yaml") for name in ("huge392", "tiny", "ablations/table4_separate"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a valid recipe."""
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(CONTENT))
    return file


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return load_recipe(path)


def _error(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_recipe_of_the_project_loads_and_round_trips(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == (f"coco_{file.stem}" if file.parent.name == "detection" else file.stem)
    assert recipe.model.spec().embed_dim > 0
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe
    assert again.hash() == recipe.hash()


def test_recipes_of_the_project_differ_in_name() -> None:
    assert len(RECIPES) >= 4
    recipes = [load_recipe(file) for file in RECIPES]
    assert len({recipe.name for recipe in recipes}) == len(recipes)


def test_every_header_has_a_command_and_a_status() -> None:
    for file in RECIPES:
        header = file.read_text().split("\nname:")[0]
        for word in ("command", "deepspeed train.py --ds_config", "paper", "run by us"):
            assert word in header, f"{file} says nothing of {word!r}"
        config = header.split("--ds_config ")[1].split()[0]
        assert (CONFIGS.parent / config).is_file()
        if "--recipe " in header:
            assert header.split("--recipe ")[1].split()[0] == str(file.relative_to(CONFIGS.parent))


def test_defaults_are_those_of_the_paper_and_the_authors_code(recipe: Recipe) -> None:
    stage = recipe.stages.pretrain
    assert stage is not None
    assert stage.masking.keep_ratio == 0.25
    assert (recipe.model.decoder.dim, recipe.model.decoder.depth, recipe.model.decoder.num_heads) == (512, 8, 16)
    assert recipe.data.mean == (0.485, 0.456, 0.406) and recipe.data.std == (0.229, 0.224, 0.225)
    assert recipe.teachers["clip"].statistics == "teacher" and recipe.teachers["clip"].features == "raw"
    assert stage.optimizer.weight_decay == 0.05 and stage.optimizer.min_lr == 0.0


@pytest.mark.parametrize(
    ("overrides", "stages", "blocks"),
    [
        ((), (1, 2), ()),
        (("model.fusion={}",), (1, 2), ()),
        (("model.fusion.blocks=[3]",), (1, 2), (3,)),
        (("model.fusion.stages=[]",), (), ()),
        (("model.fusion.stages=[2]",), (2,), ()),
        (("model.arch=vit_small",), (), ()),
        (("model.arch=vit_small", "model.fusion.blocks=[3]"), (), (3,)),
    ],
    ids=str,
)
def test_both_conv_stages_are_fused_by_default(
    overrides: tuple[str, ...], stages: tuple[int, ...], blocks: tuple[int, ...], path: Path
) -> None:
    fusion = load_recipe(path, list(overrides)).model.fusion
    assert (fusion.stages, fusion.blocks) == (stages, blocks)


def test_the_peak_rate_is_absolute_or_scaled_by_the_batch(recipe: Recipe) -> None:
    assert recipe.stage("pretrain").optimizer.peak_lr(512) == pytest.approx(3e-4)
    assert recipe.stage("pretrain").optimizer.peak_lr(128) == pytest.approx(0.75e-4)
    assert recipe.stage("finetune").optimizer.peak_lr(512) == 1e-3


def test_a_recipe_extends_another(path: Path) -> None:
    over = path.parent / "below" / "over.yaml"
    over.parent.mkdir()
    over.write_text(
        "extends: ../small.yaml\nname: over\nteachers: null\nstages:\n  pretrain:\n    teachers: null\n"
        "    masking: {mode: random, teacher: null}\n    objectives: {mimic: null}\n    crop_scale: [0.5, 0.6]\n"
    )
    recipe = load_recipe(over, ["stages.pretrain.epochs=9"])
    stage, base = recipe.stages.pretrain, load_recipe(path)
    assert stage is not None and base.stages.pretrain is not None
    assert (recipe.name, recipe.method, recipe.teachers) == ("over", "MR-MAE", {})
    assert (stage.epochs, stage.batch_size, stage.crop_scale, stage.teachers) == (9, 512, (0.5, 0.6), ())
    assert list(stage.objectives) == ["pixels"]
    assert stage.objectives["pixels"] == base.stages.pretrain.objectives["pixels"]
    assert recipe.stages.finetune == base.stages.finetune


def test_null_removes_a_stage(path: Path) -> None:
    recipe = load_recipe(path, ["stages.pretrain=null"])
    assert recipe.stages.pretrain is None
    with pytest.raises(UserError, match=r"recipe small has no stage pretrain; it has finetune, probe, evaluate$"):
        recipe.stage("pretrain")


def test_every_recipe_can_evaluate_with_a_separate_hash(path: Path, recipe: Recipe) -> None:
    assert recipe.stage("evaluate").members is None
    other = load_recipe(path, ["stages.evaluate.members=[a, b]", "stages.pretrain.epochs=9"])
    assert other.stage("evaluate").members == ("a", "b")
    assert other.hash("finetune") == recipe.hash("finetune")
    assert other.hash("evaluate") != recipe.hash("evaluate")
    assert load_recipe(path, ["stages.pretrain.epochs=9"]).hash("evaluate") == recipe.hash("evaluate")


def test_recipes_that_extend_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./c.yaml\n")
    (tmp_path / "c.yaml").write_text("extends: a.yaml\n")
    message = _error(tmp_path / "a.yaml")
    assert "extends itself" in message
    assert all(name in message for name in ("a.yaml", "b.yaml", "c.yaml"))
    (tmp_path / "self.yaml").write_text("extends: self.yaml\n")
    assert "extends itself" in _error(tmp_path / "self.yaml")


def test_diamond_shaped_extension_is_allowed(path: Path) -> None:
    (path.parent / "one.yaml").write_text("extends: small.yaml\nname: one\n")
    (path.parent / "two.yaml").write_text("extends: one.yaml\nname: two\n")
    assert load_recipe(path.parent / "two.yaml").name == "two"


def test_missing_extended_file_is_an_error(path: Path) -> None:
    (path.parent / "over.yaml").write_text("extends: smal.yaml\n")
    message = _error(path.parent / "over.yaml")
    assert "smal.yaml: no such file" in message and "'small.yaml'" in message


UNKNOWN_KEYS = {
    "sede=1": ("sede", "seed"),
    "model.image_sise=224": ("model.image_sise", "image_size"),
    "model.decoder.dept=2": ("model.decoder.dept", "depth"),
    "model.fusion.stage=[1]": ("model.fusion.stage", "stages"),
    "data.trian=x": ("data.trian", "train"),
    "teachers.clip.sauce=x": ("teachers.clip.sauce", "source"),
    "stages.pretrian.epochs=1": ("stages.pretrian", "pretrain"),
    "stages.pretrain.epoch=1": ("stages.pretrain.epoch", "epochs"),
    "stages.pretrain.masking.keep_ration=0.5": ("stages.pretrain.masking.keep_ration", "keep_ratio"),
    "stages.pretrain.objectives.mimic.wieght=1": ("stages.pretrain.objectives.mimic.wieght", "weight"),
    "stages.pretrain.optimizer.weight_decai=1": ("stages.pretrain.optimizer.weight_decai", "weight_decay"),
    "stages.finetune.layer_decai=0.5": ("stages.finetune.layer_decai", "layer_decay"),
    "loader.num_worker=1": ("loader.num_worker", "num_workers"),
    "logging.every_step=1": ("logging.every_step", "every_steps"),
}


@pytest.mark.parametrize("override", UNKNOWN_KEYS)
def test_an_unknown_key_at_any_depth(override: str, path: Path) -> None:
    where, nearest = UNKNOWN_KEYS[override]
    assert _error(path, override) == f"override {override!r} of {path}: {where}: unknown key; did you mean {nearest!r}?"


@pytest.mark.parametrize("override", UNKNOWN_KEYS)
def test_an_unknown_key_that_is_null(override: str, path: Path) -> None:
    """Merging drops null keys, so that no validation would see these."""
    key, (where, nearest) = override.partition("=")[0], UNKNOWN_KEYS[override]
    if where != key:  # the section is unknown, and only its key null
        key = where
    expected = f"{where}: unknown key; did you mean {nearest!r}?"
    assert _error(path, f"{key}=null") == f"override '{key}=null' of {path}: {expected}"
    over: Any = None
    for part in reversed(key.split(".")):
        over = {part: over}
    overlay = path.parent / "over.yaml"
    overlay.write_text(yaml.safe_dump({"extends": path.name, **over}))
    assert _error(overlay) == f"{overlay}: {expected}"


@pytest.mark.parametrize("override", ["teachers.source={kind: clip, source: x, wieghts: y}"])
def test_an_unknown_key_in_an_entry_that_is_named_like_a_field(override: str, path: Path) -> None:
    assert "did you mean 'weights'?" in _error(path, override)


REQUIRED = ["name", "method", "model.arch", "data.train", "stages.pretrain.epochs", "stages.pretrain.optimizer.betas"]


@pytest.mark.parametrize("key", [*REQUIRED, "stages.pretrain.objectives.mimic.tap", "teachers.clip.kind"])
def test_a_required_key_that_is_missing(key: str, path: Path) -> None:
    assert _error(path, f"{key}=null") == f"override '{key}=null' of {path}: {key}: this key is required"


WRONG_TYPES = {
    "seed=many": "seed",
    "model=3": "model",
    "model.image_size=[224]": "model.image_size",
    "data.mean=[0.5, 0.5]": "data.mean",
    "data.mean=0.5": "data.mean",
    "name=5": "name",
    "teachers=[clip]": "teachers",
    "teachers.clip=x": "teachers.clip",
    "teachers.clip.kind=clap": "teachers.clip.kind",
    "stages.pretrain.epochs=3.5": "stages.pretrain.epochs",
    "stages.pretrain.crop_scale=1.0": "stages.pretrain.crop_scale",
    "stages.pretrain.masking.mode=best": "stages.pretrain.masking.mode",
    "stages.pretrain.objectives.mimic.tap=middle": "stages.pretrain.objectives.mimic.tap",
    "stages.pretrain.optimizer.base_lr=fast": "stages.pretrain.optimizer.base_lr",
}


@pytest.mark.parametrize("override", WRONG_TYPES)
def test_a_value_of_the_wrong_type_names_its_key(override: str, path: Path) -> None:
    start = f"override {override!r} of {path}: {WRONG_TYPES[override]}"
    assert all(line.startswith(start) for line in _error(path, override).splitlines())


def test_a_fault_of_the_file_is_not_an_overrides(path: Path) -> None:
    path.write_text(path.read_text() + "sed: 1\n")
    file, seed = _error(path, "seed=1", "seed=-1", "name=x").splitlines()[::-1]
    if file.startswith("override"):
        file, seed = seed, file
    assert file == f"{path}: sed: unknown key; did you mean 'seed'?"
    assert seed.startswith(f"override 'seed=-1' of {path}: seed: Input should be greater")


@pytest.mark.parametrize("key", ["nvtx", "profiler", "loader"])
def test_true_for_a_section_names_its_defaults(key: str, path: Path) -> None:
    with pytest.raises(UserError, match=rf"{key}: expected a section, {{}} for its defaults, got true"):
        load_recipe(path, [f"{key}=true"])


@pytest.mark.parametrize("file", ["tiny.json", "../pipelines/toy6.yaml"])
def test_another_kind_of_file_is_no_recipe(file: str) -> None:
    kind = "an engine config, for --ds_config" if file == "tiny.json" else "a pipeline file, for mrmae submit"
    folder = Path(__file__).resolve().parents[2] / "ds_configs"
    assert _error(folder / file) == f"{folder / file}: is {kind}; expected a recipe, ds_configs/NAME.yaml"


def test_numbers_that_yaml_reads_as_text_are_numbers(path: Path) -> None:
    recipe = load_recipe(path, ["stages.pretrain.optimizer.base_lr=1e-3"])
    assert recipe.stage("pretrain").optimizer.base_lr == 1e-3


IMPOSSIBLE = {
    "seed=-1": ["seed", "greater than or equal to 0"],
    "seed=9223372036854775808": ["seed", "less than 9223372036854775808"],
    "name=a/b": ["name"],
    "model.image_size=0": ["model.image_size"],
    "data.mean=[123.675, 116.28, 103.53]": ["data.mean", "in 0 to 1", "divided by 255 it is [0.485, 0.456, 0.406]"],
    "data.mean=[0.5, -0.1, 0.5]": ["data.mean", "in 0 to 1"],
    "data.std=[58.395, 57.12, 57.375]": ["data.std", "in 0 to 0.5", "divided by 255 it is [0.229, 0.224, 0.225]"],
    "data.std=[0.5, 0.5, 0.51]": ["data.std", "in 0 to 0.5"],
    "teachers.clip={mean: [122, 116, 104], std: [0.3, 0.3, 0.3]}": ["teachers.clip.mean", "divided by 255"],
    "teachers.clip={mean: [0.5, 0.5, 0.5], std: [68, 66, 70]}": ["teachers.clip.std", "divided by 255"],
    "model.image_size=230": ["model.image_size: 230", "224 and 240"],
    "model.overrides={num_heads: 7}": ["model.overrides", "384", "7"],
    "model.fusion.stages=[1, 3]": ["model.fusion.stages: [3]", "1 to 2"],
    "model.fusion.stages=[0]": ["model.fusion.stages: [0]"],
    "model.fusion.stages=[1, 1]": ["model.fusion.stages", "[1, 1]", "once"],
    "model.fusion.blocks=[2, 9, 10]": ["model.fusion.blocks: [10]", "0 to 9"],
    "model.fusion.blocks=[-1]": ["model.fusion.blocks: [-1]"],
    "model.fusion.blocks=[4, 4]": ["model.fusion.blocks", "[4, 4]", "once"],
    "model={arch: vit_small, fusion: {stages: [1]}}": ["model.fusion.stages: [1]", "none"],
    "model={arch: vit_small, fusion: {blocks: [11]}}": ["model.fusion.blocks: [11]", "0 to 10"],
    "model.decoder.dim=30": ["model.decoder.dim", "multiple of 4"],
    "model.decoder.num_heads=3": ["model.decoder.num_heads: 3", "512"],
    "stages.pretrain.epochs=0": ["stages.pretrain.epochs"],
    "stages.pretrain.batch_size=0": ["stages.pretrain.batch_size"],
    "stages.pretrain.optimizer.warmup_epochs=4": ["stages.pretrain", "warmup_epochs must be below epochs (4)"],
    "stages.pretrain.optimizer.warmup_epochs=.nan": ["stages.pretrain.optimizer.warmup_epochs"],
    "stages.pretrain.optimizer.warmup_epochs=-1": ["stages.pretrain.optimizer.warmup_epochs"],
    "stages.pretrain.optimizer.lr=1.0": ["stages.pretrain.optimizer", "exactly one of base_lr", "lr"],
    "stages.pretrain.optimizer.base_lr=null": ["stages.pretrain.optimizer", "exactly one of base_lr"],
    "stages.pretrain.optimizer.min_lr=4e-4": ["stages.pretrain.optimizer.min_lr: 0.0004", "peak learning rate 0.0003"],
    "stages.finetune.optimizer.min_lr=2e-3": ["stages.finetune.optimizer.min_lr", "peak learning rate 0.001"],
    "stages.pretrain.optimizer.base_lr=0": ["stages.pretrain.optimizer.base_lr"],
    "stages.pretrain.crop_scale=[0.5, 1.5]": ["stages.pretrain.crop_scale.1"],
    "stages.pretrain.flip=2": ["stages.pretrain.flip"],
    "stages.pretrain.masking.keep_ratio=1": ["stages.pretrain.masking.keep_ratio"],
    "stages.pretrain.masking.keep_ratio=0": ["stages.pretrain.masking.keep_ratio"],
    "stages.pretrain.objectives={pixels: null, mimic: null}": ["stages.pretrain.objectives"],
    "stages.pretrain.objectives.mimic.weight=0": ["stages.pretrain.objectives.mimic.weight"],
    "stages.pretrain.objectives.mimic.tokens=masked": ["stages.pretrain.objectives.mimic", "visible tokens only"],
    "stages.pretrain.objectives.mimic.tokens=all": ["stages.pretrain.objectives.mimic", "visible tokens only"],
    "stages.pretrain={encoder_input: mask_tokens, objectives: {mimic: null}}": [
        "objectives.pixels.tap",
        "mask_tokens has no decoder",
    ],
    "stages.pretrain={encoder_input: mask_tokens, objectives: {pixels: null}}": [
        "stages.pretrain.objectives.mimic.tokens",
        "sees the visible ones",
        "masked or all",
    ],
    "stages.pretrain={encoder_input: mask_tokens, objectives: {pixels: null, mimic: {tokens: all}}}": [
        "encoder_input",
        "a CViT computes",
    ],
    "stages.pretrain.encoder_input=full": ["stages.pretrain.masking", "null belongs to encoder_input: full"],
    "stages.pretrain={encoder_input: full, masking: null, objectives: {pixels: null}}": ["mimic.tokens", "write all"],
    "stages.pretrain.masking={mode: block, keep_ratio: null, masked: 75, teacher: null}": ["mode", "mask_tokens"],
    "stages.pretrain.masking={mode: block, keep_ratio: 0.5, masked: 75}": [
        "masking.keep_ratio",
        "no effect on mode: block",
    ],
    "stages.pretrain.masking={mode: block, keep_ratio: null}": ["masking.masked", "mode: block needs it"],
    "stages.pretrain.masking={mode: block, keep_ratio: null, masked: 9}": ["min_block", "16 is above masked (9)"],
    "stages.pretrain.masking.masked=75": ["stages.pretrain.masking.masked", "no effect on mode: sample"],
    "stages.pretrain.masking.unit=32": ["stages.pretrain.masking.unit", "no effect on mode: sample"],
    "stages.pretrain.masking={mode: random, unit: 32, teacher: null}": ["masking.unit", "32 needs encoder_input"],
    "stages.pretrain.attention_dropout=0.1": ["stages.pretrain.attention_dropout", "no effect on a CViT"],
    "stages.pretrain.optimizer.schedule=step": ["stages.pretrain.optimizer.milestones", "step needs some"],
    "stages.pretrain.optimizer={schedule: step, milestones: [900]}": ["milestones must be between", "epochs (4)"],
    "stages.pretrain.optimizer={schedule: step, milestones: [0.5, 3]}": ["milestones must be", "warmup_epochs (1)"],
    "stages.pretrain.optimizer={schedule: step, milestones: [9], min_lr: 1e-6}": ["min_lr", "no effect on schedule"],
    "model={arch: beit_base, fusion: null}": ["stages.pretrain.encoder_input", "a BEiT has relative positions"],
    "stages.pretrain.objectives.mimic.block=11": ["stages.pretrain.objectives.mimic.block", "block 11", "0 to 10"],
    "stages.pretrain.objectives={pixels: null, mimic: {block: 4}}": ["objectives.mimic.block", "blocks 5 to 10"],
    "stages.pretrain.objectives.mimic.class_token=true": ["objectives.mimic.class_token", "no class token"],
    "stages.pretrain.objectives.pixels.block=3": ["stages.pretrain.objectives.pixels", "no effect on tap: decoder"],
    "stages.pretrain.objectives.mimic.target=clip.3": ["stages.pretrain.objectives.mimic.target", "'clip.3'", "clip"],
    "teachers.clip.layers=[2, 3]": ["stages.pretrain.objectives.mimic.target", "'clip'", "clip.2, clip.3"],
    "teachers.clip.layers=[2, 2]": ["teachers.clip.layers", "[2, 2]", "once"],
    "teachers.clip.layers=[3, 2]": ["teachers.clip.layers", "[3, 2]", "in order"],
    "teachers.clip.layers=[-1]": ["teachers.clip.layers", "[-1]"],
    "teachers.clip={layers: [2], features: proj}": ["teachers.clip.features", "proj", "raw"],
    "teachers.clip.sees=visible": ["teachers.clip.sees", "kind clip", "checkpoint"],
    "teachers.clip={kind: checkpoint, weights: null, sees: visible}": ["stages.pretrain.masking.teacher", "clip"],
    "teachers.clip.source=null": ["teachers.clip.source", "required"],
    "teachers.clip.decay=0.9": ["teachers.clip.decay", "kind clip"],
    "teachers.clip.layer_norm=each": ["teachers.clip.layer_norm", "kind clip"],
    "teachers.clip={kind: ema, source: null}": ["teachers.clip.decay", "required"],
    "teachers.clip={kind: ema, decay: 0.9}": ["teachers.clip.source", "kind ema"],
    "teachers.clip={kind: ema, source: null, decay: 0.9, features: proj}": ["teachers.clip.features", "kind ema"],
    "teachers.clip={kind: ema, source: null, decay: 1.0}": ["teachers.clip.decay", "less than 1"],
    "teachers.clip={kind: ema, source: null, decay: 0.9, decay_start: 0.5}": ["teachers.clip", "both decay_start and"],
    "teachers.clip={kind: ema, source: null, decay: 0.9}": ["stages.pretrain.masking.teacher", "moving average"],
    "stages.pretrain.objectives={pixels: null, mimic: {block: 10}}": ["model.fusion", "taps the latent", "null"],
    "stages.pretrain.objectives.pixels={target: hog, class_token: true}": ["class_token", "hog has no class token"],
    "teachers.hog={kind: timm, source: x}": ["teachers.hog", "not a name for a teacher"],
    "stages.pretrain.objectives.mimic.target=dino": ["stages.pretrain.objectives.mimic.target", "'dino'", "clip"],
    "stages.pretrain.teachers=[dino]": ["stages.pretrain.teachers[0]", "'dino'", "clip"],
    "stages.pretrain.masking.teacher=null": ["stages.pretrain.masking.teacher", "mode sample", "clip"],
    "stages.pretrain.masking={mode: topk, teacher: dino}": ["stages.pretrain.masking.teacher", "'dino'"],
    "stages.pretrain.masking={mode: random, teacher: dino}": ["stages.pretrain.masking.teacher", "'dino'", "clip"],
    "teachers=null": ["stages.pretrain.teachers[0]", "defined are none"],
    "stages.finetune.layer_decay=0": ["stages.finetune.layer_decay"],
    "stages.finetune.image_size=392": ["stages.finetune.image_size: 392", "384 and 400"],
    "stages.finetune.pool=max": ["stages.finetune.pool"],
    "stages.finetune.drop_path=1": ["stages.finetune.drop_path"],
    "stages.finetune.label_smoothing=1.5": ["stages.finetune.label_smoothing"],
    "stages.evaluate.members=[]": ["stages.evaluate.members"],
    "stages.evaluate.members=[a, b, a]": ["stages.evaluate.members", "twice"],
    "stages.evaluate.image_size=0": ["stages.evaluate.image_size"],
    "checkpoint.keep_last=0": ["checkpoint.keep_last"],
    "loader.num_workers=0": ["loader.num_workers"],
}


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_an_impossible_value_is_one_error(override: str, path: Path) -> None:
    message = _error(path, override)
    assert "\n" not in message and message.startswith((f"{path}: ", f"override {override!r} of {path}: "))
    for part in IMPOSSIBLE[override]:
        assert part in message


IMPOSSIBLE_NAMES_AND_NUMBERS = [
    "name=..",
    "model.arch=cvit_smal",
    "model.overrides.foo=1",
    "stages.pretrain.flip=true",
    "stages.pretrain.optimizer.betas=[0.9, 1.5]",
    "stages.pretrain.optimizer.base_lr=.inf",
    "stages.pretrain.crop_scale=[0.9, 0.2]",
    "stages.pretrain.crop_scale=[0.0, 1.0]",
    "data.std=[0.0, 0.2, 0.2]",
    "stages.pretrain.objectives.loss={target: pixels, tap: decoder, tokens: masked, normalize: none, weight: 1}",
    "teachers.pixels={kind: clip, source: ViT-B-16}",
]


@pytest.mark.parametrize("override", IMPOSSIBLE_NAMES_AND_NUMBERS)
def test_an_impossible_value_is_named(override: str, path: Path) -> None:
    assert override.partition("=")[0] in _error(path, override)


def test_a_moving_average_is_part_of_the_model(path: Path) -> None:
    """It needs neither source nor placement, and its layers are one target."""
    own = [
        "teachers.clip=null",
        "teachers.ema={kind: ema, decay: 0.9, layers: [8, 10]}",
        "stages.pretrain.masking=null",
    ]
    own += ["stages.pretrain.teachers=[ema]", "stages.pretrain.objectives.mimic.target=ema"]
    recipe = load_recipe(path, own)
    assert recipe.teachers["ema"].targets("ema") == ("ema",)
    path.write_text(recipe.to_yaml())
    assert load_recipe(path).hash() == recipe.hash()
    for placement in ("stream", "{ema: sharded}"):
        assert "stages.pretrain.placement.ema" in _error(path, f"stages.pretrain.placement={placement}")
    assert "teachers.ema.layers: block 11 does not exist" in _error(path, "teachers.ema.layers=[10, 11]")


POSSIBLE = [
    "model.image_size=256",
    "model.fusion={stages: [2, 1], blocks: [9, 0]}",
    "model={arch: vit_small, fusion: {blocks: [0, 10]}}",
    "model.decoder={dim: 96, num_heads: 3}",
    "stages.pretrain.optimizer.min_lr=3e-4",
    "stages.pretrain.masking={mode: random, teacher: clip}",
    "stages.pretrain.masking={mode: random, teacher: null}",
    "stages.finetune.image_size=384",
]


@pytest.mark.parametrize("override", POSSIBLE)
def test_accepts_limiting_values(override: str, path: Path) -> None:
    load_recipe(path, [override])


def test_a_decoder_that_no_objective_taps_may_be_described(path: Path) -> None:
    recipe = load_recipe(path, ["stages.pretrain.objectives.pixels=null", "model.decoder.depth=2"])
    assert recipe.model.decoder.depth == 2


def test_pixels_need_no_teacher(path: Path) -> None:
    without = ("teachers", "stages.pretrain.teachers", "stages.pretrain.masking", "stages.pretrain.objectives.mimic")
    recipe = load_recipe(path, [f"{key}=null" for key in without])
    assert recipe.stages.pretrain is not None and recipe.stages.pretrain.masking.mode == "random"


IGNORED = [
    "name=other",
    "seed=7",
    "data.train=elsewhere/train.beton",
    "data.val=elsewhere/val.beton",
    "loader.num_workers=3",
    "loader.cache_dir=/dev/shm/images",
    "logging={every_steps: 3, num_images: 0}",
    "stages.pretrain.placement=stream",
    "stages.pretrain.placement.clip={kind: sharded, offload: cpu}",
]
COUNTED = [
    "method=MCMAE",
    "size=Base",
    "model.arch=cvit_base",
    "model.image_size=256",
    "model.overrides.num_heads=12",
    "model.fusion.stages=[2]",
    "model.fusion.blocks=[3]",
    "model.decoder.depth=4",
    "data.mean=[0.5, 0.5, 0.5]",
    "data.std=[0.5, 0.5, 0.5]",
    "teachers.clip.weights=openai",
    "teachers.clip.features=proj",
    "teachers.clip.precision=fp32",
    "teachers.clip.statistics=student",
    "stages.pretrain.epochs=5",
    "stages.pretrain.batch_size=256",
    "stages.pretrain.optimizer.weight_decay=0.1",
    "stages.pretrain.optimizer.min_lr=1.0e-6",
    "stages.pretrain.crop_scale=[0.2, 0.9]",
    "stages.pretrain.flip=0.0",
    "stages.pretrain.masking.mode=topk",
    "stages.pretrain.masking.keep_ratio=0.5",
    "stages.pretrain.objectives.mimic.loss=cosine",
    "stages.pretrain.objectives.mimic.weight=0.25",
    "stages.pretrain.init=released.pth",
    "stages.finetune.layer_decay=0.75",
    "stages.finetune.rand_augment=rand-m9-mstd0.5-inc1",
    "stages.finetune.mixup=0.8",
    "stages.finetune.random_erasing=0.25",
    "stages.finetune=null",
    "stages.evaluate.members=[runs/a/finetune, runs/b/finetune]",
    "stages.evaluate.members=[runs/b/finetune]",
    "stages.evaluate.image_size=256",
]


@pytest.mark.parametrize("override", IGNORED)
def test_the_hash_ignores_what_does_not_change_results(override: str, path: Path, recipe: Recipe) -> None:
    other = load_recipe(path, [override])
    assert other != recipe
    assert other.hash() == recipe.hash()


@pytest.mark.parametrize("override", [override for override in IGNORED if "placement" in override])
def test_a_run_resumes_with_another_teacher_placement(override: str, path: Path, recipe: Recipe) -> None:
    assert load_recipe(path, [override]).hash("pretrain") == recipe.hash("pretrain")


def test_the_hash_changes_with_everything_else(path: Path, recipe: Recipe) -> None:
    hashes = {override: load_recipe(path, [override]).hash() for override in COUNTED}
    hashes[""] = recipe.hash()
    assert len(set(hashes.values())) == len(hashes)
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in hashes.values())


def test_writing_a_default_out_does_not_change_the_hash(path: Path, recipe: Recipe) -> None:
    assert load_recipe(path, ["stages.pretrain.masking.keep_ratio=0.25", "model.decoder.depth=8"]) == recipe


def test_the_resolved_recipe_states_every_default(path: Path, recipe: Recipe, tmp_path: Path) -> None:
    resolved = yaml.safe_load(recipe.to_yaml())
    assert resolved["loader"] == {"num_workers": None, "cache_dir": None, "augment_on": "cpu"}
    assert resolved["stages"]["pretrain"]["objectives"]["mimic"]["loss"] == "l2"
    assert resolved["data"]["train"] == "train.beton"
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("name", ["123", "1e-3", "null", "2024-01-01", "on", "a.b-c_d"])
def test_names_that_look_like_other_yaml_types_stay_strings(name: str, tmp_path: Path) -> None:
    content = copy.deepcopy(CONTENT) | {"name": name}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "b.yaml").write_text(load_recipe(tmp_path / "a.yaml").to_yaml())
    assert load_recipe(tmp_path / "b.yaml").name == name


def test_a_recipe_cannot_be_changed(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("runs/huge/pretrain", "huge/pretrain"),
        ("/elsewhere/of/huge-seed12/pretrain", "huge/pretrain"),
        ("demo/tiny/finetune", "tiny/finetune"),
        ("pretrain", "pretrain"),
        ("scratch", "scratch"),
        ("weights/released.pth", "weights/released.pth"),
        ("runs/huge-seedling/pretrain", "huge-seedling/pretrain"),
    ],
)
def test_a_stage_is_named_without_its_folder_and_seed(source: str, short: str) -> None:
    assert run_and_stage(source) == short


@pytest.mark.parametrize(
    ("path", "stage", "key", "same", "other"),
    [
        (HUGE, "finetune", "stages.finetune.init", "r/huge-seed1/pretrain", "runs/base/pretrain"),
        (TINY, "pretrain", "teachers.mae.source", "r/mae_tiny-seed1/pretrain", "runs/tiny/pretrain"),
        (
            SEPARATE, "evaluate", "stages.evaluate.members",
            "[r/table4_dino-seed1/finetune, r/table4_clip-seed1/finetune]",
            "[runs/table4_clip/finetune, runs/table4_dino/finetune]",
        ),
    ],
)  # fmt: skip
def test_runs_that_start_from_other_seeds_share_a_hash(path: Path, stage: str, key: str, same: str, other: str) -> None:
    recipe = load_recipe(path)
    seeded, different = (load_recipe(path, [f"{key}={value}", "seed=1"]) for value in (same, other))
    assert recipe.hash(stage) == seeded.hash(stage) and recipe.hash() == seeded.hash()  # type: ignore[arg-type]
    assert recipe.hash(stage) != different.hash(stage)  # type: ignore[arg-type]
