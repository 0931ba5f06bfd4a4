"""The ``mrmae`` command: what is done around training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mrmae_ds import __version__
from mrmae_ds.cli import replay as replay_console
from mrmae_ds.cli import submit as chain
from mrmae_ds.cli.data import add_data_commands
from mrmae_ds.cli.plan import add_plan_command
from mrmae_ds.distributed.logs import configure_logging
from mrmae_ds.errors import UserError

TABLE_NUMBERS = (1, 3, 4, 5, 6)


def _table(args: argparse.Namespace) -> None:
    from mrmae_ds.tables.markdown import to_markdown
    from mrmae_ds.tables.write import write_table

    for number in args.paper or [None]:
        table, written = write_table(args.runs, args.out or args.runs[0], number)
        print(to_markdown(table))
        print(f"written: {', '.join(map(str, written))}")


def _show(args: argparse.Namespace) -> None:
    from mrmae_ds.figures.visualize import show_runs

    for path in show_runs(args.runs, args.images, count=args.num_images, seed=args.seed, out=args.out):
        print(path)


def _cost(args: argparse.Namespace) -> None:
    from mrmae_ds.profiling.flops_report import describe_cost

    options = {"num_images": args.num_images, "tflops": args.tflops, "gpus": args.gpus}
    given = {name: value for name, value in options.items() if value is not None}
    print(describe_cost(args.ds_config, args.recipe, args.overrides, **given))


def _teachers(args: argparse.Namespace) -> None:
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.figures.teachers import build_teachers, describe_teacher, draw_teachers

    # Changes to the recipe may also follow the images.
    late = [word for word in args.images if "=" in word and not Path(word).exists()]
    images = [word for word in args.images if word not in late]
    recipe = load_recipe(args.recipe, args.overrides + late)
    teachers = build_teachers(recipe)
    print("\n\n".join(describe_teacher(name, recipe.teachers[name], teacher) for name, teacher in teachers.items()))
    if images:
        out = args.out or Path(f"{args.recipe.stem}_teachers.png")
        if told := draw_teachers(recipe, teachers, images, out, seed=args.seed):
            print(told, file=sys.stderr)
        print(f"\n{out}")


def _export(args: argparse.Namespace) -> None:
    from mrmae_ds.weights.export import export_run

    exported = export_run(args.run, args.to, args.out, args.force)
    print("\n".join([f"written: {exported.path}", *exported.notes, "load it with", f"    {exported.line}"]))


def _check(args: argparse.Namespace) -> None:
    from mrmae_ds.cli.inspect import describe

    print(describe(args.path))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="mrmae", description="Around the training of MR-MAE models.")
    parser.add_argument("--version", action="version", version=f"mrmae_ds {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    table = _command(commands, "table", _table, "the paper's tables with ours, from run records")
    table.add_argument("runs", nargs="+", type=Path, help="folders that hold runs, at any depth")
    table.add_argument(
        "--paper",
        type=int,
        choices=TABLE_NUMBERS,
        action="append",
        help="the paper's table; may be given several times. Default: the scaling table, its Table 6, as table.*",
    )
    table.add_argument(
        "--out",
        type=Path,
        help="where table[N].md, .csv, .tex, .png and table[N]_cost.png go; default: the first folder",
    )

    show = _command(commands, "show", _show, "draw where runs look, and what they reconstruct, on the same images")
    show.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished stage, runs/NAME/STAGE")
    show.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="numbers in the first run's validation set, or image files, or folders of them; default: some of the "
        "validation set, evenly spaced",
    )
    show.add_argument(
        "--num-images",
        type=int,
        help="number of images; default: the recipe's logging.num_images",
    )
    show.add_argument("--seed", type=int, default=0, help="of the mask")
    show.add_argument("--out", type=Path, help="folder for the PNG files; default: images/ in the first RUN")

    cost = _command(commands, "cost", _cost, "count a recipe's operations, from its modules alone, and its GPU-hours")
    cost.add_argument("--ds_config", type=Path, required=True, help="engine config; its recipe lies beside it")
    cost.add_argument("--recipe", type=Path, help="another recipe")
    cost.add_argument("--num-images", type=int, help="of the training set; default: ImageNet-1K's 1,281,167")
    cost.add_argument("--tflops", type=float, help="what one GPU sustains, in TFLOP/s; tells GPU-hours")
    cost.add_argument("--gpus", type=int, help="tells hours on so many")
    cost.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")

    add_plan_command(commands)
    _add_teachers(commands)

    chain.add_submit_arguments(_command(commands, "submit", chain.run_submit, chain.SUMMARY))

    export = _command(commands, "export", _export, "a finished run's weights for timm, or whole")
    export.add_argument("run", type=Path, help="a finished stage, runs/NAME/STAGE, or its model.safetensors")
    export.add_argument(
        "--to",
        choices=("timm", "safetensors"),
        default="timm",
        help="timm: a file that timm.create_model loads, of a pre-training the bare encoder; safetensors: everything",
    )
    export.add_argument("--out", type=Path, help="file or folder; default: NAME-STAGE[-timm].safetensors here")
    export.add_argument("--force", action="store_true", help="replace a file that this project did not write")

    check = _command(commands, "check", _check, "what a checkpoint is, whoever wrote it, and how to use it here")
    check.add_argument("path", type=Path, help="a file of weights, a stage's folder, or a checkpoint in it")

    replay = _command(commands, "replay", replay_console.run_replay, replay_console.SUMMARY)
    replay_console.add_replay_arguments(replay)

    data = commands.add_parser("data", help="write and check .beton files")
    add_data_commands(data.add_subparsers(required=True, metavar="COMMAND"))
    return parser


def _add_teachers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    teachers = _command(commands, "teachers", _teachers, "what a recipe's teachers are, and where they look")
    teachers.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    teachers.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    teachers.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="draw these: image files, or folders of them, or numbers in the recipe's validation set",
    )
    teachers.add_argument("--out", type=Path, help="the PNG file; default: RECIPE_teachers.png")
    teachers.add_argument("--seed", type=int, default=0, help="of the mask")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run_command=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, or 2 for bad input."""
    args = build_parser().parse_args(argv)
    configure_logging()
    try:
        args.run_command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
