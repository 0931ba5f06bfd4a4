"""``mrmae export``: weights of a finished run, or of another project, for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mrmae_ds.cli.parser import CommandParser, require_path
from mrmae_ds.errors import UserError

if TYPE_CHECKING:
    from mrmae_ds.weights.export import Exported

SUMMARY = "export a finished run's weights to a file: for timm, complete, for ONNX or as a program of torch.export"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "run",
        type=Path,
        help="a finished stage, runs/NAME/STAGE, or a weights file that `mrmae check` calls usable",
    )
    parser.add_argument(
        "--to",
        metavar="{timm,safetensors,onnx,pt2,hub:ORG/NAME}",
        help="timm (default): a file that timm.create_model loads, for a pre-training the encoder alone; safetensors "
        "(default of a detector): all weights; onnx and pt2: the same model as for timm, for ONNX Runtime and for "
        "torch.export.load; hub:ORG/NAME: upload as for timm, with a model card, to the Hugging Face hub",
    )
    parser.add_argument(
        "--out", type=Path, help="file or folder; default: ./NAME-STAGE[-timm].safetensors, .onnx or .pt2"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that this project did not write")
    parser.add_argument("--private", action="store_true", help="make a new repository of the hub private")


def run(args: argparse.Namespace) -> None:
    """Write or upload the file; print its path or address and the line of Python that loads it."""
    require_path(args.run)
    before, hub, repository = (args.to or "timm").partition("hub:")
    unused = {"--out": args.out and hub, "--force": args.force and hub, "--private": args.private and not hub}
    for option, is_unused in unused.items():
        if is_unused:
            raise UserError(f"{option}: has no effect {'with' if hub else 'without'} --to hub:ORG/NAME; leave it out")
    if hub and not before and repository.count("/") == 1:
        from mrmae_ds.weights.hub import push_to_hub

        exported = push_to_hub(args.run, repository, args.private)
    elif args.to in ("onnx", "pt2"):
        from mrmae_ds.weights.portable import export_portable

        exported = export_portable(args.run, args.to, args.out, args.force)
    elif args.to not in (None, "timm", "safetensors"):
        raise UserError(f"--to {args.to}: expected timm, safetensors, onnx, pt2 or hub:ORG/NAME")
    else:
        exported = _write(args)
    print("\n".join([f"written: {exported.path}", *exported.notes, "load it with", f"    {exported.line}"]))


def _write(args: argparse.Namespace) -> Exported:
    from mrmae_ds.weights.detectors import holds_detector
    from mrmae_ds.weights.export import export_run

    if args.to != "timm" and holds_detector(args.run):
        from mrmae_ds.detection.saved import export_detector

        return export_detector(args.run, args.out, args.force)
    return export_run(args.run, args.to or "timm", args.out, args.force)
