"""``mrmae plan`` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``plan`` to ``mrmae``."""
    summary = "what a recipe needs on a cluster: memory, network, hours, images/s; nothing is read or trained"
    parser = commands.add_parser("plan", help=summary, description=summary)
    parser.set_defaults(run_command=_plan)
    add = parser.add_argument
    add("--ds_config", type=Path, required=True, help="engine config; its recipe lies beside it")
    add("--gpus", type=int, required=True, help="in all, one process each")
    add("--gpu", metavar="KEY", help="which: h100-80, a100-40, ...; an unknown one lists them")
    add("--gpus-per-node", type=int, help="default: 8")
    add("--stage", choices=("pretrain", "finetune"), help="default: every stage of the recipe that trains")
    add("--recipe", type=Path, help="another recipe")
    add("--num-images", type=int, help="of the training set; default: ImageNet-1K's 1,281,167")
    add("--classes", type=int, help="of the data set; default: ImageNet-1K's 1,000")
    add("--network", type=float, metavar="GB/S", help="of each GPU to other nodes, one way; default: 50 (400 Gb/s)")
    add("--mfu", type=float, metavar="SHARE", help="of the peak that the counted operations reach; default: 0.35")
    add("--tflops", type=float, help="what a GPU sustains, instead of --mfu")
    add("--memory", type=float, metavar="GIB", help="of a GPU, as torch reports it, for a card not in the table")
    add("--peak", type=float, metavar="TFLOPS", help="its dense bf16 peak")
    add("--micro-batch", type=int, metavar="N", help="instead of the engine config's")
    add("--loader", type=float, metavar="IMAGES/S", help="what the loader of a node delivers, if you know it")
    add("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")


def _plan(args: argparse.Namespace) -> None:
    from mrmae_ds.planning.plan import Request, describe_plan

    given = {name: value for name, value in vars(args).items() if value is not None and name != "run_command"}
    print(describe_plan(Request(**given)))
