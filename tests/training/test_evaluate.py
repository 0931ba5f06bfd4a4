"""The stage ``evaluate``: one model or several, against a plain loop over single images in float64."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from mrmae_ds.records.metrics import read_metrics
from mrmae_ds.records.record import RunRecord
from mrmae_ds.training.evaluate import PreparedEvaluation, evaluate, log_mean_softmax, prepare_evaluation
from mrmae_ds.training.evaluation.job import EvaluationJob
from mrmae_ds.training.job import TrainArgs
from mrmae_ds.weights.export import Exported, export_run
from mrmae_ds.weights.model_file import (
    encoder_metadata,
    read_metadata,
    save_weights,
    spec_from_metadata,
)
from tests.support.jobs import ALONE
from tests.support.jpegs import stored_jpegs
from tests.support.loaders import open_loader
from tests.support.ranks import start
from tests.support.records import make_record
from tests.support.sample_data import write_sample_beton

TRAIN, VAL = 192, 90
ENGINE, RECIPE = Path("ds_configs/tiny.json"), Path("ds_configs/tiny.yaml")
CPU = torch.device("cpu")
CVIT = CViTSpec((16, 24, 32), (1, 1, 2), 4, patches=(2, 2, 1))
VIT = ViTSpec(48, 2, 4, patch=8)
# Statistics and image sizes that differ from the recipe's.
STATISTICS = {"cvit": ([0.4, 0.5, 0.6], [0.5, 0.4, 0.3]), "vit": ([0.2, 0.2, 0.3], [0.25, 0.5, 0.3])}
SIZES = {"cvit": 32, "vit": 64}
POOLS = {"cvit": "avg", "vit": "token"}
pytestmark = [pytest.mark.timeout(400), pytest.mark.multi_process]


def prepared(options: TrainArgs) -> PreparedEvaluation:
    """Prepare an evaluation on one rank."""
    job = EvaluationJob.of_args(options, ALONE)
    return prepare_evaluation(job, job.resolve_member(0))


@dataclass(frozen=True)
class Workspace:
    """A folder with images and, in runs/NAME/finetune, two classifiers better than chance."""

    folder: Path

    def member(self, name: str) -> Path:
        return self.folder / "runs" / name / "finetune"

    def overrides(self, *members: str | Path, **evaluate: object) -> tuple[str, ...]:
        names = ", ".join(str(self.member(m) if isinstance(m, str) else m) for m in members)
        extra = [f"stages.evaluate.{key}={value}" for key, value in evaluate.items()]
        data = (f"data.train={self.folder / 'train.beton'}", f"data.val={self.folder / 'val.beton'}")
        return (*data, f"stages.evaluate.members=[{names}]", *extra)

    def prepare(
        self, *members: str | Path, run: str = "run", resume: str = "auto", **evaluate: object
    ) -> PreparedEvaluation:
        overrides = self.overrides(*members, **evaluate)
        options = TrainArgs(ENGINE, "evaluate", RECIPE, self.folder / run, resume, overrides)
        return prepared(options)

    def images(self, part: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All images of a part as evaluation sees them, read singly: uint8 [N, 3, size, size] and labels [N]."""
        batches = list(open_loader(self.folder / f"{part}.beton", image_size=size, micro_batch=1).epoch(0))
        return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def _outputs(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in STATISTICS[name])
    with torch.no_grad():
        return model.eval()((images.float() / 255 - mean) / std)


