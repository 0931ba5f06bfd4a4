"""Images as they are stored: raw pixels, or JPEGs that a reader decodes in parts, of JPEGs without loss if possible."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from PIL import Image, JpegImagePlugin, features

from mrmae_ds.data.beton.segments import add_index, choose_interval, read_header
from mrmae_ds.data.convert.images import to_rgb
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.errors import UserError

logger = logging.getLogger(__name__)

LOSSLESS = "transcoded without loss"  # a kind of conversion
_MCU = 16  # pixels, both sides, of the subsampling 4:2:0 that Pillow chooses
_RECORDED = ("numpy", "pillow", "mrmae_ds")
_CAUTION = b"Caution: quantization tables are too coarse"  # of 16 bits, which all readers take
_PACKAGES = "libjpeg-turbo (Debian: libjpeg-turbo-progs; conda: libjpeg-turbo)"


class Stored(NamedTuple):
    """An image as it is stored.

    Attributes:
        content: its JPEG or its raw pixels.
        raw: True for raw pixels.
        pixels: before encoding, RGB.
        kinds: the conversions that it needed.
    """

    content: bytes
    raw: bool
    pixels: Image.Image
    kinds: list[str]


def store(image: Image.Image, options: WriteOptions) -> Stored:
    """Decode an image of any format, and transcode or encode it if its pixels are not stored raw.

    Args:
        image: not decoded yet.
        options: of the conversion.
    """
    content = content_to_keep(image, options)
    rgb, kinds = to_rgb(image, max_side=options.max_side, max_pixels=options.max_pixels, background=options.background)
    if options.stores_raw(rgb.size):
        return Stored(rgb.tobytes(), True, rgb, kinds)
    kept = transcode(content, rgb) if content and "rotated" not in kinds else None
    if kept is not None:
        kinds.append(LOSSLESS)
    return Stored(kept or encode(rgb, options.quality), False, rgb, kinds)


def encode(image: Image.Image, quality: int) -> bytes:
    """Encode an RGB image as a baseline JPEG with restart markers and an index.

    Args:
        image: RGB.
        quality: 1 to 100.
    """
    interval = choose_interval((-(-image.width // _MCU), -(-image.height // _MCU)), (_MCU, _MCU))
    stream = io.BytesIO()
    # Huffman tables of its own would take longer than all of the rest, for 4 % of the bytes. The comment would be the
    # source's.
    image.save(stream, "JPEG", quality=quality, restart_marker_blocks=interval, comment=None)
    return add_index(stream.getvalue())


@cache
def find_jpegtran() -> tuple[str, str] | None:
    """Return the path and version of libjpeg-turbo's ``jpegtran``; None if there is none that works.

    MozJPEG's writes progressive JPEGs, and a broken installation nothing.
    """
    path = shutil.which("jpegtran")
    if path is None or _run_jpegtran(path, encode(Image.new("RGB", (_MCU, _MCU)), 90)) is None:
        return None
    run = subprocess.run([path, "-version"], capture_output=True, text=True, check=False, timeout=60)
    lines = (run.stdout + run.stderr).strip().splitlines()
    return path, lines[0] if lines else "unknown"


def _run_jpegtran(path: str, content: bytes) -> bytes | None:
    """Return a JPEG with restart markers, of the same coefficients; None if ``jpegtran`` warns, or cannot do it."""
    header = read_header(content)
    if header is None:
        return None
    interval = choose_interval(header.blocks, header.mcu)
    command = [path, "-copy", "none", "-optimize", "-restart", f"{interval}B"]
    run = subprocess.run(command, input=content, capture_output=True, check=False)
    warnings = [line for line in run.stderr.splitlines() if not line.startswith(_CAUTION)]
    written = None if run.returncode or warnings else read_header(run.stdout)
    return run.stdout if written is not None and written.plain else None


def uses_jpegtran(options: WriteOptions) -> bool:
    """Return True if JPEGs may be transcoded."""
    return options.jpegs != "encode" and options.storage != "raw"


def check_jpegtran(options: WriteOptions) -> None:
    """Warn once if JPEGs are encoded because ``jpegtran`` is missing; raises UserError if they must be kept."""
    if not uses_jpegtran(options) or find_jpegtran() is not None:
        return
    if options.jpegs == "keep":
        raise UserError(f"--jpegs keep needs jpegtran, of {_PACKAGES}; install it, or use --jpegs auto")
    _warn(f"no working jpegtran is installed, so all JPEGs are encoded again, at some loss; it is part of {_PACKAGES}")


@cache
def _warn(message: str) -> None:
    logger.warning(message)


def content_to_keep(image: Image.Image, options: WriteOptions) -> bytes | None:
    """Return the content of the JPEG that an image is about to be decoded from; None if it is to be encoded.

    Args:
        image: of any format, not decoded yet.
        options: of the conversion.
    """
    file = getattr(image, "fp", None)
    if not uses_jpegtran(options) or options.stores_raw(image.size):
        return None
    if image.format not in ("JPEG", "MPO") or file is None or max(image.size) > options.max_side:
        return None
    if options.jpegs == "auto" and not is_coarse(image, options.quality):
        return None
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    return content


def transcode(content: bytes, decoded: Image.Image) -> bytes | None:
    """Transcode a JPEG without loss to a baseline JPEG with restart markers, an index and Huffman tables of its own.

    Args:
        content: the JPEG.
        decoded: its pixels, RGB.

    Returns:
        The JPEG; None if ``jpegtran`` is missing or warns, or the result is not one that readers can decode in parts
        to the same pixels.
    """
    program = find_jpegtran()
    written = _run_jpegtran(program[0], content) if program is not None else None
    if written is None:
        return None
    # Coefficients that are equal may be decoded differently, if scans of a progressive JPEG are missing.
    with Image.open(io.BytesIO(written), formats=["JPEG"]) as image:
        same = image.size == decoded.size and image.convert("RGB").tobytes() == decoded.tobytes()
    return add_index(written) if same else None


def is_coarse(image: Image.Image, quality: int) -> bool:
    """Return True if a JPEG is quantized at least as coarsely as one of ``quality``, so that encoding only adds loss.

    Args:
        image: a JPEG, as Pillow has opened it.
        quality: 1 to 100.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return False
    wanted = _quantization(quality)
    tables = [image.quantization.get(layer[3], [0] * 64) for layer in image.layer]
    limits = [wanted[min(component, 1)] for component in range(len(tables))]
    pairs = zip(tables, limits, strict=True)
    return all(one >= other for table, limit in pairs for one, other in zip(table, limit, strict=True))


@cache
def _quantization(quality: int) -> dict[int, list[int]]:
    """Return Pillow's quantization tables: luma's and chroma's."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        return dict(image.quantization)


def shaping(options: WriteOptions) -> dict[str, Any]:
    """Return what decides how an image is stored."""
    names = ("max_side", "quality", "storage", "jpegs", "max_pixels", "background")
    return {"versions": stored_by(options), **{name: getattr(options, name) for name in names}}


def stored_by(options: WriteOptions) -> dict[str, str]:
    """Return the versions of all that shapes the images."""
    program = find_jpegtran() if uses_jpegtran(options) else None
    return {**dict(record_versions()), **({"jpegtran": program[1]} if program else {})}


def record_versions() -> Iterator[tuple[str, str]]:
    """Yield the versions of the packages that shaped the file."""
    for package in _RECORDED:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
    yield "libjpeg-turbo", features.version("libjpeg_turbo") or "unknown"
