"""Record the golden loss curves: ``python -m tests.golden.record [FOLDER]``, by default into ``tests/golden/losses``.

Trains every run of :data:`RUNS` in a temporary folder and writes ``NAME.json`` for each: every logged loss, learning
rate and gradient norm of every step, the results, and a hash of the final weights. ``data.json`` has the hashes of the
data, and ``made_by.json`` names the versions and the processor. ``--unpinned`` leaves the choice of kernels to the
processor, to see whether it matters; ``--only`` names runs, in an order in which each finds what it starts from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.files import file_sha256
from tests.support import processes, ranks
from tests.support.pinned import PINNED, made_by, results, weights_sha256
from tests.support.sample_data import write_crops_beton
from tests.support.small_runs import curve

HERE = Path(__file__).resolve().parent
LOSSES = HERE / "losses"
MADE_BY = "made_by.json"
STEPS, BATCH, EPOCHS = 20, 16, 2
VALIDATION = 43  # does not divide among ranks and micro-batches


@dataclass(frozen=True)
class GoldenRun:
    """A stage to record.

    Attributes:
        recipe: file in this folder. run: folder of the run. stage: of it. ranks: of the job.
        engine: sections to add to ``engine.json``.
    """

    recipe: str
    run: str
    stage: str = "pretrain"
    ranks: int = 2
    engine: str = "engine"

    def arguments(self, folder: Path) -> list[str | Path]:
        """The command line of train.py."""
        command = ["--ds_config", folder / f"{self.engine}.json", "--recipe", HERE / self.recipe]
        command += ["--stage", self.stage, "--run", folder / self.run]
        command += [f"data.train={folder / 'train.beton'}", f"data.val={folder / 'val.beton'}"]
        return command if self.recipe == "mae.yaml" else [*command, f"teachers.mae.source={folder / 'mae/pretrain'}"]


# In an order in which each finds the weights that it starts from.
RUNS = {
    "pretrain_mae": GoldenRun("mae.yaml", "mae"),
    "pretrain_mrmae": GoldenRun("mrmae.yaml", "mrmae"),
    "pretrain_mrmae_bf16": GoldenRun("mrmae.yaml", "mrmae_bf16", engine="autocast"),
    "finetune": GoldenRun("mrmae.yaml", "mrmae", "finetune"),
    "probe": GoldenRun("mrmae.yaml", "mrmae", "probe"),
    "evaluate": GoldenRun("mrmae.yaml", "mrmae", "evaluate"),
}


def record(out: Path, only: list[str]) -> None:
    """Train, and write the files; in an environment that already holds :data:`tests.support.pinned.PINNED`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_crops_beton(folder, train=STEPS * BATCH // EPOCHS, val=VALIDATION)
        _write(out / "data.json", {path.stem: file_sha256(path) for path in data})
        engine = json.loads((HERE / "engine.json").read_text())
        (folder / "engine.json").write_text(json.dumps(engine))
        autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        (folder / "autocast.json").write_text(json.dumps(engine | autocast))
        for key in only or RUNS:
            golden = RUNS[key]
            started = ranks.start(golden.ranks, golden.arguments(folder), folder / "logs" / key)
            if any(started.wait()):
                raise SystemExit(f"{key} failed:\n{started.text()}")
            _write(out / f"{key}.json", describe(folder / golden.run / golden.stage))
    _write(out / MADE_BY, made_by())


def describe(stage: Path) -> dict[str, object]:
    """Everything of a finished stage that must not change."""
    weights = stage / "model.safetensors"
    trained = {"lines": curve(stage), "weights_sha256": weights_sha256(weights)} if weights.exists() else {}
    return {**trained, "results": results(stage)}


def _write(path: Path, content: dict[str, object]) -> None:
    """JSON with a logged step a line; floats are written so that reading gives the same bits."""
    lines = content.pop("lines", None)
    text = json.dumps(content, indent=1)
    if lines is not None:
        steps = ",\n  ".join(json.dumps(line) for line in lines)  # type: ignore[attr-defined]
        text = '{\n "lines": [\n  ' + steps + "\n ],\n" + text.removeprefix("{\n")
    path.write_text(text + "\n")


def main() -> int:
    """Parse the command line and record, in a process of its own whose kernels are pinned from the start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=LOSSES)
    parser.add_argument("--unpinned", action="store_true", help="let the processor choose the kernels")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[], help="these runs")
    args = parser.parse_args()
    pins = {} if args.unpinned else PINNED
    if any(os.environ.get(name) != value for name, value in pins.items()):
        command = [sys.executable, "-m", "tests.golden.record", *sys.argv[1:]]
        os.execve(sys.executable, command, processes.environment(**pins))
    record(args.folder, args.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
