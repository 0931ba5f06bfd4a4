"""A chain on Slurm: what is submitted, what waits for what, and what a second submission finds there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.pipeline.status import read_jobs
from tests.support.fake_slurm import FakeSlurm
from tests.support.pipelines import KEYS, make_links, record, write_pipeline


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm.make(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return fake


@pytest.fixture
def links(tmp_path: Path) -> dict[str, PipelineJob]:
    return make_links(tmp_path, tmp_path / "runs")


def _submit(folder: Path, *more: str) -> int:
    return main(["submit", str(write_pipeline(folder)), "--runs", str(folder / "runs"), *more])


def _by_name(slurm: FakeSlurm) -> dict[str, tuple[str, list[str]]]:
    """Job and what sbatch was told, by the job's name; the newest of a name."""
    named = {}
    for job, told in slurm.jobs().items():
        (name,) = [word.removeprefix("--job-name=") for word in told if word.startswith("--job-name=")]
        named[name] = (job, told)
    return named


def _waits_for(slurm: FakeSlurm, name: str) -> list[str]:
    """Names of the jobs that a job waits for, with the kind of waiting first."""
    names = {job: other for other, (job, _) in _by_name(slurm).items()}
    told = [word for word in _by_name(slurm)[name][1] if word.startswith("--dependency=")]
    if not told:
        return []
    kind, *jobs = told[0].removeprefix("--dependency=").split(":")
    return [kind, *(names[job] for job in jobs)]


