"""Submission of a pipeline to Slurm: submitted jobs, dependencies, and repeated submission."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.files import file_sha256
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.pipeline.status import read_slurm_jobs
from mrmae_ds.records.record import RECIPE_FILE
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.fake_slurm import FakeSlurm
from tests.support.pipelines import KEYS, make_jobs, write_pipeline, write_record
from tests.support.processes import REPOSITORY
from tests.support.records import make_record


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm.make(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return fake


@pytest.fixture
def jobs(tmp_path: Path) -> dict[str, PipelineJob]:
    return make_jobs(tmp_path, tmp_path / "runs")


def _submit(folder: Path, *more: str, overrides: tuple[str, ...] = ()) -> int:
    return main(["submit", str(write_pipeline(folder)), *overrides, "--runs", str(folder / "runs"), *more])


def _by_name(slurm: FakeSlurm) -> dict[str, tuple[str, list[str]]]:
    """Id and sbatch arguments of each job, by its name; the newest job of a name."""
    named = {}
    for job, arguments in slurm.jobs().items():
        (name,) = [word.removeprefix("--job-name=") for word in arguments if word.startswith("--job-name=")]
        named[name] = (job, arguments)
    return named


def _dependency(slurm: FakeSlurm, name: str) -> list[str]:
    """Kind of a job's dependency, and the names of the jobs that it depends on."""
    names = {job: other for other, (job, _) in _by_name(slurm).items()}
    options = [word for word in _by_name(slurm)[name][1] if word.startswith("--dependency=")]
    if not options:
        return []
    kind, *jobs = options[0].removeprefix("--dependency=").split(":")
    return [kind, *(names[job] for job in jobs)]


