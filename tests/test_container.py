"""Dockerfile and `make image`: agreement with setup.sh, constraints.txt and slurm/train.sbatch. No image is built."""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, environment, run

# Python of the base image's distribution.
PYTHON_OF = {"ubuntu22.04": (3, 10), "ubuntu24.04": (3, 12)}
SETUP = (REPOSITORY / "scripts/setup.sh").read_text()
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, in order."""
    text = re.sub(r"\\\n\s*", "", (REPOSITORY / "Dockerfile").read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in lines]


def _values(instructions: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in instructions if name == word]


def test_base_has_the_pinned_cuda_and_a_supported_python(instructions: list[tuple[str, str]]) -> None:
    """torch's wheels bring their own CUDA; the base image's compatibility libraries must be of the same one."""
    base = re.fullmatch(r"BASE=nvidia/cuda:(\d+\.\d+\.\d+)-base-(ubuntu\d+\.\d+)", _values(instructions, "ARG")[0])
    assert base, "the base image is pinned by a full tag"
    assert f"\ncuda-toolkit=={base[1]}." in CONSTRAINTS
    python = PYTHON_OF[base[2]]
    oldest, newest = re.search(r"\(3, (\d+)\) <= sys.version_info\[:2\] <= \(3, (\d+)\)", SETUP).groups()
    assert (3, int(oldest)) <= python <= (3, int(newest))
    assert f"for Python 3.{oldest} to 3.{newest}" in CONSTRAINTS
    assert f'requires-python = ">=3.{oldest},<3.{int(newest) + 1}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_all_packages_come_from_the_set_up_script(instructions: list[tuple[str, str]]) -> None:
    commands = " ".join(_values(instructions, "RUN"))
    assert not re.search(r"apt-get|apt |pip3? install|conda|curl|wget", commands)
    options = re.findall(r"scripts/setup\.sh (--\S+)", commands)
    assert options == ["--system", "--no-dev"]
    assert all(f"    {option})" in SETUP for option in options)
    assert "-c constraints.txt" in SETUP and not re.search(r"[a-z]==[0-9]", SETUP)
    extras = re.search(r'-e "\.\[([a-z,]+)\$\{dev:\+,([a-z,]+)\}\]"', SETUP)
    declared = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text().split("optional-dep")[1], re.M)
    assert extras and {*extras[1].split(","), *extras[2].split(",")} <= set(declared)


def test_copied_files_exist_and_are_not_ignored(instructions: list[tuple[str, str]]) -> None:
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    for words in _values(instructions, "COPY"):
        for source in [word for word in words.split() if not word.startswith("--")][:-1]:
            assert (REPOSITORY / source).exists(), source
            assert not any(fnmatch(source, pattern.removeprefix("**/")) for pattern in ignored), source
    assert {".git", ".venv", "runs", "datasets", "slurm/site.sh"} <= set(ignored)


def test_image_runs_as_a_user_where_slurm_expects_it(instructions: list[tuple[str, str]]) -> None:
    users = _values(instructions, "USER")
    assert users and users[-1].isdigit() and users[-1] != "0"
    folder = _values(instructions, "WORKDIR")[0]
    assert f"PATH={folder}/.venv/bin:$PATH" in _values(instructions, "ENV")
    assert f"PYTHON={folder}/.venv/bin/python" in (REPOSITORY / "slurm/train.sbatch").read_text()


@pytest.mark.parametrize("engine", ["docker", "podman", None])
def test_make_image_uses_the_engine_that_exists(engine: str | None, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("make", "bash"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    if engine:
        (tmp_path / engine).write_text('#!/bin/bash\necho "${0##*/} $*"\n')
        (tmp_path / engine).chmod(0o755)
    shell = f"SHELL={tmp_path}/bash"
    done = run(["make", shell, "image", "IMAGE=lab/x", "BASE=b"], 30, environment() | {"PATH": str(tmp_path)})
    if engine:
        assert done.status == 0 and f"{engine} build --tag lab/x --build-arg BASE=b ." in done.stdout, done.stderr
    else:
        assert done.status != 0 and "neither docker nor podman is on the PATH" in done.stderr
