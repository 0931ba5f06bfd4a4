"""slurm/train.sbatch on a real Slurm, with a shell script instead of train.py: launch, exit status, requeueing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.slurm_cluster import Cluster, wait_for

pytestmark = pytest.mark.multi_process

LIMIT_S = 120
SCRIPT = "slurm/train.sbatch"
CONFIG = "ds_configs/tiny.json"
# Options that a restart appends to the command; the last one takes precedence.
RESUME = ("--resume", "auto")
Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: Cluster, stub_site: Path) -> Submit:
    """``submit(STUB, OPTION..., arguments=[...], VARIABLE=...)`` submits a job whose ranks run STUB; returns its id."""

    def submit(stub: str, *options: str, arguments: tuple[str, ...] = (CONFIG,), **extra: str) -> str:
        variables = {"MRMAE_SITE": str(stub_site), "STUB": stub} | extra
        return cluster.submit(*(options or ("--nodes=2",)), SCRIPT, *arguments, **variables)

    return submit


def test_ranks_receive_their_position_and_unchanged_arguments(cluster: Cluster, submit: Submit) -> None:
    """Three ranks per node; spaces, equals signs and quotes in arguments; a launcher's variables in the shell."""
    stub = (
        'printf "P %s/%s local %s at %s:%s rank=%s <" $SLURM_PROCID $SLURM_NTASKS $SLURM_LOCALID $MASTER_ADDR '
        '"$MASTER_PORT" "$RANK"; printf "[%s]" "$@"; echo ">"'
    )
    arguments = ("--stage", "finetune", "data.train=/a b/c=d.beton", "x=[1, 'two']", "y=", "--resume", "never")
    leftovers = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    job = submit(stub, "--nodes=2", "--ntasks-per-node=3", arguments=(CONFIG, *arguments), RESUME="auto", **leftovers)
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S)
    lines = sorted(line for line in cluster.output(job).splitlines() if line.startswith("P "))
    passed = "".join(f"[{part}]" for part in ("-u", "train.py", "--ds_config", CONFIG, *arguments, *RESUME))
    places = [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)]
    # The nodes' names do not resolve; Slurm provides their address.
    assert lines == [f"P {rank}/6 local {local} at 127.0.0.1: rank= <{passed}>" for rank, local in places]


def test_site_settings_reach_every_rank(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """The example's settings, then others; site.sh may read unset variables."""
    site = tmp_path / "site.sh"
    site.write_text(
        f"""source slurm/site.example.sh
source "{cluster.folder}/stub/site.sh"
[ -z "$NOT_SET_ANYWHERE" ] && export NCCL_DEBUG=INFO
CONTAINER=(env "INSIDE=a container") SRUN_OPTIONS=(--label) TASKS_PER_NODE=2 NETWORK_INTERFACE=ib7
"""
    )
    stub = (
        'echo "$INSIDE, $SLURM_CPUS_PER_TASK CPUs, $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME $NCCL_DEBUG" '
        "$TORCH_FR_BUFFER_SIZE ${TORCH_FR_DUMP_TEMP_FILE##*/}"
    )
    job = submit(stub, "--nodes=2", MRMAE_SITE=str(site))
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S)
    lines = sorted(line for line in cluster.output(job).splitlines() if "INSIDE" in line or "container" in line)
    assert lines == [f"{rank}: a container, 2 CPUs, ib7 ib7 INFO 2000 rank_" for rank in range(4)]
    assert (cluster.folder / "stub" / "status" / f"{job}.nccl").is_dir()


