"""The router: an asyncio loop between clients and workers.

It mints request ids, tokenizes once, gives every request to a prefill worker, and, when the prompt's KV cache
is there, to a decode worker; it turns tokens into text and streams them. It knows no KV cache contents, only
who holds which lease. A request whose worker is lost is given to another one, with the tokens so far.
"""

import asyncio
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal
from uuid import uuid4

import msgspec
import zmq.asyncio

from pdengine.models.config import load_config
from pdengine.models.fingerprint import model_fingerprint
from pdengine.models.tokenizer import IncrementalDetokenizer, Tokenizer
from pdengine.router.admission import InvalidRequest, check_fits, check_sampling, tokenize
from pdengine.router.ledger import Ledger, Request
from pdengine.router.registry import Registry, WorkerEntry
from pdengine.transport.messages import (
    Abort,
    Aborted,
    Accepted,
    Cancel,
    ClientToRouter,
    Decode,
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
    Message,
    Outcome,
    PeerJoined,
    PeerLeft,
    PeerLink,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    PromptProgress,
    PullEarly,
    Pulled,
    Pushed,
    PushTarget,
    Rejected,
    ReleaseLeases,
    RenewLeases,
    Reserve,
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

OnFailure = Literal["recompute", "fail"]
TransferMode = Literal["early-pull", "pull", "push"]
TICK_SECONDS = 0.5
TOKENIZER_THREADS = 4


@dataclass(frozen=True)
class RouterConfig:
    """heartbeat_seconds: asked of the workers. silence_seconds: a worker that is not heard of for so long is
    given up. on_failure: of a request's worker: compute the request anew on another one, with the tokens
    written so far, or fail it. max_attempts: workers that a request is given to before it fails. transfer:
    whether a KV cache is pulled when its prompt is complete, or also before, where a decode worker has room;
    or pushed layer by layer, into blocks that are held from before the prompt is begun.
    """

    model_directory: Path
    client_address: str = "tcp://127.0.0.1:5555"
    worker_address: str = "tcp://127.0.0.1:5556"
    heartbeat_seconds: float = 1.0
    silence_seconds: float = 5.0
    on_failure: OnFailure = "recompute"
    max_attempts: int = 3
    transfer: TransferMode = "early-pull"


class Router:
    """Binds its sockets when made; `run` serves until it is cancelled.

    Raises CheckpointError or AddressError.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._pushes = config.transfer == "push"
        self._vocab_size = load_config(config.model_directory).vocab_size
        self._tokenizer = Tokenizer.load(config.model_directory)
        self._registry = Registry(model_fingerprint(config.model_directory))
        self._ledger = Ledger()
        self._epoch = uuid4().hex
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._context = zmq.asyncio.Context()
        self._clients = ServerSocket[ClientToRouter](self._context, ClientToRouter)
        self._workers = ServerSocket[WorkerToRouter](self._context, WorkerToRouter)
        self.client_address = self._clients.bind(config.client_address)
        self.worker_address = self._workers.bind(config.worker_address)

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
                    self._send_to_client(client, Status(tag, self._epoch, workers, len(self._ledger)))

    def _accept(self, client: bytes, message: Generate) -> None:
        tag = message.tag
        if self._ledger.find(client, tag) is not None:
            self._send_to_client(client, Rejected(tag, f"tag {tag} is in use by another request", "tag"))
            return
        request = Request(uuid4().hex, client, tag, message.sampling)
        self._ledger.add(request)
        try:
            check_sampling(message.sampling, message.timeout, self._vocab_size)
        except InvalidRequest as error:
            self._end(request, Rejected(tag, str(error), error.field))
            return
        if message.sampling.seed is None:
            request.sampling = msgspec.structs.replace(message.sampling, seed=secrets.randbits(63))
        if message.timeout is not None:
            loop = asyncio.get_running_loop()
            request.deadline = loop.call_later(message.timeout, self._abort, request, "timeout")
        request.task = asyncio.create_task(self._admit(request, message))

    async def _admit(self, request: Request, message: Generate) -> None:
        """Tokenize off the event loop, then place the request."""
        try:
            try:
                request.prompt_ids = await asyncio.get_running_loop().run_in_executor(
                    self._threads, tokenize, message.prompt, self._tokenizer, self._vocab_size
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
        request.detokenizer = IncrementalDetokenizer(self._tokenizer, request.prompt_ids)
        accepted = Accepted(request.tag, request.request_id, len(request.prompt_ids))
        self._send_to_client(request.client, accepted)
        if request in self._ledger:
            self._place(request)

    def _send_to_client(self, client: bytes, message: Message) -> None:
        try:
            self._clients.send(client, message)
        except SendFailed as error:
            requests = self._ledger.of_client(client)
            logger.info("client %s: %s; %d requests aborted", client.hex(), error, len(requests))
            for request in requests:
                self._forget(request)

    # ------------------------------------------------------------------------------- placement

    def _place(self, request: Request) -> None:
        """Give the request to a worker as a new attempt."""
        request.attempt += 1
        request.transfer = None
        request.refused_by.clear()
        self._offer(request)

    def _offer(self, request: Request) -> None:
        """Give the request to the least loaded worker that has not refused it yet. Only when all have, it may
        wait in the queue of the least loaded one."""
        num_remaining = request.max_total_tokens - request.num_tokens
        workers = self._registry.rank_prefill(request.num_tokens, num_remaining)
        if not workers:
            self._end(request, Failed(request.tag, "no worker is there to take the request"))
            return
        untried = [worker for worker in workers if worker.engine_id not in request.refused_by]
        may_wait = len(workers) == 1 or not untried
        worker = workers[0] if may_wait else untried[0]
        request.prefill_worker = worker.engine_id
        if self._registry.splits(worker):
            request.decode_worker = ""
            self._assign(request, worker, request.num_tokens)
            if self._pushes:
                self._reserve(request, worker)
            else:
                self._send_to_worker(worker, Prefill(request.work(), may_wait))
        else:
            request.decode_worker = worker.engine_id
            self._assign(request, worker, request.max_total_tokens)
            self._send_to_worker(worker, PrefillAndDecode(request.work(), may_wait))

    def _take_refusal(self, worker: WorkerEntry, message: WorkRefused) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        if request is None or worker.engine_id not in (request.worker, request.early_worker):
            return
        self._unassign(request)
        if self._pushes:
            self._end_early_transfer(request)
            request.attempt += 1  # a reservation belongs to one attempt
        if worker.engine_id not in request.refused_by:
            request.refused_by.add(worker.engine_id)
            self._offer(request)
        elif request.output_ids:
            self._end(request, Failed(request.tag, f"no worker has room: {message.reason}"))
        else:
            self._end(request, Rejected(request.tag, f"no worker has room: {message.reason}"))

    def _reserve(self, request: Request, writer: WorkerEntry) -> None:
        """Before the prompt is computed, have a decode worker hold the blocks that it is pushed into."""
        num_cached = request.max_total_tokens - 1
        worker = self._registry.pick_decode(num_cached, writer.engine_id)
        assert worker is not None, "such a prefill worker was not a candidate"
        request.early_worker = worker.engine_id
        worker.assigned[request.request_id] = request.max_total_tokens
        self._send_to_worker(worker, Reserve(request.work(), writer.engine_id))

    def _push_prompt(self, worker: WorkerEntry, message: Reserved) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        writer = None if request is None else self._registry.get(request.worker)
        if request is not None and writer is not None:
            target = PushTarget(worker.engine_id, message.block_ids)
            self._send_to_worker(writer, Prefill(request.work(), push_to=target))

    def _pull_early(self, message: PromptProgress) -> None:
        """Let a decode worker that has room for the request begin to pull what is done of its prompt."""
        request = self._ledger.current(message.request_id, message.attempt)
        if request is None or self._config.transfer != "early-pull":
            return
        num_cached = request.max_total_tokens - 1
        worker = self._registry.get(request.early_worker)
        if worker is None:
            worker = self._registry.pick_decode(num_cached, message.lease.engine_id)
            if worker is None or not worker.has_room(num_cached):
                return
            request.early_worker = worker.engine_id
            worker.assigned[request.request_id] = request.max_total_tokens
        news = PullEarly(
            request.request_id, request.attempt, num_cached, message.num_tokens, lease=message.lease
        )
        self._send_to_worker(worker, news)

    def _place_decode(self, request: Request) -> None:
        """The KV cache is there: choose who pulls it, by the load of now, unless somebody does already."""
        assert request.lease is not None
        holder = request.lease.engine_id
        worker = self._registry.get(request.early_worker)
        if worker is None or worker.leaving or holder in worker.broken_links:
            self._end_early_transfer(request)
            worker = self._registry.pick_decode(request.max_total_tokens - 1, holder)
        if worker is None:
            self._retry(request, "no decode worker is there")
        else:
            self._give_decode(request, worker)

    def _take_pushed(self, message: Pushed) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        worker = None if request is None else self._registry.get(request.early_worker)
        if request is not None and worker is not None:
            request.transfer = message.stats
            self._give_decode(request, worker)

    def _give_decode(self, request: Request, worker: WorkerEntry) -> None:
        request.early_worker = None
        request.decode_worker = worker.engine_id
        self._assign(request, worker, request.max_total_tokens)
        self._send_to_worker(worker, Decode(request.work(), request.lease))

    def _end_early_transfer(self, request: Request) -> None:
        worker = self._registry.get(request.early_worker)
        if worker is not None:
            worker.assigned.pop(request.request_id, None)
            self._send_to_worker(worker, Abort(request.request_id))
        request.early_worker = None

    def _assign(self, request: Request, worker: WorkerEntry, num_tokens: int) -> None:
        self._unassign(request)
        request.worker = worker.engine_id
        worker.assigned[request.request_id] = num_tokens

    def _unassign(self, request: Request) -> None:
        worker = self._registry.get(request.worker)
        if worker is not None:
            worker.assigned.pop(request.request_id, None)
        request.worker = None

    def _retry(self, request: Request, reason: str) -> None:
        """Give the request, with the tokens written so far, to another worker, or fail it."""
        if request not in self._ledger:
            return  # its client went away while the requests before it were given to others
        self._withdraw(request)
        if self._config.on_failure == "fail":
            self._end(request, Failed(request.tag, reason))
            return
        if request.attempt >= self._config.max_attempts:
            self._end(request, Failed(request.tag, f"after {request.attempt} attempts: {reason}"))
            return
        logger.warning(
            "request %s, attempt %d: %s; trying again", request.request_id, request.attempt, reason
        )
        self._place(request)

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
            case PromptProgress():
                self._pull_early(message)
            case EarlyPullDropped(request_id, attempt):
                request = self._ledger.current(request_id, attempt)
                if request is not None and request.early_worker == worker.engine_id:
                    self._end_early_transfer(request)
            case Prefilled():
                self._take_prefilled(worker, message)
            case DecodeAccepted(request_id, attempt):
                request = self._ledger.current(request_id, attempt)
                if request is not None:
                    request.lease_accepted = True
            case Pulled(request_id, attempt, stats):
                request = self._ledger.current(request_id, attempt)
                if request is not None:
                    request.transfer, request.lease = stats, None
            case Reserved():
                self._push_prompt(worker, message)
            case Pushed():
                self._take_pushed(message)
            case WorkRefused():
                self._take_refusal(worker, message)
            case WorkFailed(request_id, attempt, reason, retry):
                request = self._ledger.current(request_id, attempt)
                if request is not None and retry:
                    self._retry(request, reason)
                elif request is not None:
                    self._end(request, Failed(request.tag, reason))
            case LeasesRenewed():
                self._take_renewal(worker, message)
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
        for worker in workers:
            for request in self._ledger.of_worker(worker.engine_id):
                self._retry(request, f"the {worker.role} worker that had it is gone")
            for request in self._ledger.of_holder(worker.engine_id):
                self._retry(request, "the worker that held its KV cache is gone")
            for request in self._ledger.of_reserver(worker.engine_id) if self._pushes else []:
                self._retry(request, "the decode worker that held its blocks is gone")

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
        if request is None or update.position < len(request.output_ids):
            return
        if update.position > len(request.output_ids):
            self._retry(request, "tokens of its worker were lost")
            return
        self._deliver(request, update.token_id, update.finish_reason)

    def _take_prefilled(self, worker: WorkerEntry, message: Prefilled) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        if request is None or message.position != len(request.output_ids):
            if message.lease is not None:
                self._send_to_worker(worker, ReleaseLeases([message.lease.lease_id]))
            return
        request.lease, request.lease_accepted = message.lease, False
        self._deliver(request, message.token_id, message.finish_reason)
        if request not in self._ledger:
            return
        if message.pushed:
            return  # Pushed follows
        if request.lease is None:
            self._retry(request, "the prefill worker gave no lease on its KV cache")
            return
        self._place_decode(request)

    def _deliver(self, request: Request, token_id: int, finish_reason: FinishReason | None) -> None:
        """Stream one token; the one that stops an answer is counted, but is no part of its text."""
        assert request.detokenizer is not None
        request.output_ids.append(token_id)
        text = "" if finish_reason == "stop" else request.detokenizer.push([token_id])
        self._send_to_client(request.client, Delta(request.tag, text, [token_id]))
        if finish_reason is not None and request in self._ledger:
            outcome = Finished(
                request.tag,
                finish_reason,
                request.usage(),
                prefill_worker=request.prefill_worker,
                decode_worker=request.decode_worker,
                attempts=request.attempt,
                text=request.detokenizer.finish(),
                transfer=request.transfer,
            )
            self._end(request, outcome)

    # ---------------------------------------------------------------------------------- leases

    def _take_renewal(self, worker: WorkerEntry, answer: LeasesRenewed) -> None:
        for request in self._ledger:
            lease = request.lease
            if lease is None or lease.engine_id != worker.engine_id or request.lease_accepted:
                continue
            if lease.lease_id in answer.lost:
                self._retry(request, "the lease on its KV cache has expired")

    def _renew_leases(self) -> None:
        """Keep alive what no decode worker has taken over yet."""
        lease_ids: dict[str, list[int]] = {}
        for request in self._ledger:
            if request.lease is not None and not request.lease_accepted:
                lease_ids.setdefault(request.lease.engine_id, []).append(request.lease.lease_id)
        for engine_id, ids in lease_ids.items():
            worker = self._registry.get(engine_id)
            if worker is not None:
                self._send_to_worker(worker, RenewLeases(0, ids))

    async def _tick(self) -> None:
        ticked_at = monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._renew_leases()
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
            self._unassign(request)
            self._end_early_transfer(request)
            self._release_lease(request)
        else:
            self._withdraw(request)

    def _withdraw(self, request: Request) -> None:
        """Take the current attempt back from its worker, and release its lease."""
        worker = self._registry.get(request.worker)
        if worker is not None:
            self._send_to_worker(worker, Abort(request.request_id))
        self._unassign(request)
        self._end_early_transfer(request)
        self._release_lease(request)

    def _release_lease(self, request: Request) -> None:
        if request.lease is None:
            return
        holder = self._registry.get(request.lease.engine_id)
        if holder is not None:
            self._send_to_worker(holder, ReleaseLeases([request.lease.lease_id]))
        request.lease = None
