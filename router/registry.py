"""Which workers there are, how busy they are, and which of them gets the next piece of work."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pdengine.router.prefixes import PromptPrefix, unpack_tags
from pdengine.transport.messages import (
    PROTOCOL_VERSION,
    CacheUpdate,
    Compatibility,
    Hello,
    Load,
    PeerDescriptor,
    Refused,
    Role,
    WorkerStatus,
)


@dataclass(frozen=True)
class Demand:
    """What a request needs of a worker, in tokens.

    num_tokens: prompt and answers so far, whose keys and values come first. longest: of the prompt with the
    longest answer; the last token of an answer is never cached. expected: of the prompt with all answers, if
    they become as long as most: they may be many times longer, but they grow block by block, and a worker
    that runs out preempts, so that counting what they may be would leave most of a KV cache empty.
    """

    num_tokens: int
    longest: int
    expected: int
    prefix: PromptPrefix | None = None


@dataclass(frozen=True)
class Limits:
    """Tokens of the largest request, as `Registry` has them at some moment."""

    max_context: int | None
    max_prompt_tokens: int
    max_answer_tokens: int


@dataclass(eq=False)
class WorkerEntry:
    """identity: of its connection. assigned: tokens of every request that it has now, as the router knows it,
    which is newer than the last heartbeat: those to compute, and on decode workers all that are expected.
    links: peers it can pull from -> lanes. broken_links: peers that it has tried to pull from in vain.
    cached_tags: of the blocks in its prefix cache, as far as it has announced them.
    """

    identity: bytes
    descriptor: PeerDescriptor
    compatibility: Compatibility
    max_context: int
    load: Load
    heard_at: float
    leaving: bool = False
    assigned: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    broken_links: set[str] = field(default_factory=set)
    cached_tags: set[int] = field(default_factory=set)

    @property
    def engine_id(self) -> str:
        return self.descriptor.engine_id

    @property
    def role(self) -> Role:
        return self.descriptor.role

    @property
    def assigned_tokens(self) -> int:
        return sum(self.assigned.values())

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache holds."""
        return self.load.num_blocks * self.compatibility.block_size

    def has_room(self, num_tokens: int) -> bool:
        """Whether a request of `num_tokens` fits beside those that are assigned."""
        return self.assigned_tokens + num_tokens <= self.capacity

    def update_cached_tags(self, update: CacheUpdate) -> None:
        """Raises ValueError, and changes nothing, if the update has a part of a tag."""
        added, removed = unpack_tags(update.added), unpack_tags(update.removed)
        if update.reset:
            self.cached_tags.clear()
        self.cached_tags.difference_update(removed)
        self.cached_tags.update(added)

    def cached_blocks(self, prefix: PromptPrefix | None) -> int:
        """How many of a prompt's leading blocks are in its prefix cache."""
        tags = prefix.tags if prefix is not None else ()
        return next((count for count, tag in enumerate(tags) if tag not in self.cached_tags), len(tags))

    def uncached_tokens(self, demand: Demand) -> int:
        """Tokens that it would have to compute; the last one always, since the next one follows from it."""
        if demand.prefix is None:
            return demand.num_tokens
        return max(1, demand.num_tokens - self.cached_blocks(demand.prefix) * demand.prefix.block_size)