@pytest.mark.parametrize(
    ("nodes", "known", "resolves", "expected"),
    [
        (2, "10.1.2.3", {"10.1.2.3": "10.1.2.3"}, "10.1.2.3"),
        (2, "n1", {"n1": "10.0.0.7"}, "10.0.0.7"),
        (2, "n1-ib", {"n1": "10.0.0.7"}, "10.0.0.7"),
        (2, "n1", {"n1": "127.0.1.1"}, "n1"),
        (1, "n1", {"n1": "127.0.1.1"}, "127.0.1.1"),
        (2, "n1", {}, "10.9.8.7"),
    ],
    ids=["address", "name", "other name", "Debian's own name", "one node", "no name"],
)
def test_address_of_the_first_node(
    nodes: int, known: str, resolves: dict[str, str], expected: str, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    """From Slurm's address of the node and the node's own name resolution; the site file fakes both."""
    answers = "".join(f'[ "$2" != {name} ] || {{ echo "{ip} STREAM"; return 0; }}; ' for name, ip in resolves.items())
    site = tmp_path / "site.sh"
    site.write_text(
        f"""source "{cluster.folder}/stub/site.sh"
scontrol() {{ if [ "$2" = node ]; then echo "NodeAddr={known} NodeHostName=n1"; else command scontrol "$@"; fi; }}
getent() {{ {answers} return 2; }}
hostname() {{ echo "10.9.8.7 fe80::1"; }}
"""
    )
    job = submit('echo "meets at $MASTER_ADDR"', f"--nodes={nodes}", MRMAE_SITE=str(site))
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S)
    assert cluster.output(job).count(f"meets at {expected}\n") == nodes


def test_failed_rank_fails_the_job_and_ends_the_others(cluster: Cluster, submit: Submit) -> None:
    began = time.monotonic()
    job = submit('[ "$SLURM_PROCID" = 0 ] || exit 3; sleep 600')
    ended = cluster.wait_for_job(job, ["FAILED"], LIMIT_S)
    assert (ended["ExitCode"], ended["Restarts"]) == ("3:0", "0")
    assert "train.py failed with status 3, first rank 1 on n2" in cluster.output(job)
    assert time.monotonic() - began < 300 and not cluster.pids_of("n1")


def test_job_waits_for_slow_ranks(cluster: Cluster, submit: Submit) -> None:
    job = submit('[ "$SLURM_PROCID" = 1 ] || sleep 4; echo "done $SLURM_PROCID"')
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S)
    assert "done 0" in cluster.output(job)


def test_stopped_job_is_requeued_and_its_dependents_wait(cluster: Cluster, submit: Submit) -> None:
    """All ranks exit with train.py's status 75, one later than the others; srun must not kill it."""
    end = cluster.folder / "end"
    stub = (
        'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then [ "$SLURM_PROCID" = 0 ] || sleep 2; '
        f'echo "saved $SLURM_PROCID"; exit 75; fi; until [ -e {end} ]; do sleep 0.1; done; '
        'echo "finished $SLURM_PROCID"'
    )
    job = submit(stub)
    after = submit("echo after", "--nodes=1", f"--dependency=afterok:{job}")
    cluster.wait_for_job(job, ["PENDING", "RUNNING"], LIMIT_S, restarts=1)
    assert cluster.job(after)["JobState"] == "PENDING"
    end.touch()
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S, restarts=1)
    output = cluster.output(job)
    assert [f"{word} {rank}" in output for word in ("saved", "finished") for rank in (0, 1)] == [True] * 4
    cluster.wait_for_job(after, ["COMPLETED"], LIMIT_S)


def test_signal_reaches_the_ranks_but_not_their_wrapper(cluster: Cluster, submit: Submit) -> None:
    """USR1 is ignored before a rank installs its handler; afterwards the rank handles it."""
    room = cluster.folder / "signaled"
    room.mkdir()
    program = room / "waits.py"
    program.write_text(
        f"""
import os, pathlib, signal, time
room, got, rank = pathlib.Path("{room}"), [], os.environ["SLURM_PROCID"]
(room / f"began-{{rank}}").touch()
while not (room / "continue").exists():
    time.sleep(0.1)
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
(room / f"ready-{{rank}}").touch()
while not got:
    time.sleep(0.1)
print("got it", rank)
"""
    )

    def wait_for_both(state: str) -> None:
        wait_for(lambda: all((room / f"{state}-{rank}").exists() for rank in (0, 1)), f"both {state}", LIMIT_S)

    job = submit(f"exec python3 {program}")
    wait_for_both("began")
    cluster.query("scancel", "--signal=USR1", job)
    time.sleep(1)  # for the signal to arrive, of which nothing can be seen
    (room / "continue").touch()
    wait_for_both("ready")
    cluster.run("scancel", "--signal=USR1", job)  # may fail: if the first signal came late, the job is over
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S)
    assert all(f"got it {rank}" in cluster.output(job) for rank in (0, 1))


