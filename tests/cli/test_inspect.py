"""``mrmae check``: descriptions of files and folders, and errors."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mrmae_ds.cli.inspect import describe, usage
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.sizes import CViTSpec
from mrmae_ds.records.sections import Schedule
from mrmae_ds.training.checkpoint.manifest import MANIFEST, EngineLayout, FileEntry, Manifest, RunIdentity
from mrmae_ds.weights.export import export_run
from mrmae_ds.weights.identify import identify
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from mrmae_ds.weights.paths import MODEL_FILE
from tests.fixtures import load_reference, part
from tests.support.processes import REPOSITORY
from tests.support.records import make_record
from tests.support.released import file_of, mcmae_state, released_shapes, tiny_clip, tiny_vit, write_released
from tests.weights.test_export import COMMIT, CVIT, VIT, classifier_run, pretraining_run


def rows_of(text: str) -> dict[str, str]:
    """Return the rows of one block by label; assert that they are aligned."""
    lines = text.splitlines()[1:]
    starts = {re.match(r"  [\w ]+?  +", line).end() for line in lines}
    assert len(starts) == 1
    start = starts.pop()
    return {line[:start].strip(): line[start:] for line in lines}


def write_checkpoint(stage: Path, step: int) -> Path:
    """A committed checkpoint of two small files, with its manifest."""
    folder = stage / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    files = {}
    for name, size in {"model_states.pt": 1000, "optim_states.pt": 3000}.items():
        (folder / name).write_bytes(b"x" * size)
        files[name] = FileEntry(size=size, sha256=hashlib.sha256(b"x" * size).hexdigest())
    identity = RunIdentity(recipe_hash="0123456789ab", seed=7, train="", val="")
    layout = EngineLayout(world_size=2, zero_stage=3, dtype="float32")
    Manifest(step=step, identity=identity, layout=layout, files=files).write(folder)
    return folder


def test_describes_released_pretraining(tmp_path: Path) -> None:
    path = write_released(tmp_path / "x.pth", mcmae_state(load_reference("mcmae")))
    text = describe(path)
    assert text.splitlines()[0] == str(path)
    rows = rows_of(text)
    assert rows["kind"] == "CViT with its decoder, MCMAE pre-training as released"
    assert rows["format"] == "torch pickle without code"
    assert rows["encoder"] == "dims 16/24/32, depths 1/1/2, mlp ratios 4/4/4, patches 4/2/2"
    assert rows["image"] == "224 pixels, grid 14 x 14, patch 16"
    assert rows["values"] == "104,992 in 93 tensors"
    assert rows["dtype"] == "float32"
    assert rows["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows["made with"] == "model convmae_convvit_base_patch16_dec512d8b, mask_ratio 0.75, norm_pix_loss True"
    assert not rows.keys() & {"classes", "written by", "class token"}


def test_describes_released_cvit_with_class_token(tmp_path: Path) -> None:
    state = mcmae_state(load_reference("mcmae"))
    row = torch.zeros(1, 1, 32)
    state |= {"cls_token": row, "pos_embed": torch.cat([row, state["pos_embed"]], dim=1)}
    rows = rows_of(describe(write_released(tmp_path / "x.pth", state)))
    assert rows["image"] == "224 pixels, grid 14 x 14, patch 16"
    assert "left out" in rows["class token"]


VARIANTS = [{}, {"mlp_ratios": (8, 8, 4)}, {"depths": (1, 2, 1), "patches": (7, 1, 2)}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_advice_loads_file(changes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    sizes = {"dims": (8, 12, 24), "depths": (1, 1, 2), "num_heads": 6} | changes
    torch.save(build_encoder(CViTSpec(**sizes), 112).state_dict(), path)
    advice = rows_of(describe(path))["use it"]
    assert advice.startswith(f"stages.finetune.init={path} with model.arch=cvit_")
    assert advice.endswith(" model.overrides.num_heads=N (N: number of heads, which the file does not contain)")
    settings = re.findall(r"(?:stages|model)\.[\w.]+=\S+", advice.replace("num_heads=N", "num_heads=6"))
    recipe = load_recipe(REPOSITORY / "ds_configs/tiny.yaml", [*settings, "model.image_size=112"])
    assert recipe.model.spec() == CViTSpec(**sizes)
    report = load_encoder(build_encoder(recipe.model.spec(), 112, 3), Path(recipe.stages.finetune.init))
    assert len(report.missing) == 4


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("mcmae_base_pretrain", "model.arch=cvit_base, if it has 12 heads"),
        ("mae_base_pretrain", "model.arch=vit_base, if it has 12 heads"),
    ],
)
def test_advice_for_standard_size(name: str, advice: str) -> None:
    identity = identify(file_of(released_shapes(name)))
    advice += ", else model.overrides.num_heads=N (the file does not contain their number)"
    assert usage(identity, Path("x.pth")) == f"stages.finetune.init=x.pth with {advice}"


def test_describes_own_classifier(tmp_path: Path) -> None:
    model = classifier_run(tmp_path, CVIT)
    exported = export_run(tmp_path, "timm", tmp_path / "out.safetensors").path
    rows = rows_of(describe(exported))
    assert rows["kind"] == "CViT classifier, mean-pooled"
    assert rows["format"] == "safetensors"
    assert rows["encoder"].endswith("patches 2/2/1, num heads 4")
    assert (rows["classes"], rows["written by"]) == ("3", "this project: small, finetune")
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert rows["values"] == f"{sum(sizes):,} in {len(sizes)} tensors"
    assert rows["results"] == "top1 80, eval_samples 10000"
    assert rows["commit"] == COMMIT
    assert rows["input"] == "RGB in [0, 1], minus the mean 0.5 0.25 0.125, divided by 0.1 0.2 0.3"
    assert rows["use it"].startswith('timm.create_model("cvit_tiny", ')
    assert f"pretrained=True, pretrained_cfg_overlay={{'file': {str(exported)!r}, " in rows["use it"]


def test_names_from_the_file_are_printed_on_one_line(tmp_path: Path) -> None:
    model = classifier_run(tmp_path, CVIT)
    metadata = {"kind": "classifier", **encoder_metadata(model), "num_classes": 3, "stage": "fine\ntune"}
    save_weights(tmp_path / "x.safetensors", model.state_dict(), metadata | {"class_names": ["a\nb", "\x1b[31mc", "d"]})
    rows = rows_of(describe(tmp_path / "x.safetensors"))
    assert rows["classes"] == r"3: a\nb, \x1b[31mc, d" and r"fine\ntune" in rows["written by"]


def test_describes_class_token_classifier_of_rectangular_images(tmp_path: Path) -> None:
    classifier_run(tmp_path, VIT, (24, 32), pool="token")
    rows = rows_of(describe(tmp_path / MODEL_FILE))
    assert rows["kind"] == "plain ViT classifier, on the class token"
    assert rows["image"] == "24 x 32 pixels, grid 6 x 8, patch 4"
    settings = re.findall(r"(?:stages|model)\.[\w.]+=\S+", rows["use it"])
    recipe = load_recipe(REPOSITORY / "ds_configs/baselines/mae_tiny.yaml", settings)
    stage = recipe.stages.finetune
    assert stage is not None
    model = build_encoder(recipe.model.spec(), 24, 3, pool=stage.pool)
    report = load_encoder(model, Path(stage.init))
    assert (report.missing, report.resized) == ([], ["pos_embed"])


def test_advice_for_teachers(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(tiny_vit(init_values=1e-5).state_dict(), path)
    rows = rows_of(describe(path))
    assert rows["use it"].startswith(f"as a teacher: teachers.NAME={{kind: timm, source: MODEL, weights: {path}}}")
    assert "blocks.*.ls1.gamma" in rows["use it"]
    torch.save(tiny_clip(width=48, head_width=12).state_dict(), path)
    rows = rows_of(describe(path))
    assert rows["kind"] == "CLIP model, image tower 48 wide, patch 8"
    assert rows["GELU"].startswith("not recorded")
    assert rows["refused yet"].startswith(f"teachers of kind clip: {path}: does not record its number of attention")
    torch.save({"weight": torch.zeros(2)}, path)
    assert rows_of(describe(path))["use it"].startswith("as a teacher, if timm has the model: teachers.NAME=")


def test_reports_dtypes_and_nonfinite_values(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.tensor([1.0, torch.nan]).half(), "c": torch.tensor([1, 2])}
    save_file(tensors | {"d": torch.tensor([torch.inf])}, tmp_path / "x.safetensors")
    rows = rows_of(describe(tmp_path / "x.safetensors"))
    assert sorted(rows["dtype"].split(", ")) == ["float16 (1)", "float32 (2)", "int64 (1)"]
    assert rows["UNUSABLE"] == "2 tensors with NaN or infinity: b, d"
    save_file({"a": torch.zeros(2)}, tmp_path / "y.safetensors")
    assert "UNUSABLE" not in rows_of(describe(tmp_path / "y.safetensors"))


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step_000000040"])
def test_describes_checkpoints_of_run(name: str, tmp_path: Path) -> None:
    for step in (20, 40):
        write_checkpoint(tmp_path, step)
    blocks = describe(tmp_path / name).split("\n\n")
    assert len(blocks) == (1 if name.endswith("40") else 2)
    checkpoint = tmp_path / "checkpoints" / "step_000000040"
    assert blocks[-1].splitlines()[0] == str(checkpoint)
    rows = rows_of(blocks[-1])
    assert rows["kind"].endswith(f"--resume {checkpoint}")
    assert rows["step"] == "40, on 2 ranks"
    assert rows["recipe"] == "hash 0123456789ab, seed 7"
    assert rows["files"] == "2, 0.0 MiB, checksums verified"


def test_describes_all_of_stage_folder(tmp_path: Path) -> None:
    pretraining_run(tmp_path, VIT)
    schedule = Schedule(epochs=10, global_batch=64, steps=1000, steps_done=1000)
    make_record(name="small", stage="pretrain", schedule=schedule, top1=None).write(tmp_path)
    write_checkpoint(tmp_path, 1000)
    record, checkpoint, model = describe(tmp_path).split("\n\n")
    assert rows_of(record)["run"] == "small, pretrain: MR-MAE, Tiny, seed 0"
    assert rows_of(record)["status"] == "finished, step 1,000 of 1,000"
    assert rows_of(checkpoint)["step"] == "1,000, on 2 ranks"
    assert model.splitlines()[0] == str(tmp_path / MODEL_FILE)
    assert rows_of(model)["kind"] == "plain ViT, pre-training of this project"
    assert describe(tmp_path / "checkpoints") == checkpoint


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "manifest"])
def test_rejects_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 20)
    folder = write_checkpoint(tmp_path, 40)
    if damage == "missing":
        (folder / "optim_states.pt").unlink()
    elif damage == "short":
        (folder / "optim_states.pt").write_bytes(b"x")
    elif damage == "changed":
        (folder / "optim_states.pt").write_bytes(b"x" * 2999 + b"y")
    else:
        (folder / MANIFEST).write_text('{"step": ')
    with pytest.raises(UserError, match=str(folder)):
        describe(folder)
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UserError, match=rf"{folder}.*\. Intact: step_000000020$"):
            describe(path)
    assert describe(tmp_path / "checkpoints" / "step_000000020")


def test_names_the_stages_of_a_run_whether_or_not_they_have_finished(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    make_record(status="running").write(run / "pretrain")
    with pytest.raises(UserError, match=rf"^{run} is the folder of 1 stage; choose one: {run}/pretrain$"):
        describe(run)
    classifier_run(run / "finetune", CVIT)
    stages = f"{run}/finetune, {run}/pretrain"
    with pytest.raises(UserError, match=rf"^{run} is the folder of 2 stages; choose one: {stages}$"):
        describe(run)


def test_rejects_paths_that_hold_neither_weights_nor_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        describe(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"{tmp_path}: neither a stage folder .* nor a checkpoint"):
        describe(tmp_path)
    staging = write_checkpoint(tmp_path, 40)
    (staging / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"a checkpoint without manifest.json is incomplete"):
        describe(staging)


def test_detects_changed_bit(tmp_path: Path) -> None:
    path = write_released(tmp_path / "x.pth", part(load_reference("mcmae"), "finetune/"))
    assert describe(path)
    content = bytearray(path.read_bytes())
    weight = load_reference("mcmae")["finetune/patch_embed4.weight"].numpy().tobytes()
    content[content.index(weight) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.pth: damaged: the checksum of its entry x/data/\d+ does not match"):
        describe(path)


def test_rejects_pickled_module(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x.pt: a pickle that calls torch.nn.modules.linear.Linear"):
        describe(tmp_path / "x.pt")


def test_advice_names_known_number_of_heads(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(build_encoder(CViTSpec(dims=(8, 12, 24), depths=(1, 1, 2), num_heads=6), 112).state_dict(), path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    assert rows_of(describe(path))["use it"].endswith(" model.overrides.num_heads=6")


def test_offers_only_sets_of_weights_with_layers(tmp_path: Path) -> None:
    path, state = tmp_path / "x.pth", tiny_vit().state_dict()
    torch.save({"student": state, "teacher": state, "dino_loss": {"center": torch.zeros(1, 4)}}, path)
    offer = rf"contains 2 sets of weights: student, teacher; choose one: {path}#student or {path}#teacher$"
    with pytest.raises(UserError, match=offer):
        describe(path)
    with pytest.raises(UserError, match=rf"dino_loss holds no layers, only center; {offer}"):
        describe(Path(f"{path}#dino_loss"))
    assert rows_of(describe(Path(f"{path}#teacher")))["taken"] == "weights under teacher"


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_reports_prefixes_of_wrappers(wrapper: str, prefix: str, tmp_path: Path) -> None:
    state = {f"{wrapper}{prefix}{name}": tensor for name, tensor in tiny_vit().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    save_file(state, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        assert rows_of(describe(tmp_path / name))["taken"] == f"names without {wrapper}{prefix}"


def test_describes_only_weights_file_of_folder(tmp_path: Path) -> None:
    path = tmp_path / "open_clip_model.safetensors"
    save_file(tiny_clip().state_dict(), path)
    assert describe(tmp_path) == describe(path)
    save_file(tiny_clip().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"name a file in it$"):
        describe(tmp_path)


def test_reports_all_that_other_uses_need(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({n: t for n, t in tiny_vit().state_dict().items() if not n.startswith("head.")}, path)
    row = rows_of(describe(path))["refused yet"]
    assert row.startswith("export, show and teachers of kind checkpoint: it does not record its number of attention")
    with pytest.raises(UserError) as refused:
        export_run(path, "timm", tmp_path / "out.safetensors")
    assert row.endswith(str(refused.value).removeprefix(f"{path}: "))
    assert "num_attention_heads" in row and "image_mean" in row
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    assert "num_attention_heads" not in rows_of(describe(path))["refused yet"]
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    assert "refused yet" not in rows_of(describe(path))