def _write_member(workspace: Workspace, name: str, spec: EncoderSpec, seed: int) -> None:
    """A classifier of random features under a head fitted to the training labels by least squares."""
    torch.manual_seed(seed)
    model = build_encoder(spec, SIZES[name], 10, pool=POOLS[name])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    images, labels = workspace.images("train", SIZES[name])
    head, model.head = model.head, nn.Identity()
    features = _outputs(model, images, name).double()
    wanted = 4 * torch.eye(10, dtype=torch.float64)[labels]
    ridge = features.T @ features + 10 * torch.eye(features.shape[1], dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.linalg.solve(ridge, features.T @ wanted).T)
        head.bias.zero_()
    model.head = head
    mean, std = STATISTICS[name]
    classes = list(check_beton(workspace.folder / "val.beton").class_names)
    metadata = {"kind": "classifier", **encoder_metadata(model), "num_classes": 10, "class_names": classes}
    save_weights(
        workspace.member(name) / "model.safetensors", model.state_dict(), metadata | {"mean": mean, "std": std}
    )
    make_record(method=name, seed=seed, top1=50.0, pretrain=7).write(workspace.member(name))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("evaluation")
    write_sample_beton(folder, train=TRAIN, val=VAL)
    workspace = Workspace(folder)
    _write_member(workspace, "cvit", CVIT, seed=3)
    _write_member(workspace, "vit", VIT, seed=4)
    return workspace


def _softmax(workspace: Workspace, name: str, size: int | None = None) -> np.ndarray:
    """Each validation image's class probabilities, float64 [N, 10], without the stage's code."""
    path = workspace.member(name) / "model.safetensors"
    model = build_encoder(spec_from_metadata(read_metadata(path)), size or SIZES[name], 10, pool=POOLS[name])
    model.load_state_dict(load_file(path))
    images, _ = workspace.images("val", size or SIZES[name])
    logits = torch.cat([_outputs(model, image[None], name) for image in images]).numpy().astype(np.float64)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def _accuracy(workspace: Workspace, probabilities: np.ndarray) -> dict[str, float]:
    labels = workspace.images("val", 32)[1].numpy()
    right = probabilities[np.arange(VAL), labels]
    above = (probabilities > right[:, None]).sum(1)
    top1, top5 = (100 * float((above < k).mean()) for k in (1, 5))
    return {"top1": top1, "top5": top5, "loss": float(-np.log(right).mean()), "eval_samples": VAL}


@pytest.fixture(scope="module")
def expected(workspace: Workspace) -> dict[str, dict[str, float]]:
    """Accuracies of each model by name, and of the ensemble."""
    both = {name: _softmax(workspace, name) for name in ("cvit", "vit")}
    scores = {name: _accuracy(workspace, probabilities) for name, probabilities in both.items()}
    scores["both"] = _accuracy(workspace, (both["cvit"] + both["vit"]) / 2)
    # The three accuracies differ, and are neither chance nor perfect.
    assert len({score["top1"] for score in scores.values()}) == 3
    assert all(20 < score["top1"] < 95 for score in scores.values())
    return scores


def test_an_ensemble_equals_a_plain_loop(
    workspace: Workspace, expected: dict[str, dict[str, float]], alone: None
) -> None:
    average, members = evaluate(workspace.prepare("cvit", "vit"), CPU)
    assert average == pytest.approx(expected["both"], rel=1e-5)
    assert members == [pytest.approx(expected[name], rel=1e-5) for name in ("cvit", "vit")]


def test_single_member_equals_that_model(
    workspace: Workspace, expected: dict[str, dict[str, float]], alone: None
) -> None:
    average, members = evaluate(workspace.prepare("vit"), CPU)
    assert [average] == members == [pytest.approx(expected["vit"], rel=1e-5)]


@pytest.mark.parametrize("name", ["cvit", "vit"])
def test_timm_measures_the_same_of_the_exported_model(
    name: str, workspace: Workspace, tmp_path: Path, alone: None
) -> None:
    """By the printed line and timm's own transform, on the stored images: accuracies and loss of our evaluation."""
    overrides = (*workspace.overrides(name), "data.eval_backend=pillow")
    options = TrainArgs(ENGINE, "evaluate", RECIPE, tmp_path / "run", "auto", overrides)
    measured, _ = evaluate(prepared(options), CPU)
    exported = export_run(workspace.member(name), out=tmp_path / "x.safetensors")
    assert _accuracy(workspace, _softmax_by_timm(exported, workspace)) == pytest.approx(measured, rel=1e-5)
    without_statistics = re.sub(r"'(mean|std)': \([^)]*\),? ?", "", exported.line)
    other = _softmax_by_timm(replace(exported, line=without_statistics), workspace)
    assert _accuracy(workspace, other)["loss"] != pytest.approx(measured["loss"], rel=1e-2)


