"""``mrmae plan``: memory, and estimates of time and communication."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser, add_recipe_options

SUMMARY = "plan a training job: memory, and estimates of hours, communication and loader throughput"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    add_recipe_options(parser)
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="total number of GPUs, one rank each")
    add("--gpu", metavar="KEY", help="type of GPU: h100-80, a100-40, ...; an unknown key lists all")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs per node; default: 8")
    add("--stage", choices=("pretrain", "finetune", "detect"), help="stage to plan; default: all but detect")
    add(
        "--num-images",
        type=int,
        metavar="N",
        help="number of training images; default: ImageNet-1K's, in detect COCO's",
    )
    add("--classes", type=int, metavar="N", help="number of classes; default: ImageNet-1K's, in detect COCO's")
    add("--network", type=float, metavar="GB/S", help="one-way bandwidth per GPU to other nodes; default: 50")
    add("--measured", type=Path, metavar="FILE", help="JSON file of `mrmae doctor`: constants measured on a node")
    add("--tflops", type=float, metavar="TFLOPS", help="sustained TFLOP/s of one GPU, instead of a roofline estimate")
    add("--memory", type=float, metavar="GIB", help="memory of a GPU as torch reports it, for a type without a key")
    add("--peak", type=float, metavar="TFLOPS", help="dense bf16 peak of a GPU, for a type without a key")
    add("--micro-batch", type=int, metavar="N", help="micro-batch, instead of the engine config's")
    add("--loader", type=float, metavar="IMAGES/S", help="measured throughput of the loader of one node")
    add("--loader-bench", type=Path, metavar="FILE", help="JSON file of `mrmae data bench`: CPU time of an image")
    add("--search", action="store_true", help="find the fastest engine config for these GPUs")
    add("--write", type=Path, metavar="FILE", help="with --search: write the engine config that it finds")
    parser.add_overrides()


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from mrmae_ds.planning.plan import PlanRequest, describe_plan

    given = {name: value for name, value in vars(args).items() if value is not None and name != "run_command"}
    print(describe_plan(PlanRequest(**given)))
