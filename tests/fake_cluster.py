"""A real router in this process, and workers and clients that do over real sockets what a test tells them."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import zmq.asyncio

from pdengine.client import AsyncClient
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.fingerprint import model_fingerprint
from pdengine.models.prefix_hashes import PrefixHashes, prefix_root
from pdengine.router.config import RouterConfig
from pdengine.router.router import Router
from pdengine.transport.keys import KeyRole, PeerKeys, read_key_file
from pdengine.transport.messages import (
    PREFIX_TAG_BYTES,
    PROTOCOL_VERSION,
    CacheUpdate,
    Compatibility,
    Decode,
    DecodeAccepted,
    FinishReason,
    Heartbeat,
    HeartbeatReply,
    Hello,
    KVLease,
    Load,
    Malformed,
    Message,
    PeerDescriptor,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    PromptScored,
    Pulled,
    Role,
    RouterToClient,
    RouterToWorker,
    StepTokens,
    TokenLogprobs,
    TokenUpdate,
    TransferStats,
    Welcome,
    Work,
)
from pdengine.transport.regions import RegionDescriptor
from pdengine.transport.sockets import PeerSocket, SendFailed, ServerSocket

DEADLINE_SECONDS = 20.0
BLOCK_SIZE = 16
MODEL = model_fingerprint(checkpoint_directory())
STATS = TransferStats(num_blocks=1, num_bytes=4096, num_gets=1, seconds=0.001, lanes="memory")

Incoming = TypeVar("Incoming")
Kind = TypeVar("Kind", bound=Message)


def on_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make an ordinary test of an asynchronous one."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **fixtures), 3 * DEADLINE_SECONDS))

    return run


class Peer(Generic[Incoming]):
    """One end of a connection to the router; what arrives waits in `inbox` until it is expected."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, incoming: Any, keys: PeerKeys | None = None
    ) -> None:
        self.socket = PeerSocket[Incoming](context, address, incoming, keys=keys)
        self.inbox: list[Message] = []
        self._arrived = asyncio.Condition()
        self._receiver = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        while True:
            message = await self.socket.receive()
            assert isinstance(message, Message)
            async with self._arrived:
                self.inbox.append(message)
                self._arrived.notify_all()

    def send(self, message: Message) -> None:
        self.socket.send(message)

    def pending(self, kind: type[Kind]) -> list[Kind]:
        """What has arrived of this kind and was not expected yet."""
        return [message for message in self.inbox if isinstance(message, kind)]

    async def expect(self, kind: type[Kind], **fields: object) -> Kind:
        """Take the first message of this kind whose fields are as given; wait for it if need be."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.wait_for(kind, **fields)

    async def wait_for(self, kind: type[Kind], **fields: object) -> Kind:
        """Like `expect`, without a deadline."""
        async with self._arrived:
            while True:
                for message in self.pending(kind):
                    if all(getattr(message, name) == value for name, value in fields.items()):
                        self.inbox.remove(message)
                        return message
                await self._arrived.wait()

    async def close(self) -> None:
        self._receiver.cancel()
        await asyncio.gather(self._receiver, return_exceptions=True)
        self.socket.close()


def compatibility(**changes: Any) -> Compatibility:
    fields: dict[str, Any] = {
        "protocol": PROTOCOL_VERSION,
        "model": MODEL,
        "weights": "weights",
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "layout": "1",
        "ucx": "1.22",
    }
    return Compatibility(**{**fields, **changes})


def hello(
    engine_id: str,
    role: Role,
    *,
    num_blocks: int = 64,
    max_context: int = 1024,
    **compatibility_changes: Any,
) -> Hello:
    region = RegionDescriptor(("block", "dim"), (num_blocks, 1), (1, 1), "uint8", base_address=0)
    return Hello(
        PeerDescriptor(engine_id, role, "tcp://127.0.0.1:1", b"", region),
        compatibility(**compatibility_changes),
        Load(num_blocks, num_blocks),
        max_context,
    )


class FakeWorker(Peer[RouterToWorker]):
    """A worker that computes nothing."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        greeting: Hello,
        keys: PeerKeys | None = None,
    ) -> None:
        super().__init__(context, address, RouterToWorker, keys)
        self.hello = greeting
        self.engine_id = greeting.peer.engine_id
        self._last_lease_id = 0

    async def join(self) -> Welcome:
        self.send(self.hello)
        return await self.expect(Welcome)

    def announce(self, token_ids: Sequence[int], salt: str = "") -> None:
        """The KV cache of these tokens' full blocks is in this worker's prefix cache now."""
        self.send(
            CacheUpdate(
                added=b"".join(name[:PREFIX_TAG_BYTES] for name in names_of(token_ids, salt)), removed=b""
            )
        )

    async def sync(self) -> None:
        """Return when everything that the router had sent by now is in the inbox."""
        self.send(Heartbeat(self.hello.load))
        await self.expect(HeartbeatReply, known=True)

    def send_prefilled(
        self, work: Work, token_id: int, finish_reason: FinishReason | None = None
    ) -> KVLease | None:
        """The prompt is computed, and the next token of every answer is the same."""
        return self.send_first_tokens(work, [(token_id, finish_reason)] * len(work.choices))

    def send_first_tokens(
        self, work: Work, tokens: Sequence[tuple[int, FinishReason | None]]
    ) -> KVLease | None:
        """The prompt is computed; the next token of each answer, and whether it is its last one."""
        self._last_lease_id += 1
        lease = None
        if any(finish_reason is None for _, finish_reason in tokens):
            num_tokens = len(work.prompt_ids) + len(work.choices[0].output_ids)
            lease = KVLease(self._last_lease_id, self.engine_id, [0], num_tokens, duration=30.0)
        self.send(Prefilled(work.request_id, work.attempt, next_tokens(work, tokens), lease))
        return lease

    def send_accepted(self, work: Work) -> None:
        self.send(DecodeAccepted(work.request_id, work.attempt))

    def send_pulled(self, work: Work) -> None:
        self.send(Pulled(work.request_id, work.attempt, STATS))

    def send_scored(self, work: Work, first: int = 1, end: int | None = None) -> None:
        """The log probabilities of these tokens of the prompt."""
        assert work.sampling.prompt_logprobs is not None
        logprobs = [logprobs_of(token_id, work.sampling.prompt_logprobs) for token_id in work.prompt_ids]
        self.send(PromptScored(work.request_id, work.attempt, first, logprobs[first:end]))

    def send_tokens(
        self,
        work: Work,
        *token_ids: int,
        skip: int = 0,
        finish_reason: FinishReason | None = None,
        choice: int | None = None,
    ) -> None:
        """The next tokens of an answer, by default of the only one, one message each; `skip` were sent
        before."""
        if choice is None:
            [choice] = [choice.index for choice in work.choices]
        first = skip + next(len(c.output_ids) for c in work.choices if c.index == choice)
        for position, token_id in enumerate(token_ids, first):
            last = position == first + len(token_ids) - 1
            reason = finish_reason if last else None
            self.send(StepTokens([token_update(work, choice, position, token_id, reason)]))


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """Made up: every token says something else, and is the second likeliest."""
    top = [(token_id + rank, -rank / 10) for rank in range(1, num_top + 1)]
    return TokenLogprobs(-token_id / 1000, 2, top)


