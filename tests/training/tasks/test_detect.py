"""Stage detect: its data, losses and groups, and whole runs on any number of ranks and under any ZeRO stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.data.loaders.base import LoaderRequest
from mrmae_ds.detection import flops
from mrmae_ds.detection.coco import CocoSplit
from mrmae_ds.detection.flops import detector_flops
from mrmae_ds.detection.loader import DetectionBatch
from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.records.record import RunRecord
from mrmae_ds.training.engine.build import build_engine
from mrmae_ds.training.param_groups import adamw
from mrmae_ds.training.replay import replay
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.build import build_task, task_class
from mrmae_ds.training.tasks.detect import DetectTask
from mrmae_ds.weights.model_file import encoder_metadata, read_metadata, save_weights
from tests.support.coco import CATEGORIES, small_coco, write_coco
from tests.support.detectors import NUM_CLASSES, random_batch, small_detector
from tests.support.ranks import run_in_group
from tests.support.reference import perturb
from tests.support.small_detections import RECIPE, launch, overrides, write_detection_data
from tests.support.small_runs import assert_same, curve
from tests.training.parity.cases import ZERO, write_engine

PARTS = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")
CPU = torch.device("cpu")
RECOMPUTED = {"conv_stages": "all", "transformer": "all", "decoder": "none"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_detection_data(tmp_path)
    return tmp_path


def recipe_of(folder: Path, *more: str) -> Recipe:
    return load_recipe(RECIPE, overrides(folder, *more))


def task_of(folder: Path, *more: str) -> DetectTask:
    recipe = recipe_of(folder, *more)
    torch.manual_seed(0)
    task = build_task(recipe, "detect", load_engine_config(write_engine(folder / "engine.json")), len(CATEGORIES))
    assert isinstance(task, DetectTask)
    return task


def batches_of(task: DetectTask, folder: Path, micro_batch: int) -> list[DetectionBatch]:
    """Return the micro-batches of an epoch."""
    recipe = recipe_of(folder, "loader.num_workers=1")
    train, _ = task.open_data(recipe)
    request = LoaderRequest("train", task.image_size, micro_batch, seed=3)
    loader = task.train_loader(recipe, train, request, CPU)
    found = list(loader.epoch(0))
    loader.close()
    return found


@pytest.mark.multi_process
def test_losses_and_statistics(folder: Path) -> None:
    """Every parameter gets a gradient; the sum of the five parts is what is minimized."""
    task = task_of(folder)
    task.to(CPU)
    task.model.train()
    (batch, *_) = batches_of(task, folder, 2)
    losses = task.losses(task.model, batch, MicroBatchKey(0, 0, 0, 0, 1, 2))
    assert losses.keys() == {"loss", *PARTS, "boxes/positives", "boxes/recall"}
    torch.testing.assert_close(losses["loss"], torch.stack([losses[name] for name in PARTS]).sum())
    losses["loss"].backward()
    assert [name for name, p in task.model.named_parameters() if p.grad is None] == []


@pytest.mark.multi_process
def test_drawn_boxes_depend_on_the_place_in_the_global_batch_alone(folder: Path) -> None:
    """Two micro-batches of one image compute the same as a micro-batch of two; another place draws other boxes."""
    task = task_of(folder, "stages.detect.drop_path=0")
    task.to(CPU)
    task.model.train()
    (both, *_), (first, second, *_) = batches_of(task, folder, 2), batches_of(task, folder, 1)
    assert both.indices.tolist() == [first.indices.item(), second.indices.item()]
    whole = task.losses(task.model, both, MicroBatchKey(7, 5, 0, 0, 1, 2))
    parts = [
        task.losses(task.model, batch, MicroBatchKey(7, 5, 0, rank, 2, 1)) for rank, batch in enumerate((first, second))
    ]
    for name in ("objectness", "rpn_box_reg"):  # divided by the images
        torch.testing.assert_close(whole[name], (parts[0][name] + parts[1][name]) / 2)
    other = task.losses(task.model, first, MicroBatchKey(7, 5, 1, 0, 2, 1))
    assert other["objectness"] != parts[0]["objectness"]


def test_groups_of_this_projects_rule(folder: Path) -> None:
    """One-dimensional parameters and the position embedding are not decayed; scales are those of Detectron2's rule."""
    tasks = {rule: task_of(folder, f"stages.detect.optimizer.groups={rule}") for rule in ("project", "detectron2")}
    names = {rule: {id(p): name for name, p in task.model.named_parameters()} for rule, task in tasks.items()}
    found = {
        rule: {names[rule][id(p)]: group for group in task.param_groups() for p in group["params"]}
        for rule, task in tasks.items()
    }
    model = tasks["project"].model
    for name, parameter in model.named_parameters():
        ours, theirs = found["project"][name], found["detectron2"][name]
        assert ours["lr_scale"] == theirs["lr_scale"]
        assert (ours["weight_decay"] > 0) == (False if parameter.ndim == 1 else theirs["weight_decay"] > 0)


