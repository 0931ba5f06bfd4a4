"""Faults during a run of two ranks: it resumes, or ends, as documented in docs/checkpoints.md.

Every run is compared with an undisturbed one, bit by bit. The runs are those of tests/support/small_runs.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mrmae_ds.cli.main import main as mrmae
from mrmae_ds.errors import StopRequested
from mrmae_ds.training.checkpoint.folder import list_checkpoints, step_of
from mrmae_ds.training.replay import describe, replay
from tests.support.chaos import Chaos, newest_complete_step
from tests.support.processes import environment, free_port, run
from tests.support.ranks import Ranks
from tests.support.small_runs import ENGINE, STEPS, SmallRuns, assert_same, curve, leftovers

pytestmark = [pytest.mark.timeout(900), pytest.mark.multi_process]
LIMIT_S = 240
CPU = torch.device("cpu")
# Stopped in the middle of an epoch, between the two micro-batches of a step.
STOPPED_AT = 20
STOP = f"signal:rank=1,step={STOPPED_AT - 1},micro=0"


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    """Chaos test with its undisturbed run."""
    chaos = Chaos(tmp_path_factory.mktemp("faults"), seed=3)
    chaos.reference()
    return chaos


@pytest.fixture(scope="module")
def runs(chaos: Chaos) -> SmallRuns:
    return chaos.runs


@pytest.fixture(scope="module")
def undisturbed(chaos: Chaos) -> Path:
    return chaos.undisturbed


@pytest.fixture(scope="module")
def stopped(runs: SmallRuns) -> Path:
    """Run that was stopped by a signal to one of its ranks."""
    ranks = runs.launch("stopped", fault=STOP)
    assert ranks.wait(LIMIT_S) == [StopRequested.exit_status] * 2, ranks.text()
    return runs.folder / "stopped"


@pytest.fixture
def copy(stopped: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Copy of the stopped run, to be damaged and resumed."""
    folder = stopped.with_name(re.sub(r"\W+", "_", f"copy_of_{request.node.name}"))
    shutil.copytree(stopped, folder)
    yield folder
    shutil.rmtree(folder)


def _resume(runs: SmallRuns, folder: Path, *more: str, world_size: int = 2) -> Ranks:
    ranks = runs.launch(folder.name, *more, world_size=world_size)
    assert ranks.wait(LIMIT_S) == [0] * world_size, ranks.text()
    return ranks


def _newest(folder: Path) -> Path:
    return list_checkpoints(folder / "pretrain")[-1]


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pretrain" / "record.json").read_text())


# ---- kills


def test_resumes_bit_equal_after_repeated_kills(chaos: Chaos) -> None:
    """Short version of tests/support/chaos.py, which documents the checks."""
    chaos.rounds(3)


def test_deterministic_kernels_change_nothing_on_a_cpu(copy: Path, runs: SmallRuns, undisturbed: Path) -> None:
    """The run began without them."""
    engine = copy / "engine.json"
    engine.write_text(json.dumps(ENGINE | {"deterministic": True}))
    _resume(runs, copy, "--ds_config", str(engine))
    assert_same(copy / "pretrain", undisturbed)
    kernels = [_record(folder)["kernels"] for folder in (copy, undisturbed.parent)]
    assert kernels[0] == kernels[1] | {"deterministic": True} and not kernels[1]["deterministic"]


# ---- signals, and the step that a run resumes from


def test_a_signal_to_one_rank_saves_and_stops_all(stopped: Path, runs: SmallRuns) -> None:
    """The signal came between two micro-batches; the step was completed and saved before the exit."""
    assert step_of(_newest(stopped)) == newest_complete_step(stopped / "pretrain") == STOPPED_AT
    record = _record(stopped)
    assert (record["status"], record["schedule"]["steps_done"]) == ("stopped", STOPPED_AT)
    assert record["ended"] is not None
    logs = Ranks([], [runs.folder / "logs" / "stopped" / f"rank{rank}.log" for rank in range(2)])
    assert "SIGTERM: saving after this step, then stopping" in logs.text(1)
    assert f"stopped by SIGTERM after step {STOPPED_AT}; the same command resumes from there" in logs.text(0)
    assert "stopped by" not in logs.text(1)
    assert [line["step"] for line in curve(stopped / "pretrain")] == [1, 3, 6, 8, 9, 12, 15, 16, 18]
    assert not leftovers(stopped / "pretrain")


