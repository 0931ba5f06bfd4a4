"""Segment part of the JPEG kernel: the JPEG of those segments that a box touches, and checksums."""

from __future__ import annotations

import numpy as np
from numba import njit

from mrmae_ds.data.beton.segments import LENGTHS, MAGIC, NUMBERS

_MAGIC = int.from_bytes(MAGIC, "little")
_PRIME, _BLOCK = 65521, 4096  # Adler-32's modulus; bytes whose sums fit into 32 bits


@njit(nogil=True)
def adler32(content):  # type: ignore[no-untyped-def]
    """Compute zlib's Adler-32 of bytes, uint8 [n], by sums that the compiler vectorizes."""
    one, two = 1, 0
    for start in range(0, content.size, _BLOCK):
        block = content[start : start + _BLOCK]
        plain, weighted = np.uint32(0), np.uint32(0)
        for place in range(block.size):
            value = np.uint32(block[place])
            plain = np.uint32(plain + value)
            weighted = np.uint32(weighted + np.uint32(np.uint32(block.size - place) * value))
        two = (two + block.size * one + np.int64(weighted)) % _PRIME
        one = (one + np.int64(plain)) % _PRIME
    return two * 65536 + one


@njit(nogil=True)
def _number(content, place, size):  # type: ignore[no-untyped-def]
    """Read an unsigned little-endian number of ``size`` bytes at ``place`` of ``content``, uint8 [n]."""
    value = np.int64(0)
    for byte in range(size):
        value |= np.int64(content[place + byte]) << (8 * byte)
    return value


@njit(nogil=True)
def has_index(jpeg):  # type: ignore[no-untyped-def]
    """Return True if a JPEG, uint8 [n], has an index of its segments."""
    return jpeg.size >= LENGTHS and _number(jpeg, NUMBERS - len(MAGIC), len(MAGIC)) == _MAGIC


@njit(nogil=True)
def cut(jpeg, checksum, sides, mcu, region, part):  # type: ignore[no-untyped-def]
    """Make a JPEG of the segments that a region touches.

    Each of them is checked by its Adler-32 in the index. These and the header are checked by the JPEG's Adler-32, which
    they add up to: a change of either is noticed, and so is another image in this place.

    Args:
        jpeg: uint8 [n], with an index.
        checksum: its Adler-32; -1 if it is unknown.
        sides: height and width, pixels.
        mcu: height and width, pixels.
        region: top, left, bottom and right, pixels.
        part: uint8 [n + 2], written.

    Returns:
        The length of the part, 0 if anything is damaged, and its top, left, height and width in pixels.
    """
    damaged = (0, 0, 0, 0, 0)
    frame, scan = _number(jpeg, NUMBERS, 4), _number(jpeg, NUMBERS + 4, 4)
    interval, count = _number(jpeg, NUMBERS + 8, 4), _number(jpeg, NUMBERS + 12, 4)
    sums = LENGTHS + 2 * count
    rest = sums + 4 * count
    if not rest <= frame < frame + 4 <= scan <= jpeg.size or interval == 0:
        return damaged
    high, wide = mcu[0], mcu[1] * interval
    across = -(-sides[1] // wide)
    if count != across * -(-sides[0] // high):
        return damaged
    first, above = region[1] // wide, region[0] // high
    last, below = -(-region[3] // wide), -(-region[2] // high)
    height, width = min(sides[0], below * high) - above * high, min(sides[1], last * wide) - first * wide
    part[:2] = jpeg[:2]
    end = 2 + scan - rest
    part[2:end] = jpeg[rest:scan]
    frame += 2 - rest
    part[frame], part[frame + 1], part[frame + 2], part[frame + 3] = height >> 8, height & 255, width >> 8, width & 255
    total = adler32(jpeg[:scan])
    one, two = total & 0xFFFF, total >> 16
    place, copied = scan, 0
    for segment in range(count):
        length, own = _number(jpeg, LENGTHS + 2 * segment, 2), _number(jpeg, sums + 4 * segment, 4)
        if above <= segment // across < below and first <= segment % across < last:
            if place + length + 2 > jpeg.size or end + length + 2 > part.size:
                return damaged
            codes = jpeg[place : place + length]
            if adler32(codes) != own:
                return damaged
            part[end : end + length] = codes
            part[end + length], part[end + length + 1] = 0xFF, 0xD0 + copied % 8
            end += length + 2
            copied += 1
        place += length + 2
        # The Adler-32 of what precedes and of this segment, then of its marker's two bytes.
        two += length * (one - 1) + (own >> 16)
        one = (one - 1 + (own & 0xFFFF) + 0xFF) % _PRIME
        two += one
        one = (one + (0xD9 if segment == count - 1 else 0xD0 + segment % 8)) % _PRIME
        two = (two + one) % _PRIME
    if place != jpeg.size or (checksum >= 0 and checksum != two * 65536 + one):
        return damaged
    part[end - 1] = 0xD9  # the end of the image in place of the last restart marker
    return end, above * high, first * wide, height, width
