"""Hypothesis strategies for every message, made from the types of its fields."""

from collections.abc import Iterator
from typing import Any, get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from pdengine.transport.messages import Message
from pdengine.transport.regions import RegionDescriptor

Strategy = st.SearchStrategy[Any]


def message_types(union: Any) -> tuple[type[Message], ...]:
    return get_args(union)


def messages_of(union: Any) -> Strategy:
    return st.sampled_from(message_types(union)).flatmap(values_of)


def values_of(kind: type) -> Strategy:
    return _strategy(inspect.type_info(kind))


def _strategy(info: inspect.Type) -> Strategy:
    match info:
        case inspect.StructType(cls=cls) if cls is RegionDescriptor:
            return _regions()
        case inspect.StructType():
            return st.builds(info.cls, **dict(_fields(info)))
        case inspect.IntType():
            smallest = -(2**63) if info.ge is None else info.ge
            largest = 2**64 - 1 if info.lt is None else info.lt - 1
            return st.integers(smallest, largest)
        case inspect.ListType():
            return st.lists(_strategy(info.item_type), max_size=3)
        case inspect.VarTupleType():
            return st.lists(_strategy(info.item_type), max_size=3).map(tuple)
        case inspect.TupleType():
            return st.tuples(*map(_strategy, info.item_types))
        case inspect.DictType():
            return st.dictionaries(_strategy(info.key_type), _strategy(info.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of(*map(_strategy, info.types))
        case inspect.LiteralType():
            return st.sampled_from(info.values)
    simple: dict[type, Strategy] = {
        inspect.FloatType: st.floats(allow_nan=False),
        inspect.StrType: st.text(max_size=10),
        inspect.BytesType: st.binary(max_size=10),
        inspect.BoolType: st.booleans(),
        inspect.NoneType: st.none(),
    }
    return simple[type(info)]


def _fields(info: inspect.StructType) -> Iterator[tuple[str, Strategy]]:
    for field in info.fields:
        yield field.name, _strategy(field.type)


@st.composite
def _regions(draw: st.DrawFn) -> RegionDescriptor:
    num_blocks, block_bytes = draw(st.integers(1, 2**20)), draw(st.integers(1, 2**20))
    return RegionDescriptor(
        ("block", "byte"),
        (num_blocks, block_bytes),
        (block_bytes, 1),
        draw(st.sampled_from(["uint8", "float8"])),
        draw(st.integers(0, 2**62)),
        draw(st.binary(max_size=10)),
    )


def with_field(message: Message, field: str, value: object) -> bytes:
    """`message` as bytes, with `value` in the place of one field."""
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    return msgspec.msgpack.encode({**fields, field: value})