def _softmax_by_timm(exported: Exported, workspace: Workspace) -> np.ndarray:
    """Each validation image's class probabilities, float64 [N, 10], of an exported model, without this project."""
    names: dict[str, Any] = {}
    exec(exported.line, names)
    model = names["model"].eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    jpegs = [jpeg for jpeg, _, _ in stored_jpegs(workspace.folder / "val.beton")]
    with torch.no_grad():
        logits = [model(transform(Image.open(io.BytesIO(jpeg)).convert("RGB"))[None])[0] for jpeg in jpegs]
    return torch.stack(logits).double().softmax(1).numpy()


def test_two_ranks_equal_one(workspace: Workspace, expected: dict[str, dict[str, float]]) -> None:
    overrides = workspace.overrides("cvit", "vit")
    command = ("--ds_config", ENGINE, "--recipe", RECIPE, "--stage", "evaluate", "--run", workspace.folder / "two")
    ranks = start(2, [*command, *overrides], workspace.folder / "logs")
    assert ranks.wait(240) == [0, 0], ranks.text()
    both, folder = expected["both"], workspace.folder / "two" / "evaluate"
    lines = ranks.text(0).splitlines()
    assert f"  {workspace.member('cvit')}: top-1 {expected['cvit']['top1']:.2f} %" in lines[-3]
    assert f"  average of 2: top-1 {both['top1']:.2f} %, top-5 {both['top5']:.2f} %" in lines[-1]
    record = RunRecord.load(folder)
    assert (record.status, record.stage, record.hardware.world_size) == ("finished", "evaluate", 2)
    assert record.results.model_dump()["member2/top5"] == pytest.approx(expected["vit"]["top5"])
    assert {name: getattr(record.results, name) for name in both} == pytest.approx(both, rel=1e-5)
    assert [(member.finetune.method, member.finetune.seed) for member in record.members] == [("cvit", 3), ("vit", 4)]
    assert (record.pretrain_epochs, record.data.samples, record.parameters.trainable) == (7, VAL, 0)
    (line,) = read_metrics(folder)
    logged = (line["step"], line["top1"], line["member1/top1"])
    assert logged == pytest.approx((0, both["top1"], expected["cvit"]["top1"]))
    assert "members:" in (folder / "recipe.yaml").read_text() and not (folder / "checkpoints").exists()

    assert workspace.prepare("cvit", "vit", run="two").done
    assert not workspace.prepare("cvit", "vit", run="two", resume="never").done
    with pytest.raises(UserError, match=r"stages\.evaluate\.members: .*--resume never"):
        workspace.prepare("cvit", run="two")


def test_replaced_weights_are_evaluated_again(workspace: Workspace, tmp_path: Path) -> None:
    member = tmp_path / "model"
    shutil.copytree(workspace.member("cvit"), member)
    job = workspace.prepare(member, run="changed")
    record = make_record(
        stage="evaluate",
        recipe_hash=job.recipe.hash("evaluate"),
        members=[job.classifiers[0].member],
        data={"dataset": "x", "file": "x", "sha256": job.val_data.sha256, "samples": VAL, "classes": 10},
    )
    record.write(job.stage_dir)
    assert workspace.prepare(member, run="changed").done
    shutil.copy(workspace.member("vit") / "model.safetensors", member)
    with pytest.raises(UserError, match="other weights"):
        workspace.prepare(member, run="changed")


