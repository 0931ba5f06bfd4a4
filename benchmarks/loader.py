"""Throughput of this project's loaders, stock FFCV, torchvision and DALI on the same images.

    python benchmarks/loader.py train.beton [--originals TRAIN_FOLDER] [--rounds 8] [--out loader.json]

Every contender has a process of its own. The first epoch (imports, compilation, a cold page cache) is not counted. Then
they take turns of whole epochs, ``rounds`` times, so that a machine that becomes slower does so for all; the median
over rounds is printed. torchvision and DALI read the JPEGs of the .beton, unpacked into class folders, and torchvision
also the original files, if they are passed. All crop random boxes of 20 % to 100 % of an image and flip half of them;
this project's backends and torchvision crop the same boxes. CPU-seconds are those of the whole process tree; on a
machine with other work, compare them and not the images/s. A second table has the ratios of images/s within each round
beside those to reach. A contender that is not installed is named with the reason; DALI is not a dependency:
pip install nvidia-dali-cuda120.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Batches = Callable[[int], Iterator[int]]  # an epoch's batches, as the number of images in each
SCALE = (0.2, 1.0)
_LIMIT_S = 1800  # of a contender's start or round


@dataclass(frozen=True)
class Settings:
    """Settings of all contenders.

    Attributes:
        beton: the data set.
        folder: its JPEGs in class folders.
        originals: the files that it was made from, in class folders.
        size: image size, pixels.
        batch: images per batch.
        workers: threads or processes.
    """

    beton: Path
    folder: Path
    originals: Path | None
    size: int
    batch: int
    workers: int


def ours(settings: Settings, backend: str, policy: str | None = None) -> Batches:
    """Build this project's loader."""
    from mrmae_ds.config.sections import DataConfig, LoaderConfig
    from mrmae_ds.data.loaders.augment import AugmentSettings
    from mrmae_ds.data.loaders.base import LoaderRequest, TrainTransform
    from mrmae_ds.data.loaders.build import build_loader
    from mrmae_ds.data.loaders.crop import CropSettings

    augment = AugmentSettings((0.5, 0.5, 0.5), policy) if policy else None
    request = LoaderRequest(
        "train", settings.size, settings.batch, transform=TrainTransform(CropSettings(scale=SCALE), augment)
    )
    data = DataConfig(train=settings.beton, val=settings.beton, backend=backend)
    loader = build_loader(data, LoaderConfig(num_workers=settings.workers), request)
    return lambda epoch: (len(batch.labels) for batch in loader.epoch(epoch))


def stock_ffcv(settings: Settings) -> Batches:
    """Build FFCV's loader as documented: its decoder, order and compiler; uint8 output, as ours."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    from mrmae_ds.data.beton.file import BetonFile
    from mrmae_ds.data.beton.sidecar import check_beton

    side = (settings.size, settings.size)
    image = [RandomResizedCropRGBImageDecoder(side, scale=SCALE), RandomHorizontalFlip(), ToTensor()]
    names = BetonFile(check_beton(settings.beton)).names
    loader = Loader(
        str(settings.beton),
        batch_size=settings.batch,
        num_workers=settings.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        seed=0,
        pipelines={**dict.fromkeys(names), "image": image, "label": [IntDecoder(), ToTensor()]},
    )
    return lambda _: (len(images) for images, _label in loader)


def torchvision_folder(settings: Settings, policy: str | None = None, folder: Path | None = None) -> Batches:
    """Build torch's DataLoader of torchvision's ImageFolder, with our crop boxes."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import functional as transform

    from mrmae_ds.data.loaders.augment import Augment, AugmentSettings
    from mrmae_ds.data.loaders.crop import CropSettings, random_boxes

    bicubic = transform.InterpolationMode.BICUBIC
    augment = Augment(AugmentSettings((0.5, 0.5, 0.5), policy), settings.size) if policy else None

    class Images(ImageFolder):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            path, label = self.samples[index]
            source_image = self.loader(path)
            sizes = np.array([source_image.height]), np.array([source_image.width]), np.array([index])
            box = random_boxes(*sizes, seed=0, epoch=0, crop=CropSettings(scale=SCALE))[0].tolist()
            image = transform.resized_crop(source_image, *box[:4], [settings.size] * 2, interpolation=bicubic)
            image = transform.horizontal_flip(image) if box[4] else image
            return transform.pil_to_tensor(augment(image, index) if augment else image), label

    loader = DataLoader(
        Images(folder or settings.folder),
        batch_size=settings.batch,
        shuffle=True,
        num_workers=settings.workers,
        drop_last=True,
        persistent_workers=True,
    )
    return lambda _: (len(labels) for _images, labels in loader)