def test_every_link_is_a_job_that_waits_for_its_needs(
    slurm: FakeSlurm, links: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submit(tmp_path, "--sbatch=--time=24:00:00 --account=lab") == 0
    out = capsys.readouterr().out
    jobs = _by_name(slurm)
    assert list(jobs) == [*(key.replace("/", "-") for key in KEYS), "demo-tables"]
    for key, link in links.items():
        name = key.replace("/", "-")
        job, told = jobs[name]
        assert told[0] == "--parsable"
        at = told.index("slurm/train.sbatch")
        assert {"--time=24:00:00", "--account=lab"} <= set(told[:at])
        assert told[at + 1 :] == [str(link.config), *link.arguments]
        assert _waits_for(slurm, name) == (["afterok"] + [n.replace("/", "-") for n in link.needs]) * bool(link.needs)
        assert ("--kill-on-invalid-dep=yes" in told) == bool(link.needs)
        assert [word for word in told[:at] if "nodes" in word] == ([f"--nodes={link.nodes}"] if link.nodes else [])
        assert f"{key}: submitted as job {job}" in out
    assert _waits_for(slurm, "demo-tables") == ["afterany", *(key.replace("/", "-") for key in KEYS)]
    (wrapped,) = [word for word in jobs["demo-tables"][1] if word.startswith("--wrap=")]
    assert wrapped.endswith(f"mrmae table --paper 6 {tmp_path / 'runs'}")


def test_the_jobs_arguments_are_train_pys(slurm: FakeSlurm, tmp_path: Path) -> None:
    from train import parse_arguments

    _submit(tmp_path)
    for _, told in _by_name(slurm).values():
        if "slurm/train.sbatch" in told:
            config, *rest = told[told.index("slurm/train.sbatch") + 1 :]
            args = parse_arguments(["--ds_config", config, *rest])
            assert load_engine_config(args.ds_config).zero_stage == 3 and args.recipe.is_file()


def test_a_second_submission_finds_everything_in_the_queue(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _submit(tmp_path)
    before = slurm.jobs()
    capsys.readouterr()
    assert _submit(tmp_path) == 0
    assert slurm.jobs() == before
    assert f"nothing to submit: {len(KEYS)} jobs are in the queue" in capsys.readouterr().out


def test_only_what_is_missing_is_submitted_again(
    slurm: FakeSlurm, links: dict[str, PipelineJob], tmp_path: Path
) -> None:
    """The teacher has finished, one pre-training has failed and taken its fine-tuning with it, one still runs."""
    _submit(tmp_path)
    first = {key: _by_name(slurm)[key.replace("/", "-")][0] for key in KEYS}
    record(links["mae_tiny/pretrain"])
    record(links["mcmae_tiny/pretrain"], "failed")
    record(links["tiny/pretrain"], "running")
    record(links["scratch_tiny/finetune"], "running")  # its node died: no job, no end
    for key in ("mae_tiny/pretrain", "mcmae_tiny/pretrain", "mcmae_tiny/finetune", "scratch_tiny/finetune"):
        slurm.leave(first[key])
    _submit(tmp_path)
    new = {name for name, (job, _) in _by_name(slurm).items() if int(job) > int(max(first.values(), key=int)) + 1}
    assert new == {"mcmae_tiny-pretrain", "mcmae_tiny-finetune", "scratch_tiny-finetune", "demo-tables"}
    assert _waits_for(slurm, "mcmae_tiny-finetune") == ["afterok", "mcmae_tiny-pretrain"]
    assert _waits_for(slurm, "mcmae_tiny-pretrain") == []
    tables = _waits_for(slurm, "demo-tables")
    assert {"tiny-finetune", "mae_tiny-finetune", "mcmae_tiny-finetune"} <= set(tables) and len(tables) == 8


def test_what_waits_for_a_queued_job_waits_for_that_one(
    slurm: FakeSlurm, links: dict[str, PipelineJob], tmp_path: Path
) -> None:
    _submit(tmp_path)
    tuned = _by_name(slurm)["tiny-finetune"][0]
    slurm.leave(tuned)
    record(links["tiny/pretrain"], "running")
    _submit(tmp_path)
    assert _waits_for(slurm, "tiny-finetune") == ["afterok", "tiny-pretrain"]
    assert int(_by_name(slurm)["tiny-finetune"][0]) > int(tuned)


def test_a_job_that_was_started_by_hand_is_found_by_its_record(
    slurm: FakeSlurm, links: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(links["mae_tiny/pretrain"], "running", slurm_job="4711")
    (slurm.room / "4711.state").write_text("RUNNING")
    assert _submit(tmp_path, "--dry-run") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mae_tiny/pretrain")]
    assert "submitted (job 4711 running, after 100 of 100 steps)" in line
    assert slurm.jobs() == {}


def test_when_sbatch_refuses_what_was_submitted_is_on_record(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.refuse("tiny-finetune")
    assert _submit(tmp_path) == 2
    assert "Invalid account" in capsys.readouterr().err
    assert list(read_jobs(tmp_path / "runs")) == ["mae_tiny/pretrain", "tiny/pretrain"]
    slurm.refuse("")
    assert _submit(tmp_path) == 0
    names = [word for told in slurm.jobs().values() for word in told if word.startswith("--job-name=")]
    assert len(names) == len(set(names)) == len(KEYS) + 1


def test_when_all_has_finished_the_tables_are_made_at_once(
    slurm: FakeSlurm, links: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for link in links.values():
        record(link)
    assert _submit(tmp_path) == 0
    assert slurm.jobs() == {}
    assert f"all {len(KEYS)} links are finished" in capsys.readouterr().out
    assert "**80.00**" in (tmp_path / "runs" / "table6.md").read_text()


@pytest.mark.parametrize("change", [{"recipe_hash": "another"}, {"seed": 9}])
def test_another_run_in_the_folder_is_told(
    change: dict[str, object], slurm: FakeSlurm, links: dict[str, PipelineJob], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    record(links["tiny/pretrain"], **change)
    assert _submit(tmp_path) == 2
    assert f"{tmp_path / 'runs/tiny/pretrain'}: holds a run of another recipe" in capsys.readouterr().err
    assert slurm.jobs() == {}


def test_the_plan_is_printed_and_nothing_is_started(
    slurm: FakeSlurm, links: dict[str, PipelineJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(links["mae_tiny/pretrain"])
    absent_data = tmp_path / "train.beton"
    assert _submit(tmp_path, "--dry-run", "--tflops", "1", "--set", f"data.train={absent_data}") == 0
    out = capsys.readouterr().out
    *plan, summary, absent, uncounted = out.splitlines()
    assert absent == f"{absent_data} is not there: ImageNet-1K's 1,281,167 images are taken"
    lines = {line.split()[0]: line for line in plan[1:]}
    assert (
        list(lines) == KEYS and uncounted == "not counted either: 1 links whose teacher is a run that is not there yet"
    )
    assert "finished (top-1 80.00 %)" in lines["mae_tiny/pretrain"]
    assert "tiny/pretrain" in lines["tiny/finetune"].split()[3] and "not run" in lines["tiny/finetune"]
    assert slurm.jobs() == {} and not (tmp_path / "runs" / "slurm_jobs.json").exists()
    from mrmae_ds.profiling.flops_report import describe_cost

    # `mrmae cost` counts pre-training and fine-tuning; both stages' GPU-hours together are its own.
    told = describe_cost(
        Path("ds_configs/tiny.json"), Path("ds_configs/baselines/mcmae_tiny.yaml"), ["stages.pretrain.epochs=3"],
        tflops=1,
    )  # fmt: skip
    hours = float(told.split("(pretrain + finetune), ")[1].split(" GPU-hours")[0].replace(",", ""))
    counted = [float(lines[f"mcmae_tiny/{stage}"].split()[-1].replace(",", "")) for stage in ("pretrain", "finetune")]
    assert sum(counted) == pytest.approx(hours, rel=0.01)
    paid = [key for key in KEYS if key not in ("mae_tiny/pretrain", "tiny/pretrain", "mae_tiny/evaluate")]
    total = sum(float(lines[key].split()[-1].replace(",", "")) for key in paid)
    assert summary.startswith(f"{len(KEYS) - 1} of {len(KEYS)} links to run, ")
    assert float(summary.split(", ")[1].split(" GPU")[0].replace(",", "")) == pytest.approx(total, rel=0.01)


def test_only_some_runs_and_what_they_need(slurm: FakeSlurm, tmp_path: Path) -> None:
    assert _submit(tmp_path, "--only", "tiny") == 0
    assert set(_by_name(slurm)) == {"mae_tiny-pretrain", "tiny-pretrain", "tiny-finetune", "demo-tables"}
    assert _submit(tmp_path, "--only", "tinny") == 2


def test_without_slurm_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _submit(tmp_path) == 2
    assert "squeue: not found; submit on a login node, or run it here with --local" in capsys.readouterr().err
    assert _submit(tmp_path, "--dry-run", "--only", "scratch_tiny") == 0


def test_one_at_a_time(slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mrmae_ds.pipeline.status import alone

    with alone(tmp_path / "runs"):
        assert _submit(tmp_path) == 2
    assert "another mrmae submit is at work here" in capsys.readouterr().err
