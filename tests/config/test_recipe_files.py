"""Recipes of ds_configs: headers are correct, overlays are minimal, models can be built, values are the paper's."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mrmae_ds.config.engine import EngineConfig, accumulation_steps, default_recipe, load_engine_config
from mrmae_ds.config.recipe import DataConfig, Recipe, TeacherConfig, load_recipe
from mrmae_ds.factory import TeacherBuilder, build_pretraining
from mrmae_ds.imagenet import IMAGENET_TRAIN_SAMPLES
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.layers import ConvBlock
from mrmae_ds.models.sizes import ARCHITECTURES
from mrmae_ds.planning.cost_report import cost_line
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.tables.paper import TABLES, PaperRow, errata_of
from mrmae_ds.teachers import Teacher, build_meta_teacher
from mrmae_ds.teachers.base import TeacherOutput, draw_visible
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.checkpoint import meta_teacher

UNIFORM = torch.ones(64, 196)
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "ds_configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
OVERLAYS = [file for file in FILES if "\nextends: " in file.read_text()]
DETECTION = [file for file in FILES if file.parent.name == "detection"]
DETECTORS = [file for file in DETECTION if file.stem != "demo"]
# Tiny is the demo's: not in the paper, and its teacher is a run.
OF_PAPER = [file for file in FILES if not file.stem.endswith("tiny") and file not in DETECTION]
METHODS = [file for file in OF_PAPER if file.parent.name == "methods"]
TRAINED = [file for file in OF_PAPER if file.stem != "table4_separate"]
# A teacher in a file that users download: its size is stated here.
FILE_TEACHERS = {"dmae_base": "vit_large"}
HEADER_KEYS = ("command", "needs", "paper", "cost", "run by us")
QUOTED = re.compile(r"(\d+\.\d) % top-1 \(Table (\d)(?:, row (\d))?\)(?: after (\d+) epochs)?")
QUOTED_AP = re.compile(r"(\d+\.\d) AP box, (\d+\.\d) AP mask \(Table (\d)(?:, row (\d))?\)")
DASH = "no number (a dash in Table 6)"
RELATIVE = "no number: "
NO_ROW = "no row of this paper; "
TABLE_4 = {"table4_dino": 1, "table4_clip": 2, "table4_joint": 3, "table4_separate": 4}


def named(file: Path) -> str:
    return str(file.relative_to(CONFIGS))


def header(file: Path) -> dict[str, list[str]]:
    """The comment block at the top: key to its lines."""
    entries: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if match := re.fullmatch(rf"#   ({'|'.join(HEADER_KEYS)}) +(\S.*)", line):
            entries[match[1]] = [match[2]]
        elif line.startswith("#    ") and entries:
            entries[list(entries)[-1]].append(line.removeprefix("#").strip())
    return entries


@lru_cache
def loaded(file: Path) -> Recipe:
    return load_recipe(file)


def engine_config(file: Path) -> EngineConfig:
    match = re.search(r"--ds_config (\S+)", header(file)["command"][0])
    assert match
    return load_engine_config(REPOSITORY / match[1])


def paper_row(recipe: Recipe, table: int, row: int | None, epochs: int | None) -> PaperRow:
    """The row of the paper's table that a recipe's header quotes."""
    rows = TABLES[table].rows
    if table in (3, 4):
        assert row is not None
        return rows[row - 1]
    assert row is None
    stage = recipe.stages.pretrain
    wanted = epochs or (stage.epochs if stage else None)
    found = [r for r in rows if r.method == recipe.method and wanted in (None, r.epochs)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("file", OF_PAPER, ids=named)
def test_the_header_is_complete_and_its_command_names_the_files(file: Path) -> None:
    entries = header(file)
    assert tuple(entries) == HEADER_KEYS
    recipe, command = loaded(file), entries["command"][0]
    assert recipe.name == file.stem
    config = re.search(r"--ds_config (\S+)", command)
    assert config
    beside = default_recipe(REPOSITORY / config[1])
    assert f"--recipe {file.relative_to(REPOSITORY)}" in command or beside == file
    assert loaded(beside).size == recipe.size
    assert entries["run by us"] == ["no"]
    text = " ".join(entries["command"])
    trained = [name for name in ("pretrain", "finetune") if getattr(recipe.stages, name) is not None]
    first = trained[0] if trained else "evaluate"
    assert re.findall(r"--stage (\w+)", text) == {"pretrain": ["finetune"]}.get(first, [first])
    assert ("then again with --stage finetune" in text) == (trained == ["pretrain", "finetune"])


@pytest.mark.parametrize("file", OF_PAPER, ids=named)
def test_the_numbers_in_a_header_are_the_papers(file: Path) -> None:
    recipe, lines = loaded(file), header(file)["paper"]
    quoted = [match for line in lines if (match := QUOTED.match(line))]
    assert len(quoted) == len(QUOTED.findall(" ".join(lines)))
    for number, table, row, epochs in (match.groups() for match in quoted):
        printed = paper_row(recipe, int(table), row and int(row), epochs and int(epochs))
        assert float(number) == printed.cells[recipe.size if table == "6" else "FT"]
    if not quoted and file in METHODS:
        assert lines[0].startswith((RELATIVE, NO_ROW))
    elif not quoted:
        assert lines[0] == DASH
        assert [row.cells[recipe.size] for row in TABLES[6].rows if row.method == recipe.method] == [None]


def test_every_number_of_the_tables_has_its_recipe() -> None:
    """All rows of Tables 3 to 6, and the rows of Table 1 that this project can train."""
    quoted: dict[tuple[int, str], list[str]] = {}
    for file in OF_PAPER:
        recipe = loaded(file)
        text = " ".join(header(file)["paper"])
        if DASH in text:
            quoted.setdefault((6, f"{recipe.method} {recipe.size}"), []).append(file.stem)
        for _, table, row, epochs in QUOTED.findall(text):
            epochs = epochs or (recipe.stages.pretrain.epochs if recipe.stages.pretrain else "")
            key = {"6": f"{recipe.method} {recipe.size}", "1": recipe.method, "5": str(epochs)}.get(table, row)
            quoted.setdefault((int(table), key), []).append(file.stem)
    wanted = {(6, f"{row.method} {size}") for row in TABLES[6].rows for size in row.cells}
    wanted |= {(1, method) for method in ("MAE", "DMAE", "MaskFeat", "MCMAE", "MILAN", "MR-MAE", "MVP", "data2vec")}
    wanted |= {(5, str(row.epochs)) for row in TABLES[5].rows}
    wanted |= {(table, str(n + 1)) for table in (3, 4) for n in range(len(TABLES[table].rows))}
    assert quoted.keys() == wanted
    assert [files for (table, _), files in quoted.items() if table == 6 and len(files) > 1] == []


@pytest.mark.parametrize("file", OVERLAYS, ids=named)
def test_an_overlay_states_only_the_difference(file: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    parent = load_recipe(file.parent / raw.pop("extends")).model_dump(mode="json")
    repeated = [".".join(keys) for keys, value in leaves(raw) if value == below(parent, keys)]
    assert repeated == []


def leaves(raw: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in raw.items():
        found += leaves(value, (*above, key)) if isinstance(value, dict) else [((*above, key), value)]
    return found


def below(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def test_recipes_of_identical_training_differ_in_name_only() -> None:
    by_hash: dict[str, list[Path]] = {}
    for file in FILES:
        by_hash.setdefault(loaded(file).hash(), []).append(file)
    for files in by_hash.values():
        renamed = [file for file in files if set(yaml.safe_load(file.read_text())) == {"extends", "name"}]
        assert len(renamed) >= len(files) - 1
        assert all("The training is that of ds_configs/base.yaml" in file.read_text() for file in renamed)


def teacher_builder(file: Path) -> TeacherBuilder:
    """Build teachers without weights, and those in files that users download from their architecture."""
    if file.stem not in FILE_TEACHERS:
        return build_meta_teacher

    def build(name: str, config: TeacherConfig, data: DataConfig, size: int, grid: tuple[int, int]) -> Teacher:
        options = TeacherOptions.from_config(name, config, data, size, grid)
        with torch.device("meta"):
            return meta_teacher(build_encoder(ARCHITECTURES[FILE_TEACHERS[file.stem]], options.image_size), options)

    return build


@pytest.mark.parametrize("file", TRAINED, ids=named)
def test_every_recipe_can_be_built(file: Path) -> None:
    recipe = loaded(file)
    spec, size = recipe.model.spec(), recipe.model.image_size
    with torch.device("meta"):
        if recipe.stages.pretrain is not None:
            model, teachers = build_pretraining(recipe, recipe.stages.pretrain, teacher_builder(file))
            assert all(teacher.grid == model.encoder.grid for teacher in teachers.values())
            assert all(p.is_meta for p in model.parameters())
        tuning = recipe.stages.finetune
        assert tuning is not None
        classifier = build_encoder(spec, tuning.image_size or size, 1000, tuning.drop_path)
        assert classifier.grid == ((tuning.image_size or size) // spec.stride,) * 2


@pytest.mark.parametrize("file", TRAINED, ids=named)
def test_initial_weights_come_from_another_recipes_run(file: Path) -> None:
    recipe = loaded(file)
    assert recipe.stages.finetune is not None
    init = recipe.stages.finetune.init
    if recipe.stages.pretrain is not None:
        assert init == "pretrain"
        return
    match = re.fullmatch(r"runs/(\w+)/pretrain", init)
    assert match
    (source,) = [loaded(other) for other in FILES if other.stem == match[1]]
    assert source.stages.pretrain is not None and source.method == recipe.method
    assert source.model == recipe.model
    assert f"runs/{source.name}/pretrain" in " ".join(header(file)["needs"])


@pytest.mark.parametrize("file", TRAINED, ids=named)
def test_batches_divide_on_up_to_8_gpus(file: Path) -> None:
    config, stages = engine_config(file), loaded(file).stages
    for stage in (stages.pretrain, stages.finetune):
        for gpus in (1, 2, 4, 8) if stage else ():
            steps = accumulation_steps(config, stage.batch_size, gpus, file.name)
            assert steps * gpus * config.micro_batch == stage.batch_size
    assert config.micro_batch % 2 == 0  # mixup pairs images


@pytest.mark.parametrize("name", ["small", "base", "large", "huge", "huge392", "huge448"])
def test_the_engine_config_of_a_size(name: str) -> None:
    config = load_engine_config(CONFIGS / f"{name}.json")
    zero = config.as_written()["zero_optimization"]
    assert config.zero.stage == 3 and config.as_written()["gradient_clipping"] == 0.0
    assert config.as_written()["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    recipe = loaded(CONFIGS / f"{name}.yaml")
    pretrained = loaded(CONFIGS / "huge.yaml") if recipe.stages.pretrain is None else recipe
    assert pretrained.stages.pretrain is not None
    with torch.device("meta"):
        model, _ = build_pretraining(pretrained, pretrained.stages.pretrain, build_meta_teacher)
    # Forward, recomputation and backward touch every parameter.
    touched = 3 * sum(p.numel() for p in model.parameters())
    assert zero["stage3_max_live_parameters"] > touched and zero["stage3_max_reuse_distance"] > touched
    assert set(zero["leaf_module"]["classes"]) <= {type(module).__name__ for module in model.modules()}
    # A leaf whose input needs no gradient fails: the first module of the network must not be one.
    assert isinstance(model.encoder, CViT) and not isinstance(model.encoder.patch_embed1, ConvBlock)


def test_the_scaling_table_has_the_methods_own_schedules() -> None:
    sizes = {"MR-MAE": "{}", "MAE": "baselines/mae_{}", "MCMAE": "baselines/mcmae_{}"}
    batches = {"MR-MAE": (1024, 80), "MAE": (4096, 40), "MCMAE": (3072, 40)}
    for row in TABLES[6].rows:
        for size in ("small", "base", "large", "huge"):
            recipe = loaded(CONFIGS / f"{sizes[row.method].format(size)}.yaml")
            stage = recipe.stages.pretrain
            assert stage is not None and recipe.size == size.capitalize()
            assert (recipe.method, stage.epochs) == (row.method, row.epochs)
            assert (stage.batch_size, stage.optimizer.warmup_epochs) == batches[row.method]
            assert stage.masking is not None
            assert stage.optimizer.base_lr == 1.5e-4 and stage.masking.keep_ratio == 0.25
            assert recipe.model.arch == f"{'vit' if row.method == 'MAE' else 'cvit'}_{size}"
            weights = [0.5, 0.5] if row.method == "MR-MAE" else [1.0]
            assert [objective.weight for objective in stage.objectives.values()] == weights


# base_lr, epochs, layer decay, drop path; MR-MAE's paper, MAE's and MCMAE's public code.
TUNING = {
    "base": (3e-4, 100, 0.6, 0.2),
    "baselines/mae_base": (5e-4, 100, 0.65, 0.1),
    "baselines/mcmae_base": (5e-4, 100, 0.65, 0.1),
    "large": (1e-3, 50, 0.75, 0.2),
    "baselines/mae_large": (1e-3, 50, 0.75, 0.2),
    "huge": (1e-3, 50, 0.75, 0.3),
    "baselines/mae_huge": (1e-3, 50, 0.75, 0.3),
    "baselines/mcmae_huge": (1e-3, 50, 0.75, 0.3),
}


@pytest.mark.parametrize("name", TUNING)
def test_fine_tuning_is_the_published_one(name: str) -> None:
    stage = loaded(CONFIGS / f"{name}.yaml").stages.finetune
    assert stage is not None
    assert (stage.optimizer.base_lr, stage.epochs, stage.layer_decay, stage.drop_path) == TUNING[name]
    assert (stage.mixup, stage.cutmix, stage.label_smoothing, stage.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (stage.batch_size, stage.optimizer.warmup_epochs, stage.optimizer.min_lr) == (1024, 5, 1e-6)
    assert stage.rand_augment == "rand-m9-mstd0.5-inc1"
    assert stage.crop_scale == (0.08, 1.0) and stage.optimizer.betas == (0.9, 0.999)


# Epochs, batch, peak rate, floor, warm-up, betas, clipping, drop path, crop scale, color jitter: the authors' code.
# MVP has none: BEiT's.
PRETRAINING = {
    "milan": (400, 4096, 2.4e-3, 0, 40, (0.9, 0.95), None, 0, (0.2, 1), 0),
    "dmae": (100, 4096, 2.4e-3, 0, 20, (0.9, 0.95), None, 0, (0.2, 1), 0),
    "maskalign": (200, 1024, 6e-4, 1e-5, 20, (0.9, 0.95), None, 0.1, (0.2, 1), 0),
    "maskfeat": (300, 2048, 1.6e-3, 1e-6, 30, (0.9, 0.999), 0.02, 0, (0.5, 1), 0),
    "mvp": (300, 2048, 1.5e-3, 1e-5, 10, (0.9, 0.999), 3, 0.1, (0.08, 1), 0.4),
    "fd": (300, 2048, 1.2e-3, 2e-5, 10, (0.9, 0.999), 3, 0.2, (0.08, 1), 0),
    "simmim_vit": (800, 2048, 4e-4, 0, 10, (0.9, 0.999), 5, 0.1, (0.67, 1), 0),
    "data2vec": (800, 2048, 2e-3, 1e-5, 10, (0.9, 0.999), 3, 0.25, (0.08, 1), 0.4),
}
# Batch, peak rate, layer decay, drop path, warm-up, weight decay.
METHOD_TUNING = {
    "milan": (1024, 4e-4, 0.65, 0.1, 5, 0.05),
    "dmae": (1024, 2e-3, 0.75, 0.15, 20, 0.05),
    "maskalign": (1024, 1.2e-3, 0.55, 0.2, 5, 0.05),
    "maskfeat": (2048, 8e-3, 0.65, 0.1, 20, 0.05),
    "mvp": (1024, 4e-3, 0.65, 0.1, 20, 0.05),
    "fd": (2048, 5e-3, 0.6, 0.3, 20, 0.05),
    "simmim_vit": (2048, 5e-3, 0.65, 0.1, 20, 0.05),
    "data2vec": (1024, 4e-3, 0.65, 0.2, 10, 0.0),
}
# Encoder input, arch, and visible or removed tokens of 196.
MASKS = {
    "milan": ("visible", "vit_base", 49),
    "dmae": ("visible", "vit_base", 49),
    "maskalign": ("visible", "vit_base", 58),
    "maskfeat": ("mask_tokens", "vit_base", 78),
    "mvp": ("mask_tokens", "beit_base", 75),
    "fd": ("full", "beit_base", 0),
    "simmim_vit": ("mask_tokens", "beit_base", 30 * 4),  # 30 of 49 squares
    "data2vec": ("mask_tokens", "beit_base", 120),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_method_is_trained_as_its_authors_do(name: str) -> None:
    recipe = loaded(CONFIGS / f"methods/{name}_base.yaml")
    stage, tuning = recipe.stages.pretrain, recipe.stages.finetune
    assert stage is not None and tuning is not None
    rate, floor = stage.optimizer, stage.optimizer.min_lr
    found = (stage.epochs, stage.batch_size, rate.peak_lr(stage.batch_size), floor, rate.warmup_epochs, rate.betas)
    found += (rate.clip_grad, stage.drop_path, stage.crop_scale, stage.color_jitter)
    assert [value == pytest.approx(wanted) for value, wanted in zip(found, PRETRAINING[name], strict=True)] == [
        True
    ] * 10
    assert (rate.weight_decay, stage.flip) == (0.05, 0.5)
    assert stage.attention_dropout == (0.05 if name == "data2vec" else 0)
    assert (rate.schedule, rate.milestones) == (("step", (700,)) if name == "simmim_vit" else ("cosine", ()))
    rate = tuning.optimizer
    found = (tuning.batch_size, rate.peak_lr(tuning.batch_size), tuning.layer_decay, tuning.drop_path)
    assert (*found, rate.warmup_epochs, rate.weight_decay) == pytest.approx(METHOD_TUNING[name])
    assert (tuning.epochs, tuning.rand_augment, tuning.pool) == (100, "rand-m9-mstd0.5-inc1", "avg")
    assert (tuning.mixup, tuning.cutmix, tuning.label_smoothing, tuning.random_erasing) == (0.8, 1.0, 0.1, 0.25)


@pytest.mark.parametrize("name", MASKS)
def test_a_method_masks_as_its_authors_do(name: str) -> None:
    recipe = loaded(CONFIGS / f"methods/{name}_base.yaml")
    stage = recipe.stages.pretrain
    assert stage is not None
    rows, columns = (14, 14) if stage.masking is None else stage.masking.grid((14, 14), 16)
    importance = {"clip": TeacherOutput(UNIFORM, UNIFORM)}
    counts = draw_visible(stage, importance, torch.rand(64, rows * columns), (14, 14), 16).mask.sum(1)
    counts = 196 - counts if stage.encoder_input == "visible" else counts
    assert (stage.encoder_input, recipe.model.arch, counts.max().item()) == MASKS[name]


def test_numbers_of_papers_that_were_not_read_are_marked() -> None:
    for file in METHODS:
        for sentence in re.split(r"(?<=[)\d%])[,;] |\. ", " ".join(header(file)["paper"])):
            assert "authors' paper" not in sentence or "(not confirmed here)" in sentence, named(file)
    marked = [text for text in errata_of(1) if "not confirmed here" in text]
    assert [text.partition(":")[0] for text in marked] == ["BEiT", "CAE", "CMAE"]


@pytest.mark.parametrize("row", range(1, 8))
def test_a_row_of_table_3_has_the_parts_that_the_table_ticks(row: int) -> None:
    (file,) = (CONFIGS / "ablations").glob(f"table3_{row}_*.yaml")
    recipe = loaded(file)
    stage, model = recipe.stages.pretrain, recipe.model
    assert stage is not None
    printed = TABLES[3].rows[row - 1]
    pixels = [o for o in stage.objectives.values() if o.target == "pixels"]
    features = [o for o in stage.objectives.values() if o.target != "pixels"]
    high = {"": [], "L_M": [("encoder", "visible")], "L_R": [("decoder", "masked")]}[printed.labels["High Level"]]
    assert [(o.tap, o.tokens) for o in features] == high
    assert [(o.tap, o.tokens) for o in pixels] == [("decoder", "masked")] * (printed.labels["Low Level"] == "L_R")
    assert sum(o.weight for o in stage.objectives.values()) == 1.0
    assert stage.masking is not None
    assert stage.masking.mode == ("sample" if printed.labels["Focused Mimic"] else "random")
    assert bool(model.fusion.stages or model.fusion.blocks) == bool(printed.labels["Multi-layer Fusion"])
    assert model.arch == ("cvit_base" if printed.labels["Masked Conv."] else "vit_base")
    assert stage.epochs == printed.epochs
    assert recipe.stages.finetune == loaded(CONFIGS / "base.yaml").stages.finetune
    assert f"(Table 3, row {row})" in header(file)["paper"][0]


@pytest.mark.parametrize(("name", "teachers"), [("dino", ["dino"]), ("clip", ["clip"]), ("joint", ["clip", "dino"])])
def test_a_row_of_table_4_has_its_teachers(name: str, teachers: list[str]) -> None:
    recipe = loaded(CONFIGS / f"ablations/table4_{name}.yaml")
    stage = recipe.stages.pretrain
    assert stage is not None
    mimics = [o for o in stage.objectives.values() if o.tap == "encoder"]
    assert list(recipe.teachers) == list(stage.teachers) == [o.target for o in mimics] == teachers
    assert [o.weight for o in mimics] == [0.5 / len(teachers)] * len(teachers)
    sources = {"clip": "ViT-B-16-quickgelu", "dino": "vit_base_patch16_224.dino"}
    assert {key: teacher.source for key, teacher in recipe.teachers.items()} == {key: sources[key] for key in teachers}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("ablations/table4_*.yaml")), ids=named)
def test_table_4_headers_state_what_the_paper_leaves_open(file: Path) -> None:
    paper = header(file)["paper"]
    assert f"(Table 4, row {TABLE_4[file.stem]})" in paper[0]
    assert "Table 4 does not say its epochs and tricks" in paper[1] and "85.0 %" in paper[1]


@pytest.mark.parametrize("epochs", [200, 400, 800])
def test_a_row_of_table_5_differs_in_its_epochs_alone(epochs: int) -> None:
    recipe = loaded(CONFIGS / f"ablations/table5_{epochs}.yaml")
    base = load_recipe(CONFIGS / "base.yaml", [f"stages.pretrain.epochs={epochs}"])
    assert recipe.hash() == base.hash()


def test_the_readme_lists_every_recipe_as_its_header_has_it() -> None:
    lines = (CONFIGS / "README.md").read_text().splitlines()
    listed = [line for line in lines if ".yaml) |" in line and "(detection/" not in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in listed]
    expected = []
    for file in OF_PAPER:
        entries = header(file)
        numbers = []
        for number, table, row, epochs in QUOTED.findall(" ".join(entries["paper"])):
            where = f"Table {table}" + (f", row {row}" if row else "") + (f", {epochs} epochs" if epochs else "")
            numbers.append(f"{number} ({where})")
        cost = re.match(r"(.*) exaFLOP .*, (\S+) GPU-hours", entries["cost"][0])
        exaflop, hours = cost.groups() if cost else ("-", "-")
        paper = "; ".join(numbers) or "-"
        expected.append([f"[{file.stem}]({named(file)})", paper, exaflop, hours, entries["run by us"][0]])
    assert sorted(rows) == sorted(expected)


def test_the_page_explains_every_key_of_the_engine_configs() -> None:
    text = (REPOSITORY / "docs" / "engine_configs.md").read_text()
    for name in ("small", "huge"):
        for keys, _ in leaves(load_engine_config(CONFIGS / f"{name}.json").as_written()):
            assert any(f"`{key}`" in text for key in (*keys, ".".join(keys)))


@pytest.mark.parametrize("file", TRAINED, ids=named)
def test_cost_line_has_the_documented_form(file: Path) -> None:
    (line,) = header(file)["cost"]
    stages = loaded(file).stages
    trained = "pretrain + finetune" if stages.pretrain else "finetune"
    match = re.fullmatch(
        rf"([\d.,+ ]+) exaFLOP \({re.escape(trained)}\), ([\d.,]+) GPU-hours at an assumed 200 TFLOP/s", line
    )
    assert match
    exaflop = sum(float(number.replace(",", "")) for number in match[1].split(" + "))
    assert float(match[2].replace(",", "")) == pytest.approx(exaflop * 1e18 / 200e12 / 3600, rel=0.01)


COUNTED = [
    "base",
    "ablations/table3_6_mimic_only",
    "methods/milan_base",
    "methods/dmae_base",
    "methods/mvp_base",
    "methods/fd_base",
    "methods/data2vec_base",
]


@pytest.mark.parametrize("name", COUNTED)
def test_cost_line_equals_the_output_of_mrmae_cost(name: str) -> None:
    file = CONFIGS / f"{name}.yaml"
    costs = recipe_cost(loaded(file), engine_config(file).checkpointing, teacher_builder=teacher_builder(file))
    assert header(file)["cost"] == [cost_line(costs, IMAGENET_TRAIN_SAMPLES, 200)]


@pytest.mark.parametrize("file", DETECTORS, ids=named)
def test_a_detectors_header_has_the_papers_numbers(file: Path) -> None:
    entries, recipe = header(file), loaded(file)
    assert tuple(entries) == HEADER_KEYS and entries["run by us"] == ["no"]
    assert recipe.name == f"coco_{file.stem}"
    commands = " ".join(entries["command"])
    assert f"--recipe {file.relative_to(REPOSITORY)}" in commands
    assert "--ds_config ds_configs/detection/mr_mae_base.json --stage detect" in commands
    assert recipe.stages.pretrain is not None and recipe.stages.detect is not None
    quoted = QUOTED_AP.findall(" ".join(entries["paper"]))
    assert quoted
    for box, mask, table, row in quoted:
        rows = TABLES[int(table)].rows
        epochs = recipe.stages.pretrain.epochs
        method = "ViTDet" if recipe.method == "MAE" else recipe.method
        (printed,) = [rows[int(row) - 1]] if row else [r for r in rows if (r.method, r.epochs) == (method, epochs)]
        assert (float(box), float(mask)) == (printed.cells["AP box"], printed.cells["AP mask"])


def test_every_ap_of_the_tables_has_its_recipe() -> None:
    """CMAE is not one of this project's methods."""
    quoted = [q for file in DETECTORS for q in QUOTED_AP.findall(" ".join(header(file)["paper"]))]
    found = {(int(table), float(box), float(mask)) for box, mask, table, _ in quoted}
    rows = [(table, row) for table in (2, 3, 5) for row in TABLES[table].rows if row.method != "CMAE"]
    assert found == {(t, row.cells["AP box"], row.cells["AP mask"]) for t, row in rows if row.cells["AP box"]}


