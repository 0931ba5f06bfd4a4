"""``mrmae train`` and ``train.py``: training of one stage of a recipe, or evaluation of fine-tuned models."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mrmae_ds.cli.parser import CommandParser, add_recipe_options, path_argument
from mrmae_ds.distributed.launch import Launch, prepare_environment
from mrmae_ds.distributed.logs import configure_logging
from mrmae_ds.distributed.signals import end_at_interrupt

if TYPE_CHECKING:
    from mrmae_ds.config.engine import EngineConfig
    from mrmae_ds.config.recipe import Recipe
    from mrmae_ds.config.stages import StageName
    from mrmae_ds.training.job import TrainArgs

SUMMARY = "train one stage of a recipe, or evaluate a fine-tuned model; one rank per process, like train.py"
# Names in config.stages.StageName, which cannot be imported before the environment is prepared: it imports torch.
STAGES = ("pretrain", "finetune", "probe", "detect", "evaluate")


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments, and those that the deepspeed launcher passes."""
    add_recipe_options(parser)
    parser.add_argument("--stage", choices=STAGES, default="pretrain", help="stage to run; default: %(default)s")
    parser.add_argument("--run", type=Path, help="folder of the run; default: runs/NAME")
    parser.add_argument(
        "--resume", type=_resume_argument, default="auto", help="auto (default), never, or a checkpoint folder"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run two real steps, print time and memory, write nothing"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the recipe and the engine config with all defaults"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK has it too
    parser.add_overrides()
    parser.epilog = (
        "Several ranks: deepspeed --num_gpus N train.py ..., or torchrun --nproc_per_node N -- train.py ..., which "
        "also keeps a CUDA_VISIBLE_DEVICES of UUIDs that DeepSpeed's launcher cannot read."
    )


def _resume_argument(text: str) -> str:
    return text if text in ("auto", "never") else str(path_argument(text))


def run(args: argparse.Namespace) -> NoReturn:
    """Train and end the process with the status of :func:`train`."""
    end_process(train(args))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of ``train.py``."""
    parser = CommandParser(description=SUMMARY)
    add_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run ``train.py``; see :func:`train`."""
    return train(parse_arguments(argv))


@end_at_interrupt()
def train(args: argparse.Namespace) -> int:
    """Train or evaluate.

    The environment is prepared before the first import of torch, which reads it.

    Returns:
        The exit status: 0; 1 for a failure; 2 for bad input; 75 if a signal stopped the stage after a checkpoint.
    """
    launch, started = None, False
    try:
        launch = prepare_environment()
        configure_logging(launch)
        with _without("mlflow", "wandb"):
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
            if launch.rank == 0:
                with contextlib.suppress(BrokenPipeError):  # `| head` reads a part
                    _print_configs(recipe, engine_config, args.stage)
            return 0
        with _locked(options, launch):
            run_prepared = _prepare(options, launch)
            started = True
            run_prepared()
        return 0
    except Exception as error:
        from mrmae_ds.distributed.exit_status import report_exit

        return report_exit(error, launch, started)


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Let imports of optional modules fail in a block, unless they are imported already.

    DeepSpeed's autotuner and timm's scripts import trackers: a second of each rank's start, and folders in /tmp.
    """
    absent = dict.fromkeys(name for name in names if name not in sys.modules)
    sys.modules.update(absent)  # type: ignore[arg-type]  # Python's mark of a module that cannot be imported
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _print_configs(recipe: Recipe, engine_config: EngineConfig, stage: StageName) -> None:
    print(f"# recipe {recipe.hash(stage)}\n{recipe.to_yaml()}")
    print(f"# engine config {engine_config.path}\n{json.dumps(engine_config.as_written(), indent=2)}\n")
    print(f"# defaults of the engine config's other keys\n{json.dumps(engine_config.defaults(), indent=2)}")


def end_process(status: int) -> NoReturn:
    """End the process without running the interpreter's shutdown.

    A library's thread that outlives the interpreter can abort a process whose work is done, and a finished job would
    count as failed. The folder of the sockets to worker processes, which the shutdown would remove, is removed here.
    """
    if "multiprocessing.util" in sys.modules:
        with contextlib.suppress(OSError):  # there is none, and none can be created
            shutil.rmtree(sys.modules["multiprocessing.util"].get_temp_dir())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def _locked(args: TrainArgs, launch: Launch) -> AbstractContextManager[None]:
    """Return the lock of the stage's folder, which rank 0 holds; a dry run writes nothing and needs none."""
    if launch.rank or args.dry_run:
        return contextlib.nullcontext()
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.training.checkpoint.run_lock import locked

    return locked(args.stage_dir(load_recipe(args.recipe_path, list(args.overrides))))


def _prepare(args: TrainArgs, launch: Launch) -> Callable[[], None]:
    """Resolve, check and load a stage, before any process group is started; return the function that runs it."""
    if args.stage == "evaluate":
        from mrmae_ds.training.evaluate import prepare_evaluation, run_evaluation
        from mrmae_ds.training.evaluation.job import EvaluationJob
        from mrmae_ds.weights.detectors import detector_of

        job = EvaluationJob.of_args(args, launch)
        first = job.resolve_member(0)
        if (detector := detector_of(first)) is not None:
            from mrmae_ds.training.evaluate_detector import prepare_detector, run_detector

            return partial(run_detector, prepare_detector(job, detector))
        return partial(run_evaluation, prepare_evaluation(job, first))
    from mrmae_ds.training.job import prepare_stage
    from mrmae_ds.training.run import dry_run, run_stage

    return partial(dry_run if args.dry_run else run_stage, prepare_stage(args, launch))