def test_another_image_size_resizes_the_positions(workspace: Workspace) -> None:
    (classifier,) = workspace.prepare("vit", image_size=96).classifiers
    assert classifier.image_size == 96 and classifier.model.grid == (12, 12)


def test_default_member_is_the_runs_fine_tuning(workspace: Workspace) -> None:
    overrides = workspace.overrides("cvit")[:2]
    for run, found in ((workspace.folder / "runs" / "vit", True), (workspace.folder / "nowhere", False)):
        options = TrainArgs(ENGINE, "evaluate", RECIPE, run, "auto", overrides)
        if found:
            assert prepared(options).classifiers[0].source == str(workspace.member("vit"))
            continue
        with pytest.raises(UserError, match=r"stages\.evaluate\.members\[0\]: .*nowhere/finetune does not exist"):
            prepared(options)


def _foreign(workspace: Workspace, folder: Path, **config: object) -> Path:
    """The member ``vit`` as another project saves it: among twelve classes, in another order, without metadata."""
    tensors = load_file(workspace.member("vit") / "model.safetensors")
    names = list(check_beton(workspace.folder / "val.beton").class_names)
    order = [*range(9, -1, -1)]
    for end in ("weight", "bias"):
        rows = tensors[f"head.{end}"]
        other = torch.full_like(rows[:1], 100.0 if end == "bias" else 0.0)  # would win every image
        tensors[f"head.{end}"] = torch.cat([other, rows[order], other])
    labels = dict(enumerate(["other", *(names[i] for i in order), "another"]))
    mean, std = STATISTICS["vit"]
    config = {"id2label": labels, "num_attention_heads": VIT.num_heads, "hidden_size": VIT.dim} | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    torch.save({"model": tensors, "epoch": 3}, folder / "x.pth")
    return folder / "x.pth"


def test_a_classifier_of_another_project_on_some_of_its_classes(
    workspace: Workspace, expected: dict[str, dict[str, float]], tmp_path: Path, alone: None
) -> None:
    job = workspace.prepare(_foreign(workspace, tmp_path), "vit")
    (foreign, ours) = job.classifiers
    assert (foreign.member.of_classes, ours.member.of_classes) == (12, None)
    assert foreign.classes == (*range(10, 0, -1),)
    average, members = evaluate(job, CPU)
    assert members == [pytest.approx(expected["vit"], rel=1e-5)] * 2 and average == pytest.approx(
        expected["vit"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": None}, r"members\[0\]: .*x.pth does not record the names of its 12 classes; put a config.json"),
        (
            {"id2label": {i: f"c{i}" for i in range(12)}},
            r"x.pth was trained on other classes \(12\) than .*, and not on '",
        ),
        ({"num_attention_heads": None}, r"x.pth: does not record its number of attention heads"),
    ],
    ids=["classes", "other classes", "heads"],
)
def test_a_classifier_of_another_project_that_is_not_known(
    config: dict[str, object], message: str, workspace: Workspace, tmp_path: Path
) -> None:
    path = _foreign(workspace, tmp_path, **config)
    with pytest.raises(UserError, match=message):
        workspace.prepare(path)
    (tmp_path / "preprocessor_config.json").unlink()
    _foreign(workspace, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"x.pth: does not record the mean and std of its input.*preprocessor_config"):
        workspace.prepare(path)


