"""slurm/train.sbatch in a container: mounts, restarts and errors, with fake srun, scontrol and apptainer.

Neither Slurm, pyxis nor apptainer is needed: the fakes record their options and run what follows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, Finished, environment, run

pytestmark = pytest.mark.multi_process

PYTHON = "/opt/mrmae/.venv/bin/python"
# Inside the fake containers, the image's Python is PYTHON_STUB.
PROGRAMS = {
    "srun": """
[ "$1" != --help ] || { echo "$SRUN_HELP"; exit 0; }
echo "srun $*" >> ROOM/log
[[ "$*" != *--container-image=* ]] || inside=pyxis
while [[ $1 == --* ]]; do shift; done
words=("$@")
python=IMAGE_PYTHON stub=ROOM/bin/stub
[ -z "$inside" ] || words=("${words[@]/#$python/$stub}")
SLURM_PROCID=0 INSIDE=$inside exec "${words[@]}"
""",
    "apptainer": """
echo "apptainer $*" >> ROOM/log
until [[ $1 == *.sif ]]; do shift; done
words=("${@:2}") python=IMAGE_PYTHON stub=ROOM/bin/stub
INSIDE=apptainer exec "${words[@]/#$python/$stub}"
""",
    "stub": """
echo "$INSIDE: $*" >> ROOM/log
case "$1 $2" in
    "slurm/restarts.py start") echo mrmae-status-prefix=ROOM/runs/slurm/pretrain ;;
    "-u train.py") exit "$STATUS" ;;
esac
""",
    "scontrol": """
case "$1 $2" in
    "show node") echo NodeAddr=127.0.0.1 ;;
    "show hostnames") echo n1 ;;
    "show job") echo Requeue=1 ;;
    requeue*) echo "scontrol $*" >> ROOM/log ;;
esac
""",
    "sleep": "",
}


@dataclass(frozen=True)
class Site:
    """A clone whose data and runs are links to other file systems, on a cluster of one node without GPUs."""

    room: Path

    @property
    def clone(self) -> Path:
        """Return the repository's folder."""
        return self.room / "clone"

    def train(self, *arguments: str, settings: str = "", **variables: str) -> Finished:
        """Run the batch script with ``settings`` as site.sh."""
        (self.room / "site.sh").write_text(f"export DS_ACCELERATOR=cpu\n{settings}\n")
        slurm = {
            **{"SLURM_SUBMIT_DIR": str(self.clone), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"},
            **{"SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"},
            **{"MRMAE_SITE": str(self.room / "site.sh"), "STATUS": "0", "SRUN_HELP": "--container-image=PATH"},
        }
        env = environment(**(slurm | variables))
        env["PATH"] = f"{self.room / 'bin'}:{env['PATH']}"
        return run(["bash", "slurm/train.sbatch", "ds_configs/tiny.json", *arguments], 60, env, self.clone)

    def log(self) -> list[str]:
        """Return the recorded lines."""
        path = self.room / "log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def site(tmp_path: Path) -> Site:
    for name in ("bin", "clone/datasets", "data/imagenet", "scratch"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("slurm", "ds_configs"):
        (tmp_path / "clone" / name).symlink_to(REPOSITORY / name)
    (tmp_path / "clone/datasets/imagenet").symlink_to(tmp_path / "data/imagenet")
    (tmp_path / "clone/runs").symlink_to(tmp_path / "scratch")
    for name in ("mrmae.sif", "mrmae.sqsh"):
        (tmp_path / name).touch()
    for name, text in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text("#!/bin/bash" + text.replace("ROOM", str(tmp_path)).replace("IMAGE_PYTHON", PYTHON))
        program.chmod(0o755)
    return Site(tmp_path)


@pytest.mark.parametrize("kind", ["sif", "sqsh"])
def test_every_step_runs_in_the_container_before_and_after_a_requeue(kind: str, site: Site) -> None:
    """The start is stopped after a checkpoint (75): record, ranks and the check of the requeue run in the container."""
    done = site.train(settings=f"IMAGE={site.room}/mrmae.{kind} MOUNTS=(/extra)", STATUS="75")
    log = site.log()
    runtime = "apptainer" if kind == "sif" else "pyxis"
    inside = [line for line in log if line.startswith(f"{runtime}: ")]
    assert [line.split(": ")[1].split(" --")[0] for line in inside] == [
        "slurm/restarts.py start",
        "-u train.py",
        "slurm/restarts.py requeue",
    ]
    assert log[-1] == "scontrol requeue 7", done.stderr
    mounts = [site.clone, "/extra", site.room / "data/imagenet", site.room / "scratch"]
    if kind == "sif":
        binds = " ".join(f"--bind={path}" for path in mounts)
        expected = f"apptainer exec --nv --pwd {site.clone} {binds} {site.room}/mrmae.sif {PYTHON} "
        steps = [line for line in log if line.startswith("apptainer exec")]
    else:
        pairs = ",".join(f"{path}:{path}" for path in mounts)
        expected = (
            f"--container-image={site.room}/mrmae.sqsh --container-mounts={pairs} --container-workdir={site.clone} "
        )
        steps = [line for line in log if line.startswith("srun ")]
    assert len(steps) == 3 and all(expected in line for line in steps)


def test_the_submitting_shell_chooses_the_image(site: Site) -> None:
    (site.room / "weights").mkdir()
    settings = f"IMAGE=/images/other.sif\nexport HF_HOME={site.room}/weights"
    done = site.train(settings=settings, MRMAE_IMAGE="registry.site#lab/mrmae:1")
    assert done.status == 0, done.stderr
    steps = [line for line in site.log() if line.startswith("srun ")]
    assert len(steps) == 2 and all("--container-image=registry.site#lab/mrmae:1 " in line for line in steps)
    assert all(f",{site.room}/weights:{site.room}/weights " in line for line in steps)


def test_no_image_means_no_container(site: Site) -> None:
    done = site.train(f"--run={site.room}/anywhere", settings=f"PYTHON={site.room}/bin/stub")
    assert done.status == 0 and not any("container" in line for line in site.log()), done.stderr


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((), "IMAGE=/nowhere/mrmae.sif", "/nowhere/mrmae.sif: no such file"),
        ((), "IMAGE=lab/mrmae SRUN_HELP=none", "srun has no --container-image (pyxis) here"),
        (
            ("--run", "/elsewhere/run"),
            "IMAGE=lab/mrmae",
            "/elsewhere/run is not in the container: add its folder to MOUNTS",
        ),
        (("data.train=/elsewhere/a.beton",), "IMAGE=lab/mrmae", "/elsewhere/a.beton is not in the container"),
        ((), "IMAGE=lab/mrmae CACHE_DIR=/local/$USER", "/local/"),
    ],
    ids=["no image", "no pyxis", "run", "data", "cache"],
)
def test_errors_end_the_job_before_anything_starts(
    arguments: tuple[str, ...], settings: str, message: str, site: Site
) -> None:
    done = site.train(*arguments, settings=settings.replace("SRUN_HELP=none", "; export SRUN_HELP=none"))
    assert done.status == 2 and message in done.stderr and site.log() == []


@pytest.mark.parametrize("path", ["/dev/shm/cache", "/extra/run", "runs/new"])
def test_mounted_paths_are_accepted(path: str, site: Site) -> None:
    done = site.train(f"loader.cache_dir={path}", settings="IMAGE=lab/mrmae MOUNTS=(/extra)")
    assert done.status == 0, done.stderr
