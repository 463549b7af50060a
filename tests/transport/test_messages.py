"""What was encoded decodes to the same; nothing else ever decodes into a message."""

import pickle
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import message_types, messages_of, values_of, with_field

from pdengine.transport import messages
from pdengine.transport.messages import (
    ClientToRouter,
    Generate,
    Message,
    PeerReply,
    PeerRequest,
    RouterToClient,
    RouterToWorker,
    TextPrompt,
    WorkerToRouter,
)

UNIONS = {
    "client to router": ClientToRouter,
    "router to client": RouterToClient,
    "worker to router": WorkerToRouter,
    "router to worker": RouterToWorker,
    "peer request": PeerRequest,
    "peer reply": PeerReply,
}
MESSAGES = sorted(
    {kind for union in UNIONS.values() for kind in message_types(union)}, key=lambda k: k.__name__
)
# msgspec lets the UnicodeDecodeError of a broken string through, which is a ValueError.
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError)


for_each_union = pytest.mark.parametrize("union", UNIONS.values(), ids=UNIONS)


def refuses(union: Any, frame: bytes) -> bool:
    with pytest.raises(DECODE_ERRORS):
        msgspec.msgpack.decode(frame, type=union)
    return True


def test_every_message_travels_somewhere() -> None:
    defined = {
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
    }
    assert defined == set(MESSAGES)


@for_each_union
@given(data=st.data())
def test_every_message_round_trips(union: Any, data: st.DataObject) -> None:
    message = data.draw(messages_of(union))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union) == message


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_each_kind_round_trips_and_says_its_name(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values_of(kind))
    frame = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(frame)["type"] == kind.__name__
    assert msgspec.msgpack.decode(frame, type=kind) == message


@for_each_union
@given(frame=st.binary(max_size=200))
def test_random_bytes_are_no_message(union: Any, frame: bytes) -> None:
    assert refuses(union, frame)


@for_each_union
@given(data=st.data())
def test_a_truncated_message_is_none(union: Any, data: st.DataObject) -> None:
    frame = msgspec.msgpack.encode(data.draw(messages_of(union)))
    assert refuses(union, frame[: data.draw(st.integers(0, len(frame) - 1))])
    assert refuses(union, frame + b"\x00")


@for_each_union
@given(data=st.data())
def test_a_field_of_another_type_is_refused(union: Any, data: st.DataObject) -> None:
    message = data.draw(messages_of(union).filter(lambda message: message.__struct_fields__))
    field = data.draw(st.sampled_from(message.__struct_fields__))
    assert refuses(union, with_field(message, field, [[None]]))


@for_each_union
@given(data=st.data())
def test_a_missing_field_is_refused(union: Any, data: st.DataObject) -> None:
    required = st.sampled_from([kind for kind in message_types(union) if kind.__struct_fields__])
    message = data.draw(required.flatmap(values_of))
    field = message.__struct_fields__[0]  # the first one has no default in any message
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    del fields[field]
    assert refuses(union, msgspec.msgpack.encode(fields))


@for_each_union
@given(data=st.data())
def test_pickles_are_refused(union: Any, data: st.DataObject) -> None:
    protocol = data.draw(st.integers(0, pickle.HIGHEST_PROTOCOL))
    assert refuses(union, pickle.dumps(data.draw(messages_of(union)), protocol))


@for_each_union
@given(data=st.data(), tag=st.text(max_size=20))
def test_unknown_tags_are_refused(union: Any, data: st.DataObject, tag: str) -> None:
    names = {kind.__name__ for kind in message_types(union)}
    if tag not in names:
        assert refuses(union, with_field(data.draw(messages_of(union)), "type", tag))


@for_each_union
@given(data=st.data())
def test_messages_of_another_direction_are_refused(union: Any, data: st.DataObject) -> None:
    others = [kind for kind in MESSAGES if kind not in message_types(union)]
    message = data.draw(st.sampled_from(others).flatmap(values_of))
    assert refuses(union, msgspec.msgpack.encode(message))


def test_unknown_fields_are_ignored() -> None:
    """A newer peer may say more."""
    message = Generate(1, TextPrompt("Hello"))
    assert msgspec.msgpack.decode(with_field(message, "mood", 3), type=ClientToRouter) == message


@for_each_union
@pytest.mark.parametrize("header", ["dd", "df", "c6", "db"], ids=["array", "map", "bytes", "string"])
def test_a_header_that_promises_gigabytes_is_refused(union: Any, header: str) -> None:
    promise = bytes.fromhex(header) + b"\xff\xff\xff\xff"
    assert refuses(union, promise)
    prefix = msgspec.msgpack.encode({"type": "Generate", "tag": 1})[1:]
    assert refuses(union, b"\x83" + prefix + msgspec.msgpack.encode("prompt") + promise)


@for_each_union
def test_deep_nesting_is_refused(union: Any) -> None:
    with pytest.raises((*DECODE_ERRORS, RecursionError)):
        msgspec.msgpack.decode(b"\x81\xa1x" * 100_000 + b"\xc0", type=union)
