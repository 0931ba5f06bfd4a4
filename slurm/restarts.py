"""Record and check the starts of a Slurm job; called by slurm/train.sbatch.

python slurm/restarts.py start --job ID --restarts N --max-restarts N -- train.py's arguments
python slurm/restarts.py requeue --job ID --restarts N --max-restarts N --status-prefix PREFIX [--node-lost]

``start`` prints mrmae-status-prefix=PREFIX and, if this start must resume the job's earlier one, mrmae-resume=auto.
``requeue`` checks that the job may be started again. Both exit with status 2 and the reason on stderr if the job must
end. See mrmae_ds/pipeline/slurm_restarts.py.
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
    """Run a subcommand and return the exit status: 0, or 2 if the job must end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "requeue"))
    parser.add_argument("--job", required=True, help="Slurm's id of the job")
    parser.add_argument("--restarts", type=int, required=True, help="number of restarts so far")
    parser.add_argument("--max-restarts", type=int, required=True, help="largest number of restarts")
    parser.add_argument("--node-lost", action="store_true", help="the job ended because a node failed")
    parser.add_argument("--status-prefix", type=Path, help="path prefix that `start` printed")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    try:
        if args.action == "start":
            _start(argv[split + 1 :], args)
        else:
            from mrmae_ds.pipeline.slurm_restarts import check_requeue, stage_dir_of

            stage_dir = stage_dir_of(args.status_prefix)
            check_requeue(stage_dir, args.job, args.restarts, args.max_restarts, node_lost=args.node_lost)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _start(train_arguments: list[str], args: argparse.Namespace) -> None:
    from mrmae_ds.cli.train import parse_arguments
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.pipeline.slurm_restarts import record_start, resume_option, status_prefix
    from mrmae_ds.training.job import TrainArgs

    train = parse_arguments(train_arguments)
    options = TrainArgs(train.ds_config, train.stage, train.recipe, train.run)
    stage_dir = options.stage_dir(load_recipe(options.recipe_path, train.overrides))
    if not train.dry_run:
        _check_alone(stage_dir, args.job)
        start = record_start(stage_dir, args.job, args.restarts, args.max_restarts, REPOSITORY)
        message = f"start {args.restarts + 1} of job {args.job}, newest checkpoint at step {start.step}"
        print(f"{stage_dir}: {message}, code {start.commit}", file=sys.stderr)
    print(f"mrmae-status-prefix={status_prefix(stage_dir)}")
    if resume := resume_option(stage_dir, args.job, args.restarts):
        print(f"mrmae-resume={resume}")


def _check_alone(stage_dir: Path, job: str) -> None:
    """Raise UserError if another job is training in this folder: two would overwrite each other's files."""
    from mrmae_ds.pipeline.slurm_restarts import read_starts

    others = {start.job for start in read_starts(stage_dir)} - {job}
    if not others or not shutil.which("squeue"):
        return
    command = ["squeue", "--noheader", "--me", "--states=RUNNING", "--format=%A"]
    running = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    if conflicts := sorted(others & set(running)):
        raise UserError(f"{stage_dir}: job {conflicts[0]} is training here; wait for it, or pass another --run")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
