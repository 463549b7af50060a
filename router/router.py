"""The router: an asyncio loop between clients and workers.

It mints request ids, tokenizes once and names the blocks of the prompt, has every request done by workers
(router.attempts), turns tokens into text and streams them (router.delivery). It knows no KV cache contents,
only who holds which lease, and the names of what workers keep.
"""

import asyncio
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Literal
from uuid import uuid4

import msgspec

from pdengine.router.admission import InvalidRequest
from pdengine.router.attempts import Attempts
from pdengine.router.config import RouterConfig
from pdengine.router.delivery import Delivery
from pdengine.router.intake import Intake
from pdengine.router.ledger import Ledger, Request
from pdengine.router.metrics import RouterMetrics
from pdengine.router.outbox import Outbox
from pdengine.router.ports import Ports
from pdengine.router.registry import Registry, WorkerEntry
from pdengine.router.request_log import RequestLog
from pdengine.transport.messages import (
    Aborted,
    Accepted,
    CacheUpdate,
    Cancel,
    DecodeAccepted,
    EarlyPullDropped,
    Failed,
    Finished,
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
    PromptLogprobs,
    PromptProgress,
    PromptScored,
    Pulled,
    Pushed,
    Rejected,
    Reserved,
    Status,
    StepTokens,
    Welcome,
    WorkerToRouter,
    WorkFailed,
    WorkRefused,
)
from pdengine.transport.sockets import KEY_REVOKED, SendFailed

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
TOKENIZER_THREADS = 4


class Router:
    """Binds its sockets when made; `run` serves until it is cancelled.

    client_keys: for a client in this process; None in a cluster without keys. metrics: for a MetricsServer.
    Raises CheckpointError, AddressError or KeysError.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._pushes = config.transfer == "push"
        self._intake = Intake(config.model_directory)
        self._registry = Registry(self._intake.model)
        self._ledger = Ledger()
        self._log = RequestLog()
        self._attempts = Attempts(
            config, self._ledger, self._registry, send=self._send_to_worker, end=self._end
        )
        self._outbox = Outbox(
            lambda client, message: self._clients.send(client, message), self._forget_client
        )
        self._delivery = Delivery(
            self._ledger, self._attempts, self._outbox, release=self._send_to_worker, end=self._end
        )
        self._epoch = uuid4().hex
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        try:
            self._ports = Ports(config)
        except BaseException:
            self._threads.shutdown(wait=False)
            raise
        self._clients, self._workers = self._ports.clients, self._ports.workers
        self.client_address, self.worker_address = self._ports.client_address, self._ports.worker_address
        self.client_keys = self._ports.client_keys
        self.metrics = RouterMetrics(self._ports.by_name, self._registry, self._ledger, self._log)

    async def run(self) -> None:
        """Serve until cancelled; then every request in flight fails with a word to its client."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve_clients())
                group.create_task(self._serve_workers())
                group.create_task(self._tick())
                group.create_task(self._ports.watch(self._shut_out))
        finally:
            for request in self._ledger:
                self._end(request, Failed(request.tag, "the router is shutting down", retry=True))
            self.close()

    def close(self) -> None:
        """Of a router that does not run: `run` does it at its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._ports.close()

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
                        self._outbox.send(client, Failed(tag, reason))
                case GetStatus(tag):
                    workers = self._registry.statuses(monotonic())
                    self._outbox.send(
                        client,
                        Status(
                            tag, self._epoch, workers, len(self._ledger), self._registry.max_request_tokens
                        ),
                    )

    def _accept(self, client: bytes, message: Generate) -> None:
        tag, request_id = message.tag, uuid4().hex
        try:
            if self._ledger.find(client, tag) is not None:
                raise InvalidRequest("tag", f"tag {tag} is in use by another request")
            self._intake.check(message)
        except InvalidRequest as error:
            refusal = Rejected(tag, str(error), error.field)
            self._outbox.send(client, refusal)
            self._log.refuse(request_id, refusal)
            return
        sampling = message.sampling
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        request = Request(request_id, client, tag, sampling, message.n, message.priority)
        self._ledger.add(request)
        if message.timeout is not None:
            loop = asyncio.get_running_loop()
            request.deadline = loop.call_later(message.timeout, self._abort, request, "timeout")
        request.task = asyncio.create_task(self._admit(request, message))

    async def _admit(self, request: Request, message: Generate) -> None:
        """Tokenize off the event loop, then place the request."""
        try:
            try:
                parts = await asyncio.get_running_loop().run_in_executor(
                    self._threads,
                    self._intake.read,
                    message,
                    self._registry.limits,
                    self._registry.block_size,
                )
            finally:
                request.task = None
        except InvalidRequest as error:
            if error.field is None:  # nothing is wrong with it: another router may have workers
                self._end(request, Failed(request.tag, str(error), retry=True))
            else:
                self._end(request, Rejected(request.tag, str(error), error.field))
            return
        except Exception as error:
            logger.exception("tokenizing failed")
            self._end(request, Failed(request.tag, f"the prompt could not be tokenized: {error}"))
            return
        self._intake.begin(request, parts)
        accepted = Accepted(request.tag, request.request_id, len(request.prompt_ids))
        self._outbox.send(request.client, accepted)
        if request.prompt_logprobs is not None and not request.lacks_prompt_logprobs:
            self._outbox.send(request.client, PromptLogprobs(request.tag, []))  # of a prompt of one token
        if request in self._ledger:
            self._attempts.place(request)

    def _forget_client(self, client: bytes, error: SendFailed) -> None:
        requests = self._ledger.of_client(client)
        if requests:
            logger.info("client %s: %s; %d requests aborted", client.hex(), error, len(requests))
        for request in requests:
            self._forget(request)
            self._log.end(request, None)

    def _shut_out(self) -> None:
        """Other keys are admitted than before: who is no longer has nothing here any more."""
        for client in self._clients.forget_revoked():
            for request in self._ledger.of_client(client):
                self._end(request, Failed(request.tag, KEY_REVOKED))
        revoked = [self._registry.by_identity(identity) for identity in self._workers.forget_revoked()]
        self._lose_workers([worker for worker in revoked if worker is not None], KEY_REVOKED)

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
                self._send_to_worker(worker, HeartbeatReply(self._epoch, known=True, leaving=worker.leaving))
            case StepTokens():
                self._delivery.take_step(message)
            case CacheUpdate():
                self._take_cache_update(worker, message)
            case PrefixHit(request_id, attempt, cached_tokens):
                if (request := self._ledger.current(request_id, attempt)) is not None:
                    request.note_cached(worker.engine_id, cached_tokens)
            case PromptProgress():
                self._attempts.pull_early(message)
            case EarlyPullDropped():
                self._attempts.drop_early_pull(worker, message)
            case PromptScored():
                self._delivery.take_prompt_scored(message)
            case Prefilled():
                self._delivery.take_prefilled(worker, message)
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
            case Leaving() if worker.leaving:
                pass  # it says so until it has been heard
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
        if self._pushes and worker.role == "prefill":  # which tells of a link that the decode worker has
            target = self._registry.get(engine_id)
            if target is None:
                return
            worker, engine_id = target, worker.engine_id
        if error:
            worker.links.pop(engine_id, None)
            worker.broken_links.add(engine_id)
            logger.warning("worker %s has no link to %s: %s", worker.engine_id, engine_id, error)
        elif self._registry.get(engine_id) is not None:
            worker.links[engine_id] = lanes or worker.links.get(engine_id, "")
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
        self._outbox.send(request.client, outcome)
        self._log.end(request, outcome)

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
