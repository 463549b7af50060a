"""The innermost loop of our matrix product on CPUs, as LLVM code inside functions compiled by numba."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
VECTOR_BYTES = 4 * LANES
PANEL_COLUMNS = 64  # outputs that lie side by side in packed weights
PANEL_VECTORS = PANEL_COLUMNS // LANES
ROW_BYTES = 4 * PANEL_COLUMNS  # of a panel: one float32, or a pair of bfloat16, for each of its outputs
CHUNK_ROWS = 64  # of a panel, 16 KiB: they stay in the first cache while all rows of inputs pass
MAX_TILE_ROWS = 6  # their sums and one row of a panel fit into 32 vector registers

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)

MultiplyAdd = Callable[[Any, Any, Any, Any], Any]  # (builder, total, weights, values) -> total


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


def _multiply_add_float32(builder: Any, total: Any, weights: Any, values: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
    )
    return builder.call(
        function, [builder.bitcast(weights, _FLOATS), builder.bitcast(values, _FLOATS), total]
    )


def _multiply_add_bfloat16(builder: Any, total: Any, weights: Any, values: Any) -> Any:
    """Both products of each pair; x86's AVX512_BF16."""
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS]),
        "llvm.x86.avx512bf16.dpbf16ps.512",
    )
    operands = [total, builder.bitcast(weights, _PAIRS), builder.bitcast(values, _PAIRS)]
    return builder.call(function, operands)


def _broadcast(builder: Any, word: Any) -> Any:
    undefined = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(undefined, word, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _vector_at(builder: Any, address: Any, offset: int, item: Any) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), item.as_pointer())


def _prefetch(builder: Any, address: Any) -> None:
    """Into the second cache; the address need not be readable."""
    pointer = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    hints = [ir.Constant(_I32, hint) for hint in (0, 2, 1)]  # a read; the second cache; of data
    builder.call(function, [builder.inttoptr(address, pointer), *hints])


def _multiply_tile(
    builder: Any, rows: int, multiply_add: MultiplyAdd, arguments: Sequence[Any], *, prefetch_bytes: int = 0
) -> None:
    """sums[row, :64] += inputs[row] times the rows of a panel, for `rows` rows.

    arguments: the address of the first row's words of 32 bits, and how many bytes the rows are apart; the
    address of `count` rows of a panel, and `count`; the address of float32 `[rows, 64]`. prefetch_bytes: what
    lies so far behind in the panel is brought into the second cache, where it waits without pushing the
    panel's rows out of the first.
    """
    inputs, stride, panel, count, sums = arguments
    outputs = [
        _vector_at(builder, sums, row * ROW_BYTES + part * VECTOR_BYTES, _FLOATS)
        for row in range(rows)
        for part in range(PANEL_VECTORS)
    ]
    starts = [builder.add(inputs, builder.mul(stride, ir.Constant(_I64, row))) for row in range(rows)]
    first_totals = [builder.load(output, align=4) for output in outputs]
    # A loop in SSA form: LLVM would take seconds to find out that variables in memory can be registers.
    before, loop = builder.block, builder.append_basic_block("rows.loop")
    end = builder.append_basic_block("rows.end")
    builder.cbranch(builder.icmp_signed(">", count, ir.Constant(_I64, 0)), loop, end)
    builder.position_at_end(loop)
    index = builder.phi(_I64)
    totals = [builder.phi(_FLOATS) for _ in outputs]
    next_totals = _add_row(builder, index, starts, panel, totals, multiply_add, prefetch_bytes)
    next_index = builder.add(index, ir.Constant(_I64, 1))
    loop_end = builder.block
    builder.cbranch(builder.icmp_signed("<", next_index, count), loop, end)
    index.add_incoming(ir.Constant(_I64, 0), before)
    index.add_incoming(next_index, loop_end)
    builder.position_at_end(end)
    for total, first, last in zip(totals, first_totals, next_totals, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(last, loop_end)
    results = [builder.phi(_FLOATS) for _ in outputs]
    for output, result, first, last in zip(outputs, results, first_totals, next_totals, strict=True):
        result.add_incoming(first, before)
        result.add_incoming(last, loop_end)
        builder.store(result, output, align=4)


def _add_row(
    builder: Any,
    index: Any,
    starts: Sequence[Any],
    panel: Any,
    totals: Sequence[Any],
    multiply_add: MultiplyAdd,
    prefetch_bytes: int,
) -> list[Any]:
    """`totals` with row `index` of the panel times the words at `index` from `starts` added."""
    panel_row = builder.add(panel, builder.mul(index, ir.Constant(_I64, ROW_BYTES)))
    if prefetch_bytes:
        for part in range(PANEL_VECTORS):
            offset = ir.Constant(_I64, prefetch_bytes + part * VECTOR_BYTES)
            _prefetch(builder, builder.add(panel_row, offset))
    weights = [
        builder.load(_vector_at(builder, panel_row, part * VECTOR_BYTES, _INTS), align=4)
        for part in range(PANEL_VECTORS)
    ]
    sums = []
    for row, start in enumerate(starts):
        word = builder.add(start, builder.mul(index, ir.Constant(_I64, 4)))
        value = _broadcast(builder, builder.load(builder.inttoptr(word, _I32.as_pointer()), align=2))
        for part in range(PANEL_VECTORS):
            total = totals[row * PANEL_VECTORS + part]
            sums.append(multiply_add(builder, total, weights[part], value))
    return sums


def _tile(rows: int, multiply_add: MultiplyAdd) -> Any:
    """tile(inputs, stride, panel, count, sums): see `_multiply_tile`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _multiply_tile(builder, rows, multiply_add, values)
        return context.get_dummy_value()

    def define(typing_context, inputs, stride, panel, count, sums):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 5), generate

    return intrinsic(define)


def _tile_of_any_size(multiply_add: MultiplyAdd) -> Any:
    """tile(rows, inputs, stride, panel, count, sums), for 1 to MAX_TILE_ROWS rows."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        end = builder.append_basic_block("tile.end")
        choice = builder.switch(values[0], end)
        for rows in range(1, MAX_TILE_ROWS + 1):
            block = builder.append_basic_block(f"tile.{rows}")
            choice.add_case(ir.Constant(_I64, rows), block)
            builder.position_at_end(block)
            _multiply_tile(builder, rows, multiply_add, values[1:], prefetch_bytes=CHUNK_ROWS * ROW_BYTES)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    def define(typing_context, rows, inputs, stride, panel, count, sums):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 6), generate

    return intrinsic(define)


