"""``mrmae data bench``: throughput of the loader on this machine, and the CPU cores that a GPU needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser


def add_bench_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("beton", type=Path, metavar="FILE.beton")
    add("--ds_config", type=Path, help="engine config; default: plain random crops at 224 pixels")
    add("--recipe", type=Path, help="recipe; default: the YAML of the same name beside the engine config")
    add("--stage", choices=("pretrain", "finetune"), help="stage whose images are read; default: both")
    add("--gpu", metavar="KEY", help="type of GPU (h100-80, ...), whose images/s `mrmae plan` estimates")
    add("--gpus", type=int, default=8, metavar="N", help="number of GPUs of the job; default: %(default)s")
    add("--measured", type=Path, metavar="FILE", help="JSON file of `mrmae doctor`: steps and constants as measured")
    add("--images-per-s", type=float, metavar="IMAGES/S", help="measured images/s of one GPU, instead of an estimate")
    add("--backend", choices=("ffcv", "pillow"), help="default: the recipe's, or ffcv")
    add("--workers", type=int, metavar="N", help="threads or processes; default: the recipe's, or all cores")
    add("--seconds", type=float, default=10, metavar="S", help="duration for each stage; default: %(default)s")
    add("--out", type=Path, metavar="FILE", help="JSON file for `mrmae plan --loader-bench`")
    parser.add_overrides()


def run_bench(args: argparse.Namespace) -> None:
    """Measure and print the report."""
    from mrmae_ds.planning.loader_bench import LoaderBenchRequest, bench_loader

    values = {name: getattr(args, name) for name in LoaderBenchRequest.__dataclass_fields__}
    print(bench_loader(LoaderBenchRequest(**values)))