@pytest.mark.parametrize("how", ["cancelled", "stopped with Requeue=0"])
def test_cancelled_job_is_not_requeued(how: str, cluster: Cluster, submit: Submit) -> None:
    """Its ranks save and stop, as they do near the time limit."""
    ready = cluster.folder / f"ready-{how[:4]}"
    program = cluster.folder / "stops.py"
    program.write_text(
        f"""
import pathlib, signal, sys, time
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: sys.exit(75))
pathlib.Path("{ready}").touch()
time.sleep(600)
"""
    )
    job = submit(f"exec python3 {program}", "--nodes=1")
    wait_for(ready.exists, "the process", LIMIT_S)
    if how == "cancelled":
        cluster.query("scancel", job)
        ended = cluster.wait_for_job(job, ["CANCELLED"], LIMIT_S)
    else:
        cluster.query("scontrol", "update", f"JobId={job}", "Requeue=0")
        cluster.query("scancel", "--signal=USR1", job)
        ended = cluster.wait_for_job(job, ["FAILED"], LIMIT_S)
        assert ended["ExitCode"] == "75:0"
        assert "stopped after a checkpoint; not requeued because of --no-requeue" in cluster.output(job)
    time.sleep(2)
    assert (cluster.job(job)["Restarts"], cluster.job(job)["JobState"]) == ("0", ended["JobState"])


def test_job_without_progress_is_not_requeued(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """It stops without a newer checkpoint; the real slurm/restarts.py checks the run folder."""
    job = submit("exit 75", "--nodes=1", arguments=(CONFIG, "--run", str(tmp_path / "run")), REAL_RESTARTS="1")
    ended = cluster.wait_for_job(job, ["FAILED"], LIMIT_S)
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "0")
    assert "no progress beyond step 0 in this start" in cluster.output(job)


@pytest.mark.slow
def test_restarts_are_limited(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """Each start makes progress, so that only MAX_RESTARTS ends the job."""
    checkpoint = f"{tmp_path}/run/pretrain/checkpoints/step_00000000$((SLURM_RESTART_COUNT + 1))"
    stub = f'mkdir -p {checkpoint}; echo "{{}}" > {checkpoint}/manifest.json; exit 75'
    site = tmp_path / "site.sh"
    site.write_text('source "$FIRST_SITE"\nMAX_RESTARTS=1\n')
    variables = {"MRMAE_SITE": str(site), "FIRST_SITE": str(cluster.folder / "stub" / "site.sh"), "REAL_RESTARTS": "1"}
    job = submit(stub, "--nodes=1", arguments=(CONFIG, "--run", str(tmp_path / "run")), **variables)
    ended = cluster.wait_for_job(job, ["FAILED"], LIMIT_S)
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "1")
    output = cluster.output(job)
    assert "stopped after a checkpoint; requeued" in output and "restarted 1 time (MAX_RESTARTS)" in output
    assert "start 2 of job" in output and "newest checkpoint at step 1" in output


