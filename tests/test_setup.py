"""Set-up script, in copies of a clone: what it installs, what it leaves alone, and packages that it may not install."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, Finished, environment, run
from tests.support.slurm_cluster import find_program

pytestmark = pytest.mark.multi_process


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
    for way in ("apt-get install", "conda install -c conda-forge", "uv", "container"):
        assert way in done.stderr
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
    for name in ("g++", "pkg-config", "jpegtran", "git"):
        _script(tools / name)
    for name in ("mkdir", "rm", "touch"):
        (tools / name).symlink_to(shutil.which(name) or name)
    _script(tools / "id", "echo 0")
    _script(tools / "apt-get", f'echo "$@" >> {bare_machine}/asked', "exit ${APT_STATUS:-0}")
    (bare_machine / ".venv" / "bin").mkdir(parents=True)
    _script(bare_machine / ".venv" / "bin" / "python")
    return bare_machine


def _setup(clone: Path, *arguments: str, **variables: str) -> Finished:
    """Run the clone's script with its tools only."""
    path = {"PATH": str(clone.parent / "bin")}
    return run(["bash", clone / "scripts/setup.sh", *arguments], 30, environment() | path | variables)


def test_a_second_run_does_nothing(root_machine: Path) -> None:
    assert "setup: ready" in _setup(root_machine).stdout
    before = {path: path.stat().st_mtime_ns for path in (root_machine / ".venv").rglob("*")}
    done = _setup(root_machine)
    assert (done.status, done.stdout, done.stderr) == (0, "", "")
    assert before == {path: path.stat().st_mtime_ns for path in (root_machine / ".venv").rglob("*")}
    (root_machine / "constraints.txt").write_text("torch==0.0.1\n")
    assert "setup: ready" in _setup(root_machine).stdout


def test_the_environment_of_another_clone_is_left_alone(root_machine: Path) -> None:
    """A worktree's link: an editable installation would make the other clone import this one's code."""
    python = root_machine / ".venv/bin/python"
    _script(python, f'echo "$@" >> {root_machine}/asked')
    (root_machine / ".venv").rename(root_machine.parent / "shared")
    (root_machine / ".venv").symlink_to(root_machine.parent / "shared")
    done = _setup(root_machine)
    assert (done.status, done.stdout) == (0, "") and ".venv is a link" in done.stderr
    assert not (root_machine / "asked").exists() and not list((root_machine / ".venv/").glob(".setup-*"))


def test_tools_for_development_are_left_out_of_the_image(root_machine: Path) -> None:
    _script(root_machine / ".venv/bin/python", f'echo "$@" >> {root_machine}/asked')
    extras = []
    for arguments in ((), ("--no-dev",)):
        (root_machine / "asked").unlink(missing_ok=True)
        assert "setup: ready" in _setup(root_machine, *arguments).stdout
        extras.append(re.findall(r"-e \.\[(.*)\]", (root_machine / "asked").read_text())[0].split(","))
    assert extras[0] == [*extras[1], "docs", "dev"] and "ffcv" in extras[1]


def test_system_packages_are_a_step_of_their_own(root_machine: Path) -> None:
    """The image's first layer has neither Python nor pyproject.toml."""
    for name in ("python3", "git", "pkg-config"):
        (root_machine.parent / "bin" / name).unlink()
    (root_machine / "pyproject.toml").unlink()
    _script(root_machine.parent / "bin" / "apt-get", f'echo "$@" >> {root_machine}/asked', *_INSTALLS_PYTHON)
    done = _setup(root_machine, "--system")
    assert (done.status, done.stderr) == (0, ""), done.stderr
    asked = (root_machine / "asked").read_text()
    for package in ("pkg-config", "libopencv-dev", "libturbojpeg0-dev", "python3 python3-venv python3-dev", "git"):
        assert package in asked
    assert not list((root_machine / ".venv").glob(".setup-*"))


_INSTALLS_PYTHON = (f'[ -e "${{0%/*}}/python3" ] || /bin/ln -s {sys.base_prefix}/bin/python3 "${{0%/*}}/python3"',)


def test_libraries_are_unpacked_without_root(root_machine: Path) -> None:
    """apt-get may not install, but download; FFCV's flags then name the unpacked libraries, by a relative path."""
    tools = root_machine.parent / "bin"
    for name in ("awk", "basename", "chmod"):
        (tools / name).symlink_to(shutil.which(name) or name)
    _script(tools / "id", "echo 1000")
    (tools / "pkg-config").unlink()
    _script(
        tools / "apt-get",
        'case "$*" in',
        f'    *simulate*) echo "$@" >> {root_machine}/asked; echo "Inst libturbojpeg0 (1.0)" ;;',
        '    *"download libturbojpeg0") echo > libturbojpeg0.deb ;;',
        "    *) exit 100 ;;",
        "esac",
    )
    _script(tools / "dpkg", 'mkdir -p "$3/usr/lib/x86_64-linux-gnu"')
    flags = root_machine / "flags"
    _script(
        root_machine / ".venv/bin/python",
        f'[[ "$*" != *"-m pip install"* ]] || {{ pkg-config --cflags --libs opencv4; echo "$LDFLAGS"; }} > {flags}',
    )
    done = _setup(root_machine)
    assert done.status == 0 and "without root: unpacking pkg-config libopencv-dev libturbojpeg0-dev" in done.stdout
    system = root_machine / ".venv/system"
    assert f"-I{system}/usr/include/opencv4" in flags.read_text()
    assert "-rpath,$ORIGIN/../../../../system/usr/lib/x86_64-linux-gnu:" in flags.read_text()
    assert not list(system.glob("**/*.deb"))


def test_uv_supplies_python_without_root(root_machine: Path) -> None:
    tools = root_machine.parent / "bin"
    shutil.rmtree(root_machine / ".venv")
    (tools / "python3").unlink()
    _script(tools / "own-python", '[[ "$*" != *ensurepip* ]]')
    _script(
        tools / "uv",
        f'echo "$@" >> {root_machine}/asked',
        f'[ "$1 $2" != "python find" ] || echo {tools}/own-python',
        f'[ "$1" != venv ] || {{ mkdir -p .venv/bin; {shutil.which("cp")} {tools}/own-python .venv/bin/python; }}',
    )
    done = _setup(root_machine)
    assert done.status == 0 and "setup: ready" in done.stdout, done.stderr
    asked = (root_machine / "asked").read_text().splitlines()
    assert asked[0] == "python install --quiet 3.11" and f"--python {tools}/own-python .venv" in asked[2]


def test_opencv_without_libgl_is_replaced(root_machine: Path) -> None:
    (root_machine.parent / "bin" / "sed").symlink_to(shutil.which("sed") or "sed")
    python = root_machine / ".venv/bin/python"
    _script(python, f'echo "$@" >> {root_machine}/asked', '[[ "$*" != *"import cv2"* ]]')
    assert "setup: ready" in _setup(root_machine).stdout
    pinned = re.findall(r"^opencv-python==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert f"--force-reinstall --no-deps opencv-python-headless=={pinned[0]}\n" in (root_machine / "asked").read_text()


def test_conda_s_compiler_is_found_by_its_variable(root_machine: Path) -> None:
    (root_machine.parent / "bin" / "g++").rename(root_machine.parent / "bin" / "x86_64-conda-linux-gnu-c++")
    done = _setup(root_machine, CXX="x86_64-conda-linux-gnu-c++ -O2")
    assert done.status == 0 and not (root_machine / "asked").exists(), done.stderr
    assert "g++" not in done.stdout


def test_slurm_is_installed_for_tests_only(root_machine: Path) -> None:
    done = _setup(root_machine)
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
