"""Index of a JPEG's segments, by which a reader decodes and checks only those that a crop touches.

A conversion puts a restart marker after every few MCUs, the smallest units of a JPEG, an interval that divides the MCUs
of a row. The codes between two markers, a segment, can be decoded without those before them. The index says where each
segment is and has its checksum. It is an application segment (APP11) at the start of the JPEG, which others skip:

    place  bytes     content, numbers little-endian
    6      8         ``MAGIC``
    14     4         place of the frame's height and width in the JPEG
    18     4         place of the first segment
    22     4         interval, MCUs
    26     4         N, segments
    30     N * 2     length of each segment, without its marker
    ...    N * 4     Adler-32 of each segment
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

from mrmae_ds.units import first_few

MAGIC = b"MRMAESEG"
NUMBERS, LENGTHS = 14, 30  # places in an indexed JPEG
_MOST = (0xFFFF - LENGTHS) // 6  # segments whose index fits into an application segment
_LEAST = 512  # pixels of a segment: with fewer, markers and index would be a tenth of the file
_SIDE = 8  # of a block of coefficients, pixels
# Width and height of a chroma sample in luma samples, of all kinds that libturbojpeg decodes to planes.
SAMPLINGS = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)}
_SOI, _APP0, _APP11 = b"\xff\xd8", 0xE0, b"\xff\xeb"
_BASELINE, _FRAMES = (0xC0, 0xC1), (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # also progressive, and both arithmetic
_SCAN, _RESTART, _JFIF = 0xDA, 0xDD, b"JFIF\0"


class Header(NamedTuple):
    """Header of a JPEG, gray or with chroma sampled in one of the usual ways.

    Attributes:
        frame: place of the frame's height and width.
        scan: place of the codes.
        interval: MCUs between restart markers; 0 without them.
        size: width and height, pixels.
        mcu: width and height of an MCU, pixels.
        plain: True for a baseline JPEG that every decoder takes for gray or YCbCr, of one scan.
    """

    frame: int
    scan: int
    interval: int
    size: tuple[int, int]
    mcu: tuple[int, int]
    plain: bool

    @property
    def blocks(self) -> tuple[int, int]:
        """MCUs in a row and in a column."""
        (width, height), (wide, high) = self.size, self.mcu
        return -(-width // wide), -(-height // high)


def read_header(jpeg: bytes) -> Header | None:
    """Read the header of a JPEG; None if it is of another kind, or damaged."""
    try:
        return _read_header(jpeg)
    except (struct.error, IndexError):
        return None


def _read_header(jpeg: bytes) -> Header | None:
    place, frame, interval, components = 2, 0, 0, 0
    baseline = jfif = False
    size, mcu = (0, 0), (0, 0)
    while jpeg[place] == 0xFF:
        kind = jpeg[place + 1]
        if kind == 0xFF:  # a fill byte
            place += 1
            continue
        length = int.from_bytes(jpeg[place + 2 : place + 4], "big")
        content = jpeg[place + 4 : place + 2 + length]
        if kind == _APP0:
            jfif |= content.startswith(_JFIF)
        elif kind == _RESTART:
            interval = int.from_bytes(content[:2], "big")
        elif kind in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", content)
            luma, *chroma = (divmod(content[7 + 3 * component], 16) for component in range(components))
            if bits != 8 or (components, chroma) not in ((1, []), (3, [(1, 1), (1, 1)])):
                return None
            luma = luma if chroma else (1, 1)
            if luma not in SAMPLINGS:
                return None
            frame, size, mcu = place + 5, (width, height), (_SIDE * luma[0], _SIDE * luma[1])
            baseline = kind in _BASELINE
        elif kind == _SCAN:
            plain = baseline and content[0] == components and (jfif or components == 1)
            return Header(frame, place + 2 + length, interval, size, mcu, plain) if frame else None
        place += 2 + length
    return None


def describe_damage(jpeg: bytes) -> str:
    """Return which segments of a JPEG do not have their checksums; "" if it has no index.

    Args:
        jpeg: one whose own checksum is wrong, so that something in it is.
    """
    header = read_header(jpeg)
    if jpeg[NUMBERS - len(MAGIC) : NUMBERS] != MAGIC:
        return ""
    scan, interval, count = struct.unpack_from("<3I", jpeg, NUMBERS + 4)
    if header is None or (header.scan, header.interval) != (scan, interval) or len(jpeg) < LENGTHS + 6 * count:
        return "in its header"
    lengths = struct.unpack_from(f"<{count}H", jpeg, LENGTHS)
    checksums = struct.unpack_from(f"<{count}I", jpeg, LENGTHS + 2 * count)
    across, (wide, high) = header.blocks[0] // interval, (header.mcu[0] * interval, header.mcu[1])
    damaged = []
    for segment, (length, checksum) in enumerate(zip(lengths, checksums, strict=True)):
        if zlib.adler32(jpeg[scan : scan + length]) != checksum:
            left, top = segment % across * wide, segment // across * high
            place = f"columns {left} to {left + wide - 1}, rows {top} to {top + high - 1}"
            damaged.append(f"in segment {segment} of {count} ({place})")
        scan += length + 2
    return first_few(damaged, 4) or "in its header"


def choose_interval(blocks: tuple[int, int], mcu: tuple[int, int]) -> int:
    """Return the number of MCUs between restart markers, a divisor of the MCUs of a row.

    It is the smallest of at least two MCUs and 512 pixels, and so large that the index can list the segments; the whole
    row if there is none. The narrower the segments, the less is decoded beside a crop.

    Args:
        blocks: MCUs in a row and in a column.
        mcu: width and height of an MCU, pixels.
    """
    across, down = blocks
    least = max(2, _LEAST // (mcu[0] * mcu[1]))
    divisors = [count for count in range(least, across + 1) if across % count == 0]
    return next((count for count in divisors if across // count * down <= _MOST), across)


def add_index(jpeg: bytes) -> bytes:
    """Insert the index into a JPEG; one that has no restart markers, or cannot be indexed, is returned as it is."""
    header = read_header(jpeg)
    if header is None or not header.plain or not header.interval or not jpeg.endswith(b"\xff\xd9"):
        return jpeg
    segments = re.split(rb"\xff[\xd0-\xd7]", jpeg[header.scan : -2])
    across, down = header.blocks
    longest = max(map(len, segments))
    expected = across // header.interval * down
    if across % header.interval or len(segments) != expected or expected > _MOST or longest > 0xFFFF:
        return jpeg
    length = 6 * len(segments) + LENGTHS
    moved = length - len(_SOI)
    numbers = struct.pack("<4I", header.frame + moved, header.scan + moved, header.interval, len(segments))
    numbers += struct.pack(f"<{len(segments)}H", *map(len, segments))
    numbers += struct.pack(f"<{len(segments)}I", *map(zlib.adler32, segments))
    return _SOI + _APP11 + struct.pack(">H", length - 4) + MAGIC + numbers + jpeg[len(_SOI) :]
