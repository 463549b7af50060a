"""What the CPU kernels compiled by numba are made of: vectors of 16 float32, loads and stores by address.

A vector has its own numba type, is passed to and from functions, and lies in registers; LLVM splits it where
the CPU's are narrower. `+`, `-` and `*` work on vectors, and a product that is added to something becomes one
fused operation. Addresses are int64, in bytes.

bfloat16 is the upper half of a float32. Two orders are offered: as it lies in memory, and, cheaper to load,
"even and odd": the first vector holds elements 0, 2, ... 30 of 32, the second 1, 3, ... 31. In sums over
elements the order does not matter.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, register_model

LANES = 16
VECTOR_BYTES = 64
LINE_BYTES = 64  # of the caches

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS, _SHORTS = (ir.VectorType(item, LANES) for item in (_F32, _I32, _I16))


class Float32x16(types.Type):  # type: ignore[misc]
    """numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


vector = Float32x16()
address, integer, number = types.int64, types.int64, types.float32


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


def has_bf16_dot_product() -> bool:
    """Whether this CPU has `dot_bfloat16` (AVX512_BF16)."""
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


def _typed(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba function of `generate(builder, *values)`, which returns its value; None for a void one."""

    def decorate(generate: Callable[..., Any]) -> Any:
        def define(typing_context, *given):  # type: ignore[no-untyped-def]
            def codegen(context, builder, signature, values):  # type: ignore[no-untyped-def]
                value = generate(builder, *values)
                return context.get_dummy_value() if value is None else value

            return result(*arguments), codegen

        define.__name__, define.__doc__ = generate.__name__, generate.__doc__
        define.__signature__ = inspect.signature(generate)  # type: ignore[attr-defined]  # numba counts arguments
        return intrinsic(define)

    return decorate


def _pointer(builder: Any, place: Any, item: Any) -> Any:
    return builder.inttoptr(place, item.as_pointer())


def _floats(value: float) -> Any:
    return ir.Constant(_FLOATS, [ir.Constant(_F32, value)] * LANES)


def _ints(value: int) -> Any:
    return ir.Constant(_INTS, [ir.Constant(_I32, value)] * LANES)


def _broadcast(builder: Any, value: Any, of: Any) -> Any:
    undefined = ir.Constant(of, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [ir.Constant(_I32, 0)] * LANES))


def _shuffle(builder: Any, first: Any, second: Any, lanes: Sequence[int]) -> Any:
    mask = [ir.Constant(_I32, lane) for lane in lanes]
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(mask)), mask))


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    signature = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), values)


# ---- loads and stores


@_typed(vector, address)
def load_float32(builder, place):  # type: ignore[no-untyped-def]
    return builder.load(_pointer(builder, place, _FLOATS), align=4)


@_typed(types.void, address, vector)
def store_float32(builder, place, value):  # type: ignore[no-untyped-def]
    builder.store(value, _pointer(builder, place, _FLOATS), align=4)


@_typed(vector, address)
def load_bfloat16(builder, place):  # type: ignore[no-untyped-def]
    """16 elements in their order."""
    halves = builder.load(_pointer(builder, place, _SHORTS), align=2)
    return _lower_halves(builder, builder.zext(halves, _INTS))


@_typed(types.void, address, vector)
def store_bfloat16(builder, place, value):  # type: ignore[no-untyped-def]
    """16 elements in their order, rounded to nearest, ties to even."""
    halves = builder.trunc(builder.lshr(_rounded(builder, value), _ints(16)), _SHORTS)
    builder.store(halves, _pointer(builder, place, _SHORTS), align=2)


@_typed(types.UniTuple(vector, 2), address)
def load_even_odd_bfloat16(builder, place):  # type: ignore[no-untyped-def]
    """32 elements, even and odd."""
    words = builder.load(_pointer(builder, place, _INTS), align=2)
    pair = ir.Constant(ir.ArrayType(_FLOATS, 2), ir.Undefined)
    pair = builder.insert_value(pair, _lower_halves(builder, words), 0)
    return builder.insert_value(pair, _upper_halves(builder, words), 1)


@_typed(types.void, address, vector, vector)
def store_even_odd_bfloat16(builder, place, even, odd):  # type: ignore[no-untyped-def]
    """32 elements, rounded to nearest, ties to even."""
    lower = builder.lshr(_rounded(builder, even), _ints(16))
    upper = builder.and_(_rounded(builder, odd), _ints(-65536))
    builder.store(builder.or_(lower, upper), _pointer(builder, place, _INTS), align=2)


def _upper_halves(builder: Any, words: Any) -> Any:
    return builder.bitcast(builder.and_(words, _ints(-65536)), _FLOATS)


def _lower_halves(builder: Any, words: Any) -> Any:
    return builder.bitcast(builder.shl(words, _ints(16)), _FLOATS)


def _rounded(builder: Any, value: Any) -> Any:
    """float32 as words whose upper half is the nearest bfloat16."""
    bits = builder.bitcast(value, _INTS)
    is_odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
    rounded = builder.add(builder.add(bits, _ints(0x7FFF)), is_odd)
    quiet_nan = builder.or_(bits, _ints(0x400000))  # rounding could carry a NaN into its sign
    return builder.select(builder.fcmp_unordered("uno", value, value), quiet_nan, rounded)


@_typed(types.void, address, integer, integer, address, integer)
def transpose_words(builder, source, stride, count, target, target_stride):  # type: ignore[no-untyped-def]
    """16 x 16 words of 32 bits: row i of what lies at `target` is column i of what lies at `source`. Rows are
    `stride` bytes apart; those of the source from `count` on are 0, but readable."""
    rows = []
    for row in range(LANES):
        place = builder.add(source, builder.mul(stride, ir.Constant(_I64, row)))
        words = builder.load(_pointer(builder, place, _INTS), align=2)
        rows.append(_where_row(builder, row, count, words))
    size = LANES // 2  # of the squares that change places
    while size > 0:
        upper = [row for row in range(LANES) if row & size == 0]
        first = [lane if lane & size == 0 else LANES + lane - size for lane in range(LANES)]
        second = [lane + size for lane in first]
        for row in upper:
            a, b = rows[row], rows[row + size]
            rows[row], rows[row + size] = _shuffle(builder, a, b, first), _shuffle(builder, a, b, second)
        size //= 2
    for row, words in enumerate(rows):
        place = builder.add(target, builder.mul(target_stride, ir.Constant(_I64, row)))
        builder.store(words, _pointer(builder, place, _INTS), align=4)


@_typed(types.void, address, integer, integer, address)
def interleave_rows(builder, source, stride, count, target):  # type: ignore[no-untyped-def]
    """16 elements of 16 bits from each of two rows, side by side; of the rows the first `count` are not 0."""
    halves = [
        builder.zext(builder.load(_pointer(builder, place, _SHORTS), align=2), _INTS)
        for place in (source, builder.add(source, stride))
    ]
    lower, upper = (_where_row(builder, row, count, words) for row, words in enumerate(halves))
    words = builder.or_(lower, builder.shl(upper, _ints(16)))
    builder.store(words, _pointer(builder, target, _INTS), align=4)


def _where_row(builder: Any, row: int, count: Any, words: Any) -> Any:
    """`words` if `row` is below `count`, else zeros."""
    return builder.select(builder.icmp_signed("<", ir.Constant(_I64, row), count), words, _ints(0))


@_typed(types.float32, address)
def load_number(builder, place):  # type: ignore[no-untyped-def]
    return builder.load(_pointer(builder, place, _F32), align=4)


@_typed(types.void, address, number)
def store_number(builder, place, value):  # type: ignore[no-untyped-def]
    builder.store(value, _pointer(builder, place, _F32), align=4)


@_typed(integer, address)
def load_integer(builder, place):  # type: ignore[no-untyped-def]
    """int64."""
    return builder.load(_pointer(builder, place, _I64), align=8)


@_typed(types.void, address, integer)
def store_integer(builder, place, value):  # type: ignore[no-untyped-def]
    """int64."""
    builder.store(value, _pointer(builder, place, _I64), align=8)


@_typed(integer, address)
def take_ticket(builder, place):  # type: ignore[no-untyped-def]
    """The int64 at `place`, which becomes one more; every thread gets another value."""
    return builder.atomic_rmw("add", _pointer(builder, place, _I64), ir.Constant(_I64, 1), "seq_cst")


@_typed(types.void, address)
def prefetch_to_l2(builder, place):  # type: ignore[no-untyped-def]
    """Ask for the cache line at `place`, which need not be readable, but not for the first cache."""
    byte_pointer = _pointer(builder, place, ir.IntType(8))
    hints = [ir.Constant(_I32, hint) for hint in (0, 1, 1)]  # a read; prefetcht2 on x86; data
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), byte_pointer, *hints)


# ---- arithmetic


def _define_operator(symbol: Any, generate: Callable[..., Any]) -> None:
    class Operator(ConcreteTemplate):  # type: ignore[misc]
        cases = (vector(vector, vector),)

    def lower(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return generate(builder, *values, flags=["contract"])

    infer_global(symbol)(Operator)
    lower_builtin(symbol, Float32x16, Float32x16)(lower)


_define_operator(operator.add, ir.IRBuilder.fadd)
_define_operator(operator.sub, ir.IRBuilder.fsub)
_define_operator(operator.mul, ir.IRBuilder.fmul)


@_typed(vector, number)
def splat(builder, value):  # type: ignore[no-untyped-def]
    """A vector of one value."""
    return _broadcast(builder, value, _FLOATS)


@_typed(vector, vector, vector)
def divide(builder, first, second):  # type: ignore[no-untyped-def]
    return builder.fdiv(first, second)


@_typed(vector, vector, vector)
def larger(builder, first, second):  # type: ignore[no-untyped-def]
    return builder.select(builder.fcmp_ordered("ogt", first, second), first, second)


@_typed(vector, vector, integer, number)
def first_lanes(builder, value, count, other):  # type: ignore[no-untyped-def]
    """The first `count` lanes of a vector, and `other` in those behind."""
    lanes = ir.Constant(_INTS, [ir.Constant(_I32, lane) for lane in range(LANES)])
    counts = _broadcast(builder, builder.trunc(count, _I32), _INTS)
    return builder.select(builder.icmp_signed("<", lanes, counts), value, _broadcast(builder, other, _FLOATS))


@_typed(number, vector)
def sum_of_lanes(builder, value):  # type: ignore[no-untyped-def]
    for half in (8, 4, 2, 1):
        lower, upper = (_shuffle(builder, value, value, range(start, start + half)) for start in (0, half))
        value = builder.fadd(lower, upper)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@_typed(number, vector)
def largest_lane(builder, value):  # type: ignore[no-untyped-def]
    for half in (8, 4, 2, 1):
        lower, upper = (_shuffle(builder, value, value, range(start, start + half)) for start in (0, half))
        value = builder.select(builder.fcmp_ordered("ogt", lower, upper), lower, upper)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@_typed(vector, address)
def sums_of_rows(builder, place):  # type: ignore[no-untyped-def]
    """The sums of the rows of 16 x 16 float32 at `place`, the sum of row i in lane i."""
    rows = [
        builder.load(_pointer(builder, builder.add(place, ir.Constant(_I64, 64 * row)), _FLOATS), align=4)
        for row in range(LANES)
    ]
    part = LANES // 2  # of a row's lanes that are still to be added
    while part > 0:
        groups = range(0, 2 * LANES, 2 * part)
        lower = [start + lane for start in _interleaved(groups) for lane in range(part)]
        upper = [lane + part for lane in lower]
        half = len(rows) // 2
        rows = [
            builder.fadd(
                _shuffle(builder, rows[row], rows[row + half], lower),
                _shuffle(builder, rows[row], rows[row + half], upper),
            )
            for row in range(half)
        ]
        part //= 2
    return rows[0]


def _interleaved(groups: Sequence[int]) -> list[int]:
    """The groups of the first vector and those of the second in turn."""
    half = len(groups) // 2
    return [group for pair in zip(groups[:half], groups[half:], strict=True) for group in pair]


@_typed(vector, vector)
def exp2(builder, value):  # type: ignore[no-untyped-def]
    """2 ** value to 2 units in the last place, 0 below -126; of numbers above 127 that of 127."""
    # Clamped, so that the exponent fits; of -infinity, too.
    lowest, highest = _floats(-127.0), _floats(127.0)
    value = builder.select(builder.fcmp_ordered("olt", value, lowest), lowest, value)
    value = builder.select(builder.fcmp_ordered("ogt", value, highest), highest, value)
    # Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    shifter = _floats(12582912.0)
    shifted = builder.fadd(value, shifter)
    rest = builder.fsub(value, builder.fsub(shifted, shifter))  # in [-1/2, 1/2]
    power = _floats(_EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        product = builder.fmul(power, rest, flags=["contract"])
        power = builder.fadd(product, _floats(coefficient), flags=["contract"])
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _ints(23))
    scaled = builder.bitcast(builder.add(builder.bitcast(power, _INTS), exponent), _FLOATS)
    return builder.select(builder.fcmp_ordered("olt", value, _floats(-126.0)), _floats(0.0), scaled)


# Of 2 ** x in [-1/2, 1/2], the highest power first: Taylor's (ln 2 ** n / n!), with errors below 2 ** -25.
_EXP2_COEFFICIENTS = (
    1.5252733804e-05, 1.5403530394e-04, 1.3333558146e-03, 9.6181291076e-03,
    5.5504108665e-02, 2.4022650696e-01, 6.9314718056e-01, 1.0,
)  # fmt: skip
