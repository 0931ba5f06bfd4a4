"""One image of every unusual kind, and the expected result of its conversion."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from tests.support.sample_data import photograph

SIZE = (96, 72)  # wider than high, so that a rotation is visible


class Odd(NamedTuple):
    """Unusual image: ``make`` writes its file; ``expected`` is its conversion, or a part of the error about it."""

    make: Callable[[Path], object]
    expected: Image.Image | str
    kinds: tuple[str, ...] = ()
    tolerance: float = 4.0  # mean difference from ``expected``, of 255 levels


def plain() -> Image.Image:
    """Return the base image, RGB and smooth, so that libraries resize it alike."""
    small = photograph().crop((60, 40, 460, 340)).resize((24, 18), Image.Resampling.LANCZOS)
    return small.resize(SIZE, Image.Resampling.BICUBIC)


def _saved(format: str | None = None, **options: object) -> Callable[[Path], object]:
    return lambda path: plain().save(path, format, **options)


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _cmyk() -> Image.Image:
    """Return the plain image in CMYK without black, as complements."""
    return Image.merge("CMYK", [*ImageOps.invert(plain()).split(), Image.new("L", SIZE)])


def _lab() -> Image.Image:
    """Return the plain image in CIE L*a*b*."""
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(plain(), *profiles, outputMode="LAB")
    assert converted is not None
    return converted


def _plain_cmyk_jpeg() -> bytes:
    """Write a CMYK JPEG of uninverted values without Adobe's marker."""
    content = _encoded(_cmyk().point(lambda value: 255 - value), "JPEG", quality=95)
    place = content.index(b"\xff\xee")
    length = 2 + struct.unpack(">H", content[place + 2 : place + 4])[0]
    return content[:place] + content[place + length :]


RAMP = np.tile(np.linspace(0, 65535, SIZE[0]).astype(np.uint16), (SIZE[1], 1))
RAMP_8 = Image.fromarray(np.rint(RAMP / 257).astype(np.uint8)).convert("RGB")


def _deep_rgb(path: Path) -> None:
    """Write 16 bits per channel by OpenCV; Pillow cannot."""
    deep = np.asarray(plain()).astype(np.uint16) * 257
    assert cv2.imwrite(str(path), deep[:, :, ::-1])


def _alpha() -> Image.Image:
    """Return an alpha channel, opaque in the left half and transparent in the right one."""
    alpha = Image.new("L", SIZE, 0)
    alpha.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
    return alpha