def test_the_encoder_of_a_pretraining_is_loaded(folder: Path) -> None:
    recipe = recipe_of(folder)
    encoder = build_encoder(recipe.model.spec(), recipe.model.image_size)
    perturb(encoder, seed=3)
    metadata = {"kind": "encoder", **encoder_metadata(encoder), "mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(folder / "runs" / "pretrain" / "model.safetensors", encoder.state_dict(), metadata)
    recipe = recipe_of(folder, "stages.detect.init=pretrain")
    engine = load_engine_config(write_engine(folder / "engine.json"))
    task = build_task(recipe, "detect", engine, len(CATEGORIES), folder / "runs")
    assert task.init == folder / "runs" / "pretrain" / "model.safetensors" and "missing 6 (" in task.init_report
    state = task.encoder.state_dict()
    assert all("rel_pos" in name for name in state.keys() - encoder.state_dict().keys())
    for name in state.keys() & encoder.state_dict().keys():
        assert torch.equal(state[name], encoder.state_dict()[name]), name
    with pytest.raises(UserError, match=r"stages\.detect\.init: .*nowhere does not exist"):
        build_task(recipe_of(folder, "stages.detect.init=nowhere"), "detect", engine, 4, folder / "runs")


def write_detector(folder: Path, classes: int = len(CATEGORIES)) -> dict[str, Tensor]:
    """Write random weights of a whole detector to ``FOLDER/detector.pth``."""
    recipe = recipe_of(folder)
    torch.manual_seed(7)
    task = build_task(recipe, "detect", load_engine_config(write_engine(folder / "engine.json")), classes)
    state = task.model.state_dict()
    torch.save({"model": state}, folder / "detector.pth")
    return state


def test_a_whole_detector_or_its_encoder_is_loaded(folder: Path) -> None:
    written, path = write_detector(folder), folder / "detector.pth"
    engine = load_engine_config(write_engine(folder / "engine.json"))
    for init, whole in ((f"{path}", True), (f"{path}#backbone.net", False)):
        torch.manual_seed(0)
        task = build_task(recipe_of(folder, f"stages.detect.init={init}"), "detect", engine, 4, folder / "runs")
        assert task.init_whole == whole and "missing 0; not used" in task.init_report
        state = task.model.state_dict()
        assert all(torch.equal(t, written[name]) for name, t in state.items() if whole or "backbone.net." in name)
        assert torch.equal(state["rpn.head.cls_logits.weight"], written["rpn.head.cls_logits.weight"]) == whole
    write_detector(folder, 3)
    with pytest.raises(UserError, match=r"stages\.detect\.init: .*detects 3 classes, but the data set has 4"):
        build_task(recipe_of(folder, f"stages.detect.init={path}"), "detect", engine, 4, folder / "runs")


def _without_objects(content: dict[str, Any]) -> None:
    content["annotations"] = [annotation | {"iscrowd": 1} for annotation in content["annotations"]]


def _other_names(content: dict[str, Any]) -> None:
    content["categories"][0]["name"] = "cat"


@pytest.mark.parametrize(
    ("change", "message"),
    [(_without_objects, "no object to evaluate on in its"), (_other_names, "categories of train and val differ")],
)
def test_validation_sets_that_are_refused(folder: Path, change: Any, message: str) -> None:
    content = small_coco()
    change(content)
    path, images = write_coco(folder / "other", content)
    changed = f"data.detection.val={{images: {images}, annotations: {path}}}"
    with pytest.raises(UserError, match=message):
        task_class("detect").open_data(recipe_of(folder, changed))


def test_data_that_a_recipe_lacks(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.detection: stages\.detect needs COCO's train and val"):
        recipe_of(folder, "data.detection=null")


def test_the_data_set_as_records_describe_it(folder: Path) -> None:
    train, val = task_class("detect").open_data(recipe_of(folder))
    assert isinstance(train, CocoSplit) and isinstance(val, CocoSplit)
    assert (train.num_samples, val.num_samples, train.num_classes) == (4, 6, 4)
    assert (train.num_annotations, val.num_annotations) == (17, 18)
    assert train.class_names == tuple(CATEGORIES.values()) and train.name == "annotations"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one training, on one rank and on two, under ZeRO-2 and ZeRO-3."""
    folder = tmp_path_factory.mktemp("detect")
    write_detection_data(folder)
    for name, ranks, zero in (("one", 1, 2), ("two", 2, 2), ("sharded", 2, 3)):
        ended = launch(folder, name, ranks, write_engine(folder / f"{name}.json", zero))
        assert ended.wait(120) == [0] * ranks, ended.text()
    return folder


@pytest.mark.multi_process
def test_a_run_leaves_its_record_and_files(runs: Path) -> None:
    stage = runs / "sharded" / "detect"
    record = RunRecord.load(stage)
    assert record.status == "finished" and record.detection is not None and record.operations is not None
    assert (record.detection.train.images, record.detection.val.images) == (4, 6)
    assert record.detection.val.annotations == 18 and record.data.classes == 4
    for kind in ("box", "mask"):
        value = record.results.value(f"{kind}/AP")
        assert value is not None and 0 <= value <= 100
    assert record.results.eval_samples == 6
    names = {path.name for path in stage.iterdir()}
    assert names >= {"results_val.json", "per_class.csv", "predictions.png", "loss_curves.png", "model.safetensors"}
    lines = curve(stage)
    assert {*(f"loss/{name}" for name in PARTS), "boxes/positives", "boxes/recall"} <= lines[0].keys()
    assert "box/AP" not in lines[0] and {"box/AP", "mask/AP"} <= lines[-1].keys()
    metadata = read_metadata(stage / "model.safetensors")
    assert metadata["kind"] == "detector" and metadata["category_ids"] == list(CATEGORIES)


@pytest.mark.multi_process
def test_training_starts_where_a_detector_ended(runs: Path) -> None:
    """At a rate of almost zero the detector's AP stays; the record says that no pre-training was continued."""
    init = f"stages.detect.init={runs / 'one' / 'detect'}"
    more = (init, "stages.detect.epochs=1", "stages.detect.optimizer.lr=1e-20")
    ended = launch(runs, "continued", 1, write_engine(runs / "continued.json"), *more)
    assert ended.wait(120) == [0], ended.text()
    record, before = (RunRecord.load(runs / name / "detect") for name in ("continued", "one"))
    assert record.init is not None and record.init.whole and before.init is None
    for name in ("box/AP", "mask/AP"):
        assert record.results.value(name) == before.results.value(name)


def assert_same_but_for_rounding(runs: Path, name: str) -> None:
    """Compare losses and weights with those of one rank."""
    ours, theirs = (runs / run / "detect" for run in (name, "one"))
    for mine, other in zip(curve(ours), curve(theirs), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
    weights = load_file(theirs / "model.safetensors")
    for tensor_name, tensor in load_file(ours / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[tensor_name], rtol=0, atol=1e-6)


@pytest.mark.multi_process
def test_ranks_and_zero_stages_train_the_same(runs: Path) -> None:
    for name in ("two", "sharded"):
        assert_same_but_for_rounding(runs, name)


@pytest.mark.multi_process
def test_a_run_resumes_in_mid_epoch_bit_by_bit(runs: Path) -> None:
    """A signal ends the first processes after the first of an epoch's two steps."""
    engine = runs / "two.json"
    stopped = launch(runs, "resumed", 2, engine, fault="signal:step=2")
    assert stopped.wait(120) == [75, 75], stopped.text()
    resumed = launch(runs, "resumed", 2, engine)
    assert resumed.wait(120) == [0, 0], resumed.text()
    assert "resuming after step 3" in resumed.text()
    assert_same(runs / "resumed" / "detect", runs / "two" / "detect")


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("engine", ["two", "sharded"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(before: int, after: int, engine: str, runs: Path) -> None:
    name, config = f"{engine}-{before}-{after}", runs / f"{engine}.json"
    stopped = launch(runs, name, before, config, fault="signal:step=2")
    assert stopped.wait(120) == [75] * before, stopped.text()
    resumed = launch(runs, name, after, config)
    assert resumed.wait(120) == [0] * after, resumed.text()
    assert "resuming after step 3" in resumed.text()
    assert_same_but_for_rounding(runs, name)


ENGINES: dict[str, tuple[int, dict[str, Any], float]] = {
    "partitioned": (2, {}, 0.0),
    "unpartitioned": (0, {}, 1e-6),
    "recomputed": (3, {"activation_checkpointing": RECOMPUTED}, 1e-6),
    "offloaded": (3, {"zero_optimization": ZERO[3] | OFFLOAD}, 1e-6),
    "autocast": (3, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 0.05),
    "bf16": (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, 0.05),
}


@pytest.fixture(scope="module")
def curve_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, float]]]:
    """Function of an engine to the losses of a training on one rank.

    Which proposals are kept may depend on the last bit: with seed 0, offloaded losses differ by 1e-4 from step 4 on.
    With seeds 1, 2 and 3 they differ in no digit.
    """
    folder = tmp_path_factory.mktemp("engines")
    write_detection_data(folder)

    @functools.cache
    def train(name: str) -> list[dict[str, float]]:
        zero, changes, _ = ENGINES[name]
        ended = launch(folder, name, 1, write_engine(folder / f"{name}.json", zero, **changes), "seed=1")
        assert ended.wait(120) == [0], ended.text()
        return curve(folder / name / "detect")

    return train


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "partitioned"])
def test_engines_compute_the_same(name: str, curve_of: Callable[..., list[dict[str, float]]]) -> None:
    for ours, theirs in zip(curve_of(name), curve_of("partitioned"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=ENGINES[name][2])


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_skipped_step_is_captured_and_repeated(runs: Path) -> None:
    ended = launch(runs, "skipped", 2, runs / "two.json", fault="nan_loss:step=3")
    assert ended.wait(120) == [0, 0] and "step 4 skipped: a loss was not finite" in ended.text(), ended.text()
    (folder,) = (runs / "skipped" / "detect" / "captures").iterdir()
    capture, parts = replay(folder, CPU)
    assert capture.stage == "detect" and [part.rank for part in parts] == [0, 1]
    assert parts[1].replayed == pytest.approx(parts[1].captured, rel=1e-6)  # the fault was rank 0's
    assert all(part.finite for part in parts)


def test_operations_are_counted_on_one_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, built, task = recipe_of(tmp_path), [], task_of(tmp_path)
    build = flops.build_detector
    monkeypatch.setattr(flops, "build_detector", lambda *args: built.append(build(*args)) or built[-1])
    none, all_blocks = (task.count_operations(recipe, CheckpointPlan(0, n), 3) for n in (0, 1))
    assert len(built) == 2 and none.forward == all_blocks.forward and none.recomputed == 0
    encoder = detector_flops(built[0].eval(), recipe.stages.detect)["encoder"]
    assert 0 < all_blocks.recomputed < encoder  # the stages of convolutions are kept
    assert all_blocks.training == none.training + all_blocks.recomputed


def _without_guard(rank: int, world_size: int, folder: Path) -> None:
    """Train a step with objects and one without; leave out the mask head where a rank has no object."""
    from mrmae_ds.detection.roi_heads import RegionHeads

    whole = RegionHeads._masks

    def early_return(self: RegionHeads, levels: Any, boxes: Any) -> Any:
        return whole(self, levels, boxes) if sum(map(len, boxes)) else levels[0].new_zeros(0, NUM_CLASSES + 1, 28, 28)

    RegionHeads._masks = early_return  # type: ignore[method-assign]
    model = small_detector()
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": 0.0, "lr": 0.1}]
    config = load_engine_config(write_engine(folder / f"guard-{rank}.json", zero=3))
    engine = build_engine(model, groups, adamw((0.9, 0.999)), config, 1, CPU)
    for objects in (2, 0):
        try:
            engine.backward(engine(*random_batch((objects,), seed=rank), seeds=[rank])["loss"])
        except RuntimeError as error:
            (folder / f"stopped-{rank}").write_text(f"{objects} {error}")
            return
        engine.step()


@pytest.mark.multi_process
def test_a_module_that_is_left_out_stops_training(tmp_path: Path) -> None:
    """Without a rank's objects in the step, ZeRO-3 would silently apply the mask head's gradient of the step before."""
    run_in_group(_without_guard, 2, tmp_path)
    for rank in range(2):
        message = (tmp_path / f"stopped-{rank}").read_text()
        assert message.startswith("0 no gradient reached roi_heads.mask_head"), message
