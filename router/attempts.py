"""Who has which request: each attempt from its first worker to the one that writes the answers.

A request is given to a prefill worker and, when the prompt's KV cache is there, to a decode worker; or to one
worker that does all of it. Whoever loses or fails it makes the next attempt begin, with the tokens so far.
"""

import logging
from collections.abc import Callable

from pdengine.router.config import RouterConfig
from pdengine.router.ledger import Ledger, Request
from pdengine.router.registry import Demand, Registry, WorkerEntry
from pdengine.transport.messages import (
    Abort,
    Decode,
    EarlyPullDropped,
    Failed,
    LeasesRenewed,
    Message,
    Outcome,
    Prefill,
    PrefillAndDecode,
    PromptProgress,
    PullEarly,
    Pushed,
    PushTarget,
    Rejected,
    ReleaseLeases,
    RenewLeases,
    Reserve,
    Reserved,
    WorkRefused,
)

logger = logging.getLogger(__name__)

Send = Callable[[WorkerEntry, Message], None]
End = Callable[[Request, Outcome], None]


class Attempts:
    """send: to a worker; it must not call back into this class. end: gives a request its outcome, and may
    call `withdraw` or `settle`."""

    def __init__(
        self, config: RouterConfig, ledger: Ledger, registry: Registry, *, send: Send, end: End
    ) -> None:
        self._config = config
        self._pushes = config.transfer == "push"
        self._ledger = ledger
        self._registry = registry
        self._send = send
        self._end = end

    # --------------------------------------------------------------------------- the first worker

    def place(self, request: Request) -> None:
        """Give the request to a worker as a new attempt."""
        request.attempt += 1
        request.transfer = None
        request.refused_by.clear()
        if not request.has_output:
            request.cached_tokens = None
        if request.prefix is not None and request.prefix.block_size != self._registry.block_size:
            request.prefix = None  # all workers have gone meanwhile, and others have come
        self._offer(request)

    def _offer(self, request: Request) -> None:
        """Give the request to the first worker that has not refused it yet. Only when all have, it may wait
        in the queue of the least loaded one."""
        demand = request.demand()
        workers = self._candidates(request, demand)
        if not workers:
            self._end(request, Failed(request.tag, "no worker is there to take the request", retry=True))
            return
        untried = [worker for worker in workers if worker.engine_id not in request.refused_by]
        may_wait = len(workers) == 1 or not untried
        worker = workers[0] if may_wait else untried[0]
        request.prefill_worker = worker.engine_id
        uncached = worker.uncached_tokens(demand)
        if self._registry.splits(worker) and not request.has_diverged:
            request.decode_worker = ""
            self._assign(request, worker, uncached)
            if self._pushes:
                self._reserve(request, demand, worker)
            else:
                self._send(worker, Prefill(request.work(), may_wait))
        else:
            request.decode_worker = worker.engine_id
            num_cached = 0 if worker.role == "decode" else demand.num_tokens - uncached
            self._assign(request, worker, demand.expected - num_cached)
            self._send(worker, PrefillAndDecode(request.work(), may_wait))

    def _candidates(self, request: Request, demand: Demand) -> list[WorkerEntry]:
        """Who may get the request, the best first."""
        if request.has_diverged:
            return self._registry.rank_whole(demand)
        workers = self._registry.rank_prefill(demand)
        local = self._registry.pick_local(demand, self._config.local_prefill_tokens)
        if local is None or local.engine_id in request.refused_by:
            return workers
        return [local, *(worker for worker in workers if worker is not local)]

    def take_refusal(self, worker: WorkerEntry, message: WorkRefused) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        if request is None or worker.engine_id not in (request.worker, request.early_worker):
            return
        if self._pushes or request.lease is not None:
            request.attempt += 1  # a reservation and a lease belong to one attempt
        self.settle(request)
        if worker.engine_id not in request.refused_by:
            request.refused_by.add(worker.engine_id)
            self._offer(request)
        elif request.has_output:
            self._end(request, Failed(request.tag, f"no worker has room: {message.reason}"))
        else:
            self._end(request, Rejected(request.tag, f"no worker has room: {message.reason}"))

    # -------------------------------------------------------------- pushes, and pulls before the end

    def _reserve(self, request: Request, demand: Demand, writer: WorkerEntry) -> None:
        """Before the prompt is computed, have a decode worker hold the blocks that it is pushed into."""
        worker = self._registry.pick_decode(demand, writer.engine_id)
        assert worker is not None, "such a prefill worker was not a candidate"
        request.early_worker = worker.engine_id
        worker.assigned[request.request_id] = demand.expected
        self._send(worker, Reserve(request.work(), writer.engine_id))

    def push_prompt(self, worker: WorkerEntry, message: Reserved) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        writer = None if request is None else self._registry.get(request.worker)
        if request is not None and writer is not None:
            target = PushTarget(worker.engine_id, message.block_ids)
            self._send(writer, Prefill(request.work(), push_to=target))

    def take_pushed(self, message: Pushed) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        worker = None if request is None else self._registry.get(request.early_worker)
        if request is not None and worker is not None:
            request.transfer = message.stats
            self._give_decode(request, worker)

    def pull_early(self, message: PromptProgress) -> None:
        """Let a decode worker that has room for the request begin to pull what is done of its prompt."""
        request = self._ledger.current(message.request_id, message.attempt)
        if request is None or self._config.transfer != "early-pull":
            return
        worker = self._registry.get(request.early_worker)
        if worker is None:
            demand = request.demand()
            worker = self._registry.pick_decode(demand, message.lease.engine_id)
            if worker is None or not worker.has_room(demand.expected):
                return
            request.early_worker = worker.engine_id
            worker.assigned[request.request_id] = demand.expected
        news = PullEarly(
            request.request_id, request.attempt, message.num_tokens, message.lease, request.prefix_names
        )
        self._send(worker, news)

    def drop_early_pull(self, worker: WorkerEntry, message: EarlyPullDropped) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        if request is not None and request.early_worker == worker.engine_id:
            self._end_early_transfer(request)

    def _end_early_transfer(self, request: Request) -> None:
        worker = self._registry.get(request.early_worker)
        if worker is not None:
            worker.assigned.pop(request.request_id, None)
            self._send(worker, Abort(request.request_id))
        request.early_worker = None

    # ---------------------------------------------------------------------------- the second worker

    def place_decode(self, request: Request) -> None:
        """The KV cache is there: choose who pulls it, by the load of now, unless somebody does already."""
        assert request.lease is not None
        holder = request.lease.engine_id
        worker = self._registry.get(request.early_worker)
        if worker is None or worker.leaving or holder in worker.broken_links:
            self._end_early_transfer(request)
            worker = self._registry.pick_decode(request.demand(), holder)
        if worker is None:
            self.retry(request, "no decode worker is there")
        else:
            self._give_decode(request, worker)

    def _give_decode(self, request: Request, worker: WorkerEntry) -> None:
        request.early_worker = None
        request.decode_worker = worker.engine_id
        self._assign(request, worker, request.demand().expected)
        self._send(worker, Decode(request.work(), request.lease))

    # ------------------------------------------------------------------------------ their ends

    def retry(self, request: Request, reason: str) -> None:
        """Give the request, with the tokens written so far, to another worker, or fail it."""
        if request not in self._ledger:
            return  # its client went away while the requests before it were given to others
        self.withdraw(request)
        if self._config.on_failure == "fail":
            self._end(request, Failed(request.tag, reason))
            return
        if request.attempt >= self._config.max_attempts:
            self._end(request, Failed(request.tag, f"after {request.attempt} attempts: {reason}"))
            return
        logger.warning(
            "request %s, attempt %d: %s; trying again", request.request_id, request.attempt, reason
        )
        self.place(request)

    def retry_those_of(self, workers: list[WorkerEntry]) -> None:
        """Give what these workers had, who are gone from the registry, to those that are left."""
        for worker in workers:
            for request in self._ledger.of_worker(worker.engine_id):
                self.retry(request, f"the {worker.role} worker that had it is gone")
            for request in self._ledger.of_holder(worker.engine_id):
                self.retry(request, "the worker that held its KV cache is gone")
            for request in self._ledger.of_reserver(worker.engine_id) if self._pushes else []:
                self.retry(request, "the decode worker that held its blocks is gone")

    def withdraw(self, request: Request) -> None:
        """Take the current attempt back from its worker, and release its lease."""
        worker = self._registry.get(request.worker)
        if worker is not None:
            self._send(worker, Abort(request.request_id))
        self.settle(request)

    def settle(self, request: Request) -> None:
        """The worker of the current attempt has nothing left of it: release what others hold."""
        self._unassign(request)
        self._end_early_transfer(request)
        if request.lease is None:
            return
        holder = self._registry.get(request.lease.engine_id)
        if holder is not None:
            self._send(holder, ReleaseLeases([request.lease.lease_id]))
        request.lease = None

    def _assign(self, request: Request, worker: WorkerEntry, num_tokens: int) -> None:
        self._unassign(request)
        request.worker = worker.engine_id
        worker.assigned[request.request_id] = num_tokens

    def _unassign(self, request: Request) -> None:
        worker = self._registry.get(request.worker)
        if worker is not None:
            worker.assigned.pop(request.request_id, None)
        request.worker = None

    def give_up_answer(self, request: Request, index: int) -> None:
        """Tell the worker that has the request to write no more of this answer."""
        worker = self._registry.get(request.worker)
        if worker is not None:
            self._send(worker, Abort(request.request_id, [index]))

    # ------------------------------------------------------------------------------------ leases

    def take_renewal(self, worker: WorkerEntry, answer: LeasesRenewed) -> None:
        for request in self._ledger:
            lease = request.lease
            if lease is None or lease.engine_id != worker.engine_id or request.lease_accepted:
                continue
            if lease.lease_id in answer.lost:
                self.retry(request, "the lease on its KV cache has expired")

    def renew_leases(self) -> None:
        """Keep alive what no decode worker has taken over yet."""
        lease_ids: dict[str, list[int]] = {}
        for request in self._ledger:
            if request.lease is not None and not request.lease_accepted:
                lease_ids.setdefault(request.lease.engine_id, []).append(request.lease.lease_id)
        for engine_id, ids in lease_ids.items():
            worker = self._registry.get(engine_id)
            if worker is not None:
                self._send(worker, RenewLeases(0, ids))