def test_submission_from_another_folder_is_refused(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _submit(tmp_path) == 2
    reason = f"not in {tmp_path}; Slurm jobs run in the repository, so first: cd {REPOSITORY}"
    assert capsys.readouterr().err == f"error: slurm/train.sbatch: {reason}\n"
    assert slurm.jobs() == {}


@pytest.mark.parametrize(
    ("submitted_from", "reason"),
    [
        ("{}", "no slurm/task.sh in {}: submit from the repository"),
        (None, "not a Slurm job: sbatch slurm/train.sbatch"),
    ],
)
def test_the_script_needs_a_job_of_the_repository(submitted_from: str | None, reason: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    if submitted_from:
        env["SLURM_SUBMIT_DIR"] = submitted_from.format(tmp_path)
    script = REPOSITORY / "slurm/train.sbatch"
    result = subprocess.run(["bash", script, "ds_configs/tiny.json"], env=env, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"train.sbatch: {reason.format(tmp_path)}" in result.stderr


def test_submits_every_job_with_its_dependencies(
    slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submit(tmp_path, "--sbatch=--time=24:00:00 --account=lab") == 0
    out = capsys.readouterr().out
    submitted = _by_name(slurm)
    assert list(submitted) == [*(key.replace("/", "-") for key in KEYS), "demo-tables"]
    for key, job in jobs.items():
        name = key.replace("/", "-")
        slurm_id, arguments = submitted[name]
        assert arguments[0] == "--parsable"
        at = arguments.index("slurm/train.sbatch")
        assert {"--time=24:00:00", "--account=lab"} <= set(arguments[:at])
        assert arguments[at + 1 :] == [str(job.config), *job.arguments]
        dependencies = [key.replace("/", "-") for key in job.dependencies]
        assert _dependency(slurm, name) == (["afterok", *dependencies] if dependencies else [])
        assert ("--kill-on-invalid-dep=yes" in arguments) == bool(job.dependencies)
        assert [word for word in arguments[:at] if "nodes" in word] == ([f"--nodes={job.nodes}"] if job.nodes else [])
        assert f"{key}: submitted as job {slurm_id}" in out
    assert _dependency(slurm, "demo-tables") == ["afterany", *(key.replace("/", "-") for key in KEYS)]
    (wrapped,) = [word for word in submitted["demo-tables"][1] if word.startswith("--wrap=")]
    assert wrapped.endswith(f"mrmae table --paper 6 {tmp_path / 'runs'}")


def test_submitted_arguments_are_parsed_by_train_py(slurm: FakeSlurm, tmp_path: Path) -> None:
    from mrmae_ds.cli.train import parse_arguments

    _submit(tmp_path)
    for _, arguments in _by_name(slurm).values():
        if "slurm/train.sbatch" in arguments:
            config, *rest = arguments[arguments.index("slurm/train.sbatch") + 1 :]
            args = parse_arguments(["--ds_config", config, *rest])
            assert load_engine_config(args.ds_config).zero.stage == 3 and args.recipe.is_file()


def test_second_submission_finds_all_jobs_in_the_queue(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _submit(tmp_path)
    before = slurm.jobs()
    capsys.readouterr()
    assert _submit(tmp_path) == 0
    assert slurm.jobs() == before
    assert f"nothing to submit: {len(KEYS)} jobs in the queue" in capsys.readouterr().out


def test_resubmits_missing_jobs_only(slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path) -> None:
    """The teacher has finished, one pre-training has failed together with its fine-tuning, one still runs."""
    _submit(tmp_path)
    first = {key: _by_name(slurm)[key.replace("/", "-")][0] for key in KEYS}
    write_record(jobs["mae_tiny/pretrain"])
    write_record(jobs["mcmae_tiny/pretrain"], "failed")
    write_record(jobs["tiny/pretrain"], "running")
    write_record(jobs["scratch_tiny/finetune"], "running")  # its node failed: no job in the queue, no end time
    for key in ("mae_tiny/pretrain", "mcmae_tiny/pretrain", "mcmae_tiny/finetune", "scratch_tiny/finetune"):
        slurm.leave(first[key])
    _submit(tmp_path)
    new = {name for name, (job, _) in _by_name(slurm).items() if int(job) > int(max(first.values(), key=int)) + 1}
    assert new == {"mcmae_tiny-pretrain", "mcmae_tiny-finetune", "scratch_tiny-finetune", "demo-tables"}
    assert _dependency(slurm, "mcmae_tiny-finetune") == ["afterok", "mcmae_tiny-pretrain"]
    assert _dependency(slurm, "mcmae_tiny-pretrain") == []
    tables = _dependency(slurm, "demo-tables")
    assert {"tiny-finetune", "mae_tiny-finetune", "mcmae_tiny-finetune"} <= set(tables) and len(tables) == 8


def test_resubmitted_jobs_depend_on_queued_ones(slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path) -> None:
    _submit(tmp_path)
    finetune = _by_name(slurm)["tiny-finetune"][0]
    slurm.leave(finetune)
    write_record(jobs["tiny/pretrain"], "running")
    _submit(tmp_path)
    assert _dependency(slurm, "tiny-finetune") == ["afterok", "tiny-pretrain"]
    assert int(_by_name(slurm)["tiny-finetune"][0]) > int(finetune)


def test_finds_manually_started_jobs_by_their_record(
    slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(jobs["mae_tiny/pretrain"], "running", slurm_job="4711")
    (slurm.room / "4711.state").write_text("RUNNING")
    assert _submit(tmp_path, "--dry-run") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mae_tiny/pretrain")]
    assert "submitted (job 4711 running, after 100 of 100 steps)" in line
    assert slurm.jobs() == {}


def test_jobs_submitted_before_an_sbatch_error_are_saved(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.refuse("tiny-finetune")
    assert _submit(tmp_path) == 2
    assert "Invalid account" in capsys.readouterr().err
    assert list(read_slurm_jobs(tmp_path / "runs")) == ["mae_tiny/pretrain", "tiny/pretrain"]
    slurm.refuse("")
    assert _submit(tmp_path) == 0
    names = [word for arguments in slurm.jobs().values() for word in arguments if word.startswith("--job-name=")]
    assert len(names) == len(set(names)) == len(KEYS) + 1


def test_builds_tables_at_once_if_all_jobs_are_finished(
    slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in jobs.values():
        write_record(job)
    assert _submit(tmp_path) == 0
    assert slurm.jobs() == {}
    assert f"all {len(KEYS)} jobs are finished" in capsys.readouterr().out
    assert "**80.00**" in (tmp_path / "runs" / "table6.md").read_text()


@pytest.mark.parametrize("change", [{"recipe_hash": "another"}, {"seed": 9}])
def test_refuses_a_folder_with_another_run(
    change: dict[str, object], slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_record(jobs["tiny/pretrain"], **change)
    assert _submit(tmp_path) == 2
    assert f"{tmp_path / 'runs/tiny/pretrain'}: holds a run of another recipe" in capsys.readouterr().err
    assert slurm.jobs() == {}


def test_refuses_a_fine_tuning_of_weights_that_were_made_over(
    slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As train.py does; the finished fine-tuning would otherwise fill the table's cell."""
    for job in jobs.values():
        write_record(job)
    job, weights = jobs["tiny/finetune"], jobs["tiny/pretrain"].stage_dir / MODEL_FILE
    summary = make_record().init
    assert summary is not None
    init = summary.model_copy(update={"sha256": file_sha256(weights)})
    write_record(job, init=init)
    (job.stage_dir / RECIPE_FILE).write_text(job.recipe.to_yaml())
    assert _submit(tmp_path) == 0
    weights.write_bytes(b"of another seed")
    capsys.readouterr()
    assert _submit(tmp_path) == 2
    assert f"{job.stage_dir}: holds a run of other weights than {weights} has by now" in capsys.readouterr().err
    assert slurm.jobs() == {}


def test_dry_run_prints_costs_and_starts_nothing(
    slurm: FakeSlurm, jobs: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(jobs["mae_tiny/pretrain"])
    absent_data = tmp_path / "train.beton"
    assert _submit(tmp_path, "--dry-run", "--tflops", "1", overrides=(f"data.train={absent_data}",)) == 0
    out = capsys.readouterr().out
    *plan, summary, absent, uncounted = out.splitlines()
    assert absent == f"{absent_data}: no such file; counted on ImageNet-1K's 1,281,167 images"
    lines = {line.split()[0]: line for line in plan[1:]}
    assert list(lines) == KEYS
    teacher = jobs["mae_tiny/pretrain"].stage_dir / MODEL_FILE
    reason = f"teachers.mae.source: {teacher}: not a readable weights file"
    assert uncounted.startswith(f"tiny/pretrain is not counted: ds_configs/tiny.yaml: {reason}")
    assert "finished (top-1 80.00 %)" in lines["mae_tiny/pretrain"]
    assert "tiny/pretrain" in lines["tiny/finetune"].split()[3] and "not run" in lines["tiny/finetune"]
    assert slurm.jobs() == {} and not (tmp_path / "runs" / "slurm_jobs.json").exists()
    from mrmae_ds.planning.cost_report import describe_cost

    # `mrmae cost` counts pre-training and fine-tuning; both stages' GPU-hours together are its own.
    text = describe_cost(
        Path("ds_configs/tiny.json"), Path("ds_configs/baselines/mcmae_tiny.yaml"), ["stages.pretrain.epochs=3"],
        tflops=1,
    )  # fmt: skip
    hours = float(text.split("(pretrain + finetune), ")[1].split(" GPU-hours")[0].replace(",", ""))
    counted = [float(lines[f"mcmae_tiny/{stage}"].split()[-1].replace(",", "")) for stage in ("pretrain", "finetune")]
    assert sum(counted) == pytest.approx(hours, rel=0.01)
    unfinished = [key for key in KEYS if key not in ("mae_tiny/pretrain", "tiny/pretrain", "mae_tiny/evaluate")]
    total = sum(float(lines[key].split()[-1].replace(",", "")) for key in unfinished)
    assert summary.startswith(f"{len(KEYS) - 1} of {len(KEYS)} jobs to run, ")
    assert float(summary.split(", ")[1].split(" GPU")[0].replace(",", "")) == pytest.approx(total, rel=0.01)


def test_only_selects_runs_and_their_dependencies(slurm: FakeSlurm, tmp_path: Path) -> None:
    assert _submit(tmp_path, "--only", "tiny") == 0
    assert set(_by_name(slurm)) == {"mae_tiny-pretrain", "tiny-pretrain", "tiny-finetune", "demo-tables"}


def test_unknown_runs_are_named_before_absent_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = str(REPOSITORY / "pipelines/table1.yaml")
    assert main(["submit", pipeline, "--dry-run", "--only", "milan_bas"]) == 2
    expected = "error: --only milan_bas: no such run in the pipeline; did you mean 'milan_base'?\n"
    assert capsys.readouterr().err == expected


def test_absent_sources_leave_a_dry_run_and_are_refused_for_jobs_to_start_alone(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two runs, one has its teacher in a file that is absent and its initial weights in another."""
    mae = {"recipe": "ds_configs/baselines/mae_tiny.yaml", "stages": ["pretrain"]}
    absent = {"teachers": {"mae": {"source": "none.pth"}}, "stages": {"finetune": {"init": "init.pth"}}}
    pipeline = write_pipeline(tmp_path, runs=[{"set": absent}, mae])
    arguments = ["submit", str(pipeline), "--runs", str(tmp_path / "runs")]
    assert main([*arguments, "--dry-run", "--only", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["tiny/pretrain", "not", "run"]  # no cost
    assert float(lines[2].split()[-1]) > 0  # which initial weights do not change
    problem = "ds_configs/tiny.yaml: teachers.mae.source: none.pth does not exist; "
    assert lines[-2].startswith(f"tiny/pretrain cannot start yet and is not counted: {problem}")
    init = "ds_configs/tiny.yaml: stages.finetune.init: init.pth does not exist; "
    assert lines[-1].startswith(f"tiny/finetune cannot start yet: {init}")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: tiny/pretrain: {problem}") and slurm.jobs() == {}
    assert main([*arguments, "--local"]) == 2 and not list(tmp_path.glob("runs/*/"))
    assert main([*arguments, "--only", "mae_tiny"]) == 0
    assert set(_by_name(slurm)) == {"mae_tiny-pretrain", "demo-tables"}


def test_a_dry_run_says_which_job_awaits_its_teacher(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submit(tmp_path, "--dry-run", "--only", "tiny") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "not counted either: 1 job with a run as teacher that does not exist yet"


def test_missing_slurm_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _submit(tmp_path) == 2
    assert "squeue: not found; submit on a login node, or run here with --local" in capsys.readouterr().err
    assert _submit(tmp_path, "--dry-run", "--only", "scratch_tiny") == 0


def test_unreachable_slurm_is_one_line(slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["squeue: error: fetch_config: DNS SRV lookup failed", "squeue: fatal: Could not establish a source"]
    (slurm.room.parent / "squeue").write_text("#!/bin/sh\nprintf '%s\\n' '" + "' '".join(lines) + "' >&2; exit 1\n")
    assert _submit(tmp_path) == 2
    assert capsys.readouterr().err == f"error: {lines[1]}; without Slurm: --local\n"


@pytest.mark.parametrize("file", ["tiny.yaml", "tiny.json"])
def test_other_files_than_pipelines_are_one_line(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", f"ds_configs/{file}"]) == 2
    kind = "a recipe, for --recipe" if file.endswith("yaml") else "an engine config, for --ds_config"
    expected = f"error: ds_configs/{file}: is {kind}; expected a pipeline file, pipelines/NAME.yaml\n"
    assert capsys.readouterr().err == expected


def test_concurrent_submission_is_refused(slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mrmae_ds.pipeline.status import lock_runs

    with lock_runs(tmp_path / "runs"):
        assert _submit(tmp_path) == 2
    assert "locked by another mrmae submit" in capsys.readouterr().err
