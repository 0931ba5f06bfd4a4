"""Every stage, engine and placement runs on a GPU stand-in to its end and keeps the rules of a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mrmae_ds.records.record import RunRecord
from tests.fake_gpu.cases import CASES, LIMIT_S, SCRATCH, STEPS, STEPS_PER_EPOCH, WAITS, Case, Workspace, violations
from tests.support import ranks
from tests.support.processes import REPOSITORY

pytestmark = [pytest.mark.fake_gpu, pytest.mark.ffcv, pytest.mark.multi_process, pytest.mark.timeout(4 * LIMIT_S)]
FAULTS = "tests/support/faults.py"


@pytest.fixture(scope="module")
def losses_on_the_cpu(workspace: Workspace) -> list[float]:
    """Losses of the pre-training without the stand-in, under ZeRO-3."""
    started = ranks.start(1, workspace.arguments(Case("zero3"), "cpu"), workspace.folder / "cpu")
    assert started.wait(LIMIT_S) == [0], started.text()
    return workspace.losses("cpu")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if c.fast else pytest.mark.slow) for n, c in CASES.items()])
def test_a_run_keeps_the_rules(workspace: Workspace, name: str) -> None:
    done, reports = workspace.run(CASES[name], name)
    assert violations(name, done, reports) == []
    assert [report.steps for report in reports] == [STEPS] * CASES[name].ranks


@pytest.mark.parametrize(
    "name", ["pretrain-zero1", "pretrain-zero3", pytest.param("placement-stream", marks=pytest.mark.slow)]
)
def test_losses_are_those_of_the_cpu(workspace: Workspace, losses_on_the_cpu: list[float], name: str) -> None:
    """The operators that CUDA's code path issues compute the same, among them its fused attention."""
    if not (workspace.folder / name).exists():
        workspace.run(CASES[name], name)
    assert workspace.losses(name) == pytest.approx(losses_on_the_cpu, rel=1e-5)
    assert len(losses_on_the_cpu) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"), [("detect-zero3", 1e-5), ("detect-two-ranks", 1e-5), ("detect-autocast", 0.05)]
)
def test_losses_of_detection_are_those_of_the_cpu(workspace: Workspace, name: str, tolerance: float) -> None:
    """Under autocast another kernel computes attention; its rounding changes which proposals are kept.

    Drop path, which a GPU draws for itself, is off.
    """
    case, cpu, gpu = replace(CASES[name], settings=("stages.detect.drop_path=0",)), f"{name}-cpu", f"{name}-gpu"
    started = ranks.start(case.ranks, workspace.arguments(case, cpu), workspace.folder / cpu)
    assert started.wait(LIMIT_S) == [0] * case.ranks, started.text()
    done, _ = workspace.run(case, gpu)
    assert [process.status for process in done] == [0] * case.ranks, done[0].stderr
    losses = workspace.losses(cpu, "detect")
    assert workspace.losses(gpu, "detect") == pytest.approx(losses, rel=tolerance) and len(losses) == STEPS


@pytest.mark.slow
def test_the_stages_follow_each_other(workspace: Workspace) -> None:
    """Fine-tuning, probe and evaluation from a pre-training; every validation image is counted."""
    for stage in ("pretrain", "finetune", "probe", "evaluate"):
        command = workspace.arguments(Case("zero3", stage), "stages")
        done, report = workspace.program(f"stages-{stage}", "train.py", *command)
        assert (done.status, report.races) == (0, 0), done.stderr
    for stage in ("finetune", "evaluate"):
        assert RunRecord.load(workspace.folder / "stages" / stage).results.eval_samples == 10


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero3", "offload"])
def test_a_stopped_run_resumes(workspace: Workspace, losses_on_the_cpu: list[float], engine: str) -> None:
    name = f"stopped-{engine}"
    command = workspace.arguments(Case(engine), name)
    stopped, _ = workspace.program(name, FAULTS, "signal:step=2,number=10", "--", *command)
    assert stopped.status == 75, stopped.stderr
    resumed, report = workspace.program(name, "train.py", *command)
    assert resumed.status == 0, resumed.stderr
    assert report.steps == STEPS - STEPS_PER_EPOCH
    assert workspace.losses(name) == pytest.approx(losses_on_the_cpu, rel=1e-5)


@pytest.mark.slow
def test_a_captured_step_is_replayed(workspace: Workspace) -> None:
    """A step with a NaN loss is skipped, captured, and repeated on the device; the NaN itself was planted."""
    command = workspace.arguments(Case("zero3"), "captured")
    trained, _ = workspace.program("captured", FAULTS, "nan_loss:step=1", "--", *command)
    assert trained.status == 0, trained.stderr
    (capture,) = (workspace.folder / "captured/pretrain/captures").iterdir()
    repeated, _ = workspace.program("replay", "mrmae_ds/__main__.py", "replay", capture, "--device", "cuda")
    assert repeated.status == 0, repeated.stderr
    assert "skipped because a loss was not finite" in repeated.stdout
    assert "not reproduced" in repeated.stdout


def test_listed_waits_name_code_that_exists() -> None:
    """An entry whose function is gone would allow a new wait of that name."""
    listed = yaml.safe_load(WAITS.read_text())
    for entry in listed["in_steps"] + listed["between_steps"]:
        file, _, function = entry.get("where", "").partition(" ")
        assert entry["why"]
        if function and not function.startswith("<"):
            assert f"def {function}(" in (REPOSITORY / file).read_text(), entry["where"]


def test_planted_mistakes_are_reported(workspace: Workspace) -> None:
    """A buffer that is reused without waiting for its copy, and a value that is read after every step."""
    name = "pretrain-zero1"
    # Eight micro-batches before a wait of the step ends all copies: more than the loader has buffers.
    many = ("stages.pretrain.batch_size=24", "stages.pretrain.epochs=3")
    command = workspace.arguments(Case("zero1", settings=many), "planted")
    done, report = workspace.program(
        "planted", Path(__file__).parent / "planted.py", "overwritten", "item", "--", *command
    )
    broken = violations(name, [done], [report])
    assert done.status == 0, done.stderr
    assert any("were overwritten while a copy read them" in text for text in broken)
    assert any("1 waits a step, not in waits.yaml" in text and ".item()" in text for text in broken), broken


def test_a_planted_cpu_tensor_raises(workspace: Workspace) -> None:
    command = workspace.arguments(Case("zero1", settings=SCRATCH), "planted-cpu")
    done, _ = workspace.program("planted-cpu", Path(__file__).parent / "planted.py", "cpu_tensor", "--", *command)
    assert done.status == 1
    assert "Expected all tensors to be on the same device" in done.stdout + done.stderr
