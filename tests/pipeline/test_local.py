"""Local execution of a pipeline: order, failures, finished jobs; and once with real training."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.pipeline import local
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.records.record import RunRecord, find_records
from tests.support.pipelines import KEYS, make_jobs, write_pipeline, write_record
from tests.support.processes import REPOSITORY, environment, run
from tests.support.sample_data import write_sample_beton

pytestmark = pytest.mark.multi_process

# Replaces train.py: writes the record prepared for its stage, or fails, or waits for SIGTERM.
TRAIN = """
import json, os, pathlib, shutil, signal, sys, time
room = pathlib.Path({room!r})
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = f"{{pathlib.Path(options['--run']).name}}-{{options['--stage']}}"
folder = pathlib.Path(options["--run"]) / options["--stage"]
with (room / "started").open("a") as file:
    file.write(name + "\\n")
if (room / f"{{name}}.fails").exists():
    sys.exit(int((room / f"{{name}}.fails").read_text()))
if (room / f"{{name}}.waits").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((room / "stopped").write_text(name), os._exit(75)))
    (room / "waiting").write_text(name)
    time.sleep(60)
print("trained", name, os.environ.get("OMP_NUM_THREADS"), os.environ.get("DS_ACCELERATOR"), os.environ.get("RANK"))
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(room / f"{{name}}.json", folder / "record.json")
(folder / "model.safetensors").write_bytes(b"")
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with the fake train.py, the records that its stages will write, and the list of started stages."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "train.py").write_text(TRAIN.format(room=str(room)))
    for key, job in make_jobs(tmp_path, tmp_path / "runs").items():
        write_record(job)
        (job.stage_dir / "record.json").rename(room / f"{key.replace('/', '-')}.json")
        shutil.rmtree(job.stage_dir)
    monkeypatch.setattr(local, "TRAIN", room / "train.py")
    return room


def _started(room: Path) -> list[str]:
    return (room / "started").read_text().split() if (room / "started").exists() else []


