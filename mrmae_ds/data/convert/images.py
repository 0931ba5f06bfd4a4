"""Any image to RGB: what is odd is converted and named, what cannot be read is refused with a reason."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError

# Not all that Pillow opens: its EPS reader, for one, runs Ghostscript on the file's content, whatever the file's name.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that is not taken; the message alone is the reason."""


def open_image(path: str | Path) -> Image.Image:
    """Open an image file by its content, whatever its name says. Nothing is decoded yet.

    Raises:
        ImageError: if it is no image that can be read here. OSError: if there is no such file.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a regular file")  # opening a pipe would wait for ever
    if status.st_size == 0:
        raise ImageError("empty file")
    Image.init()
    try:
        return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            raise ImageError("HEIC, which Pillow cannot read: convert it to JPEG") from None
        kinds = ", ".join(FORMATS)
        raise ImageError(
            f"no image, of a kind Pillow cannot read, or damaged at its beginning (read as {kinds})"
        ) from None


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Within the block, Pillow refuses images of more pixels, and truncated ones, in this process."""
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
    """Why an image is not taken, on one line."""
    if isinstance(error, _BOMB):
        return f"more than {max_pixels:,} pixels (--max-pixels): {error}"
    text = (
        str(error) if isinstance(error, ImageError) else f"{type(error).__name__}: {str(error) or 'cannot be decoded'}"
    )
    return " ".join(text.split())[:500]


def to_rgb(image: Image.Image, *, max_side: int, max_pixels: int, background: str) -> tuple[Image.Image, list[str]]:
    """Decode an image and make it an upright RGB one of 8 bits.

    Args:
        image: of any mode; a large JPEG that is not loaded yet is decoded at a fraction of its size.
        max_side: a longer side is reduced to this many pixels (bicubic, antialiased), the other one in proportion,
            to 1 at least.
        max_pixels: more are refused before they are decoded.
        background: color shown through transparent pixels, as Pillow names colors.

    Returns the image, and what was odd about it: "CMYK", "16-bit", ...

    Raises:
        ImageError, or whatever Pillow raises for a damaged file.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height}: more than {max_pixels:,} pixels (--max-pixels)")
    kinds: list[str] = []
    ratio = max_side / max(width, height)
    if ratio < 1:
        kinds.append("reduced")
        width, height = (max(1, round(side * ratio)) for side in (width, height))
        # A JPEG decoder reduces by 2, 4 or 8 nearly for nothing; twice the size wanted leaves bicubic its part.
        image.draft(None, (2 * width, 2 * height))
    image.load()
    rgb = _rgb(image, background, kinds)
    # A new image in any case: looking for more frames may replace the pixels of the old one.
    rgb = rgb.resize((width, height), Image.Resampling.BICUBIC) if ratio < 1 else rgb.copy()
    rgb = _upright(rgb, image, kinds)
    if _several_frames(image):
        kinds.append("several frames")
    return rgb, kinds


def _rgb(image: Image.Image, background: str, kinds: list[str]) -> Image.Image:
    """All modes to RGB; see ``to_rgb``."""
    mode = image.mode
    if mode.startswith("I;16"):
        kinds.append("16-bit")
        return _from_16_bits(np.asarray(image))
    if mode in ("I", "F"):
        return _from_32_bits(np.asarray(image), mode, kinds)
    if image.has_transparency_data:
        kinds.append("transparent")
        above = image if mode == "RGBA" else image.convert("RGBA")
        rgb = Image.new("RGB", image.size, background)
        rgb.paste(above, mask=above)
        return rgb
    if mode == "RGB":
        return image
    kinds.append({"L": "gray", "1": "1-bit", "P": "palette"}.get(mode, mode))
    if mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for Adobe's inverted kind; without Adobe's marker it is a plain one.
        image = ImageChops.invert(image)
    return image.convert("RGB")


def _from_16_bits(values: np.ndarray) -> Image.Image:
    """Divided by 257, rounded, as RGB: 65,535 becomes 255."""
    scaled = values.astype(np.uint32)
    scaled += 128
    scaled //= 257
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _from_32_bits(values: np.ndarray, mode: str, kinds: list[str]) -> Image.Image:
    """Integers within 16 bits are taken for such; other values are stretched from the least to the greatest."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ImageError("pixels that are no numbers")
    if mode == "I" and low >= 0 and high <= 0xFFFF:
        kinds.append("16-bit")
        return _from_16_bits(values)
    kinds.append("32-bit")
    stretched = values.astype(np.float64)
    stretched -= low
    stretched *= 255 / max(high - low, np.finfo(float).tiny)
    return Image.fromarray(np.rint(stretched, out=stretched).astype(np.uint8)).convert("RGB")


def _upright(rgb: Image.Image, image: Image.Image, kinds: list[str]) -> Image.Image:
    """Turned as the EXIF record of ``image`` says. Pillow has turned TIFF and AVIF while loading."""
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged record raises anything, and is no reason to lose the pixels
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
    """Whether there is more than the first frame, which is the one taken. Moves on in the file."""
    try:
        return getattr(image, "n_frames", 1) > 1
    except Exception:  # a later frame is damaged; the first is not
        return True
