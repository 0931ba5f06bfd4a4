"""``mrmae cost``: FLOPs and GPU-hours of a recipe."""

from __future__ import annotations

import argparse

from mrmae_ds.cli.parser import CommandParser, add_recipe_options

SUMMARY = "count a recipe's FLOPs from its modules, and estimate its GPU-hours"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    add_recipe_options(parser)
    parser.add_argument(
        "--num-images", type=int, help="number of training images; default: ImageNet-1K's, in detect COCO's"
    )
    parser.add_argument("--tflops", type=float, help="sustained TFLOP/s of one GPU; print the GPU-hours")
    parser.add_argument("--gpus", type=int, help="print the wall-clock hours on this many GPUs")
    parser.add_overrides()


def run(args: argparse.Namespace) -> None:
    """Print the report."""
    from mrmae_ds.planning.cost_report import describe_cost

    options = {"num_images": args.num_images, "tflops": args.tflops, "gpus": args.gpus}
    given = {name: value for name, value in options.items() if value is not None}
    print(describe_cost(args.ds_config, args.recipe, args.overrides, **given))
