"""Between a worker and the router: who is in the cluster, what is to be done, and what was done."""

from typing import Annotated

import msgspec

from pdengine.transport.messages.peers import LeasesRenewed, ReleaseLeases, RenewLeases
from pdengine.transport.messages.shared import (
    FinishReason,
    Load,
    Malformed,
    Message,
    Role,
    SamplingParams,
    TokenLogprobs,
    TransferStats,
)
from pdengine.transport.regions import RegionDescriptor

PROTOCOL_VERSION = 4
PREFIX_TAG_BYTES = 8
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # as workers send it; any tokenizer takes it


class PrefixNames(msgspec.Struct, frozen=True):
    """Under which names the KV cache of a prompt is looked up and kept (pdengine.models.prefix_hashes).

    root: of the empty prefix, made of the model and the salt. blocks: of the prompt's full blocks, one after
    the other.
    """

    root: bytes
    blocks: bytes


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """One of the answers to a prompt. output_ids: its tokens that were written before this attempt."""

    index: int
    output_ids: list[int]


class Work(msgspec.Struct, frozen=True, omit_defaults=True):
    """One attempt at one request, as a worker gets it.

    attempt: counts up whenever the router gives the request to somebody again; workers and router ignore
        whatever belongs to an older attempt.
    choices: the answers that are still to be written, at least one. They share the prompt's KV cache.
    sampling: with a seed. Answer i draws its noise from seed + i.
    priority: lower is more urgent.
    prefix: None if the KV cache of other requests shall neither be used for this one nor the reverse.
    """

    request_id: str
    attempt: int
    prompt_ids: list[int]
    choices: list[Choice]
    sampling: SamplingParams
    priority: int = 0
    prefix: PrefixNames | None = None


class KVLease(msgspec.Struct, frozen=True):
    """The right to read the KV cache of one prompt from the worker that computed it.

    engine_id: the worker that holds the blocks. num_tokens: tokens whose keys and values they hold.
    duration: seconds from each acknowledged renewal.
    """

    lease_id: int
    engine_id: str
    block_ids: list[int]
    num_tokens: int
    duration: float


class PushTarget(msgspec.Struct, frozen=True):
    """Blocks of the worker `engine_id` that wait for the KV cache of one prompt."""

    engine_id: str
    block_ids: list[int]


class TokenUpdate(msgspec.Struct, frozen=True, array_like=True):
    """choice: index of the answer. position: of the token, counted from the first token of the answer."""

    request_id: str
    attempt: int
    choice: int
    position: int
    token_id: TokenId
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


# ------------------------------------------------------------------------------------------------ the cluster


class Compatibility(msgspec.Struct, frozen=True):
    """What must be equal in all workers of a cluster, compared at join field by field.

    model: fingerprint of configuration and tokenizer, equal to the router's too. weights: fingerprint of
    the weights. layout: version of the pool's layout. ucx: library version, since versions may not be
    able to talk to each other (openucx/ucx#10376).
    """

    protocol: int
    model: str
    weights: str
    dtype: str
    block_size: int
    layout: str
    ucx: str


class PeerDescriptor(msgspec.Struct, frozen=True):
    """How other workers reach a worker: its control address, its transfer address and its pool.

    public_key: what the control address proves itself with (CURVE, Z85); empty in a cluster without keys.
    """

    engine_id: str
    role: Role
    control_address: str
    transfer_address: bytes
    region: RegionDescriptor
    public_key: str = ""


class Hello(Message, frozen=True):
    """max_context: tokens of prompt and answer together that this worker takes for one request."""

    peer: PeerDescriptor
    compatibility: Compatibility
    load: Load
    max_context: int


class Heartbeat(Message, frozen=True):
    load: Load


class Leaving(Message, frozen=True):
    """No new work, please: this worker finishes what it has and stops."""


class Left(Message, frozen=True):
    """This worker stops now; what it still had must be done elsewhere."""


class PeerLink(Message, frozen=True):
    """This worker can pull from `engine_id`, or push to it, over `lanes`, or cannot, because of `error`.

    Of a decode worker that is pushed to: whether it lets `engine_id` do so, without `lanes`.
    """

    engine_id: str
    lanes: str = ""
    error: str = ""


class CacheUpdate(Message, frozen=True):
    """Which blocks can be found in this worker's prefix cache: what has changed since the last update.

    added, removed: the first PREFIX_TAG_BYTES of the name of each block, one after the other; the removals
    come first. reset: forget all that was added before.
    """

    added: bytes
    removed: bytes
    reset: bool = False


class Welcome(Message, frozen=True):
    """epoch: names this run of the router; work of another epoch is aborted.

    pushes: prefill workers write the KV cache to decode workers; otherwise these read it.
    """

    epoch: str
    heartbeat_interval: float
    peers: list[PeerDescriptor]
    pushes: bool = False


class Refused(Message, frozen=True):
    """This worker cannot join: `field` is `theirs` here and `ours` in the cluster."""

    field: str
    ours: str
    theirs: str