TILES_FLOAT32 = [_tile(rows, _multiply_add_float32) for rows in range(1, MAX_TILE_ROWS + 1)]
TILES_BFLOAT16 = [_tile(rows, _multiply_add_bfloat16) for rows in range(1, MAX_TILE_ROWS + 1)]
tile_float32 = _tile_of_any_size(_multiply_add_float32)
tile_bfloat16 = _tile_of_any_size(_multiply_add_bfloat16)


@intrinsic
def start_sums(typing_context, bias, sums):  # type: ignore[no-untyped-def]
    """Copy float32 `[64]` at `bias` to `sums`; zeros if `bias` is 0."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        bias, sums = values
        is_zero = builder.icmp_signed("==", bias, ir.Constant(_I64, 0))
        source = builder.select(is_zero, sums, bias)
        for part in range(PANEL_VECTORS):
            value = builder.load(_vector_at(builder, source, VECTOR_BYTES * part, _FLOATS), align=4)
            zeros = ir.Constant(_FLOATS, [ir.Constant(_F32, 0.0)] * LANES)
            place = _vector_at(builder, sums, VECTOR_BYTES * part, _FLOATS)
            builder.store(builder.select(is_zero, zeros, value), place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _store(item: Any, item_bytes: int) -> Any:
    """store(sums, output, count): the first `count` of float32 `[64]` as numbers of this type."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        sums, output, count = values
        outputs, is_stored = ir.VectorType(item, LANES), ir.VectorType(ir.IntType(1), LANES)
        lanes = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
        limit = ir.Constant(ir.VectorType(_I64, LANES), ir.Undefined)
        limit = builder.insert_element(limit, count, ir.Constant(_I32, 0))
        limit = builder.shuffle_vector(limit, limit, ir.Constant(_INTS, [0] * LANES))
        for part in range(PANEL_VECTORS):
            total = builder.load(_vector_at(builder, sums, VECTOR_BYTES * part, _FLOATS), align=4)
            value = total if item is _F32 else builder.fptrunc(total, outputs)
            place = _vector_at(builder, output, item_bytes * LANES * part, outputs)
            first = ir.Constant(ir.VectorType(_I64, LANES), [LANES * part] * LANES)
            mask = builder.icmp_signed("<", builder.add(lanes, first), limit)
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [outputs, place.type, _I32, is_stored]),
                f"llvm.masked.store.v{LANES}{'f32' if item is _F32 else 'bf16'}.p0",
            )
            builder.call(function, [value, place, ir.Constant(_I32, item_bytes), mask])
        return context.get_dummy_value()

    def define(typing_context, sums, output, count):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 3), generate

    return intrinsic(define)


store_sums_float32 = _store(_F32, 4)
store_sums_bfloat16 = _store(_BFloat16(), 2)