def _altered(workspace: Workspace, folder: Path, drop: str = "", **metadata: object) -> Path:
    """A member's file with other metadata, or without some of its tensors."""
    path = workspace.member("cvit") / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not drop or not name.startswith(drop)}
    save_weights(folder / "model.safetensors", tensors, read_metadata(path) | metadata)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pretrain"}, r"members\[1\]: .*no classifier \(pretrain\)"),
        ({"class_names": [str(i) for i in range(10)]}, r"members\[1\]: .*other classes"),
        (
            {"class_names": ["a", "b"], "num_classes": 2},
            r"members\[1\]: .*other classes \(2\).*\(10; number 0 is .*the other",
        ),
        ({"drop": "fc_norm"}, r"members\[1\]: .*lacks fc_norm"),
        ({"drop": "head"}, r"members\[1\]: .*incomplete: .*head.weight"),
    ],
)
def test_a_member_that_does_not_fit_is_refused(
    changes: dict[str, object], message: str, workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        workspace.prepare("cvit", _altered(workspace, tmp_path, **changes))


def test_a_size_that_does_not_tile_names_the_model(workspace: Workspace) -> None:
    with pytest.raises(UserError, match=r"stages\.evaluate\.image_size: 36 .*32 and 40, for .*vit/finetune"):
        workspace.prepare("cvit", "vit", image_size=36)


@pytest.mark.parametrize(("changes", "message"), [({"dry_run": True}, "--dry-run"), ({"resume": "x"}, "--resume x")])
def test_refuses_invalid_evaluations(changes: dict[str, object], message: str, workspace: Workspace) -> None:
    options = TrainArgs(
        ENGINE, "evaluate", RECIPE, workspace.folder, **{"overrides": workspace.overrides("vit")} | changes
    )
    with pytest.raises(UserError, match=message):
        prepared(options)


def test_ensemble_averages_probabilities() -> None:
    sure, unsure = torch.tensor([[0.0, 20.0]]), torch.tensor([[0.5, 0.0]])
    mean = log_mean_softmax([sure, unsure, unsure]).exp()
    second = (1 / (1 + np.exp(-20.0)) + 2 / (1 + np.exp(0.5))) / 3
    assert mean[0, 1].item() == pytest.approx(second, rel=1e-6)


def test_evaluation_repeats_the_final_accuracy_of_fine_tuning(workspace: Workspace, alone: None) -> None:
    """Under autocast: the stage's plain module computes what DeepSpeed's engine computed."""
    engine = json.loads(ENGINE.read_text()) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    config, run = workspace.folder / "autocast.json", workspace.folder / "tuned"
    config.write_text(json.dumps(engine))
    recipe, data = Path("ds_configs/baselines/scratch_tiny.yaml"), workspace.folder / "val.beton"
    overrides = (f"data.train={data}", f"data.val={data}")
    settings = (
        *overrides,
        "stages.finetune.epochs=2",
        "stages.finetune.batch_size=48",
        "model.overrides.depths=[1,1,1]",
    )
    command = ("--ds_config", config, "--recipe", recipe, "--stage", "finetune", "--run", run, *settings)
    rank = start(1, command, workspace.folder / "logs")
    assert rank.wait(240) == [0], rank.text()
    tuned = RunRecord.load(run / "finetune").results
    plain = TrainArgs(ENGINE, "evaluate", recipe, run, "auto", overrides)
    again, _ = evaluate(prepared(replace(plain, ds_config=config)), CPU)
    assert again == {name: getattr(tuned, name) for name in ("top1", "top5", "loss", "eval_samples")}
    full, _ = evaluate(prepared(plain), CPU)
    assert full["loss"] != again["loss"]  # by any amount: rounding may cancel in a mean


def test_bf16_weights_are_evaluated_as_they_were_trained(
    workspace: Workspace, expected: dict[str, dict[str, float]], alone: None
) -> None:
    config = workspace.folder / "bf16.json"
    section = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    config.write_text(json.dumps(json.loads(ENGINE.read_text()) | section))
    options = TrainArgs(
        config, "evaluate", RECIPE, workspace.folder / "bf16", "auto", workspace.overrides("cvit", "vit")
    )
    job = prepared(options)
    average, _ = evaluate(job, CPU)
    assert {p.dtype for classifier in job.classifiers for p in classifier.model.parameters()} == {torch.bfloat16}
    assert average["loss"] == pytest.approx(expected["both"]["loss"], rel=0.02)
    assert average["loss"] != pytest.approx(expected["both"]["loss"], rel=1e-6)