def _on_white(image: Image.Image) -> Image.Image:
    half = Image.new("RGB", SIZE, "white")
    half.paste(image.convert("RGB").crop((0, 0, SIZE[0] // 2, SIZE[1])))
    return half


def _with_alpha(mode: str) -> Image.Image:
    image = plain().convert("L") if mode == "LA" else plain()
    image.putalpha(_alpha())
    return image


def _palette() -> Image.Image:
    return plain().quantize(200)


def _transparent_palette() -> tuple[bytes, Image.Image]:
    """Return a palette PNG with a transparent right half, and the image on white."""
    image = plain().quantize(200)
    image.putpalette((image.getpalette() or []) + [90, 180, 0], "RGB")
    last = len(image.getpalette() or []) // 3 - 1
    image.paste(last, (SIZE[0] // 2, 0, *SIZE))
    return _encoded(image, "PNG", transparency=last), _on_white(image)


def _turned(orientation: int) -> bytes:
    """Write a JPEG that EXIF orientation turns into the plain image."""
    stored = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    image = plain()
    for turn in stored:
        image = image.transpose(turn)
    return _encoded(image, "JPEG", quality=95, exif=_exif(orientation))


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def _odd_exif(kind: int, value: bytes) -> bytes:
    """Return an EXIF record whose orientation has the wrong type, by TIFF's number of the type."""
    entry = struct.pack(">HHI", ExifTags.Base.Orientation, kind, 1) + value.ljust(4, b"\0")
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


_XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def _animated(format: str, **options: object) -> bytes:
    others = [Image.new("RGB", SIZE, color) for color in ("red", "blue")]
    return _encoded(plain(), format, save_all=True, append_images=others, **options)


def _png(size: tuple[int, int], color: int, pixels: bytes, text: bytes = b"") -> bytes:
    """Return an 8-bit PNG with any header; ``text`` is a compressed comment."""
    header = struct.pack(">IIBBBBB", *size, 8, color, 0, 0, 0)
    parts = [(b"IHDR", header), (b"zTXt", b"comment\0\0" + zlib.compress(text))]
    chunks = b""
    for kind, content in (*parts, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        checksum = zlib.crc32(kind + content)
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return b"\x89PNG\r\n\x1a\n" + chunks


def _tiff(pixels: bytes, **changes: int) -> bytes:
    """Return a little-endian 8-bit gray TIFF of 96 x 72.

    Args:
        changes: values of tags, by ``t`` and their number; ``next`` is the offset of the next page.
    """
    tags = {256: SIZE[0], 257: SIZE[1], 258: 8, 259: 1, 262: 1, 273: 122, 277: 1, 278: SIZE[1], 279: len(pixels)}
    following = changes.pop("next", 0)
    tags |= {int(tag[1:]): value for tag, value in changes.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following)
    return head.ljust(122, b"\0") + pixels


def _thin(size: tuple[int, int]) -> Image.Image:
    return plain().resize(size, Image.Resampling.BOX)


def _floats() -> np.ndarray:
    return (RAMP.astype(np.float32) - 7000) / 100


_PNG = _encoded(plain(), "PNG")
_JPEG = _encoded(plain(), "JPEG", quality=95)
_SEE_THROUGH = _transparent_palette()
_GRAY = plain().convert("L")
_BITS = plain().convert("1")
_MANY = ("several frames",)

# MAX_SIDE is what the tests write with; the limit of pixels is below the size of the last images.
MAX_SIDE, MAX_PIXELS = 512, 2_000_000
ODD: dict[str, Odd] = {
    "empty.jpg": Odd(_bytes(b""), "empty file"),
    "text.jpg": Odd(_bytes(b"Not an image, whatever its name says.\n" * 9), "no image"),
    "truncated.jpg": Odd(_bytes(_JPEG[:-400]), "truncated"),
    "truncated.png": Odd(_bytes(_PNG[: len(_PNG) // 2]), "OSError|SyntaxError|truncated"),
    "headless.png": Odd(_bytes(_PNG[:6]), "no image, of a format .*, or damaged at its start"),
    "phone.heic": Odd(_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(100)), "HEIC"),
    "postscript.jpg": Odd(_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no image"),
    "nan.tif": Odd(lambda path: Image.fromarray(_floats() * np.nan).save(path), "not finite"),
    "bomb.png": Odd(_bytes(_png((60_000, 60_000), 2, bytes(1000))), "more than 2,000,000 pixels"),
    "bomb_in_a_comment.png": Odd(_bytes(_png((1, 1), 2, bytes(4), bytes(10**8))), "ValueError: Decompressed data"),
    "without_palette.png": Odd(_bytes(_png((8, 8), 3, bytes(72))), "AssertionError: cannot be decoded"),
    "no_size.png": Odd(_bytes(_png((0, 8), 2, b"")), "no image"),
    "no_end.jpg": Odd(_bytes(_JPEG[:-2]), "truncated"),
    "twelve_bits.jpg": Odd(_bytes(_JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")), "of a format"),
    "no_height.jpg": Odd(
        _bytes(_JPEG.replace(b"\x08" + struct.pack(">HH", SIZE[1], SIZE[0]), b"\x08\0\0\0\x60")), "no image"
    ),
    "floats_of_three.tif": Odd(
        lambda path: cv2.imwrite(str(path), np.zeros((8, 8, 3), dtype=np.float32)),
        "of a format that Pillow cannot read",
    ),
    "short.tif": Odd(_bytes(_tiff(bytes(100))), "truncated"),
    "far.tif": Odd(_bytes(_tiff(b"", t273=10**9)), "truncated"),
    "billions.tif": Odd(_bytes(_tiff(b"", t256=2**31 - 1)), "more than 2,000,000 pixels"),
    "page.jpg": Odd(_bytes(b"<!DOCTYPE html><html>404 not found</html>"), "no image"),
    "zeros.jpg": Odd(_bytes(bytes(10_000)), "no image"),
    "device.png": Odd(lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "itself.png": Odd(lambda path: path.symlink_to("itself.png"), "symbolic links"),
    "large.png": Odd(lambda path: _thin((1500, 1400)).save(path), "more than 2,000,000 pixels"),
    "dangling.jpg": Odd(lambda path: path.symlink_to("nowhere.jpg"), "FileNotFoundError"),
    "pipe.png": Odd(os.mkfifo, "not a regular file"),
    "cmyk_adobe.jpg": Odd(lambda path: _cmyk().save(path, quality=95), plain(), ("CMYK",)),
    "cmyk_plain.jpg": Odd(_bytes(_plain_cmyk_jpeg()), plain(), ("CMYK",)),
    "cmyk.tif": Odd(lambda path: _cmyk().save(path), plain(), ("CMYK",)),
    "lab.tif": Odd(lambda path: _lab().save(path), plain(), ("LAB",)),
    "gray16.png": Odd(lambda path: Image.fromarray(RAMP).save(path), RAMP_8, ("16-bit",), 1.5),
    "gray16.tif": Odd(lambda path: Image.fromarray(RAMP).save(path), RAMP_8, ("16-bit",), 1.5),
    "gray16.pgm": Odd(lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path), RAMP_8, ("16-bit",), 1.5),
    "gray16_big_endian.tif": Odd(lambda path: Image.fromarray(RAMP.astype(">u2")).save(path), RAMP_8, ("16-bit",), 1.5),
    "rgb16.png": Odd(_deep_rgb, plain()),
    "rgb16.tif": Odd(_deep_rgb, plain()),
    # Values that fit 16, and 8, bits: the file alone says that its pixels have 32.
    "int32.tif": Odd(lambda path: Image.fromarray(RAMP // np.int32(257)).save(path), RAMP_8, ("32-bit",), 1.5),
    "int32_of_15.tif": Odd(lambda path: Image.fromarray(RAMP // np.int32(2)).save(path), RAMP_8, ("32-bit",), 1.5),
    "floats.tif": Odd(lambda path: Image.fromarray(_floats()).save(path), RAMP_8, ("32-bit",), 1.5),
    "palette.png": Odd(lambda path: _palette().save(path), _palette().convert("RGB"), ("palette",), 8),
    "palette_see_through.png": Odd(_bytes(_SEE_THROUGH[0]), _SEE_THROUGH[1], ("transparent",), 8),
    "still.gif": Odd(_saved(), plain().quantize().convert("RGB"), ("palette",), 10),
    "see_through.gif": Odd(lambda path: _with_alpha("RGBA").save(path), _on_white(plain()), ("transparent",), 10),
    "rgba.png": Odd(lambda path: _with_alpha("RGBA").save(path), _on_white(plain()), ("transparent",)),
    "rgba.webp": Odd(lambda path: _with_alpha("RGBA").save(path, quality=95), _on_white(plain()), ("transparent",)),
    "la.png": Odd(lambda path: _with_alpha("LA").save(path), _on_white(_GRAY), ("transparent",)),
    "gray.jpg": Odd(lambda path: _GRAY.save(path, quality=95), _GRAY.convert("RGB"), ("gray",)),
    "bits.png": Odd(lambda path: _BITS.save(path), _BITS.convert("RGB"), ("1-bit",), 40),
    **{f"turned{way}.jpg": Odd(_bytes(_turned(way)), plain(), ("rotated",)) for way in range(2, 9)},
    "turned.png": Odd(
        lambda path: plain().transpose(Image.Transpose.ROTATE_90).save(path, exif=_exif(6)), plain(), ("rotated",)
    ),
    "turned.tif": Odd(lambda path: plain().transpose(Image.Transpose.ROTATE_90).save(path, exif=_exif(6)), plain()),
    "bad_exif.jpg": Odd(_saved(quality=95, exif=b"Exif\0\0nothing of the kind"), plain()),
    "bad_exif.png": Odd(_saved(exif=b"Exif\0\0nothing of the kind"), plain(), ("unreadable EXIF",)),
    "float_exif.jpg": Odd(_saved(quality=95, exif=_odd_exif(11, struct.pack(">f", 6))), plain()),
    "text_exif.jpg": Odd(_saved(quality=95, exif=_odd_exif(2, b"6")), plain()),
    "turned_by_xmp.jpg": Odd(
        lambda path: plain().transpose(Image.Transpose.ROTATE_90).save(path, quality=95, xmp=_XMP),
        plain(),
        ("rotated",),
    ),
    "endless.tif": Odd(_bytes(_tiff(_GRAY.tobytes(), next=8)), _GRAY.convert("RGB"), ("gray",)),
    "negative.tif": Odd(_bytes(_tiff(ImageOps.invert(_GRAY).tobytes(), t262=0)), _GRAY.convert("RGB"), ("gray",)),
    "ten_bits.ppm": Odd(
        _bytes(b"P6 96 72 1023\n" + (np.asarray(plain()).astype(np.uint16) * 4).astype(">u2").tobytes()), plain()
    ),
    "more.jpg": Odd(_bytes(_JPEG + bytes(5000)), plain()),
    "rgb.jpg": Odd(_saved(quality=95, keep_rgb=True), plain()),
    "restarts.jpg": Odd(_saved(quality=95, restart_marker_blocks=1), plain()),
    "stereo.mpo": Odd(_bytes(_animated("MPO", quality=95)), plain(), _MANY),
    'a "name",\nof two lines.png': Odd(_saved(), plain()),
    "animated.gif": Odd(_bytes(_animated("GIF")), plain().quantize().convert("RGB"), (*_MANY,), 12),
    "animated.webp": Odd(_bytes(_animated("WEBP", quality=95)), plain(), _MANY),
    "animated.png": Odd(_bytes(_animated("PNG")), plain(), _MANY),
    "pages.tif": Odd(_bytes(_animated("TIFF")), plain(), _MANY),
    "progressive.jpg": Odd(_saved(quality=95, progressive=True), plain()),
    "png_named.jpg": Odd(_bytes(_PNG), plain()),
    "jpeg_named.png": Odd(_bytes(_JPEG), plain()),
    "wavelets.jp2": Odd(_saved(), plain()),
    "modern.avif": Odd(_saved(quality=95), plain()),
    "BITMAP.BMP": Odd(_saved(), plain()),
    "line.png": Odd(lambda path: _thin((5000, 1)).save(path), _thin((5000, 1)).resize((512, 1), 3), ("reduced",)),
    "pole.jpg": Odd(
        lambda path: _thin((1, 5000)).save(path, quality=95), _thin((1, 5000)).resize((1, 512), 3), ("reduced",), 6
    ),
    "dot.png": Odd(lambda path: Image.new("RGB", (1, 1), "orange").save(path), Image.new("RGB", (1, 1), "orange")),
    "wide.jpg": Odd(
        lambda path: _thin((1600, 1200)).save(path, quality=95),
        _thin((1600, 1200)).resize((512, 384), Image.Resampling.BICUBIC),
        ("reduced",),
    ),
    "größe 日本.png": Odd(_saved(), plain()),
    os.fsdecode(b"bytes\xff.png"): Odd(_saved("PNG"), plain()),
}


def make_odd_images(folder: Path) -> None:
    """Write all of them into ``folder``."""
    folder.mkdir(parents=True)
    for name, odd in ODD.items():
        odd.make(folder / name)