def _run(tmp_path: Path, *more: str) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return main(["submit", str(write_pipeline(tmp_path)), "--runs", str(tmp_path / "runs"), "--local", *more])
    except SystemExit as end:
        return int(str(end.code))
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_runs_jobs_after_their_dependencies_and_writes_the_table(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert _run(tmp_path) == 0
    assert _started(room) == [key.replace("/", "-") for key in KEYS]
    out = capsys.readouterr().out
    assert "[1/8] mae_tiny/pretrain started" in out and "tiny/finetune finished in" in out and "top-1 80.00 %" in out
    assert "**80.00**" in (tmp_path / "runs/table6.md").read_text()
    cores = len(os.sched_getaffinity(0))
    log = (tmp_path / "runs/logs/tiny-pretrain.log").read_text()
    assert log == f"trained tiny-pretrain {os.environ.get('OMP_NUM_THREADS', cores)} cpu None\n"


def test_second_call_runs_nothing(room: Path, tmp_path: Path) -> None:
    assert _run(tmp_path) == 0
    before = _started(room)
    assert _run(tmp_path) == 0
    assert _started(room) == before


def test_failure_skips_dependents_only(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (room / "tiny-pretrain.fails").write_text("3")
    (room / "mae_tiny-finetune.fails").write_text("0")  # exits with 0 but writes no record
    assert _run(tmp_path) == 1
    skipped = {"tiny-finetune", "mae_tiny-evaluate"}
    assert set(_started(room)) == {key.replace("/", "-") for key in KEYS} - skipped
    err = capsys.readouterr().err
    assert "not finished: tiny/pretrain: exit status 3, see " in err
    assert "not finished: tiny/finetune: depends on tiny/pretrain" in err
    assert "not finished: mae_tiny/evaluate: depends on mae_tiny/finetune" in err
    for file in room.glob("*.fails"):
        file.unlink()
    assert _run(tmp_path) == 0
    restarted = ["tiny-pretrain", "tiny-finetune", "mae_tiny-finetune", "mae_tiny-evaluate"]
    assert _started(room)[-4:] == restarted


def test_parallel_jobs_wait_for_their_dependencies(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, "--jobs", "2") == 0
    assert sorted(_started(room)) == sorted(key.replace("/", "-") for key in KEYS)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    started = {words[1]: index for index, words in enumerate(lines) if words[2:3] == ["started;"]}
    ended = {words[0]: index for index, words in enumerate(lines) if words[1:2] == ["finished"]}
    # The second job to start is not tiny's, which waits for its teacher.
    assert list(started)[:2] == ["mae_tiny/pretrain", "mcmae_tiny/pretrain"]
    assert list(started.values())[1] < min(ended.values())
    for key, job in make_jobs(tmp_path, tmp_path / "runs").items():
        assert all(ended[dependency] < started[key] for dependency in job.dependencies)


def test_interrupt_stops_running_jobs_and_waits_for_them(room: Path, tmp_path: Path) -> None:
    (room / "mae_tiny-pretrain.waits").write_text("")
    program = (
        f"from pathlib import Path; from mrmae_ds.pipeline import local; "
        f"local.TRAIN = Path({str(room / 'train.py')!r}); "
        f"from mrmae_ds.cli.main import main; main(['submit', {str(write_pipeline(tmp_path))!r}, '--local', '--runs', "
        f"{str(tmp_path / 'runs')!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (room / "waiting").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and err == "interrupted; run the same command again to resume\n"
    assert (room / "stopped").read_text() == "mae_tiny-pretrain"
    assert _started(room) == ["mae_tiny-pretrain"]


def test_several_ranks_are_launched_by_deepspeed(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, tmp_path / "runs")
    job: PipelineJob = jobs["tiny/finetune"]
    command = local.LocalPipeline([], {}, processes=2, gpus=0).command(job)
    assert command[0].endswith("deepspeed") and command[1:4] == ["-q", "--num_gpus", "2"]
    assert command[4:] == [str(local.TRAIN), "--ds_config", "ds_configs/tiny.json", *job.arguments]


@pytest.mark.parametrize("option", [["--jobs", "0"], ["--processes", "0"], ["--tflops", "0"]])
def test_invalid_numbers_are_refused(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, *option) == 2
    assert capsys.readouterr().err.startswith(f"error: {option[0]} must be ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pipeline_with_real_training(tmp_path: Path) -> None:
    """Two recipes, two seeds, one step per stage: MAE, and MR-MAE with the MAE as its teacher; then their table."""
    write_sample_beton(tmp_path, train=32, val=20)
    data = {"train": str(tmp_path / "train.beton"), "val": str(tmp_path / "val.beton"), "backend": "pillow"}
    optimizer = {"warmup_epochs": 0}
    stages = {name: {"epochs": 1, "optimizer": optimizer} for name in ("pretrain", "finetune")}
    pipeline = write_pipeline(
        tmp_path,
        set={"data": data, "stages": stages, "logging": {"num_images": 0}},
        runs=[{"recipe": "ds_configs/baselines/mae_tiny.yaml"}, {}],
    )
    command = ["mrmae", "submit", pipeline, "--runs", tmp_path / "runs", "--seeds", "0,1", "--local", "--jobs", "2"]
    result = run(command, 840)
    assert result.status == 0, result.stdout + result.stderr
    records = {f"{folder.parent.name}/{folder.name}": record for folder, record in find_records([tmp_path / "runs"])}
    assert {record.status for record in records.values()} == {"finished"} and len(records) == 8
    student = records["tiny-seed1/pretrain"]
    assert student.seed == 1 and student.teachers["mae"].sha256 is not None
    assert student.teachers["mae"].sha256 != records["tiny/pretrain"].teachers["mae"].sha256
    both = [records[f"tiny{end}/finetune"].results.top1 for end in ("", "-seed1")]
    mean = sum(value for value in both if value is not None) / 2
    table = (tmp_path / "runs" / "table6.md").read_text()
    assert f"**{mean:.2f} ± " in table and "(n=2)" in table
    again = run(command, 120)
    assert again.status == 0 and "8 jobs, 8 finished already" in again.stdout and "started" not in again.stdout
    assert RunRecord.load(tmp_path / "runs/tiny/finetune") == records["tiny/finetune"]
