"""What the router asks of this worker, checked at once: the engine gets it, or the router hears why not."""

from collections.abc import Callable, Container

from pdengine.engine.commands import AbortRequest, AddRequest, Command
from pdengine.engine.lease_keeper import LeaseKeeper
from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.open_answers import OpenAnswers
from pdengine.engine.pushes import StartPushed
from pdengine.engine.request_log import RequestRecord
from pdengine.engine.sequence import Mode, Push, Sequence, blocks_for, sequences_of
from pdengine.transport.messages import (
    Abort,
    Decode,
    DecodeAccepted,
    KVLease,
    PeerLink,
    Prefill,
    PrefillAndDecode,
    PullEarly,
    PushTarget,
    Reserve,
    Work,
    WorkFailed,
)

UNKNOWN_PREFILL_WORKER = "the prefill worker is not known here"

Order = Prefill | PrefillAndDecode | PullEarly | Reserve | Decode | Abort


class WorkIntake:
    """Belongs to the control thread.

    num_blocks: of the pool. max_requests: answers that are written at once. open_answers: gets what is begun
    and given up. peers: engine ids of those that this worker can pull from, or push to. is_leaving: whether
    this worker leaves: then it pulls nothing early.
    """

    def __init__(
        self,
        *,
        block_size: int,
        num_blocks: int,
        max_requests: int,
        metrics: WorkerMetrics,
        open_answers: OpenAnswers,
        peers: Container[str],
        leases: LeaseKeeper,
        post: Callable[[Command], None],
        tell_router: Callable[[WorkFailed | DecodeAccepted | PeerLink], None],
        is_leaving: Callable[[], bool],
    ) -> None:
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._max_requests = max_requests
        self._metrics = metrics
        self._open = open_answers
        self._peers = peers
        self._leases = leases
        self._post = post
        self._tell_router = tell_router
        self._is_leaving = is_leaving

    def take(self, order: Order) -> None:
        match order:
            case Prefill(work, may_wait, push_to):
                self._take_prompt(work, may_wait, push_to)
            case PrefillAndDecode(work, may_wait):
                self._take(self._sequences(work, Mode.WHOLE, may_wait))
            case PullEarly():
                self._pull_early(order)
            case Reserve():
                self._reserve(order)
            case Decode(work, KVLease() as lease):
                self._take_leased(work, lease)
            case Decode(work):
                self._start_pushed(work)
            case Abort(request_id, choices):
                self._open.give_up(request_id, choices)
                self._post(AbortRequest(request_id, None if choices is None else frozenset(choices)))

    def _sequences(self, work: Work, mode: Mode, may_wait: bool = True) -> list[Sequence]:
        return sequences_of(work, mode, block_size=self._block_size, may_wait=may_wait)

    def _take(self, sequences: list[Sequence]) -> None:
        refusal = self._refusal(sequences)
        if refusal is None:
            self._start(sequences)
        else:
            self._tell_router(refusal)

    def _take_prompt(self, work: Work, may_wait: bool, push_to: PushTarget | None) -> None:
        [sequence] = self._sequences(work, Mode.PREFILL, may_wait)
        if push_to is not None:
            num_blocks = blocks_for(len(sequence.token_ids), self._block_size)
            if push_to.engine_id not in self._peers or len(push_to.block_ids) != num_blocks:
                reason = "its KV cache cannot be pushed where it shall be"
                self._tell_router(WorkFailed(work.request_id, work.attempt, reason, retry=True))
                return
            sequence.push = Push(work.request_id, work.attempt, push_to)
        self._take([sequence])

    def _reserve(self, order: Reserve) -> None:
        """A writer that is not known here could never be asked whether it still writes to the blocks."""
        [sequence] = self._sequences(order.work, Mode.DECODE)
        sequence.writer = order.writer
        if order.writer not in self._peers:
            # Before the refusal: else the router would choose the same two again.
            self._tell_router(PeerLink(order.writer, error=UNKNOWN_PREFILL_WORKER))
        self._take([sequence])

    def _start(self, sequences: list[Sequence]) -> None:
        choices = [answer.choice for sequence in sequences for answer in sequence.answers]
        leader = sequences[0]
        record = RequestRecord(leader.request_id, leader.attempt, leader.mode, leader.num_prompt_tokens)
        self._open.begin(record, choices)
        self._post(AddRequest(sequences))

    def _take_leased(self, work: Work, lease: KVLease) -> None:
        """Pull at once and renew the lease from now on; the engine waits until it is known to hold."""
        [sequence] = self._sequences(work, Mode.DECODE)
        refusal = self._refusal([sequence], lease)
        if refusal is not None:
            self._tell_router(refusal)
            return
        sequence.lease = self._leases.borrow(lease, work.request_id)
        self._tell_router(DecodeAccepted(work.request_id, work.attempt))
        self._start([sequence])
        self._leases.renew()

    def _start_pushed(self, work: Work) -> None:
        record = RequestRecord(work.request_id, work.attempt, Mode.DECODE, len(work.prompt_ids))
        self._open.begin(record, [choice.index for choice in work.choices])
        self._post(StartPushed(work))

    def _pull_early(self, news: PullEarly) -> None:
        """Nobody depends on an early pull: what is wrong with it shows when Decode comes."""
        fits = len(news.lease.block_ids) <= self._num_blocks
        done = news.num_tokens // self._block_size <= len(news.lease.block_ids)
        if fits and done and news.lease.engine_id in self._peers and not self._is_leaving():
            self._post(news)

    def _refusal(self, sequences: list[Sequence], lease: KVLease | None = None) -> WorkFailed | None:
        """That this worker leaves is no reason: what comes nevertheless was sent before the router knew, and
        elsewhere it would be computed again."""
        leader = sequences[0]

        def refuse(reason: str, *, retry: bool) -> WorkFailed:
            self._metrics.request_ended("failed")
            return WorkFailed(leader.request_id, leader.attempt, reason, retry)

        needed = blocks_for(max(s.max_cached_tokens for s in sequences), self._block_size)
        if needed > self._num_blocks:
            reason = f"the request needs {needed} KV blocks, the pool has {self._num_blocks}"
            return refuse(reason, retry=False)
        if leader.num_slots > self._max_requests:
            limit = f"this worker writes {self._max_requests} answers at once at most"
            return refuse(f"n is {leader.num_slots}, {limit}", retry=False)
        holder = leader.writer if lease is None else lease.engine_id
        if holder is not None and holder not in self._peers:
            return refuse(UNKNOWN_PREFILL_WORKER, retry=True)
        if lease is None:
            return None
        lengths = {len(answer.token_ids) - 1 for answer in (leader, *leader.siblings)}
        if lengths != {lease.num_tokens} or len(lease.block_ids) < blocks_for(
            lease.num_tokens, self._block_size
        ):
            return refuse(f"lease {lease.lease_id} does not cover the tokens of the request", retry=True)
        return None
