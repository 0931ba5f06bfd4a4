"""What slurm/train.sbatch asks about the run that it is to start, or to start again; mrmae_ds/training/restarts.py.

python slurm/starts.py begin --job ID --restarts N --max-restarts N -- train.py's arguments
python slurm/starts.py again --job ID --restarts N --max-restarts N --notes NOTES [--node-lost]

NOTES is the first line of the first one's answer; the second line is what --resume must be in this start, if anything.
"""

from __future__ import annotations

import argparse
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
            _begin(_stage_dir(argv[split + 1 :]), asked)
        else:
            from mrmae_ds.training.restarts import check_another, stage_of

            stage_dir = stage_of(asked.notes)
            check_another(stage_dir, asked.job, asked.restarts, asked.max_restarts, node_lost=asked.node_lost)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _stage_dir(arguments: list[str]) -> Path:
    from mrmae_ds.recipe import load_recipe
    from mrmae_ds.training.job import Options
    from train import parse_arguments

    args = parse_arguments(arguments)
    options = Options(args.ds_config, args.stage, args.recipe, args.run)
    return options.stage_dir(load_recipe(options.recipe_path, args.overrides))


def _begin(stage_dir: Path, asked: argparse.Namespace) -> None:
    from mrmae_ds.training.restarts import begin_start, notes_of, resume_option

    start = begin_start(stage_dir, asked.job, asked.restarts, asked.max_restarts, REPOSITORY)
    print(
        f"{stage_dir}: start {asked.restarts + 1} of job {asked.job}, newest checkpoint at step {start.step}, "
        f"code {start.commit}",
        file=sys.stderr,
    )
    print(notes_of(stage_dir))
    print(resume_option(stage_dir, asked.job, asked.restarts) or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
