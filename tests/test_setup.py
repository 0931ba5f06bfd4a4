"""Set-up script: a second run does nothing, and packages that it may not install are a clear error."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, environment, run
from tests.support.slurm_cluster import find_program

pytestmark = pytest.mark.multi_process


def test_a_second_run_does_nothing() -> None:
    """`make test` has run it once; its stamp says that nothing has changed since."""
    before = {path: path.stat().st_mtime_ns for path in (REPOSITORY / ".venv").glob(".setup-*")}
    done = run(["bash", "scripts/setup.sh"], 30)
    assert (done.status, done.stdout, done.stderr) == (0, "", "")
    assert len(before) == 1 and all(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.fixture
def bare_machine(tmp_path: Path) -> Path:
    """A clone on a machine without a compiler, without FFCV's libraries and without root."""
    clone, tools = tmp_path / "clone", tmp_path / "bin"
    (clone / "scripts").mkdir(parents=True)
    tools.mkdir()
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        shutil.copy(REPOSITORY / name, clone / name)
    for name in ("bash", "cat", "cut", "dirname", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name) or name)
    (tools / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    (tools / "id").write_text("#!/bin/sh\necho 1000\n")
    (tools / "id").chmod(0o755)
    return clone


def test_missing_packages_are_named_where_they_cannot_be_installed(bare_machine: Path) -> None:
    done = run(
        ["bash", bare_machine / "scripts/setup.sh"], 30, environment() | {"PATH": str(bare_machine.parent / "bin")}
    )
    assert done.status == 1
    for package in ("g++", "pkg-config", "libopencv-dev", "libturbojpeg0-dev"):
        assert package in done.stderr
    assert "apt-get install" in done.stderr and "conda install -c conda-forge" in done.stderr
    assert not (bare_machine / ".venv").exists()


def test_an_interpreter_that_does_not_fit_is_refused(bare_machine: Path) -> None:
    path = {"PATH": str(bare_machine.parent / "bin"), "PYTHON": "/bin/false"}
    done = run(["bash", bare_machine / "scripts/setup.sh"], 30, environment() | path)
    assert done.status == 1 and "PYTHON=/bin/false is not a Python 3.10 to 3.12" in done.stderr


def _script(path: Path, *lines: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def root_machine(bare_machine: Path) -> Path:
    """The clone on a machine with everything but Slurm, with root; nothing is really installed."""
    tools = bare_machine.parent / "bin"
    for name in ("g++", "pkg-config", "jpegtran"):
        _script(tools / name)
    for name in ("mkdir", "rm", "touch"):
        (tools / name).symlink_to(shutil.which(name) or name)
    _script(tools / "id", "echo 0")
    _script(tools / "apt-get", f'echo "$@" >> {bare_machine}/asked', "exit ${APT_STATUS:-0}")
    (bare_machine / ".venv" / "bin").mkdir(parents=True)
    _script(bare_machine / ".venv" / "bin" / "python")
    return bare_machine


def test_slurm_is_installed_for_tests_only(root_machine: Path) -> None:
    done = run(
        ["bash", root_machine / "scripts/setup.sh"], 30, environment() | {"PATH": str(root_machine.parent / "bin")}
    )
    assert done.status == 0 and "setup: ready" in done.stdout, done.stderr
    assert not (root_machine / "asked").exists()
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("test", "test-all"):
        assert re.search(rf"^{target}:.* slurm$", makefile, re.M)


@pytest.mark.parametrize("status", ["0", "100"])
def test_jpegtran_is_installed_if_it_can_be(status: str, root_machine: Path) -> None:
    (root_machine.parent / "bin" / "jpegtran").unlink()
    path = {"PATH": str(root_machine.parent / "bin"), "APT_STATUS": status}
    done = run(["bash", root_machine / "scripts/setup.sh"], 30, environment() | path)
    assert done.status == 0 and "setup: ready" in done.stdout, done.stderr
    assert "libjpeg-turbo-progs" in (root_machine / "asked").read_text()
    assert ("jpegtran is not installed" in done.stdout) == (status != "0")


@pytest.mark.parametrize("status", ["0", "100"])
def test_slurm_is_installed_if_it_can_be(status: str, root_machine: Path) -> None:
    path = {"PATH": str(root_machine.parent / "bin"), "APT_STATUS": status}
    done = run(["bash", root_machine / "scripts/setup.sh", "--slurm"], 30, environment() | path)
    assert done.status == 0 and "setup: ready" not in done.stdout, done.stderr
    asked = (root_machine / "asked").read_text().splitlines()
    assert asked == ["update -qq", "install -y -qq --no-install-recommends slurm-wlm munge"]
    assert ("tests/slurm will be skipped" in done.stdout) == (status != "0")


def test_a_machine_with_slurm_is_left_alone(root_machine: Path) -> None:
    _script(root_machine.parent / "bin" / "sbatch")
    path = {"PATH": str(root_machine.parent / "bin")}
    done = run(["bash", root_machine / "scripts/setup.sh", "--slurm"], 30, environment() | path)
    assert done.status == 0 and not (root_machine / "asked").exists(), done.stderr


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("apt-get"), reason="only root may install Slurm")
def test_the_tests_of_slurm_are_not_skipped_here() -> None:
    assert find_program("sbatch"), "make slurm should have installed slurm-wlm and munge; see what it printed"
