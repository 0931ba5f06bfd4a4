"""Commands for data sets: ``mrmae data`` and the scripts in ``data/``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal, get_args

from mrmae_ds.cli.data_bench import add_bench_arguments, run_bench
from mrmae_ds.cli.parser import CommandParser
from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.options import RAW_SIDE, Jpegs, Output, Storage, WriteOptions, parse_max_bad
from mrmae_ds.data.convert.skipped import report_path
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted

SUMMARY = "convert images to .beton files, and check them"


def add_arguments(parser: CommandParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add, run_subcommand, summary in (
        ("write", add_folder_arguments, run_folder, "convert a tree of images, a folder per class, to .beton files"),
        ("imagenet", add_imagenet_arguments, run_imagenet, "convert ImageNet-1K to .beton files"),
        (
            "tars",
            _add_tars_arguments,
            _run_tars,
            "convert WebDataset's tar archives to .beton files, without unpacking",
        ),
        (
            "parquet",
            _add_parquet_arguments,
            _run_parquet,
            "convert Hugging Face's Parquet or Arrow files to .beton files",
        ),
        ("adopt", _add_adopt_arguments, _run_adopt, "check a .beton of FFCV's own writer, and write its sidecar"),
        ("info", _add_info_arguments, _run_info, "describe a .beton"),
        ("bench", add_bench_arguments, run_bench, "measure the loader, and the CPU cores that a GPU needs"),
        ("verify", _add_verify_arguments, _run_verify, "check the checksum of a .beton and decode every image"),
    ):
        subparser = commands.add_parser(name, help=summary, description=summary)
        add(subparser)
        subparser.set_defaults(run_data_command=run_subcommand)


def run(args: argparse.Namespace) -> None:
    """Run the subcommand."""
    args.run_data_command(args)


def _add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every source of images has."""
    default = WriteOptions()
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made if missing")
    for part in ("train", "val"):
        parser.add_argument(
            f"--num-{part}-images", f"--{part}-count", type=int, metavar="N",
            help="at most N, class-balanced; default: all",
        )  # fmt: skip
    parser.add_argument(
        "--max-side", type=int, default=default.max_side, metavar="PIXELS",
        help="reduce the longer side to this; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=int, default=default.quality, metavar="Q", help="JPEG quality, 1 to 100; default: %(default)s"
    )
    parser.add_argument(
        "--format", choices=get_args(Storage), default=default.storage, dest="storage",
        help=f"jpeg; raw: pixels without loss, 3 bytes each, which need no decoding; auto: raw up to {RAW_SIDE} pixels "
        "on the longer side, jpeg above; the expected size is printed first; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--jpegs", choices=get_args(Jpegs), default=default.jpegs,
        help="JPEGs that are not reduced: auto transcodes those whose quality is not above --quality without loss "
        "(needs jpegtran), keep transcodes all, encode encodes all again; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes; default: the cores, at most 8")
    parser.add_argument(
        "--max-bad", type=parse_max_bad, default=default.max_bad, metavar="N|SHARE",
        help="maximum of unreadable images per file, which are left out and listed: a number, or a share (0.01, 1%%), "
        "rounded up; the command fails if there are more; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--max-pixels", type=int, default=default.max_pixels, metavar="N",
        help="larger images count as unreadable and are not decoded; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--background", default=default.background, metavar="COLOR",
        help="color behind transparent pixels; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=default.timeout_s, metavar="S", dest="timeout_s",
        help="limit for one image, in seconds; default: %(default)s",
    )  # fmt: skip


def _output(args: argparse.Namespace) -> Output:
    names = ("max_side", "quality", "storage", "jpegs", "workers", "max_bad", "max_pixels", "background", "timeout_s")
    options = WriteOptions(**{name: getattr(args, name) for name in names})
    return Output(args.out, args.name, options, args.num_train_images, args.num_val_images)