def dali(settings: Settings) -> Batches:
    """Build NVIDIA's DALI on the CPU: fused decoding and cropping, as in its ImageNet example."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=settings.batch, num_threads=settings.workers, device_id=None, seed=0)
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(file_root=str(settings.folder), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            jpegs, device="cpu", output_type=types.RGB, random_area=list(SCALE), random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, resize_x=settings.size, resize_y=settings.size, interp_type=types.INTERP_LINEAR)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    from nvidia.dali.plugin.base_iterator import LastBatchPolicy

    iterator = DALIGenericIterator(
        [pipeline()], ["image", "label"], reader_name="files", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    return lambda _: (len(batch[0]["label"]) for batch in iterator)


def torchvision_originals(settings: Settings) -> Batches:
    """Build ``torchvision_folder`` of the images before their conversion to the .beton."""
    if settings.originals is None:
        raise ValueError("no --originals")
    return torchvision_folder(settings, folder=settings.originals)


POLICY = "rand-m9-mstd0.5-inc1"
CONTENDERS: dict[str, Callable[[Settings], Batches]] = {
    "mrmae_ds, ffcv backend": lambda settings: ours(settings, "ffcv"),
    "stock FFCV": stock_ffcv,
    "mrmae_ds, pillow backend": lambda settings: ours(settings, "pillow"),
    "torchvision ImageFolder": torchvision_folder,
    "torchvision, original files": torchvision_originals,
    "DALI, CPU": dali,
    "mrmae_ds, ffcv + RandAugment": lambda settings: ours(settings, "ffcv", POLICY),
    "mrmae_ds, pillow + RandAugment": lambda settings: ours(settings, "pillow", POLICY),
    "torchvision + RandAugment": lambda settings: torchvision_folder(settings, POLICY),
}
# A reader of this project, another one, and how many times its images/s are to be reached.
TO_REACH = (
    ("mrmae_ds, ffcv backend", "torchvision ImageFolder", 4.5),
    ("mrmae_ds, ffcv backend", "stock FFCV", 2.0),
    ("mrmae_ds, ffcv backend", "DALI, CPU", 3.0),
    ("mrmae_ds, ffcv + RandAugment", "torchvision + RandAugment", 3.0),
)
Results = dict[str, list[dict[str, float]] | str]  # of each contender: its rounds, or why it did not run


def serve(name: str, settings: Settings, images: int) -> None:
    """Measure one contender in this process: print seconds to the first batch, then a round for each line of stdin.

    Args:
        name: of the contender.
        settings: of all.
        images: minimum of a round, in whole epochs.
    """
    import psutil

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    created = time.perf_counter()
    batches = CONTENDERS[name](settings)
    first = None
    for _ in batches(0):
        first = first or time.perf_counter() - created
    print(json.dumps(first or 0.0), file=answers, flush=True)
    own = psutil.Process()

    def cpu_seconds() -> float:
        tree = [own, *own.children(recursive=True)]
        return sum(times.user + times.system for times in (process.cpu_times() for process in tree))

    epoch = 1
    for _ in sys.stdin:
        count, cpu, start = 0, cpu_seconds(), time.perf_counter()
        while count < images:
            count += sum(batches(epoch))
            epoch += 1
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        result = {"cpu_s_per_1000": 1000 * cpu / count, "images_per_s": count / seconds}
        print(json.dumps(result), file=answers, flush=True)


class Contender:
    """A contender in a process of its own, which runs a round on each request.

    Args:
        command: of the process.

    Raises:
        RuntimeError: by all methods, with the last line of the error, if it fails.
    """

    def __init__(self, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, open as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.first_batch_s = self._answer()

    def run_round(self) -> dict[str, float]:
        """Run a round; ``load`` is the machine's one-minute average."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended since the last round, for the reason that follows
            print(file=self._process.stdin, flush=True)
        return {**self._answer(), "first_batch_s": self.first_batch_s, "load": os.getloadavg()[0]}

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        # One line is outstanding at a time, so that none is left in the stream's buffer.
        if select.select([self._process.stdout], [], [], _LIMIT_S)[0]:
            line = self._process.stdout.readline()
            if line:
                return json.loads(line)
        self.close()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"no result, status {self._process.returncode}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def unpack(beton: Path, folder: Path) -> None:
    """Write the .beton's JPEGs as FOLDER/LABEL/ROW.jpg, its raw images as ROW.bmp."""
    from mrmae_ds.data.beton.file import RAW, BetonFile
    from mrmae_ds.data.beton.sidecar import check_beton

    file = BetonFile(check_beton(beton))
    for row, label in enumerate(file.labels.tolist()):
        target = folder / f"{label:04d}" / f"{row:08d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.table[row, 4] == RAW:
            file.image(row).save(target.with_suffix(".bmp"))
        else:
            target.write_bytes(file.jpeg(row))


