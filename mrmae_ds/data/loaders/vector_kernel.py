"""Instructions that numba's compiler does not find by itself, for the kernels: of vectors, and an atomic one.

Each function is a few lines of LLVM's code, which runs on every CPU. Only ``_multiply_pairs`` names an instruction of
x86, since LLVM does not recognize it.

An array of pairs has two int16 in each int32, the first in its low half: samples of two neighboring rows or columns,
or the weights of these. One instruction multiplies 16 pairs by a pair of weights and adds both products.

The functions do not check bounds. They read and write whole vectors: arrays extend ``LANES`` elements beyond the last
one that is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # int32 in a vector of AVX-512; LLVM splits it on other CPUs
SIDE = 8  # of a block that is transposed
_UNROLLED = 6  # pairs of taps
_BYTE, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def checksum_of_files(*modules: ModuleType) -> int:
    """Return a checksum of modules' files, for a variable of the function that encloses a kernel.

    Numba's cache on disk notices changes of the kernel's own file and of the enclosing function's variables, but not of
    what other files define.
    """
    return zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in modules))


def _shuffle(builder: ir.IRBuilder, one: ir.Value, two: ir.Value, places: Sequence[int]) -> ir.Value:
    """Select elements of two vectors, counted through both."""
    mask = ir.Constant(ir.VectorType(_INT32, len(places)), [ir.Constant(_INT32, place) for place in places])
    return builder.shuffle_vector(one, two, mask)


def _spread(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    """Return a vector of equal elements."""
    vector = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return _shuffle(builder, builder.insert_element(vector, value, _INT32(0)), vector, [0] * count)


def _place(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, bytes_each: int, kind: ir.Type) -> ir.Value:
    """Return the pointer to an element of an array."""
    return builder.inttoptr(builder.add(address, builder.mul(index, _INT64(bytes_each))), kind.as_pointer())


def _multiply_pairs(context: Any, builder: ir.IRBuilder, one: ir.Value, two: ir.Value) -> ir.Value:
    """Multiply int16 [2 * LANES] and add neighboring products, int32 [LANES]."""
    features = context.codegen().magic_tuple()[2].split(",")  # of the CPU that numba compiles for
    count = 2 * LANES
    for feature, name, width in (("+avx512bw", "avx512.pmaddw.d.512", 32), ("+avx2", "avx2.pmadd.wd", 16)):
        if feature in features:
            part, result = ir.VectorType(_INT16, width), ir.VectorType(_INT32, width // 2)
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(result, [part, part]), f"llvm.x86.{name}"
            )
            if width == count:
                return builder.call(function, [one, two])
            halves = [
                builder.call(function, [_shuffle(builder, vector, vector, places) for vector in (one, two)])
                for places in (range(width), range(width, count))
            ]
            return _shuffle(builder, halves[0], halves[1], range(LANES))
    wide, products = ir.VectorType(_INT32, LANES), []
    for parity in (0, 1):
        factors = [_shuffle(builder, vector, vector, range(parity, count, 2)) for vector in (one, two)]
        products.append(builder.mul(*(builder.sext(factor, wide) for factor in factors)))
    return builder.add(*products)


def _make_filter(bits: int) -> Callable[..., None]:
    """Return ``filter_pairs`` with results of ``bits`` bits."""

    @intrinsic
    def filter_pairs(typing, source, step, weights, every, pairs, target, count, half, shift):  # type: ignore[no-untyped-def]
        """Filter by pairs of taps: ``target[x] = (half + sum of source[j, x] * weights[j]) >> shift``.

        Args:
            typing: of numba.
            source: address of the pairs, int32 [pairs, count].
            step: elements from one j to the next.
            weights: address of the pairs of weights, int32 [pairs].
            every: elements from one of them to the next.
            pairs: number of j.
            target: address of the results.
            count: number of x.
            half: int32.
            shift: int32.
        """
        arguments = [types.uint64, types.int64, types.uint64, types.int64, types.int64]
        arguments += [types.uint64, types.int64, types.int32, types.int32]

        def generate(context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[ir.Value]) -> ir.Value:
            source, step, weights, every, pairs, target, count, half, shift = values
            start, shifts = _spread(builder, half, LANES), _spread(builder, shift, LANES)
            kind, element = ir.VectorType(_INT16, 2 * LANES), ir.IntType(bits)

            def load_factors(index: ir.Value) -> ir.Value:
                pair = builder.load(_place(builder, weights, builder.mul(index, every), 4, _INT32))
                return builder.bitcast(_spread(builder, pair, LANES), kind)

            def add_products(total: ir.Value, x: ir.Value, index: ir.Value, factors: ir.Value) -> ir.Value:
                place = _place(builder, source, builder.add(x, builder.mul(index, step)), 4, kind)
                products = _multiply_pairs(context, builder, builder.load(place, align=4), factors)
                return builder.add(total, products)

            def store(total: ir.Value, x: ir.Value) -> None:
                result = builder.ashr(total, shifts)
                if bits < _INT32.width:
                    result = builder.trunc(result, ir.VectorType(element, LANES))
                builder.store(result, _place(builder, target, x, bits // 8, result.type), align=bits // 8)

            def each_vector() -> Any:
                return cgutils.for_range_slice(builder, _INT64(0), count, _INT64(LANES), intp=_INT64)

            memory = cgutils.alloca_once(builder, start.type)
            many, after = builder.append_basic_block(), builder.append_basic_block()
            switch = builder.switch(pairs, many)
            for number in range(1, _UNROLLED + 1):  # the usual numbers, without an inner loop
                block = builder.append_basic_block()
                switch.add_case(_INT64(number), block)
                builder.position_at_end(block)
                factors = [load_factors(_INT64(index)) for index in range(number)]
                with each_vector() as (x, _):
                    total = start
                    for index in range(number):
                        total = add_products(total, x, _INT64(index), factors[index])
                    store(total, x)
                builder.branch(after)
            builder.position_at_end(many)
            with each_vector() as (x, _):
                builder.store(start, memory)
                with cgutils.for_range(builder, pairs, intp=_INT64) as loop:
                    total = add_products(builder.load(memory), x, loop.index, load_factors(loop.index))
                    builder.store(total, memory)
                store(builder.load(memory), x)
            builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*arguments), generate

    return filter_pairs


filter_to_int16, filter_to_int32 = _make_filter(16), _make_filter(32)


def _load_transposed(builder: ir.IRBuilder, source: ir.Value, step: ir.Value) -> list[ir.Value]:
    """Load a block, int32 [SIDE, SIDE], as its columns; ``step``: elements from one row to the next."""
    kind = ir.VectorType(_INT32, SIDE)
    rows = [
        builder.load(_place(builder, source, builder.mul(step, _INT64(row)), 4, kind), align=4) for row in range(SIDE)
    ]
    for _ in range(SIDE.bit_length() - 1):  # a perfect shuffle each
        mixed = []
        for row in range(SIDE):
            start = row % 2 * SIDE // 2
            places = [place + part for place in range(start, start + SIDE // 2) for part in (0, SIDE)]
            mixed.append(_shuffle(builder, rows[row // 2], rows[row // 2 + SIDE // 2], places))
        rows = mixed
    return rows


def _transpose_blocks(
    builder: ir.IRBuilder, values: Sequence[ir.Value], unit: int, converted: Callable[[ir.Value], ir.Value]
) -> None:
    """Store the columns of blocks [SIDE, SIDE] as rows.

    Args:
        builder: of the code.
        values: source, step, target, every and count, as of ``transpose``.
        unit: bytes of an element of the target.
        converted: function of a column to what is stored.
    """
    source, step, target, every, count = values
    with cgutils.for_range_slice(builder, _INT64(0), count, _INT64(SIDE), intp=_INT64) as (x, _):
        block = builder.add(source, builder.mul(x, _INT64(4)))
        for row, column in enumerate(_load_transposed(builder, block, step)):
            stored, index = converted(column), builder.mul(every, builder.add(x, _INT64(row)))
            builder.store(stored, _place(builder, target, index, unit, stored.type), align=unit)


_TRANSPOSES = types.void(types.uint64, types.int64, types.uint64, types.int64, types.int64)


@intrinsic
def transpose(typing, source, step, target, every, count):  # type: ignore[no-untyped-def]
    """Transpose int32 [SIDE, count] to [count, SIDE].

    Args:
        typing: of numba.
        source: address.
        step: elements from one row of the source to the next.
        target: address.
        every: elements from one row of the target to the next.
        count: rounded up to a multiple of SIDE.
    """

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        _transpose_blocks(builder, values, 4, lambda column: column)
        return context.get_dummy_value()

    return _TRANSPOSES, generate


@intrinsic
def store_pixels(typing, source, step, target, every, count):  # type: ignore[no-untyped-def]
    """Transpose pixels [SIDE, count], each the low 3 bytes of an int32, to bytes [count, SIDE, 3].

    Args:
        typing: of numba.
        source: address.
        step: elements from one row of the source to the next.
        target: address.
        every: bytes from one row of the target to the next.
        count: a multiple of SIDE.
    """
    used = [place for place in range(4 * SIDE) if place % 4 < 3]

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        def low_bytes(column: ir.Value) -> ir.Value:
            pixels = builder.bitcast(column, ir.VectorType(_BYTE, 4 * SIDE))
            return _shuffle(builder, pixels, pixels, used)

        _transpose_blocks(builder, values, 1, low_bytes)
        return context.get_dummy_value()

    return _TRANSPOSES, generate


@intrinsic
def take_next(typing, counter):  # type: ignore[no-untyped-def]
    """Add 1 to a counter, int64, and return what it was: each thread gets a number of its own.

    Threads that take the images of a batch in this way end within one image of each other. If these were distributed
    beforehand, all would wait for the one with the largest images.

    Args:
        typing: of numba.
        counter: address.
    """

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        place = builder.inttoptr(values[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", place, _INT64(1), "monotonic")

    return types.int64(types.uint64), generate
