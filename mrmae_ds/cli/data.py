"""The commands about data sets, for ``mrmae data`` and for the scripts in ``data/``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.options import WriteOptions, parse_max_bad
from mrmae_ds.data.convert.skipped import report_path
from mrmae_ds.distributed.logs import configure_logging
from mrmae_ds.errors import UserError

Command = Callable[[argparse.Namespace], None]
Subparsers = Any  # what add_subparsers returns; argparse has no public name for it


def add_data_commands(commands: Subparsers) -> None:
    """``write``, ``imagenet``, ``info`` and ``verify``; each parser's default ``run_command`` runs it."""
    for name, add, run, summary in (
        ("write", add_folder_arguments, run_folder, "a tree of images, a folder a class, as .beton files"),
        ("imagenet", add_imagenet_arguments, run_imagenet, "ImageNet-1K as it is handed out, as .beton files"),
        ("info", _add_info_arguments, _run_info, "what a .beton holds and how it was written"),
        ("verify", _add_verify_arguments, _run_verify, "compare the checksum and decode every image"),
    ):
        parser = commands.add_parser(name, help=summary, description=summary)
        add(parser)
        parser.set_defaults(run_command=run)


def run_script(run: Command, args: argparse.Namespace) -> int:
    """Run a command; the exit status: 0, or 2 after printing the message of a UserError."""
    configure_logging()
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """What every source of images has; see ``options.WriteOptions``."""
    default = WriteOptions()
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to, made if missing")
    parser.add_argument("--train-count", type=int, metavar="N", help="at most N, class-balanced; default: all")
    parser.add_argument("--val-count", type=int, metavar="N", help="at most N, class-balanced; default: all")
    parser.add_argument(
        "--max-side", type=int, default=default.max_side, metavar="PIXELS",
        help="reduce the longer side to this; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=int, default=default.quality, metavar="Q", help="of the JPEGs, 1 to 100; default: %(default)s"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: the cores, 8 at most")
    parser.add_argument(
        "--max-bad", type=parse_max_bad, default=default.max_bad, metavar="N|SHARE",
        help="fail if more images than this cannot be read: a number, or a share like 0.01 or 1%% of each file, "
        "rounded up; those up to it are left out and listed; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--max-pixels", type=int, default=default.max_pixels, metavar="N",
        help="larger images count as bad, and are not decoded; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--background", default=default.background, metavar="COLOR",
        help="behind transparent pixels; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=default.timeout_s, metavar="S", dest="timeout_s",
        help="fail if an image takes longer, seconds; default: %(default)s",
    )  # fmt: skip


def _options(args: argparse.Namespace) -> WriteOptions:
    names = ("max_side", "quality", "workers", "max_bad", "max_pixels", "background", "timeout_s")
    return WriteOptions(**{name: getattr(args, name) for name in names})


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``mrmae data write`` and ``data/folder.py``."""
    parser.add_argument("source", metavar="SRC", help="SRC/train/CLASS/* and SRC/val/CLASS/*, or SRC/CLASS/*")
    _add_writing_arguments(parser)
    parser.add_argument("--name", help="of the data set, as tables show it; default: the folder's")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F",
        help="split off from each class where SRC has no val/; default: %(default)s",
    )  # fmt: skip


def run_folder(args: argparse.Namespace) -> None:
    """Write the files and say what was written."""
    from mrmae_ds.data.convert.folder import write_folder

    with _stoppable():
        written = write_folder(
            args.source,
            args.out,
            _options(args),
            name=args.name,
            val_fraction=args.val_fraction,
            train_count=args.train_count,
            val_count=args.val_count,
        )
    report(written)


def add_imagenet_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``mrmae data imagenet`` and ``data/imagenet.py``."""
    parser.add_argument("source", metavar="SRC", help="SRC/train/n01440764/*.JPEG, and SRC/val/ alike or flat")
    _add_writing_arguments(parser)
    parser.add_argument("--name", default="ImageNet-1K", help="of the data set, in tables; default: %(default)s")
    parser.add_argument(
        "--val-labels", metavar="FILE", help="labels of the images in SRC/val; default: a file of a usual name in SRC"
    )
    parser.add_argument(
        "--synsets", metavar="FILE", help="map_clsloc.txt, needed where the labels are the devkit's numbers"
    )
    parser.add_argument(
        "--class-names", metavar="FILE", help="lines `n01440764 tench, ...`: readable names; default: WordNet ids"
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="take a set of other than 1,281,167 and 50,000 images"
    )


def run_imagenet(args: argparse.Namespace) -> None:
    """Write the files and say what was written."""
    from mrmae_ds.data.convert.imagenet import write_imagenet

    with _stoppable():
        written = write_imagenet(
            args.source,
            args.out,
            _options(args),
            val_labels=args.val_labels,
            synsets=args.synsets,
            class_names=args.class_names,
            allow_partial=args.allow_partial,
            train_count=args.train_count,
            val_count=args.val_count,
            name=args.name,
        )
    report(written)


def report(written: Sequence[BetonInfo]) -> None:
    """Print what was written, and where the list of what was left out lies."""
    from mrmae_ds.data.convert.verify import describe_beton

    for info in written:
        print(describe_beton(info.path))
        if report_path(info.path).exists():
            print(f"warning: some images were left out, see {report_path(info.path)}", file=sys.stderr)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C, and the SIGTERM of a scheduler, end the block in order: no processes and no half-written file remain."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("beton", type=Path)


def _run_info(args: argparse.Namespace) -> None:
    from mrmae_ds.data.convert.verify import describe_beton

    print(describe_beton(args.beton))


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("beton", type=Path)
    parser.add_argument("--source", metavar="SRC", help="also compare stored images with the files they were made of")
    parser.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="how many of them; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice")


def _run_verify(args: argparse.Namespace) -> None:
    from mrmae_ds.data.convert.verify import verify_beton

    if args.num_images < 1 or args.seed < 0:
        raise UserError(
            f"--num-images must be at least 1 and --seed not negative, not {args.num_images} and {args.seed}"
        )
    info = verify_beton(args.beton)
    print(f"{info.path}: {info.num_samples:,} images decode, checksum as written")
    if args.source:
        from mrmae_ds.data.convert.compare import compare_with_source

        lowest = compare_with_source(args.beton, args.source, args.num_images, args.seed)
        count = min(args.num_images, info.num_samples)
        print(f"{info.path}: {count:,} images are those of {args.source}, at {lowest:.1f} dB or more")
