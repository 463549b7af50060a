"""The router: an asyncio loop between clients and workers.

It mints request ids, tokenizes once and names the blocks of the prompt, has every request done by workers
(router.attempts), turns tokens into text and streams them. It knows no KV cache contents, only who holds
which lease, and the names of what workers keep.
"""

import asyncio
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Literal
from uuid import uuid4

import msgspec
import zmq.asyncio

from pdengine.models.config import load_config
from pdengine.models.fingerprint import model_fingerprint
from pdengine.models.tokenizer import IncrementalDetokenizer, Tokenizer
from pdengine.router.admission import InvalidRequest, check_fits, check_request, tokenize
from pdengine.router.attempts import Attempts
from pdengine.router.config import RouterConfig
from pdengine.router.ledger import Answer, Ledger, Request
from pdengine.router.prefixes import PromptPrefix, name_prefix
from pdengine.router.registry import Registry, WorkerEntry
from pdengine.transport.messages import (
    Aborted,
    Accepted,
    CacheUpdate,
    Cancel,
    ClientToRouter,
    DecodeAccepted,
    Delta,
    EarlyPullDropped,
    Failed,
    Finished,
    FinishReason,
    Generate,
    GetStatus,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Inquire,
    LeasesRenewed,
    Leaving,
    Left,
    Malformed,
    Message,
    Outcome,
    PeerJoined,
    PeerLeft,
    PeerLink,
    Prefilled,
    PrefixHit,
    PromptProgress,
    Pulled,
    Pushed,
    Rejected,
    ReleaseLeases,
    Reserved,
    Status,
    StepTokens,
    TokenUpdate,
    Welcome,
    WorkerToRouter,
    WorkFailed,
    WorkRefused,
)
from pdengine.transport.sockets import SendFailed, ServerSocket

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
TOKENIZER_THREADS = 4


