"""``mrmae teachers``: teachers of a recipe and their importance maps."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser

SUMMARY = "describe a recipe's teachers, and draw their importance maps"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="recipe file")
    parser.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="draw importance maps of these: image files, folders of them, or indices into the recipe's validation set",
    )
    parser.add_argument("--num-images", type=int, help="number of images of folders; default: 8")
    parser.add_argument("--out", type=Path, help="PNG file; default: RECIPE_teachers.png")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mask; default: %(default)s")
    parser.add_overrides()


def run(args: argparse.Namespace) -> None:
    """Print the descriptions; with ``--images``, write the figure and print its path."""
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.figures.teachers import build_teachers, describe_teacher, draw_teachers

    recipe = load_recipe(args.recipe, args.overrides)
    teachers = build_teachers(recipe)
    print("\n\n".join(describe_teacher(name, recipe.teachers[name], teacher) for name, teacher in teachers.items()))
    if args.images:
        out = args.out or Path(f"{args.recipe.stem}_teachers.png")
        draw_teachers(recipe, teachers, args.images, out, count=args.num_images, seed=args.seed)
        print(f"\n{out}")
