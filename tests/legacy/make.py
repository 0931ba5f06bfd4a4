"""Make the legacy runs: ``python -m tests.legacy.make REPOSITORY``, a clean clone at the commit that is to make them.

Trains with the clone's own train.py, in a temporary folder as a user would have it (``recipes/``, ``datasets/``,
``runs/``), and writes ``legacy.tar.xz``, ``table/``, ``uninterrupted.json`` and ``made_by.json`` beside this file.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from mrmae_ds.files import file_sha256
from tests.support.pinned import PINNED, made_by, weights_sha256
from tests.support.processes import environment, finish, rank_processes, run
from tests.support.sample_data import write_crops_beton
from tests.support.small_runs import curve

HERE = Path(__file__).resolve().parent
TRAIN, VAL = 48, 21
# Folders and files that neither a table, a resumed run nor a replay needs.
DROPPED = ("tensorboard", "pictures", "loss_curves.png")


def train(code: Path, folder: Path, recipe: str, name: str, stage: str = "pretrain", fault: str = "") -> None:
    """Run one stage of ``recipes/RECIPE.yaml`` in ``runs/NAME`` on two ranks; a fault may end it."""
    program = [str(code / "tests/faults.py"), fault, "--"] if fault else [str(code / "train.py")]
    command = ["--ds_config", "recipes/mrmae.json", "--recipe", f"recipes/{recipe}.yaml", "--run", f"runs/{name}"]
    done = finish(rank_processes(2, *command, "--stage", stage, program=program, cwd=folder), 240)
    if not fault.startswith("error") and any(rank.status for rank in done):
        raise SystemExit(f"{name} {stage}: {[rank.status for rank in done]}\n{done[0].stderr}")


def make(code: Path, folder: Path) -> None:
    """All runs, tables and the archive."""
    shutil.copytree(HERE / "recipes", folder / "recipes")
    (folder / "datasets").mkdir()
    data = write_crops_beton(folder / "datasets", TRAIN, VAL)
    train(code, folder, "mae", "mae")
    for stage in ("pretrain", "finetune", "probe", "evaluate"):
        train(code, folder, "mrmae", "mrmae", stage)
    train(code, folder, "mrmae", "interrupted", fault="error:step=8")
    train(code, folder, "mrmae", "skipped", fault="nan_loss:step=4")
    shutil.copytree(folder / "runs/interrupted", folder / "whole/interrupted")
    shutil.rmtree(folder / "whole/interrupted/pretrain")
    train(code, folder, "mrmae", "../whole/interrupted")
    stage = folder / "whole/interrupted/pretrain"
    whole = {"lines": curve(stage), "weights_sha256": weights_sha256(stage / "model.safetensors")}
    (HERE / "uninterrupted.json").write_text(json.dumps(whole, indent=1) + "\n")
    shutil.rmtree(HERE / "table", ignore_errors=True)
    for number in (None, 3):
        paper = [] if number is None else ["--paper", str(number)]
        main = "import sys; from mrmae_ds.cli import main; sys.exit(main())"
        done = run([sys.executable, "-c", main, "table", "runs", "--out", "table", *paper], 120, cwd=folder)
        if done.status:
            raise SystemExit(done.stderr)
    (HERE / "table").mkdir()
    for path in sorted((folder / "table").glob("*")):
        if path.suffix in (".md", ".csv"):
            shutil.copy(path, HERE / "table")
    made = made_by() | {"data": {path.stem: file_sha256(path) for path in data}}
    (HERE / "made_by.json").write_text(json.dumps(made, indent=1) + "\n")
    _pack(folder)


def unpack_runs(folder: Path) -> None:
    """Unpack the runs and the recipes into ``folder``, as their user left them."""
    # Not tarfile's extractall(filter=...), which Python 3.11.2 of Debian 12 lacks.
    shutil.unpack_archive(HERE / "legacy.tar.xz", folder)
    shutil.copytree(HERE / "recipes", folder / "recipes")


def _pack(folder: Path) -> None:
    """Archive ``runs/``, without what is easily made again, and of the checkpoints those of the interrupted run."""

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(entry.name).parts
        finished = "checkpoints" in parts and "interrupted" not in parts
        hidden = any(part.startswith(".") for part in parts)
        if finished or hidden or any(part in DROPPED for part in parts):
            return None
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(HERE / "legacy.tar.xz", "w:xz", preset=9) as archive:
        archive.add(folder / "runs", "runs", filter=kept)


if __name__ == "__main__":
    repository = Path(sys.argv[1]).resolve()
    os.environ.update(environment(**PINNED) | {"PYTHONPATH": str(repository)})
    with tempfile.TemporaryDirectory() as temporary:
        make(repository, Path(temporary))