@pytest.mark.slow
def test_second_job_in_a_folder_is_refused(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """The same command, submitted twice by mistake."""
    arguments, ready = (CONFIG, "--run", str(tmp_path / "run")), tmp_path / "ready"
    first = submit(f"touch {ready}; sleep 600", "--nodes=1", arguments=arguments, REAL_RESTARTS="1")
    wait_for(ready.exists, "the first job trains", LIMIT_S)
    second = submit("echo STARTED", "--nodes=1", arguments=arguments, REAL_RESTARTS="1")
    assert cluster.wait_for_job(second, ["FAILED"], LIMIT_S)["ExitCode"] == "2:0"
    assert f"run/pretrain: job {first} is training here" in cluster.output(second)
    assert "STARTED" not in cluster.output(second)
    cluster.query("scancel", first)
    cluster.wait_for_job(first, ["CANCELLED"], LIMIT_S)
    third = submit("echo STARTED", "--nodes=1", arguments=arguments, REAL_RESTARTS="1")
    cluster.wait_for_job(third, ["COMPLETED"], LIMIT_S)


@pytest.mark.slow
def test_node_failure_requeues_the_job(cluster: Cluster, submit: Submit) -> None:
    """The ranks fail before Slurm detects the node failure, as after a broken connection."""
    gone = cluster.folder / "gone"
    stub = f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0; until [ -f {gone} ]; do sleep 0.1; done; exit 1'
    job = submit(stub)
    cluster.wait_for_job(job, ["RUNNING"], LIMIT_S)
    wait_for(lambda: bool(cluster.pids_of("n2")), "processes", 60)
    cluster.daemons["n2"].kill()
    cluster.daemons["n2"].wait()
    gone.touch()
    wait_for(lambda: "a node does not respond; requeued" in cluster.output(job), "requeued", LIMIT_S)
    cluster.start_node("n2")
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S, restarts=1)
    cluster.wait_for_nodes()


@pytest.mark.slow
def test_failure_of_the_first_node_requeues_the_job(cluster: Cluster, submit: Submit) -> None:
    """The batch script runs on this node, so Slurm itself must requeue the job."""
    job = submit('[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0; sleep 600')
    wait_for(lambda: len(cluster.pids_of("n2")) > 1, "processes", LIMIT_S)
    cluster.fail_node("n1")
    cluster.wait_for_job(job, ["PENDING"], LIMIT_S, restarts=1)
    cluster.restore_node("n1")
    cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S, restarts=1)
    cluster.wait_for_nodes()


def test_cache_of_a_single_job_is_removed(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    kept, own = tmp_path / "kept", tmp_path / "own-$SLURM_JOB_ID"
    stub = 'for word in "$@"; do case $word in loader.cache_dir=*) mkdir -p "${word#*=}/x"; echo "$word"; esac; done'
    site = tmp_path / "site.sh"
    first = str(cluster.folder / "stub" / "site.sh")
    jobs = []
    for folder in (kept, own):
        copy = site.with_name(f"{folder.name[:3]}.sh")
        copy.write_text(f'source "{first}"\nCACHE_DIR={folder}\n')
        jobs.append(submit(stub, "--nodes=2", MRMAE_SITE=str(copy)))
    for job, folder in zip(jobs, (kept, own), strict=True):
        cluster.wait_for_job(job, ["COMPLETED"], LIMIT_S)
        assert f"loader.cache_dir={str(folder).replace('$SLURM_JOB_ID', job)}" in cluster.output(job)
    assert (kept / "x").exists() and not list(tmp_path.glob("own-*"))


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        ((), {}, "no engine config given"),
        (("--stage", "finetune"), {}, "--stage: no such file; the first argument is the engine config"),
        ((CONFIG,), {"MRMAE_SITE": "/nowhere/site.sh"}, "MRMAE_SITE=/nowhere/site.sh: no such file"),
        ((CONFIG, "stages.pretrain.epoch=3"), {"REAL_RESTARTS": "1"}, "epochs"),
    ],
    ids=["nothing", "no config", "no site", "unknown key"],
)
def test_errors_end_the_job_before_training(
    arguments: tuple[str, ...], extra: dict[str, str], message: str, cluster: Cluster, submit: Submit
) -> None:
    job = submit("echo STARTED", "--nodes=1", arguments=arguments, **extra)
    assert cluster.wait_for_job(job, ["FAILED"], LIMIT_S)["ExitCode"] == "2:0"
    assert message in cluster.output(job) and "STARTED" not in cluster.output(job)


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_node_without_gpus_is_an_error(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("unset DS_ACCELERATOR SLURM_NTASKS_PER_NODE\n")
    job = submit("echo STARTED", "--nodes=1", MRMAE_SITE=str(site))
    assert cluster.wait_for_job(job, ["FAILED"], LIMIT_S)["ExitCode"] == "2:0"
    assert "no GPU on n1" in cluster.output(job) and "SBATCH_GPUS_PER_NODE" in cluster.output(job)