def _attempt(action: Callable[[], T]) -> T | str:
    """Return the result of an action, or the reason that it has none."""
    try:
        return action()
    except RuntimeError as error:
        return str(error)


def run_all(args: argparse.Namespace, folder: Path) -> Results:
    """Run ``rounds`` rounds of every contender in turn; of one that fails, the reason takes the place of all rounds."""
    command = [sys.executable, __file__, str(args.beton), "--folder", str(folder)]
    command += [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in ("size", "batch", "workers", "num_images")]
    command += [f"--originals={args.originals}"] if args.originals else []
    names = [name for name in args.only or CONTENDERS if args.originals or "original" not in name]
    contenders: dict[str, Contender] = {}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    reasons: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            started = _attempt(partial(Contender, [*command, "--contender", name]))
            print(f"start: {name}: {started if isinstance(started, str) else 'ready'}", file=sys.stderr)
            if isinstance(started, str):
                reasons[name] = started
            else:
                stack.callback(started.close)
                contenders[name] = started
        for turn in range(args.rounds):
            for name in [name for name in contenders if name not in reasons]:
                done = _attempt(contenders[name].run_round)
                print(f"round {turn + 1}: {name}: {done}", file=sys.stderr)
                if isinstance(done, str):
                    reasons[name] = done
                else:
                    rounds[name].append(done)
    return {**rounds, **reasons}


def table(results: Results) -> str:
    """Format medians over rounds as Markdown, with CPU time as a multiple of the first contender's."""
    lines = ["| loader | CPU-s per 1,000 | ratio | images/s | first batch, s | load |", "|---|---|---|---|---|---|"]
    reference: float | None = None
    for name, rounds in results.items():
        if isinstance(rounds, str):
            lines.append(f"| {name} | did not run: {rounds} | | | | |")
            continue
        cpu, speed, first, load = (statistics.median(run[key] for run in rounds) for key in rounds[0])
        reference = reference or cpu
        lines.append(f"| {name} | {cpu:.2f} | {cpu / reference:.2f} | {speed:,.0f} | {first:.1f} | {load:.0f} |")
    return "\n".join(lines)


def ratios(results: Results) -> str:
    """Format the ratios of images/s to reach, of two readers in the same round, as Markdown."""
    lines = ["| | against | median | lowest to highest | to reach |", "|---|---|---|---|---|"]
    for ours_name, other_name, goal in TO_REACH:
        if not {ours_name, other_name} <= results.keys():
            continue
        pair = results[ours_name], results[other_name]
        if isinstance(pair[0], str) or isinstance(pair[1], str):
            found = " | "
        else:
            values = sorted(one["images_per_s"] / other["images_per_s"] for one, other in zip(*pair, strict=True))
            found = f"{statistics.median(values):.2f} | {values[0]:.2f} to {values[-1]:.2f}"
        lines.append(f"| {ours_name} | {other_name} | {found} | {goal:g} |")
    return "\n".join(lines)


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for the JSON: paths by name, and the number of images."""
    from mrmae_ds.data.beton.sidecar import check_beton

    info = check_beton(args.beton)
    kept = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    kept |= {"num_samples": info.num_samples, "bytes_per_image": round(info.size / info.num_samples)}
    return {key: value for key, value in kept.items() if value is not None and key not in ("out", "alone")}


def main() -> None:
    """Parse, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", type=Path)
    parser.add_argument("--size", type=int, default=224, help="pixels, both sides")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads or processes")
    parser.add_argument("--num-images", type=int, default=3000, help="minimum of a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--originals", type=Path, help="class folders of the files that the .beton was made from")
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="these contenders; default: all")
    parser.add_argument("--out", type=Path, help="JSON of all rounds")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.contender:
        settings = Settings(args.beton, args.folder, args.originals, args.size, args.batch, args.workers)
        serve(args.contender, settings, args.num_images)
        os._exit(0)  # some contenders' threads outlive their loader
    from mrmae_ds.records.environment import collect_versions, cpu_name

    with tempfile.TemporaryDirectory() as folder:
        unpack(args.beton, Path(folder))
        results = run_all(args, Path(folder))
    print(table(results), ratios(results), sep="\n\n")
    if args.out:
        settings = recorded(args)
        machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "versions": collect_versions()}
        content = {"settings": settings, "machine": machine, "rounds": results}
        args.out.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
