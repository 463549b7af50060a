"""What a client can make the router read."""

import msgspec
import pytest
import zmq.asyncio
from fake_cluster import on_event_loop, running_cluster

from pdengine.transport.messages import (
    MAX_LIST,
    MAX_PROMPT_TOKENS,
    ChatMessage,
    ChatPrompt,
    Generate,
    Malformed,
    RouterToClient,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from pdengine.transport.sockets import CURVE_BYTES, MAX_REQUEST_BYTES, MessageTooLong, PeerSocket

TEXT = TextPrompt("x")
TOO_MANY = MAX_LIST + 1


@pytest.mark.parametrize(
    "message",
    [
        Generate(1, TokenPrompt([0] * (MAX_PROMPT_TOKENS + 1))),
        Generate(1, ChatPrompt([ChatMessage("", "")] * TOO_MANY)),
        Generate(1, TEXT, SamplingParams(stop_token_ids=(0,) * TOO_MANY)),
        Generate(1, TEXT, SamplingParams(logit_bias=dict.fromkeys(range(TOO_MANY), 0.0))),
        Generate(1, TEXT, stop=("",) * TOO_MANY),
    ],
    ids=["token_ids", "messages", "stop_token_ids", "logit_bias", "stop"],
)
@on_event_loop
async def test_a_list_that_nobody_asks_for_is_not_even_read(message: Generate) -> None:
    async with running_cluster() as cluster:
        client = cluster.raw_client()
        client.send(message)
        assert "length" in (await client.expect(Malformed)).reason
        assert (await cluster.client.status()).requests == 0


@on_event_loop
async def test_arrays_in_arrays_are_malformed_however_many() -> None:
    """In a field that is not known they are skipped; where none may be, the first is refused."""
    cancel = {"type": "Cancel", "tag": 1}
    size = MAX_REQUEST_BYTES - 100
    async with running_cluster() as cluster:
        client = cluster.raw_client()
        skipped = msgspec.msgpack.encode({**cancel, "x": msgspec.Raw(_arrays(size))})
        for data in (skipped, b"\x91" * size, _arrays(size)):
            await client.socket._socket.send(data)
        for _ in range(2):
            await client.expect(Malformed)
        assert (await cluster.client.status()).requests == 0
        assert not client.pending(Malformed)


def _arrays(size: int) -> bytes:
    return b"\xdd" + (size - 5).to_bytes(4, "big") + b"\x90" * (size - 5)


@on_event_loop
async def test_a_message_that_is_too_large_costs_its_connection_only() -> None:
    async with running_cluster() as cluster:
        context = zmq.asyncio.Context()
        giant = PeerSocket[RouterToClient](
            context, cluster.router.client_address, RouterToClient, watched=True
        )
        assert await giant.connection_change()
        await giant._socket.send(b"\xc0" * (MAX_REQUEST_BYTES + CURVE_BYTES + 1))
        assert not await giant.connection_change()
        giant.close()
        context.destroy(linger=0)
        assert (await cluster.client.status()).requests == 0
        with pytest.raises((MessageTooLong, ValueError), match="too long"):
            await cluster.client.generate("x" * MAX_REQUEST_BYTES)