def token_update(
    work: Work, choice: int, position: int, token_id: int, finish_reason: FinishReason | None
) -> TokenUpdate:
    """With log probabilities, if they are asked for."""
    num_top = work.sampling.logprobs
    logprobs = None if num_top is None else logprobs_of(token_id, num_top)
    return TokenUpdate(work.request_id, work.attempt, choice, position, token_id, finish_reason, logprobs)


def output_ids(work: Work) -> list[int]:
    """What is written already of the only answer that is asked for."""
    [choice] = work.choices
    return choice.output_ids


def next_tokens(work: Work, tokens: Sequence[tuple[int, FinishReason | None]]) -> list[TokenUpdate]:
    """A token of each answer, in order, and why the answer ends with it, if it does."""
    return [
        token_update(work, choice.index, len(choice.output_ids), *token)
        for choice, token in zip(work.choices, tokens, strict=True)
    ]


def names_of(token_ids: Sequence[int], salt: str = "") -> list[bytes]:
    """The names of the full blocks of a prompt to the model of `hello`."""
    hashes = PrefixHashes(prefix_root(MODEL, salt), BLOCK_SIZE)
    hashes.extend(token_ids)
    return hashes.blocks


class FakeCluster:
    """A running router, with a client, and the peers that a test adds. keys: the directory of a cluster with
    keys."""

    def __init__(self, router: Router, keys: Path | None = None) -> None:
        self.keys = keys
        self.router = router
        self.running = asyncio.create_task(router.run())
        self.context = zmq.asyncio.Context()
        self.client = AsyncClient(
            router.client_address, connect_timeout=DEADLINE_SECONDS, retries=0, keys=keys
        )
        self.peers: list[Peer[Any]] = []

    def keys_of(self, name: str) -> PeerKeys | None:
        """Of the cluster's files of keys, if it has any."""
        if self.keys is None:
            return None
        return read_key_file(self.keys / f"{name}.toml", get_args(KeyRole)).to_connect()

    def new_worker(self, role: Role, engine_id: str = "", **options: Any) -> FakeWorker:
        """A worker that has not said hello."""
        engine_id = engine_id or f"{role}-{len(self.peers)}"
        greeting = hello(engine_id, role, **options)
        worker = FakeWorker(self.context, self.router.worker_address, greeting, self.keys_of("worker"))
        self.peers.append(worker)
        return worker

    async def worker(self, role: Role, engine_id: str = "", **options: Any) -> FakeWorker:
        worker = self.new_worker(role, engine_id, **options)
        await worker.join()
        return worker

    async def pair(self) -> tuple[FakeWorker, FakeWorker]:
        return await self.worker("prefill"), await self.worker("decode")

    def raw_client(self) -> Peer[RouterToClient]:
        client = Peer[RouterToClient](self.context, self.router.client_address, RouterToClient)
        self.peers.append(client)
        return client

    async def drop_client(self, client: Peer[RouterToClient]) -> None:
        """Close the connection of the only client with requests, and wait until the router's socket knows."""
        (identity,) = {request.client for request in self.router._ledger}
        await client.close()
        self.peers.remove(client)
        await self._wait_until_gone(self.router._clients, identity)

    async def drop_worker(self, worker: FakeWorker) -> None:
        """Close the connection of a worker, and wait until the router's socket knows."""
        entry = self.router._registry.get(worker.engine_id)
        assert entry is not None
        await worker.close()
        self.peers.remove(worker)
        await self._wait_until_gone(self.router._workers, entry.identity)

    async def _wait_until_gone(self, server: ServerSocket[Any], identity: bytes) -> None:
        """ZeroMQ has no event for it: only a send tells."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            with contextlib.suppress(SendFailed):
                while True:
                    server.send(identity, Malformed("are you there?"))
                    await asyncio.sleep(0)

    async def start_request(self, worker: FakeWorker, **options: Any) -> tuple[asyncio.Task[Any], Work]:
        """A request by the client, and the work that `worker` got for it."""
        task = asyncio.create_task(self.client.generate("The red violin", **options))
        return task, (await expect_work(worker)).work

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    async def close(self) -> None:
        for peer in self.peers:
            await peer.close()
        await self.client.close()
        await self.stop()
        self.context.destroy(linger=0)

    async def check_baseline(self) -> None:
        """Every request has ended, and nothing that belonged to one is left."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (await self.client.status()).requests:
                pass
        ledger = self.router._ledger
        assert (ledger._by_id, ledger._by_tag) == ({}, {})
        assert [worker.assigned for worker in self.router._registry if worker.assigned] == []
        names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
        assert "Router._admit" not in names


async def expect_work(worker: FakeWorker) -> Prefill | PrefillAndDecode | Decode:
    if worker.hello.peer.role == "prefill":
        return await worker.expect(Prefill)
    if worker.hello.peer.role == "decode":
        return await worker.expect(Decode)
    return await worker.expect(PrefillAndDecode)


@asynccontextmanager
async def running_cluster(**config: Any) -> AsyncIterator[FakeCluster]:
    """A router on free ports of the loopback; at the end of the block it must have nothing left."""
    options = {"silence_seconds": 10 * DEADLINE_SECONDS, **config}
    router = Router(
        RouterConfig(
            checkpoint_directory(),
            client_address="tcp://127.0.0.1:0",
            worker_address="tcp://127.0.0.1:0",
            **options,
        )
    )
    cluster = FakeCluster(router, options.get("keys"))
    try:
        yield cluster
        if not cluster.running.done():
            await cluster.check_baseline()
    finally:
        await cluster.close()
    if not cluster.running.cancelled():
        cluster.running.result()
