"""Decoding of any image file to RGB. Unusual formats are converted and reported; unreadable files raise ImageError."""

from __future__ import annotations

import io
import logging
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageChops, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from mrmae_ds.data.convert.options import WriteOptions

logger = logging.getLogger(__name__)

# Not all that Pillow opens: its EPS reader runs Ghostscript on the file's content, whatever the file's name.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_DARK = "16-bit, but dark"  # the whole image below an eighth of white
_DARK_LIMIT = 0xFFFF // 8
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """Raised for an image that cannot be used; the message is the reason."""


def open_image(path: str | Path) -> Image.Image:
    """Open an image file by its content, regardless of its name, without decoding it.

    Args:
        path: the file.

    Returns:
        The image, which still reads from the file.

    Raises:
        ImageError: if it is not a readable image.
        OSError: if there is no such file.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a regular file")  # opening a pipe would block forever
    if status.st_size == 0:
        raise ImageError("empty file")
    return _open(path)


def open_content(content: bytes) -> Image.Image:
    """Open the content of an image file without decoding it; see ``open_image``."""
    if not content:
        raise ImageError("empty file")
    return _open(io.BytesIO(content))


def _open(source: str | Path | io.BytesIO) -> Image.Image:
    Image.init()
    try:
        return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        if isinstance(source, io.BytesIO):
            head = source.getvalue()[:12]
        else:
            with open(source, "rb") as file:
                head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            raise ImageError("HEIC, which Pillow cannot read: convert it to JPEG") from None
        kinds = ", ".join(FORMATS)
        raise ImageError(
            f"no image, of a format that Pillow cannot read, or damaged at its start (tried {kinds})"
        ) from None


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Make Pillow refuse images of more pixels, and truncated ones, in this process within the block."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def reason(error: Exception, max_pixels: int) -> str:
    """Return the reason why an image cannot be used, on one line."""
    if isinstance(error, _BOMB):
        return f"more than {max_pixels:,} pixels (--max-pixels): {error}"
    text = (
        str(error) if isinstance(error, ImageError) else f"{type(error).__name__}: {str(error) or 'cannot be decoded'}"
    )
    return " ".join(text.split())[:500]


def read_rgb(path: Path) -> Image.Image:
    """Decode an image file to RGB as it is stored: not rotated, as annotations are made.

    Raises:
        ImageError: if it has more pixels than conversion takes by default, or is damaged.
        OSError: if there is no such file.
    """

    def convert(image: Image.Image) -> Image.Image:
        image.load()
        return _rgb(image, WriteOptions.background, []).copy()

    return _decode(path, convert)


def read_upright(path: Path, max_side: int | None = None) -> Image.Image:
    """Decode an image file to RGB, rotated by its EXIF orientation as viewers show it.

    Args:
        path: of the file.
        max_side: pixels; a longer side is reduced to it, as in :func:`to_rgb`. None keeps the size.

    Raises:
        ImageError: as :func:`read_rgb`.
        OSError: as :func:`read_rgb`.
    """
    limit, background = WriteOptions.max_pixels, WriteOptions.background

    def convert(image: Image.Image) -> Image.Image:
        side = max_side or max(image.size)
        return to_rgb(image, max_side=side, max_pixels=limit, background=background)[0]

    return _decode(path, convert)


def _decode(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Open an image file and convert it; all that Pillow raises for a damaged one is an ImageError."""
    limit = WriteOptions.max_pixels
    try:
        with pixel_limit(limit), open_image(path) as image:
            return convert(image)
    except _BOMB:
        raise ImageError(f"more than {limit:,} pixels") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ImageError(reason(error, limit)) from None


