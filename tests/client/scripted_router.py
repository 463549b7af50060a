"""A router that says what a test tells it, and can be killed and started again at its address."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import zmq.asyncio
from fake_cluster import DEADLINE_SECONDS

from pdengine.client import AsyncClient
from pdengine.client.connection import NO_TAG
from pdengine.transport.messages import (
    Accepted,
    ClientToRouter,
    Delta,
    Deltas,
    Failed,
    Finished,
    Generate,
    GetStatus,
    Inquire,
    Message,
    PromptLogprobs,
    Status,
    TokenLogprobs,
    Usage,
)
from pdengine.transport.sockets import ServerSocket

Kind = TypeVar("Kind", bound=Message)


class ScriptedRouter:
    """Make it on the loop that uses it. received: what clients sent and no `expect` took, in order. stalled:
    whether it says nothing when it is asked whether it is there."""

    def __init__(self, address: str = "tcp://127.0.0.1:0") -> None:
        self.received: list[ClientToRouter] = []
        self.stalled = False
        self._identity = b""
        self._arrived = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket = ServerSocket[ClientToRouter](self._context, ClientToRouter)
        self.address = self._socket.bind(address)
        self._receiver = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        while True:
            self._identity, message = await self._socket.receive()
            if isinstance(message, GetStatus):
                self.send(Status(message.tag, self.address, [], 0))
            elif message == Inquire(NO_TAG):
                if not self.stalled:
                    self.send(Failed(NO_TAG, "there is no such request"))
            else:
                self.received.append(message)
                self._arrived.set()
                self._arrived.clear()

    async def expect(self, kind: type[Kind]) -> Kind:
        """Take the next message; it must be of this kind."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not self.received:
                await self._arrived.wait()
        message = self.received.pop(0)
        assert isinstance(message, kind)
        return message

    def send(self, message: Message) -> None:
        """To the client that was heard last."""
        self._socket.send(self._identity, message)

    def write(
        self, tag: int, *token_ids: int, index: int = 0, logprobs: list[TokenLogprobs] | None = None
    ) -> None:
        """Tokens of an answer, all in one delta; the text of each is its number and a blank."""
        text = "".join(f"{token_id} " for token_id in token_ids)
        self.send(Deltas([Delta(tag, text, list(token_ids), index, None, logprobs)]))

    def finish(self, tag: int, n: int = 1) -> None:
        self.send(Finished(tag, ["length"] * n, Usage(1, 1), "prefill", "decode", attempts=1))

    async def answer(self, *token_ids: int) -> Generate:
        """Take a request and give it all of this."""
        request = await self.expect(Generate)
        self.send(Accepted(request.tag, f"id-{request.tag}", 1))
        if request.sampling.prompt_logprobs is not None:
            self.send(PromptLogprobs(request.tag, [TokenLogprobs(-1.0, 2, [])]))
        self.write(request.tag, *token_ids)
        self.finish(request.tag)
        return request

    async def kill(self) -> None:
        """Without a word."""
        self._receiver.cancel()
        await asyncio.gather(self._receiver, return_exceptions=True)
        self._context.destroy(linger=0)

    async def restart(self) -> "ScriptedRouter":
        """Another one at the same address, after `kill`."""
        return ScriptedRouter(self.address)


@asynccontextmanager
async def routers_and_client(
    number: int, *, retries: int = 3
) -> AsyncIterator[tuple[list[ScriptedRouter], AsyncClient]]:
    """Running routers, and a client that is connected to all of them. A test may put others into the list."""
    routers = [ScriptedRouter() for _ in range(number)]
    addresses = [router.address for router in routers]
    async with AsyncClient(addresses, connect_timeout=DEADLINE_SECONDS, retries=retries) as client:
        for address in addresses:
            await client.status(address)
        yield routers, client
    for router in routers:
        with contextlib.suppress(zmq.ZMQError):
            await router.kill()