def test_resumes_in_mid_epoch(copy: Path, runs: SmallRuns, undisturbed: Path) -> None:
    ranks = _resume(runs, copy)
    assert f"resuming after step {STOPPED_AT}" in ranks.text(0)
    assert_same(copy / "pretrain", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_the_other_signals_save_and_stop_all(number: int, runs: SmallRuns, undisturbed: Path) -> None:
    name = f"signal {number}"
    ranks = runs.launch(name, fault=f"signal:rank=0,step=4,micro=1,number={number}")
    assert ranks.wait(LIMIT_S) == [StopRequested.exit_status] * 2, ranks.text()
    assert step_of(_newest(runs.folder / name)) == 5
    _resume(runs, runs.folder / name)
    assert_same(runs.stage(name), undisturbed)


@pytest.mark.slow
def test_the_launcher_forwards_the_status_of_a_signal(runs: SmallRuns) -> None:
    """DeepSpeed's launcher: one rank receives a signal, all stop, and the launcher exits with the same status."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "train.py"]
    arguments = runs.arguments("launched", "stages.pretrain.epochs=300", "checkpoint.every_steps=1000")
    process = subprocess.Popen(
        [*command, *map(str, arguments)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (runs.stage("launched") / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
        os.kill(int(ranks[0]), signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == StopRequested.exit_status, output
    assert _record(runs.folder / "launched")["status"] == "stopped"


# ---- damaged checkpoints


def _damage(folder: Path, how: str) -> None:
    newest = _newest(folder)
    shard = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if how == "truncated shard":
        os.truncate(shard, shard.stat().st_size // 2)
    elif how == "missing file":
        shard.unlink()
    elif how == "flipped byte":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "emptied manifest":
        (newest / "manifest.json").write_text("")
    else:
        (newest.parent / "latest").write_text("")


@pytest.mark.parametrize(
    "how", ["truncated shard", "missing file", "flipped byte", "emptied pointer",
            pytest.param("emptied manifest", marks=pytest.mark.slow)],
)  # fmt: skip
def test_skips_a_damaged_checkpoint(how: str, copy: Path, runs: SmallRuns, undisturbed: Path) -> None:
    """The run resumes from the previous checkpoint, reports the reason, and ends bit-equal."""
    newest = _newest(copy)
    _damage(copy, how)
    text = _resume(runs, copy).text(0)
    if how == "emptied pointer":  # no test depends on it
        assert f"resuming after step {STOPPED_AT}" in text and "skipped: " not in text
    else:
        assert f"resuming after step {STOPPED_AT - 2}" in text and f"skipped: {newest}" in text
    assert_same(copy / "pretrain", undisturbed)
    assert not leftovers(copy / "pretrain")
    assert (copy / "pretrain" / "checkpoints" / "latest").read_text() == _newest(copy).name


def test_refuses_a_fresh_start_without_a_complete_checkpoint(copy: Path, runs: SmallRuns) -> None:
    """Sizes are correct and contents are not: all ranks read them, all refuse, and nothing is changed."""
    for checkpoint in list_checkpoints(copy / "pretrain"):
        file = checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        file.write_bytes(bytes(file.stat().st_size))
    before = sorted(path for path in copy.rglob("*"))
    ranks = runs.launch(copy.name)
    assert ranks.wait(LIMIT_S) == [2, 2], ranks.text()
    assert "no complete checkpoint in it; --resume never starts over" in ranks.text(0)
    assert "Traceback" not in ranks.text() and "error" not in ranks.text(1)
    assert sorted(path for path in copy.rglob("*")) == before


def test_rejects_other_images_naming_both_sets(copy: Path, runs: SmallRuns, tmp_path: Path) -> None:
    other = SmallRuns(tmp_path)
    other_data = [str(a) for a in other.arguments("x") if str(a).startswith("data.val")]
    swapped = f"data.train={tmp_path / 'val.beton'}"
    done = run(["python", "train.py", *runs.arguments(copy.name, swapped, *other_data)], LIMIT_S)
    assert done.status == 2 and "data.train: sha256 " in done.stderr and "data.val" not in done.stderr


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system of its own, which can be resized; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk; checkpoint/test_save.py covers the same errors without one")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_during_a_save(small_disk: Path, runs: SmallRuns, undisturbed: Path) -> None:
    """All ranks exit with the reason, the earlier checkpoint stays, and with more space the run resumes."""
    size = sum(file.stat().st_size for file in _newest(runs.folder / "undisturbed").iterdir())
    room = int(2.6 * size) // 1024
    subprocess.run(["mount", "-o", f"remount,size={room}k", small_disk], check=True)
    keep = "checkpoint.keep_last=9"
    ranks = runs.launch(small_disk / "run", keep)
    assert ranks.wait(LIMIT_S) == [2, 2], ranks.text()
    assert "No space left on device; free space there" in ranks.text(0), ranks.text()
    assert "was not saved, the earlier ones are as they were" in ranks.text(0)
    stage = small_disk / "run" / "pretrain"
    newest = newest_complete_step(stage)
    assert newest in (2, 4) and not leftovers(stage)
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    ranks = runs.launch(small_disk / "run", keep)
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    assert f"resuming after step {newest}" in ranks.text(0)
    assert_same(stage, undisturbed)


# ---- ranks that fail


def _run_until_failed(runs: SmallRuns, name: str, fault: str, *more: str) -> Ranks:
    """Run a fault after which both ranks must exit with 1."""
    ranks = runs.launch(name, *more, fault=fault)
    assert ranks.wait(LIMIT_S) == [1, 1], ranks.text()
    assert _record(runs.folder / name)["status"] == "failed"
    return ranks


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_on_one_rank_ends_all_and_is_printed_last(rank: int, runs: SmallRuns) -> None:
    ranks = _run_until_failed(runs, f"error {rank}", f"error:rank={rank},step=5,micro=1")
    own, other = ranks.text(rank), ranks.text(1 - rank)
    assert own.rstrip().endswith("ValueError: the fault of this test") and own.count("Traceback") == 1
    assert other.rstrip().endswith(f"warning: exiting because rank {rank} failed")
    assert "Traceback" not in other
    assert ranks.logs[rank].stat().st_mtime_ns >= ranks.logs[1 - rank].stat().st_mtime_ns


@pytest.mark.parametrize("how", ["freeze", pytest.param("sleep", marks=pytest.mark.slow)])
def test_a_hang_ends_all_ranks_with_the_stacks_of_all(how: str, runs: SmallRuns) -> None:
    """``freeze`` holds the interpreter, so that none of the rank's own threads can report it."""
    name = f"stuck {how}"
    ranks = runs.launch(name, "watchdog.timeout_minutes=0.5", fault=f"{how}:rank=1,step=5")
    statuses = ranks.wait(LIMIT_S) if how == "sleep" else _wait_for_rank_0(ranks)
    assert statuses[0] == 1 and (how == "freeze" or statuses == [1, 1]), ranks.text()
    text = ranks.text()
    assert "---- rank 0, process" in text and "---- rank 1, process" in text
    assert f"in _{how}" in text, "the stacks of the hung rank"
    assert "in train" in text and "made no progress for" in text
    assert _record(runs.folder / name)["status"] == "failed"


def _wait_for_rank_0(ranks: Ranks) -> list[int]:
    """A rank that holds its interpreter is ended by a launcher, when another rank has ended."""
    ranks.processes[0].join(LIMIT_S)
    code = ranks.processes[0].exitcode
    ranks.kill()
    return [-1 if code is None else code]


# ---- non-finite batches


def test_skips_a_batch_that_is_not_finite_on_one_rank(runs: SmallRuns, undisturbed: Path) -> None:
    """No rank takes the step; it is counted, captured and reported; the run continues; earlier steps are equal."""
    ranks = runs.launch("nan", fault="nan_loss:rank=1,step=9,micro=1")
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    assert (
        "step 10 skipped: a loss was not finite (1 skipped so far, 1 consecutive); repeat it with mrmae replay"
        in ranks.text(0)
    )
    lines, clean = curve(runs.stage("nan")), curve(undisturbed)
    assert [line["skipped_steps"] for line in lines] == [int(line["step"] > 9) for line in lines]
    assert [line for line in lines if line["step"] < 10] == [line for line in clean if line["step"] < 10]
    assert all(np.isfinite(line["loss"]) for line in lines)
    (capture,) = (runs.stage("nan") / "captures").iterdir()
    assert capture.name == "step_000000009"
    # Repeated without the fault every loss is finite, and those that were finite before are equal.
    step, parts = replay(capture, CPU)
    assert (step.step, step.bad_loss, step.world_size, step.accumulation) == (9, True, 2, 2)
    assert [(part.rank, part.index) for part in parts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for part in parts:
        assert part.finite and part.captured.keys() == part.replayed.keys() == {"loss", "pixels"}
        assert math.isnan(part.captured["loss"]) == ((part.rank, part.index) == (1, 1))
        assert part.replayed["pixels"] == pytest.approx(part.captured["pixels"], rel=1e-5)
    assert "not reproduced" in describe(step, parts)


def test_only_bad_batches_end_the_run(runs: SmallRuns, capsys: pytest.CaptureFixture[str]) -> None:
    """At this learning rate the weights explode: five steps are skipped, then all ranks exit with 1."""
    wild = ("stages.pretrain.optimizer.base_lr=1e30", "stages.pretrain.optimizer.warmup_epochs=0")
    ranks = runs.launch("wild", *wild)
    assert ranks.wait(LIMIT_S) == [1, 1], ranks.text()
    assert ranks.text(0).rstrip().splitlines()[-1].startswith("error: loss or gradients were not finite in the last 5")
    assert "Traceback" not in ranks.text() and "error" not in ranks.text(1)
    assert curve(runs.stage("wild"))[-1]["skipped_steps"] == 5
    assert _record(runs.folder / "wild")["status"] == "failed"
    captures = sorted((runs.stage("wild") / "captures").iterdir())
    assert len(captures) == 5
    weights = [capture / "model.safetensors" for capture in captures]
    assert len({path.stat().st_ino for path in weights}) == 1, "the same weights, once on the disk"
    assert mrmae(["replay", str(captures[1])]) == 0
    output = capsys.readouterr().out
    assert output.endswith("\nreproduced\n") and "first not finite: encoder.blocks.0" in output


# ---- another number of ranks


@pytest.mark.parametrize("change", ["2 to 1", pytest.param("1 to 2", marks=pytest.mark.slow)])
def test_resumes_on_another_number_of_ranks_with_the_same_curve(
    change: str, stopped: Path, copy: Path, runs: SmallRuns, undisturbed: Path
) -> None:
    """Images, masks, learning rates and optimizer states are equal; sums over other numbers round differently."""
    if change == "1 to 2":
        shutil.rmtree(copy)
        ranks = runs.launch(copy.name, world_size=1, fault=STOP.replace("rank=1", "rank=0"))
        assert ranks.wait(LIMIT_S) == [StopRequested.exit_status], ranks.text()
    text = _resume(runs, copy, world_size=1 if change == "2 to 1" else 2).text(0)
    assert f"resuming after step {STOPPED_AT}" in text and "converting for" in text
    ours, theirs = curve(copy / "pretrain"), curve(undisturbed)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm", "lr"):
        rtol = 1e-5 if name == "loss" else 1e-4
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=rtol)
    assert {step_of(path) for path in list_checkpoints(copy / "pretrain")} == {STEPS - 2, STEPS}
    assert not leftovers(copy / "pretrain")


# ---- fine-tuning


FINETUNE = (
    "--stage", "finetune", "stages.finetune.init=scratch", "stages.finetune.batch_size=8", "stages.finetune.epochs=2",
    "stages.finetune.optimizer.warmup_epochs=0.5", "stages.finetune.drop_path=0.2", "stages.finetune.mixup=0.8",
    "stages.finetune.random_erasing=0.25",
)  # fmt: skip


def test_resumes_fine_tuning_with_layer_decay(runs: SmallRuns) -> None:
    """Many parameter groups with their own learning rates; drop path, mixup, erasing; an evaluation each epoch."""
    ranks = runs.launch("whole", *FINETUNE)
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    ranks = runs.launch("interrupted", *FINETUNE, fault="signal:rank=1,step=10,micro=0")
    assert ranks.wait(LIMIT_S) == [StopRequested.exit_status] * 2, ranks.text()
    shutil.copytree(runs.folder / "interrupted", runs.folder / "one")
    _resume(runs, runs.folder / "interrupted", *FINETUNE)
    whole_run = runs.stage("whole", "finetune")
    assert_same(runs.stage("interrupted", "finetune"), whole_run)
    _resume(runs, runs.folder / "one", *FINETUNE, world_size=1)
    ours, theirs = curve(runs.stage("one", "finetune")), curve(whole_run)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4)
    assert ours[-1]["top1"] == theirs[-1]["top1"]


