"""Starts and restarts of a run, asked by slurm/train.sbatch; see mrmae_ds/pipeline/slurm_restarts.py.

python slurm/starts.py begin --job ID --restarts N --max-restarts N -- train.py's arguments
python slurm/starts.py again --job ID --restarts N --max-restarts N --notes NOTES [--node-lost]

The first prints mrmae-notes=NOTES and, if the start must go on with what an earlier one has begun, mrmae-resume=auto.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mrmae_ds.errors import UserError  # noqa: E402


def main(argv: list[str]) -> int:
    """Print the answer; the exit status: 0, or 2 with the reason why the job must end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("begin", "again"))
    parser.add_argument("--job", required=True)
    parser.add_argument("--restarts", type=int, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--node-lost", action="store_true", help="it ended because of a node, not by itself")
    parser.add_argument("--notes", type=Path, help="how the names of the stage's notes begin")
    split = argv.index("--") if "--" in argv else len(argv)
    asked = parser.parse_args(argv[:split])
    try:
        if asked.question == "begin":
            _begin(argv[split + 1 :], asked)
        else:
            from mrmae_ds.pipeline.slurm_restarts import check_another, stage_of

            stage_dir = stage_of(asked.notes)
            check_another(stage_dir, asked.job, asked.restarts, asked.max_restarts, node_lost=asked.node_lost)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _begin(arguments: list[str], asked: argparse.Namespace) -> None:
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.pipeline.slurm_restarts import begin_start, notes_of, resume_option
    from mrmae_ds.training.job import TrainArgs
    from train import parse_arguments

    args = parse_arguments(arguments)
    options = TrainArgs(args.ds_config, args.stage, args.recipe, args.run)
    stage_dir = options.stage_dir(load_recipe(options.recipe_path, args.overrides))
    if not args.dry_run:
        _check_alone(stage_dir, asked.job)
        start = begin_start(stage_dir, asked.job, asked.restarts, asked.max_restarts, REPOSITORY)
        told = f"start {asked.restarts + 1} of job {asked.job}, newest checkpoint at step {start.step}"
        print(f"{stage_dir}: {told}, code {start.commit}", file=sys.stderr)
    print(f"mrmae-notes={notes_of(stage_dir)}")
    if resume := resume_option(stage_dir, asked.job, asked.restarts):
        print(f"mrmae-resume={resume}")


def _check_alone(stage_dir: Path, job: str) -> None:
    """Raise UserError if another job trains in this folder: two would write over each other."""
    from mrmae_ds.pipeline.slurm_restarts import read_starts

    others = {start.job for start in read_starts(stage_dir)} - {job}
    if not others or not shutil.which("squeue"):
        return
    asked = ["squeue", "--noheader", "--me", "--states=RUNNING", "--format=%A"]
    running = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.split()
    if both := sorted(others & set(running)):
        raise UserError(f"{stage_dir}: job {both[0]} is at work in it; wait for it, or give this one another --run")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