class Registry:
    """The workers that have joined. model: fingerprint that all of them must have."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._workers: dict[str, WorkerEntry] = {}

    def __iter__(self) -> Iterator[WorkerEntry]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, engine_id: str | None) -> WorkerEntry | None:
        return None if engine_id is None else self._workers.get(engine_id)

    def by_identity(self, identity: bytes) -> WorkerEntry | None:
        return next((worker for worker in self._workers.values() if worker.identity == identity), None)

    def refusal(self, hello: Hello) -> Refused | None:
        """Why this worker cannot join: the first field that differs from the router's or the workers'."""
        theirs = hello.compatibility
        if theirs.protocol != PROTOCOL_VERSION:
            return Refused("protocol", str(PROTOCOL_VERSION), str(theirs.protocol))
        if theirs.model != self._model:
            return Refused("model", self._model, theirs.model)
        for other in self._workers.values():
            for name in Compatibility.__struct_fields__:
                ours_value, their_value = getattr(other.compatibility, name), getattr(theirs, name)
                if ours_value != their_value:
                    return Refused(name, str(ours_value), str(their_value))
        return None

    def add(self, identity: bytes, hello: Hello, now: float) -> WorkerEntry:
        worker = WorkerEntry(
            identity, hello.peer, hello.compatibility, hello.max_context, hello.load, heard_at=now
        )
        self._workers[worker.engine_id] = worker
        return worker

    def remove(self, engine_id: str) -> None:
        del self._workers[engine_id]
        for worker in self._workers.values():
            worker.links.pop(engine_id, None)
            worker.broken_links.discard(engine_id)

    def silent(self, now: float, timeout: float) -> list[WorkerEntry]:
        """Workers that were not heard of for `timeout` seconds."""
        return [worker for worker in self._workers.values() if worker.heard_at + timeout < now]

    def forgive_silence(self, seconds: float) -> None:
        """Count as if all workers had been heard `seconds` later."""
        for worker in self._workers.values():
            worker.heard_at += seconds

    # ------------------------------------------------------------------------------- placement

    def rank_prefill(self, demand: Demand) -> list[WorkerEntry]:
        """Workers for a new request, the least loaded first: those that prefill, or that do all of it.

        The load is what has been assigned and what this prompt would add, so a worker that has its prefix
        comes first until it is busier by as much as it saves. Where one side of a disaggregated cluster is
        missing, the other side runs whole requests.
        """
        prefills = [worker for worker in self._able(demand.num_tokens) if self.splits(worker)]
        anyhow = replace(demand, prefix=None)  # whether there is one, not which
        for_prompt = [w for w in prefills if self.pick_decode(anyhow, w.engine_id) is not None]
        for_all = [w for w in self._able(demand.longest) if not self.splits(w)]
        candidates = for_prompt + [w for w in for_all if w.role == "unified"] or for_all
        return self._by_load(candidates, demand)

    def rank_whole(self, demand: Demand) -> list[WorkerEntry]:
        """Workers of any role for a request that one worker must run to its end, the least loaded first."""
        return self._by_load(self._able(demand.longest), demand)

    def pick_local(self, demand: Demand, limit: int) -> WorkerEntry | None:
        """A decode worker that has so much of a prompt that it should compute the rest by itself.

        The rest is `limit` tokens at most, and at least one block of the prompt is there. The smallest rest
        wins: in a conversation that is the worker that wrote the last answer.
        """
        rests = {
            worker: worker.uncached_tokens(demand)
            for worker in self._able(demand.longest)
            if worker.role == "decode" and worker.cached_blocks(demand.prefix) > 0
        }
        workers = [w for w, rest in rests.items() if rest <= limit and w.has_room(demand.expected)]
        return min(workers, key=lambda w: (rests[w], len(w.assigned)), default=None)

    def pick_decode(self, demand: Demand, holder: str | None = None) -> WorkerEntry | None:
        """A decode worker that can pull from `holder`, has room for the answers and the fewest requests.

        The wishes count in this order: one that has no link yet, or no room, is better than none. Among
        workers with as many requests the one that has most of the prompt has the least to pull; that alone is
        no reason to make a batch larger, since a pull is paid once and every token of the batch is slower.
        """
        able = [worker for worker in self._able(demand.longest) if worker.role == "decode"]
        workers = [worker for worker in able if holder not in worker.broken_links]

        def load(worker: WorkerEntry) -> tuple[bool, bool, int, int, int]:
            unlinked = holder is not None and holder not in worker.links
            cached = worker.cached_blocks(demand.prefix)
            room = worker.has_room(demand.expected)
            return unlinked, not room, len(worker.assigned), -cached, worker.assigned_tokens

        return min(workers, key=load, default=None)

    @property
    def is_disaggregated(self) -> bool:
        """Whether there is a worker for each of the two phases."""
        roles = {worker.role for worker in self._workers.values() if not worker.leaving}
        return {"prefill", "decode"} <= roles

    def splits(self, worker: WorkerEntry) -> bool:
        """Whether what `worker` is given now is decoded elsewhere: somebody must be able to pull it."""
        return worker.role == "prefill" and any(
            other.role == "decode" and not other.leaving and worker.engine_id not in other.broken_links
            for other in self._workers.values()
        )

    def _by_load(self, workers: list[WorkerEntry], demand: Demand) -> list[WorkerEntry]:
        return sorted(workers, key=lambda w: (w.assigned_tokens + w.uncached_tokens(demand), len(w.assigned)))

    def _able(self, num_tokens: int) -> list[WorkerEntry]:
        return [w for w in self._workers.values() if not w.leaving and w.capacity >= num_tokens]

    # ---------------------------------------------------------------------------------- limits

    @property
    def limits(self) -> Limits:
        return Limits(self.max_context, self.max_prompt_tokens, self.max_answer_tokens)

    @property
    def block_size(self) -> int | None:
        """Tokens per KV block, the same in all workers; None without workers."""
        return next((worker.compatibility.block_size for worker in self._workers.values()), None)

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and answer together that every worker takes; None without workers."""
        return min((worker.max_context for worker in self._workers.values()), default=None)

    @property
    def max_answer_tokens(self) -> int:
        """Tokens of prompt and answer together that the largest KV cache holds where answers are written."""
        return max((w.capacity for w in self._workers.values() if not self.splits(w)), default=0)

    @property
    def max_request_tokens(self) -> int | None:
        """Tokens of prompt and answer together of the largest request; the last one is never cached."""
        max_context = self.max_context
        return None if max_context is None else min(max_context, self.max_answer_tokens + 1)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that the largest KV cache holds where prompts are computed."""
        complete = self.is_disaggregated
        capacities = [w.capacity for w in self._workers.values() if not (complete and w.role == "decode")]
        return max(capacities, default=0)

    @property
    def roles(self) -> list[Role]:
        """Of all workers. May be read on any thread."""
        return [worker.role for worker in list(self._workers.values())]

    def statuses(self, now: float) -> list[WorkerStatus]:
        return [
            WorkerStatus(w.engine_id, w.role, w.load, now - w.heard_at, dict(w.links))
            for w in self._workers.values()
        ]