def _add_split_arguments(parser: argparse.ArgumentParser, unsplit: str) -> None:
    """Add the arguments of sources that may have no validation set; ``unsplit`` says when."""
    parser.add_argument("--name", help="name of the data set in tables; default: the folder's")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F",
        help=f"share of each class that becomes val.beton where {unsplit}; default: %(default)s",
    )  # fmt: skip


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mrmae data write`` and ``data/folder.py``."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="SRC/train/CLASS/* and SRC/val/CLASS/*, or SRC/CLASS/*"
    )
    _add_writing_arguments(parser)
    _add_split_arguments(parser, "SRC has no val/")
    parser.add_argument(
        "--nested-classes", action=argparse.BooleanOptionalAction,
        help="each folder that holds images is a class, at any depth; --no-nested-classes: each folder below train/ "
        "is one, whatever its name; default: as the tree shows, or an error",
    )  # fmt: skip


def run_folder(args: argparse.Namespace) -> None:
    """Write the files and report them."""
    from mrmae_ds.data.convert.folder import write_folder

    with _stoppable():
        written = write_folder(args.source, _output(args), val_fraction=args.val_fraction, nested=args.nested_classes)
    report(written)


def add_imagenet_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mrmae data imagenet`` and ``data/imagenet.py``."""
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="SRC/train/n01440764/*.JPEG, and SRC/val/ with class folders or flat"
    )
    _add_writing_arguments(parser)
    parser.add_argument("--name", default="ImageNet-1K", help="name of the data set in tables; default: %(default)s")
    parser.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="labels of the images in SRC/val; default: the first file of a usual name in SRC",
    )
    parser.add_argument(
        "--synsets", type=Path, metavar="FILE", help="map_clsloc.txt, needed if the labels are the devkit's numbers"
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="lines `n01440764 tench, ...`: readable names; default: WordNet ids",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="accept counts other than 1,281,167 and 50,000 images"
    )


def run_imagenet(args: argparse.Namespace) -> None:
    """Write the files and report them."""
    from mrmae_ds.data.convert.imagenet import ImageNetSource, write_imagenet

    source = ImageNetSource(args.source, args.val_labels, args.synsets, args.allow_partial)
    with _stoppable():
        written = write_imagenet(source, _output(args), class_names=args.class_names)
    report(written)


def _add_tars_arguments(parser: argparse.ArgumentParser) -> None:
    _add_shard_arguments(parser, "folder of train-*.tar and val-*.tar, or of any *.tar")


def _add_shard_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help=source)
    _add_writing_arguments(parser)
    _add_split_arguments(parser, "no file is named like val")
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE",
        help="class names, a line for each label from 0; default: those of the files, or the labels' numbers",
    )  # fmt: skip


def _run_tars(args: argparse.Namespace) -> None:
    _run_shards(args, "tars")


def _add_parquet_arguments(parser: argparse.ArgumentParser) -> None:
    _add_shard_arguments(parser, "folder of train-*.parquet and val-*.parquet, of any *.parquet, or of *.arrow")
    for kind in ("image", "label"):
        parser.add_argument(f"--{kind}-column", metavar="NAME", help="default: the one of its type, or of a usual name")


def _run_parquet(args: argparse.Namespace) -> None:
    _run_shards(args, "parquet", args.image_column, args.label_column)


def _run_shards(args: argparse.Namespace, kind: Literal["tars", "parquet"], *columns: str | None) -> None:
    from mrmae_ds.data.convert.shards import ShardOptions, write_shards

    class_names = str(args.class_names) if args.class_names else None  # the sidecar keeps it
    with _stoppable():
        written = write_shards(args.source, _output(args), kind, ShardOptions(args.val_fraction, class_names, *columns))
    report(written)


def report(written: Sequence[BetonInfo]) -> None:
    """Print descriptions of written data sets, and warn of images that were left out."""
    from mrmae_ds.data.convert.verify import describe_beton

    for info in written:
        print(describe_beton(info.path))
        if report_path(info.path).exists():
            print(f"warning: some images were left out, see {report_path(info.path)}", file=sys.stderr)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Unwind the block on Ctrl-C and on a scheduler's SIGTERM, so that no process remains."""
    continues = "the same command continues, and does at most the last few seconds again"

    def stop(number: int, _: FrameType | None) -> None:
        print(f"stopped by {signal.Signals(number).name}; {continues}", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {continues}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _add_adopt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("beton", type=Path)
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, a line for each label from 0; default: the labels' numbers",
    )
    parser.add_argument("--name", help="name of the data set in tables; default: the file's")


def _run_adopt(args: argparse.Namespace) -> None:
    from mrmae_ds.data.convert.adopt import adopt_beton

    report([adopt_beton(args.beton, args.classes, args.name)])


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("beton", type=Path)


def _run_info(args: argparse.Namespace) -> None:
    from mrmae_ds.data.convert.verify import describe_beton

    print(describe_beton(args.beton))


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("beton", type=Path)
    parser.add_argument(
        "--source", type=Path, metavar="SRC", help="also compare stored images with the files that they were made from"
    )
    parser.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="number of images to compare; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of their choice; default: %(default)s")


def _run_verify(args: argparse.Namespace) -> None:
    from mrmae_ds.data.convert.verify import find_stored_copies, verify_beton

    if args.num_images < 1 or args.seed < 0:
        raise UserError(
            f"--num-images must be at least 1 and --seed not negative, not {args.num_images} and {args.seed}"
        )
    info = verify_beton(args.beton)
    print(f"{info.path}: {counted(info.num_samples, 'image')} decoded, checksum as written")
    for line in find_stored_copies(info):
        print(f"{info.path}: {line}")
    if args.source:
        from mrmae_ds.data.convert.compare import compare_with_source

        lowest = compare_with_source(args.beton, args.source, args.num_images, args.seed)
        count = min(args.num_images, info.num_samples)
        compared = counted(count, "image")
        print(f"{info.path}: {compared} compared with {args.source}: the same, at {lowest:.1f} dB or more")
