"""Copy the images of a COCO data set that show a few large objects, with their annotations: data of the detection demo.

Usage: python data/coco_subset.py IMAGES ANNOTATIONS --out DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from mrmae_ds.cli.parser import CommandParser, require_path, run_command
from mrmae_ds.detection.coco_json import load_entries
from mrmae_ds.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Write images/ and annotations.json."""
    for path in (args.images, args.annotations):
        require_path(path)
    content = load_entries(args.annotations)
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    by_id = sorted(content["images"], key=lambda image: image["id"])
    chosen = [image for image in by_id if _is_simple(image, objects[image["id"]], args)][: args.num_images]
    if not chosen:
        raise UserError(f"{args.annotations}: no image with at most {args.max_objects} large objects; raise the limits")
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    for image in chosen:
        shutil.copy(args.images / image["file_name"], args.out / "images")
    annotations = [annotation for image in chosen for annotation in objects[image["id"]]]
    kept = {"images": chosen, "annotations": annotations, "categories": content["categories"]}
    (args.out / "annotations.json").write_text(json.dumps(kept))
    print(f"{args.out}: {len(chosen)} images, {len(annotations)} objects")


def _is_simple(image: dict[str, Any], annotations: list[dict[str, Any]], args: argparse.Namespace) -> bool:
    least = args.min_area * image["width"] * image["height"]
    large = all(_area(annotation) >= least and not annotation.get("iscrowd") for annotation in annotations)
    return large and 0 < len(annotations) <= args.max_objects


def _area(annotation: dict[str, Any]) -> float:
    _, _, width, height = annotation["bbox"]
    return annotation.get("area", width * height)


if __name__ == "__main__":
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="COCO's JSON of these images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--num-images", type=int, default=8, help="at most; default: %(default)s")
    parser.add_argument("--max-objects", type=int, default=6, help="of an image; default: %(default)s")
    parser.add_argument("--min-area", type=float, default=0.01, help="of an object, share of its image; default: 0.01")
    sys.exit(run_command(run, parser.parse_args()))