def to_rgb(image: Image.Image, *, max_side: int, max_pixels: int, background: str) -> tuple[Image.Image, list[str]]:
    """Decode an image to upright 8-bit RGB.

    Args:
        image: of any mode; a large JPEG that is not loaded yet is decoded at a fraction of its size.
        max_side: pixels; a longer side is reduced to it (bicubic, antialiased), the other one in proportion, to at
            least 1.
        max_pixels: larger images are refused before they are decoded.
        background: color behind transparent pixels, as Pillow names colors.

    Returns:
        The image, and the conversions that it needed: "CMYK", "16-bit", ...

    Raises:
        ImageError: if it is too large or holds no finite pixels.
        Exception: any that Pillow raises for a damaged file.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height}: more than {max_pixels:,} pixels (--max-pixels)")
    kinds: list[str] = []
    ratio = max_side / max(width, height)
    if ratio < 1:
        kinds.append("reduced")
        width, height = (max(1, round(side * ratio)) for side in (width, height))
        # A JPEG decoder reduces by 2, 4 or 8 at almost no cost; bicubic resizing does the last factor of 2.
        image.draft(None, (2 * width, 2 * height))
    image.load()
    rgb = _rgb(image, background, kinds)
    # Always a new image: the search for more frames may replace the pixels of the old one.
    rgb = rgb.resize((width, height), Image.Resampling.BICUBIC) if ratio < 1 else rgb.copy()
    rgb = _upright(rgb, image, kinds)
    if _several_frames(image):
        kinds.append("several frames")
    return rgb, kinds


def _rgb(image: Image.Image, background: str, kinds: list[str]) -> Image.Image:
    """Convert any mode to RGB, appending the conversion to ``kinds``."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image), kinds)
    if mode in ("I", "F"):
        return _from_32_bits(np.asarray(image), _has_16_bits(image), kinds)
    if image.has_transparency_data:
        kinds.append("transparent")
        foreground = image if mode == "RGBA" else image.convert("RGBA")
        rgb = Image.new("RGB", image.size, background)
        rgb.paste(foreground, mask=foreground)
        return rgb
    if mode == "RGB":
        return image
    kinds.append({"L": "gray", "1": "1-bit", "P": "palette"}.get(mode, mode))
    if mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow treats every CMYK JPEG as Adobe's inverted kind; without Adobe's marker it is a plain one.
        image = ImageChops.invert(image)
    return image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    """Return True if the file of an image of mode I has 16 bits per pixel, which Pillow opens as 32."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # signed
        return tuple(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ())) == (16,)
    return image.format in ("PNG", "PPM", "JPEG2000")  # none of them has 32


def _from_16_bits(values: npt.NDArray[Any], kinds: list[str]) -> Image.Image:
    """Divide by 257 and round, as RGB: 65,535 becomes 255."""
    kinds += ["16-bit", _DARK] if values.max() <= _DARK_LIMIT else ["16-bit"]
    scaled = values.astype(np.uint32)
    scaled += 128
    scaled //= 257
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def warn_of_dark(path: Path, kinds: Mapping[str, int]) -> None:
    """Print a warning if 16-bit images are dark, as 12-bit values in 16 bits are.

    Args:
        path: the file that they were written to.
        kinds: number of conversions by kind.
    """
    if dark := kinds.get(_DARK, 0):
        logger.warning(
            "%s: 16-bit images that are nowhere brighter than an eighth of white, 65,535: %s of %s; if their white is "
            "another (4,095 of 12 bits), scale the values before conversion",
            path,
            f"{dark:,}",
            f"{kinds['16-bit']:,}",
        )


def _from_32_bits(values: npt.NDArray[Any], of_16_bits: bool, kinds: list[str]) -> Image.Image:
    """Convert values of 16-bit files as such; stretch others, and negative ones, from the least to the greatest."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ImageError("pixels that are not finite")
    if of_16_bits and low >= 0:
        return _from_16_bits(values, kinds)
    kinds.append("32-bit")
    stretched = values.astype(np.float64)
    stretched -= low
    stretched *= 255 / max(high - low, np.finfo(float).tiny)
    return Image.fromarray(np.rint(stretched, out=stretched).astype(np.uint8)).convert("RGB")


def _upright(rgb: Image.Image, image: Image.Image, kinds: list[str]) -> Image.Image:
    """Rotate by the EXIF orientation of ``image``. Pillow rotates TIFF and AVIF itself while loading."""
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged record raises anything; the pixels are still good
        kinds.append("unreadable EXIF")
        return rgb
    if not isinstance(orientation, int) or not 2 <= orientation <= 8:
        return rgb
    kinds.append("rotated")
    marker = Image.Exif()
    marker[ExifTags.Base.Orientation] = orientation
    rgb.info = {"exif": marker.tobytes()}
    return ImageOps.exif_transpose(rgb)


def _several_frames(image: Image.Image) -> bool:
    """Return True if there are frames after the first, the one that is used. Advances in the file."""
    try:
        return getattr(image, "n_frames", 1) > 1
    except Exception:  # a later frame is damaged; the first is not
        return True