class Router:
    """Binds its sockets when made; `run` serves until it is cancelled.

    Raises CheckpointError or AddressError.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._pushes = config.transfer == "push"
        self._vocab_size = load_config(config.model_directory).vocab_size
        self._tokenizer = Tokenizer.load(config.model_directory)
        self._model = model_fingerprint(config.model_directory)
        self._registry = Registry(self._model)
        self._ledger = Ledger()
        self._attempts = Attempts(
            config, self._ledger, self._registry, send=self._send_to_worker, end=self._end
        )
        self._epoch = uuid4().hex
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._context = zmq.asyncio.Context()
        self._clients = ServerSocket[ClientToRouter](self._context, ClientToRouter)
        self._workers = ServerSocket[WorkerToRouter](self._context, WorkerToRouter)
        try:
            self.client_address = self._clients.bind(config.client_address)
            self.worker_address = self._workers.bind(config.worker_address)
        except BaseException:
            self._close()
            raise

    async def run(self) -> None:
        """Serve until cancelled; then every request in flight fails with a word to its client."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve_clients())
                group.create_task(self._serve_workers())
                group.create_task(self._tick())
        finally:
            for request in self._ledger:
                self._end(request, Failed(request.tag, "the router is shutting down"))
            self._close()

    def _close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._clients.close()
        self._workers.close()
        self._context.destroy(linger=None)

    # --------------------------------------------------------------------------------- clients

    async def _serve_clients(self) -> None:
        while True:
            client, message = await self._clients.receive()
            match message:
                case Generate():
                    self._accept(client, message)
                case Cancel(tag):
                    request = self._ledger.find(client, tag)
                    if request is not None:
                        self._abort(request, "cancelled")
                case Inquire(tag):
                    if self._ledger.find(client, tag) is None:
                        reason = "the router gave the request up because its client did not read"
                        self._send_to_client(client, Failed(tag, reason))
                case GetStatus(tag):
                    workers = self._registry.statuses(monotonic())
                    self._send_to_client(
                        client,
                        Status(
                            tag, self._epoch, workers, len(self._ledger), self._registry.max_request_tokens
                        ),
                    )

    def _accept(self, client: bytes, message: Generate) -> None:
        tag = message.tag
        if self._ledger.find(client, tag) is not None:
            self._send_to_client(client, Rejected(tag, f"tag {tag} is in use by another request", "tag"))
            return
        try:
            check_request(message, self._vocab_size)
        except InvalidRequest as error:
            self._send_to_client(client, Rejected(tag, str(error), error.field))
            return
        sampling = message.sampling
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        request = Request(uuid4().hex, client, tag, sampling, message.n, message.priority)
        self._ledger.add(request)
        if message.timeout is not None:
            loop = asyncio.get_running_loop()
            request.deadline = loop.call_later(message.timeout, self._abort, request, "timeout")
        request.task = asyncio.create_task(self._admit(request, message))

    async def _admit(self, request: Request, message: Generate) -> None:
        """Tokenize off the event loop, then place the request."""
        try:
            try:
                request.prompt_ids, request.prefix = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._read_prompt, message, self._registry.block_size
                )
            finally:
                request.task = None
            check_fits(len(request.prompt_ids), request.sampling.max_tokens, self._registry)
        except InvalidRequest as error:
            self._end(request, Rejected(request.tag, str(error), error.field))
            return
        except Exception as error:
            logger.exception("tokenizing failed")
            self._end(request, Failed(request.tag, f"the prompt could not be tokenized: {error}"))
            return
        for choice in request.choices:
            choice.detokenizer = IncrementalDetokenizer(self._tokenizer, request.prompt_ids)
        accepted = Accepted(request.tag, request.request_id, len(request.prompt_ids))
        self._send_to_client(request.client, accepted)
        if request in self._ledger:
            self._attempts.place(request)

    def _read_prompt(
        self, message: Generate, block_size: int | None
    ) -> tuple[list[int], PromptPrefix | None]:
        """Token ids of the prompt, and the names of its blocks. Runs on a thread beside the loop."""
        prompt_ids = tokenize(message.prompt, self._tokenizer, self._vocab_size)
        if block_size is None:
            return prompt_ids, None
        return prompt_ids, name_prefix(self._model, message.cache_salt, prompt_ids, block_size)

    def _send_to_client(self, client: bytes, message: Message) -> None:
        try:
            self._clients.send(client, message)
        except SendFailed as error:
            requests = self._ledger.of_client(client)
            logger.info("client %s: %s; %d requests aborted", client.hex(), error, len(requests))
            for request in requests:
                self._forget(request)

    # --------------------------------------------------------------------------------- workers

    async def _serve_workers(self) -> None:
        while True:
            identity, message = await self._workers.receive()
            worker = self._registry.by_identity(identity)
            if isinstance(message, Hello):
                self._welcome(identity, message)
            elif worker is not None:
                worker.heard_at = monotonic()
                self._hear(worker, message)
            elif isinstance(message, Heartbeat):
                self._send(identity, HeartbeatReply(self._epoch, known=False))

    def _welcome(self, identity: bytes, hello: Hello) -> None:
        known = self._registry.get(hello.peer.engine_id)
        if known is not None and known.identity == identity:
            return  # it was welcomed already, and asked twice
        if known is not None:
            self._lose_workers([known], "it has connected anew")
        refusal = self._registry.refusal(hello)
        if refusal is not None:
            logger.warning(
                "refused a %s worker: its %s is %s, the cluster's is %s",
                hello.peer.role,
                refusal.field,
                refusal.theirs,
                refusal.ours,
            )
            self._send(identity, refusal)
            return
        peers = [other.descriptor for other in self._registry]
        self._registry.add(identity, hello, monotonic())
        logger.info("%s worker %s has joined", hello.peer.role, hello.peer.engine_id)
        self._send(identity, Welcome(self._epoch, self._config.heartbeat_seconds, peers, self._pushes))
        self._broadcast(PeerJoined(hello.peer), but=hello.peer.engine_id)

    def _hear(self, worker: WorkerEntry, message: WorkerToRouter) -> None:
        match message:
            case Heartbeat(load):
                worker.load = load
                self._send_to_worker(worker, HeartbeatReply(self._epoch, known=True))
            case StepTokens(updates):
                for update in updates:
                    self._take_token(update)
            case CacheUpdate():
                self._take_cache_update(worker, message)
            case PrefixHit(request_id, attempt, cached_tokens):
                if (request := self._ledger.current(request_id, attempt)) is not None:
                    request.note_cached(worker.engine_id, cached_tokens)
            case PromptProgress():
                self._attempts.pull_early(message)
            case EarlyPullDropped():
                self._attempts.drop_early_pull(worker, message)
            case Prefilled():
                self._take_prefilled(worker, message)
            case DecodeAccepted(request_id, attempt):
                if (request := self._ledger.current(request_id, attempt)) is not None:
                    request.lease_accepted = True
            case Pulled(request_id, attempt, stats):
                if (request := self._ledger.current(request_id, attempt)) is not None:
                    request.transfer, request.lease = stats, None
            case Reserved():
                self._attempts.push_prompt(worker, message)
            case Pushed():
                self._attempts.take_pushed(message)
            case WorkRefused():
                self._attempts.take_refusal(worker, message)
            case WorkFailed(request_id, attempt, reason, retry):
                request = self._ledger.current(request_id, attempt)
                if request is not None and retry:
                    self._attempts.retry(request, reason)
                elif request is not None:
                    self._end(request, Failed(request.tag, reason))
            case LeasesRenewed():
                self._attempts.take_renewal(worker, message)
            case PeerLink(engine_id, lanes, error):
                self._take_link(worker, engine_id, lanes, error)
            case Leaving():
                logger.info("%s worker %s is leaving", worker.role, worker.engine_id)
                worker.leaving = True
            case Left():
                self._lose_workers([worker], "it has left")

    def _lose_workers(self, workers: list[WorkerEntry], reason: str) -> None:
        """Forget workers, all of them first, and then give what they had to those that are left."""
        for worker in workers:
            logger.warning("%s worker %s is gone: %s", worker.role, worker.engine_id, reason)
            self._registry.remove(worker.engine_id)
        for worker in workers:
            self._broadcast(PeerLeft(worker.engine_id))
        self._attempts.retry_those_of(workers)

    def _take_link(self, worker: WorkerEntry, engine_id: str, lanes: str, error: str) -> None:
        if self._pushes:  # it is the prefill worker that tells, and the decode worker that has the link
            target = self._registry.get(engine_id)
            if target is None:
                return
            worker, engine_id = target, worker.engine_id
        if error:
            worker.links.pop(engine_id, None)
            worker.broken_links.add(engine_id)
            logger.warning("worker %s has no link to %s: %s", worker.engine_id, engine_id, error)
        elif self._registry.get(engine_id) is not None:
            worker.links[engine_id] = lanes
            worker.broken_links.discard(engine_id)

    def _take_cache_update(self, worker: WorkerEntry, update: CacheUpdate) -> None:
        try:
            worker.update_cached_tags(update)
        except ValueError as error:
            logger.warning("worker %s sent a cache update that is none: %s", worker.engine_id, error)
            self._send_to_worker(worker, Malformed(f"CacheUpdate: {error}"))

    def _broadcast(self, message: Message, but: str | None = None) -> None:
        for worker in self._registry:
            if worker.engine_id != but:
                self._send_to_worker(worker, message)

    def _send_to_worker(self, worker: WorkerEntry, message: Message) -> None:
        self._send(worker.identity, message)

    def _send(self, identity: bytes, message: Message) -> None:
        try:
            self._workers.send(identity, message)
        except SendFailed as error:
            logger.warning("%s was not sent to a worker: %s", type(message).__name__, error)
            # Soon, not here: the caller is in the middle of something. If it lives, it will join again.
            asyncio.get_running_loop().call_soon(self._lose_unreachable, identity)

    def _lose_unreachable(self, identity: bytes) -> None:
        worker = self._registry.by_identity(identity)
        if worker is not None:
            self._lose_workers([worker], "it cannot be reached")

    # ---------------------------------------------------------------------------------- tokens

    def _take_token(self, update: TokenUpdate) -> None:
        request = self._ledger.current(update.request_id, update.attempt)
        choice = None if request is None else request.find_choice(update.choice)
        if request is None or choice is None or update.position < len(choice.output_ids):
            return
        if update.position > len(choice.output_ids):
            self._attempts.retry(request, "tokens of its worker were lost")
            return
        self._deliver(request, choice, update.token_id, update.finish_reason)

    def _take_prefilled(self, worker: WorkerEntry, message: Prefilled) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        unfinished = [] if request is None else request.unfinished
        expected = [(choice.index, len(choice.output_ids)) for choice in unfinished]
        if request is None or [(token.choice, token.position) for token in message.tokens] != expected:
            if message.lease is not None:
                self._send_to_worker(worker, ReleaseLeases([message.lease.lease_id]))
            if request is not None:
                self._attempts.retry(request, "its worker sent other tokens than were asked for")
            return
        request.lease, request.lease_accepted = message.lease, False
        for choice, token in zip(unfinished, message.tokens, strict=True):
            self._deliver(request, choice, token.token_id, token.finish_reason)
            if request not in self._ledger:
                return
        if message.pushed:
            return  # Pushed follows
        if request.lease is None:
            self._attempts.retry(request, "the prefill worker gave no lease on its KV cache")
            return
        self._attempts.place_decode(request)

    def _deliver(
        self, request: Request, choice: Answer, token_id: int, finish_reason: FinishReason | None
    ) -> None:
        """Stream one token; with the last one of the last answer the request ends."""
        text = choice.append(token_id, finish_reason)
        delta = Delta(request.tag, text, [token_id], choice.index, finish_reason)
        self._send_to_client(request.client, delta)
        if finish_reason is None or request.unfinished or request not in self._ledger:
            return
        outcome = Finished(
            request.tag,
            [choice.finish_reason for choice in request.choices if choice.finish_reason is not None],
            request.usage(),
            prefill_worker=request.prefill_worker,
            decode_worker=request.decode_worker,
            attempts=request.attempt,
            transfer=request.transfer,
        )
        self._end(request, outcome)

    # ------------------------------------------------------------------------------------ time

    async def _tick(self) -> None:
        ticked_at = monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._attempts.renew_leases()
            now = monotonic()
            if now - ticked_at > 2 * TICK_SECONDS:
                # This process stood still: heartbeats of that time are there and not read yet.
                self._registry.forgive_silence(now - ticked_at)
            else:
                silence = self._config.silence_seconds
                self._lose_workers(self._registry.silent(now, silence), f"not heard of for {silence:g} s")
            ticked_at = now

    # ------------------------------------------------------------------------------------- end

    def _abort(self, request: Request, cause: Literal["cancelled", "timeout"]) -> None:
        self._end(request, Aborted(request.tag, cause))

    def _end(self, request: Request, outcome: Outcome) -> None:
        """The one outcome of a request."""
        if request not in self._ledger:
            return  # its client went away while the requests before it ended
        self._forget(request, finished=isinstance(outcome, Finished))
        self._send_to_client(request.client, outcome)

    def _forget(self, request: Request, *, finished: bool = False) -> None:
        """Drop a request and whatever workers hold for it."""
        self._ledger.remove(request)
        if request.deadline is not None:
            request.deadline.cancel()
        if request.task is not None:
            request.task.cancel()
        if finished:
            self._attempts.settle(request)
        else:
            self._attempts.withdraw(request)