# Recipe values of each method, and the number of its losses with their total. The models have two blocks.
LAYERS = "stages.pretrain.objectives={layer2: {target: mae.0, block: 0}, layer3: {target: mae.1, block: 1}}"
METHODS: dict[str, tuple[tuple[str, ...], int]] = {
    "milan": (("stages.pretrain.placement=sharded",), 2),
    "dmae": (("stages.pretrain.placement=step",), 3),
    "maskalign": (("stages.pretrain.placement=stream", "teachers.mae.layers=[0, 1]", LAYERS), 3),
    "mvp": (("stages.pretrain.placement=stream",), 2),
    "fd": (("stages.pretrain.placement=sharded",), 2),
    "maskfeat": ((), 2),
    "simmim_vit": (("stages.pretrain.optimizer.milestones=[2]",), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_resume_and_are_replayed(method: str, runs: SmallRuns, undisturbed: Path) -> None:
    """Bit by bit, and the visible set that a teacher sees is that of the captured step."""
    values, losses = METHODS[method]
    teacher = () if method in ("maskfeat", "simmim_vit") else (f"teachers.mae.source={undisturbed}",)
    recipe = ("--recipe", f"ds_configs/methods/{method}_tiny.yaml", *teacher)
    here = (*recipe, *values, "stages.pretrain.drop_path=0.2")
    assert runs.launch(f"{method}", *here).wait(LIMIT_S) == [0, 0]
    ranks = runs.launch(f"half {method}", *here, fault=STOP)
    assert ranks.wait(LIMIT_S) == [StopRequested.exit_status] * 2, ranks.text()
    _resume(runs, runs.folder / f"half {method}", *here)
    assert_same(runs.stage(f"half {method}"), runs.stage(method))
    ranks = runs.launch(f"nan {method}", *here, fault="nan_loss:rank=1,step=9,micro=1")
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    (capture,) = (runs.stage(f"nan {method}") / "captures").iterdir()
    for part in replay(capture, CPU)[1]:
        assert part.finite and len(part.replayed) == losses
        for name in part.replayed.keys() - {"loss"}:
            assert part.replayed[name] == pytest.approx(part.captured[name], rel=1e-5)


DATA2VEC = (
    "--recipe", "ds_configs/methods/data2vec_tiny.yaml",
    "teachers.ema={decay: 0.9, decay_start: 0.5, decay_epochs: 2, layers: [0, 1]}",
)  # fmt: skip


@pytest.mark.slow
def test_a_moving_average_is_saved_and_left_out_of_the_result(runs: SmallRuns) -> None:
    """Resumed bit by bit, and on one rank; replayed with the average of the captured step."""
    assert runs.launch("averaged", *DATA2VEC).wait(LIMIT_S) == [0, 0]
    whole = runs.stage("averaged")
    ranks = runs.launch("half averaged", *DATA2VEC, fault=STOP)
    assert ranks.wait(LIMIT_S) == [StopRequested.exit_status] * 2, ranks.text()
    shutil.copytree(runs.folder / "half averaged", runs.folder / "one averaged")
    _resume(runs, runs.folder / "half averaged", *DATA2VEC)
    assert_same(runs.stage("half averaged"), whole)
    _resume(runs, runs.folder / "one averaged", *DATA2VEC, world_size=1)
    ours, theirs = curve(runs.stage("one averaged")), curve(whole)
    for name in ("loss", "loss/latent", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4)
    saved = load_file(whole / "model.safetensors")
    assert not any(name.startswith("averages.") for name in saved)
    assert _record(whole.parent)["parameters"]["total"] == sum(tensor.numel() for tensor in saved.values())
    assert runs.launch("nan averaged", *DATA2VEC, fault="nan_loss:rank=1,step=9,micro=1").wait(LIMIT_S) == [0, 0]
    (capture,) = (runs.stage("nan averaged") / "captures").iterdir()
    for part in replay(capture, CPU)[1]:
        assert part.finite and len(part.replayed) == 2
        assert part.replayed["latent"] == pytest.approx(part.captured["latent"], rel=1e-5)


PROBE = (
    "--stage", "probe", "stages.probe={epochs: 2, batch_size: 8, init: scratch, optimizer: {warmup_epochs: 0.5}}",
)  # fmt: skip


@pytest.mark.slow
def test_resumes_a_linear_probe(runs: SmallRuns) -> None:
    """Another optimizer, no ZeRO, and a BatchNorm's statistics."""
    ranks = runs.launch("probed", *PROBE)
    assert ranks.wait(LIMIT_S) == [0, 0], ranks.text()
    ranks = runs.launch("half probed", *PROBE, fault="signal:rank=1,step=10,micro=0")
    assert ranks.wait(LIMIT_S) == [StopRequested.exit_status] * 2, ranks.text()
    _resume(runs, runs.folder / "half probed", *PROBE)
    assert_same(runs.stage("half probed", "probe"), runs.stage("probed", "probe"))


@pytest.mark.slow
def test_resumes_from_checkpoints_written_in_the_background(tmp_path: Path) -> None:
    """Saves by the clock, killed three times."""
    by_the_clock = ("checkpoint.every_steps=null", "checkpoint.every_minutes=0.01")
    chaos = Chaos(tmp_path, seed=5, more=("checkpoint.async_save=true", *by_the_clock))
    chaos.reference()
    chaos.rounds(3)