@pytest.mark.parametrize("file", DETECTORS, ids=named)
def test_detectors_have_the_published_settings(file: Path) -> None:
    recipe = loaded(file)
    stage, plain = recipe.stages.detect, recipe.model.arch == "vit_base"
    assert stage is not None
    ours = file.stem != "mae_vit_base"
    assert (stage.epochs, stage.batch_size, stage.layer_decay) == ((25, 16, 0.8) if ours else (100, 64, 0.7))
    assert stage.optimizer.lr == (1e-4 if recipe.method in ("MAE", "MCMAE") else 2e-4)
    assert stage.detector.global_blocks == ((2, 5, 8, 11) if plain else (1, 4, 7, 10))
    assert (stage.init, stage.image_size, stage.jitter, stage.drop_path) == ("pretrain", 1024, (0.1, 2.0), 0.1)
    assert stage.optimizer.groups == "detectron2" and stage.optimizer.weight_decay == 0.1
    for gpus in (1, 2, 4, 8):
        accumulation_steps(load_engine_config(CONFIGS / "detection/mr_mae_base.json"), stage.batch_size, gpus, "")


@pytest.mark.parametrize("row", [4, 5, 6])
def test_the_encoders_of_table_3_are_those_of_the_ablations(row: int) -> None:
    (ablation,) = (CONFIGS / "ablations").glob(f"table3_{row}_*.yaml")
    assert loaded(CONFIGS / f"detection/table3_{row}.yaml").hash("pretrain") == loaded(ablation).hash("pretrain")


@pytest.mark.parametrize("file", DETECTORS, ids=named)
def test_cost_line_of_a_detector(file: Path) -> None:
    """GPU-hours follow from the exaFLOP, and those of the stage from its count for one image."""
    (line,), recipe = header(file)["cost"], loaded(file)
    match = re.fullmatch(r"([\d.]+) \+ ([\d.]+) exaFLOP \(pretrain \+ detect\), (\d+(?:\.\d)?) GPU-hours at .*", line)
    assert match and recipe.stages.pretrain is not None and recipe.stages.detect is not None
    before, after, hours = map(float, match.groups())
    assert hours == pytest.approx((before + after) * 1e18 / 200e12 / 3600, rel=0.01)
    per_image = {"cvit_base": 6 * 908e9, "vit_base": 6 * 792e9}[recipe.model.arch]  # three forward passes
    assert after == pytest.approx(per_image * 117_266 * recipe.stages.detect.epochs / 1e18, rel=0.01)


def test_the_readme_lists_every_detector() -> None:
    text = (CONFIGS / "README.md").read_text()
    for file in DETECTION:
        assert f"[{file.stem}]({named(file)})" in text
