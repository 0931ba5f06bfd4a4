"""Train one stage of a recipe, or evaluate what was fine-tuned.

deepspeed train.py --ds_config ds_configs/NAME.json [--stage finetune|evaluate] [key.path=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mrmae_ds.distributed.launch import Launch, prepare_environment
from mrmae_ds.distributed.logs import configure_logging

if TYPE_CHECKING:
    from mrmae_ds.training.job import TrainArgs


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; also takes what the deepspeed launcher adds."""
    from mrmae_ds.config.stages import StageName

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", type=Path, required=True, help="engine config, ds_configs/NAME.json")
    parser.add_argument(
        "--recipe", type=Path, help="recipe; default: the YAML of the same name beside the engine config"
    )
    parser.add_argument("--stage", choices=get_args(StageName), default="pretrain")
    parser.add_argument("--run", type=Path, help="folder of the run; default: runs/NAME")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="run two real steps, print time and memory, write nothing"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and engine config")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; the environment says it too
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="recipe values to replace")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 for a failure, 2 for bad input, 75 if a signal stopped it after a save."""
    launch, started = None, False
    try:
        # Before the command line is read: the names of the stages come with torch, which reads the environment.
        launch = prepare_environment()
        configure_logging(launch)
        args = parse_arguments(argv)
        from mrmae_ds.config.engine import validate_sections
        from mrmae_ds.training.job import TrainArgs, load_configs

        options = TrainArgs(
            ds_config=args.ds_config,
            stage=args.stage,
            recipe=args.recipe,
            run=args.run,
            resume=args.resume,
            overrides=tuple(args.overrides),
            dry_run=args.dry_run,
        )
        if args.print_config:
            recipe, engine_config = load_configs(options)
            validate_sections(engine_config)
            if launch.rank == 0:
                print(f"# recipe {recipe.hash(args.stage)}\n{recipe.to_yaml()}\n# engine config {args.ds_config}")
                print(json.dumps(engine_config.as_written(), indent=2))
            return 0
        prepare = _prepared_evaluation if args.stage == "evaluate" else _prepared_training
        work = prepare(options, launch)
        started = True
        work()
        return 0
    except Exception as error:
        from mrmae_ds.distributed.exit_status import report_exit

        return report_exit(error, launch, started)


def _prepared_training(options: TrainArgs, launch: Launch) -> Callable[[], None]:
    from mrmae_ds.training.job import prepare_stage

    job = prepare_stage(options, launch)
    from mrmae_ds.training.run import dry_run, run_stage

    return partial(dry_run if options.dry_run else run_stage, job)


def _prepared_evaluation(options: TrainArgs, launch: Launch) -> Callable[[], None]:
    from mrmae_ds.training.evaluation.evaluate import prepare_evaluation, run_evaluation

    return partial(run_evaluation, prepare_evaluation(options, launch))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave at once: a library's thread that outlives the interpreter's end can abort a process whose work is done,
    # and a finished job would count as failed.
    os._exit(status)
