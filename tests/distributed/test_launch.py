from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mrmae_ds.distributed.launch import Launch, prepare_environment
from mrmae_ds.errors import UserError
from tests.support.processes import REPOSITORY

SET_BY_US = ("TORCH_EXTENSIONS_DIR", "NUMBA_THREADING_LAYER", "OMP_NUM_THREADS", "LOCAL_SIZE")
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "node7",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Environment without launchers; restored afterwards."""
    for name in {*SET_BY_US, *LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))}:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return monkeypatch


def _set(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


def test_plain_python_is_one_rank(environment: pytest.MonkeyPatch) -> None:
    assert prepare_environment() == Launch(rank=0, local_rank=0, world_size=1, local_size=1)
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "0")
    assert "OMP_NUM_THREADS" not in os.environ


LAUNCHED = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("local", [{"LOCAL_SIZE": "8"}, {"LOCAL_WORLD_SIZE": "8"}], ids=["deepspeed", "torchrun"])
def test_reads_the_variables_of_the_launcher(environment: pytest.MonkeyPatch, local: dict[str, str]) -> None:
    _set(environment, LAUNCHED | local)
    assert prepare_environment() == Launch(rank=9, local_rank=1, world_size=16, local_size=8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node0", "29500")
    assert os.environ["LOCAL_SIZE"] == "8"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_prefers_the_launcher_to_slurm(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM | LAUNCHED | {"LOCAL_SIZE": "8"})
    assert prepare_environment() == Launch(rank=9, local_rank=1, world_size=16, local_size=8)


def test_reads_the_variables_of_srun(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM)
    assert prepare_environment() == Launch(rank=5, local_rank=1, world_size=8, local_size=4)
    exported = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    assert exported == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node7"}
    assert os.environ["MASTER_PORT"] == "13456"


def test_chooses_a_port_below_those_that_the_system_assigns(environment: pytest.MonkeyPatch) -> None:
    """Linux assigns ports from 32768; jobs that share a node use different ports."""
    ports = set()
    for job in (1, 2, 19_999, 20_000, 987_654_321):
        _set(environment, SLURM | {"SLURM_JOB_ID": str(job)})
        for name in ("RANK", "MASTER_PORT"):
            environment.delenv(name, raising=False)
        prepare_environment()
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 5 and min(ports) >= 1024 and max(ports) < 32768


def test_a_requeued_job_uses_another_port(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM | {"SLURM_RESTART_COUNT": "1"})
    prepare_environment()
    assert os.environ["MASTER_PORT"] not in ("", "13456")


@pytest.mark.parametrize(("node", "expected"), [("0", 4), ("1", 4), ("2", 3)])
def test_srun_with_unequal_nodes(environment: pytest.MonkeyPatch, node: str, expected: int) -> None:
    """Uses the step's count, not the option that another job may have left in the environment."""
    step = {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": node, "SLURM_NTASKS_PER_NODE": "8"}
    _set(environment, SLURM | step | {"SLURM_NTASKS": "11"})
    assert prepare_environment().local_size == expected
    assert os.environ["LOCAL_SIZE"] == str(expected)


def test_srun_on_one_node_needs_no_address(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8"})
    environment.delenv("MASTER_ADDR")
    assert prepare_environment().local_size == 8
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_a_batch_script_without_srun_is_refused_naming_srun(environment: pytest.MonkeyPatch) -> None:
    """Its shell has the variables of task 0, and the other tasks do not exist."""
    _set(environment, SLURM | {"SLURM_PROCID": "0"})
    environment.delenv("SLURM_STEP_ID")
    with pytest.raises(UserError, match=r"8 tasks.*no SLURM_STEP_ID.*put srun in front.*SLURM_NTASKS=1"):
        prepare_environment()
    environment.setenv("SLURM_NTASKS", "1")
    assert prepare_environment() == Launch(0, 0, 1, 1)


@pytest.mark.parametrize("agent", ["", "True"])
def test_a_port_on_which_another_job_listens_is_refused(environment: pytest.MonkeyPatch, agent: str) -> None:
    """Torchrun's own agent listens there for rank 0. Without a listener the port is free, even if just used."""
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        _set(environment, LAUNCHED | {"RANK": "0", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": agent})
        if agent:
            prepare_environment()
        else:
            with pytest.raises(UserError, match=f"port {port} is taken.*deepspeed --master_port N"):
                prepare_environment()
        environment.setenv("RANK", "1")
        prepare_environment()
    environment.setenv("RANK", "0")
    prepare_environment()


def test_rejects_a_number_of_tasks_that_is_not_a_number(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x"})
    with pytest.raises(UserError, match=r"SLURM_STEP_TASKS_PER_NODE.*4\(x"):
        prepare_environment()


def test_keeps_a_port_that_was_set(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM | {"MASTER_PORT": "31000"})
    prepare_environment()
    assert os.environ["MASTER_PORT"] == "31000"


def test_srun_with_one_gpu_bound_to_each_task(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM)
    environment.delenv("SLURM_LOCALID")
    assert prepare_environment().local_rank == 0


def test_explains_a_missing_master_address_under_srun(environment: pytest.MonkeyPatch) -> None:
    _set(environment, SLURM)
    environment.delenv("MASTER_ADDR")
    environment.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    with pytest.raises(UserError, match=r"MASTER_ADDR.*scontrol show hostnames"):
        prepare_environment()


def test_one_slurm_task_is_one_rank(environment: pytest.MonkeyPatch) -> None:
    _set(environment, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"})
    assert prepare_environment() == Launch(0, 0, 1, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_an_allocation_without_srun_is_one_rank(environment: pytest.MonkeyPatch) -> None:
    _set(environment, {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"})
    assert prepare_environment() == Launch(0, 0, 1, 1)


@pytest.mark.parametrize("given", [("RANK",), ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("WORLD_SIZE",)])
def test_rejects_incomplete_variables(environment: pytest.MonkeyPatch, given: tuple[str, ...]) -> None:
    _set(environment, dict.fromkeys(given, "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in given]
    with pytest.raises(UserError) as caught:
        prepare_environment()
    assert f"{', '.join(given)} set but not {', '.join(missing)}" in str(caught.value)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "two", "1.0"])
def test_rejects_a_launcher_variable_that_is_no_number(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    _set(environment, LAUNCHED | {name: value})
    with pytest.raises(UserError, match="whole number"):
        prepare_environment()


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID"])
def test_rejects_a_slurm_variable_that_is_not_a_number(environment: pytest.MonkeyPatch, name: str) -> None:
    _set(environment, SLURM | {name: "x"})
    with pytest.raises(UserError, match="whole number"):
        prepare_environment()


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_JOB_ID"])
def test_rejects_other_slurm_variables_that_are_not_numbers(environment: pytest.MonkeyPatch, name: str) -> None:
    _set(environment, SLURM | {name: "x"})
    with pytest.raises(UserError):
        prepare_environment()


@pytest.mark.parametrize("wrong", [{"RANK": "16"}, {"RANK": "-1"}, {"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}])
def test_rejects_a_rank_outside_of_the_world(environment: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    _set(environment, LAUNCHED | wrong)
    with pytest.raises(UserError):
        prepare_environment()


def test_sets_defaults_that_must_precede_the_imports(environment: pytest.MonkeyPatch) -> None:
    prepare_environment()
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]) == Path(sys.prefix) / "torch_extensions"
    assert os.environ["NUMBA_THREADING_LAYER"] == "tbb"
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"
    prepare_environment()
    assert os.environ["PATH"].count(str(Path(sys.executable).parent)) == 1


def test_keeps_variables_set_by_the_user(environment: pytest.MonkeyPatch) -> None:
    chosen = {"TORCH_EXTENSIONS_DIR": "/x", "NUMBA_THREADING_LAYER": "workqueue", "OMP_NUM_THREADS": "3"}
    _set(environment, chosen | LAUNCHED | {"LOCAL_SIZE": "8"})
    prepare_environment()
    assert {name: os.environ[name] for name in chosen} == chosen


@pytest.mark.parametrize("module", ["mrmae_ds.distributed.launch", "mrmae_ds.cli.main", "train"])
def test_imports_no_slow_module(module: str) -> None:
    heavy = ("torch", "timm", "deepspeed", "numba")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_prepares_the_environment_before_torch_is_imported() -> None:
    """torch reads OMP_NUM_THREADS when it is imported, which the command line's modules do."""
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("threads when torch is imported:", os.environ.get("OMP_NUM_THREADS"))
sys.meta_path.insert(0, Watch())
from mrmae_ds.cli.main import main
main(["train", "--ds_config", "no such file"])
"""
    given = {name: value for name, value in os.environ.items() if name not in {*SET_BY_US, *LAUNCHERS}}
    environment = given | LAUNCHED | {"LOCAL_SIZE": "8"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "threads when torch is imported: 1\n" in done.stdout, done.stdout + done.stderr