class HeartbeatReply(Message, frozen=True):
    """known: False asks the worker to say Hello again. leaving: the router knows that the worker leaves, and
    what it gave it before has come before this."""

    epoch: str
    known: bool
    leaving: bool = False


class PeerJoined(Message, frozen=True):
    peer: PeerDescriptor


class PeerLeft(Message, frozen=True):
    engine_id: str


# ------------------------------------------------------------------------------------------------------- work


class Prefill(Message, frozen=True):
    """Compute the prompt, answer Prefilled and hold the KV cache under a lease.

    may_wait: queue it if it cannot start at once; otherwise refuse it. push_to: write the KV cache there
    while it is computed, instead of granting a lease.
    """

    work: Work
    may_wait: bool = True
    push_to: PushTarget | None = None


class PullEarly(Message, frozen=True):
    """If there is room, start to pull the first `num_tokens` tokens of a prompt that is still computed.

    lease: its blocks are those of the whole prompt. Decode follows with the same lease, or Abort, or nothing.
    """

    request_id: str
    attempt: int
    num_tokens: int
    lease: KVLease
    prefix: PrefixNames | None = None


class Reserve(Message, frozen=True):
    """Queue the request, hold blocks for it, answer Reserved: `writer` will push the KV cache into them."""

    work: Work
    writer: str


class Decode(Message, frozen=True):
    """Pull the leased KV cache and write the answer. lease: None if the KV cache was pushed."""

    work: Work
    lease: KVLease | None


class PrefillAndDecode(Message, frozen=True):
    """Run the whole request here. may_wait: as in Prefill."""

    work: Work
    may_wait: bool = True


class Abort(Message, frozen=True):
    """choices: the answers to give up; None: the whole request, and all that is held for it."""

    request_id: str
    choices: list[int] | None = None


# ---------------------------------------------------------------------------- what a worker tells of its work


class PrefixHit(Message, frozen=True):
    """The KV cache of the prompt's first `cached_tokens` tokens was here already, from another request."""

    request_id: str
    attempt: int
    cached_tokens: int


class PromptProgress(Message, frozen=True):
    """The KV cache of the prompt's first `num_tokens` tokens is there; the rest is still being computed.

    lease: the one that Prefilled will grant. Until then the blocks stay for as long as the request does.
    """

    request_id: str
    attempt: int
    num_tokens: int
    lease: KVLease


class PromptScored(Message, frozen=True):
    """Log probabilities of the tokens of the prompt from `position` on. The first token, 0, has none.

    All of them come before the first token of the answer, in order; after a preemption none comes again.
    """

    request_id: str
    attempt: int
    position: int
    logprobs: list[TokenLogprobs]


class Prefilled(Message, frozen=True):
    """The prompt's KV cache is there, and so is the next token of each answer, in the order of the choices.

    lease: None where all answers ended with this token, or where the KV cache is pushed: then Pushed follows.
    """

    request_id: str
    attempt: int
    tokens: list[TokenUpdate]
    lease: KVLease | None
    pushed: bool = False


class EarlyPullDropped(Message, frozen=True):
    """This worker has nothing of a prompt that it was told to pull early: no room, or the pull has failed."""

    request_id: str
    attempt: int


class DecodeAccepted(Message, frozen=True):
    """From now on this worker renews the lease."""

    request_id: str
    attempt: int


class Pulled(Message, frozen=True):
    request_id: str
    attempt: int
    stats: TransferStats


class Reserved(Message, frozen=True):
    """Blocks for the prompt are held here, `block_ids`, for it to be written to."""

    request_id: str
    attempt: int
    block_ids: list[int]


class Pushed(Message, frozen=True):
    """All of the prompt's KV cache lies in the blocks that were reserved for it."""

    request_id: str
    attempt: int
    stats: TransferStats


class StepTokens(Message, frozen=True):
    """The tokens of one engine step, of all requests."""

    updates: list[TokenUpdate]


class WorkRefused(Message, frozen=True):
    """This worker has no room for the work now, and has not taken it: somebody else may."""

    request_id: str
    attempt: int
    reason: str


class WorkFailed(Message, frozen=True):
    """retry: whether another attempt may succeed."""

    request_id: str
    attempt: int
    reason: str
    retry: bool


WorkerToRouter = (
    Hello
    | Heartbeat
    | Leaving
    | Left
    | PeerLink
    | PromptProgress
    | EarlyPullDropped
    | PromptScored
    | Prefilled
    | PrefixHit
    | CacheUpdate
    | DecodeAccepted
    | Pulled
    | Reserved
    | Pushed
    | StepTokens
    | WorkRefused
    | WorkFailed
    | LeasesRenewed
)
RouterToWorker = (
    Welcome
    | Refused
    | HeartbeatReply
    | PeerJoined
    | PeerLeft
    | Prefill
    | PullEarly
    | Reserve
    | Decode
    | PrefillAndDecode
    | Abort
    | RenewLeases
    | ReleaseLeases
    | Malformed
)
