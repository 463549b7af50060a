"""Every message that crosses a process boundary, one struct each, as msgpack.

The structs are tagged unions of msgspec (https://jcristharif.com/msgspec): decoding checks every type, and
what does not decode is an error of the sender, never of this process. Durations are in seconds and are
durations: no clock reading ever crosses the wire.

    any     -> sender   Malformed
    client  -> router   Generate, Cancel, Inquire, GetStatus
    router  -> client   Accepted, PromptLogprobs, Deltas, Status, and one Outcome per request
    worker  -> router   Hello, Heartbeat, Leaving, Left, PeerLink, PromptProgress, EarlyPullDropped,
                        PromptScored, Prefilled, PrefixHit, CacheUpdate, DecodeAccepted, Pulled, Reserved,
                        Pushed, StepTokens, WorkRefused, WorkFailed, LeasesRenewed
    router  -> worker   Welcome, Refused, HeartbeatReply, PeerJoined, PeerLeft, Prefill, PullEarly, Reserve,
                        Decode, PrefillAndDecode, Abort, RenewLeases, ReleaseLeases
    decode  -> prefill  RenewLeases, ReleaseLeases, EndPush
    prefill -> decode   LeasesRenewed, PushEnded
"""

from typing import Annotated, Literal

import msgspec

from pdengine.transport.regions import RegionDescriptor

PROTOCOL_VERSION = 4

PREFIX_TAG_BYTES = 8
# Far above what anybody asks for. Checked before a list is read: a hostile message costs the router little.
MAX_LIST = 2**16
MAX_PROMPT_TOKENS = 2**22

Role = Literal["prefill", "decode", "unified"]
FinishReason = Literal["stop", "length"]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # as workers send it; any tokenizer takes it


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages; the class name is the tag on the wire."""


# ---------------------------------------------------------------------------------------------- requests


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen and when a request ends.

    max_tokens: tokens to write at most, at least 1.
    temperature: 0 is greedy.
    min_p: sample among the tokens at least p times as likely as the likeliest one (arXiv 2407.01082); 0
        means all.
    top_k: sample among the k most likely tokens; 0 means all.
    top_p: sample among the smallest set of tokens whose probability reaches p (nucleus sampling,
        Holtzman et al., arXiv 1904.09751); 1 means all. Temperature, min_p, top_k and top_p apply in this
        order, and each keeps tokens as likely as the last one that it keeps.
    seed: noise is a function of (seed, position). The router draws one where the client gave none.
    stop_token_ids: end after any of these, in addition to the model's end-of-sequence tokens.
    ignore_eos: do not end at the model's end-of-sequence tokens.
    min_tokens: write at least so many before anything but max_tokens may end the answer.
    presence_penalty, frequency_penalty: what is taken off the logit of a token that the answer has already,
        once, and for each time that it has it.
    repetition_penalty: the logit of a token that prompt or answer have is divided by it if it is positive,
        else multiplied (CTRL, arXiv 1909.05858); 1 is none.
    logit_bias: token id to what is added to its logit. Bias, penalties and min_tokens come before the
        temperature.
    logprobs: tell the log probability of each token of the answer, and of so many of the likeliest ones; None
        tells none. They are the model's own: before bias, penalties and temperature.
    prompt_logprobs: the same of each token of the prompt but the first.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_LIST)] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, float], msgspec.Meta(max_length=MAX_LIST)] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """What the model thought of one token.

    rank: 1 is the likeliest token of the vocabulary. top: the likeliest tokens and their log probabilities,
    in falling order; as many as were asked for.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    token_ids: Annotated[list[int], msgspec.Meta(max_length=MAX_PROMPT_TOKENS)]


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    messages: Annotated[list[ChatMessage], msgspec.Meta(max_length=MAX_LIST)]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


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


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TransferStats(msgspec.Struct, frozen=True):
    """What the pull, or the push, of one prompt moved.

    num_gets: reads, one per run of consecutive blocks; of a push, writes. seconds: while reads were in
    flight; of a push, from its first write to the end of its last one. lanes: what carried them, "mapping" or
    as UCX names it. num_early_blocks: those whose read began before the prompt was complete.
    num_cached_blocks: not among num_blocks; they were there already, as the prefix of another request.
    """

    num_blocks: int
    num_bytes: int
    num_gets: int
    seconds: float
    lanes: str
    num_early_blocks: int = 0
    num_cached_blocks: int = 0


# ------------------------------------------------------------------------------------- client <-> router


class Generate(Message, frozen=True):
    """tag: the client's own number for this request, unique among its requests in flight.

    timeout: seconds until the router aborts the request; None is no deadline.
    n: answers to write.
    priority: lower is more urgent. Requests of one priority are served in the order of their arrival.
    cache_salt: the KV cache of a prompt is shared among requests of one salt only, so that nobody else can
        tell by the time of an answer what was asked before.
    stop: end an answer where any of these comes up in its text, which ends before it.
    """

    tag: int
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    timeout: float | None = None
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LIST)] = ()


class Cancel(Message, frozen=True):
    tag: int


class Inquire(Message, frozen=True):
    """Is this request still in flight? If it is not, the answer is Failed; otherwise there is none."""

    tag: int


class GetStatus(Message, frozen=True):
    tag: int


class Accepted(Message, frozen=True):
    tag: int
    request_id: str
    prompt_tokens: int


class PromptLogprobs(Message, frozen=True):
    """Of each token of the prompt but the first. Comes before the first Delta."""

    tag: int
    logprobs: list[TokenLogprobs]


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of answer `index` to request `tag`, and the text that they complete.

    text: may lag the tokens by part of a character, or by what a stop string may begin with. finish_reason:
    with the last one of each answer. logprobs: of each of `token_ids`, if they were asked for.
    """

    tag: int
    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None


class Deltas(Message, frozen=True):
    """What one engine step wrote for one client, of all its requests."""

    deltas: list[Delta]


class Finished(Message, frozen=True):
    """finish_reasons: of all answers, in order. usage: of all of them together."""

    tag: int
    finish_reasons: list[FinishReason]
    usage: Usage
    prefill_worker: str
    decode_worker: str
    attempts: int
    transfer: TransferStats | None = None


class Rejected(Message, frozen=True):
    """Refused at the door: nothing was computed. field: the argument at fault, if there is one."""

    tag: int
    reason: str
    field: str | None = None


class Aborted(Message, frozen=True):
    tag: int
    cause: Literal["cancelled", "timeout"]


class Failed(Message, frozen=True):
    """retry: another router, or this one later, may do it."""

    tag: int
    reason: str
    retry: bool = False


Outcome = Finished | Rejected | Aborted | Failed


class Malformed(Message, frozen=True):
    """Answer to a message that could not be understood."""

    reason: str


class WorkerStatus(msgspec.Struct, frozen=True):
    engine_id: str
    role: Role
    load: "Load"
    heartbeat_age: float
    links: dict[str, str]


class Status(Message, frozen=True):
    """max_request_tokens: of prompt and answer together that the workers take for one request; None while
    there is no worker."""

    tag: int
    epoch: str
    workers: list[WorkerStatus]
    requests: int
    max_request_tokens: int | None = None


ClientToRouter = Generate | Cancel | Inquire | GetStatus
RouterToClient = (
    Accepted | PromptLogprobs | Deltas | Finished | Rejected | Aborted | Failed | Malformed | Status
)


# ------------------------------------------------------------------------------------- worker <-> router


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


class Load(msgspec.Struct, frozen=True):
    """running, waiting: requests. pinned_blocks: of prompts computed for others, running or leased.
    quarantined_blocks: destinations of pulls and pushes that have not ended. idle_blocks: of the free ones,
    those that the prefix cache can still give. step_age: seconds since the engine loop last turned, while a
    sequence can run; else 0.
    """

    num_blocks: int
    free_blocks: int
    pinned_blocks: int = 0
    quarantined_blocks: int = 0
    running: int = 0
    waiting: int = 0
    step_age: float = 0.0
    idle_blocks: int = 0


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
    """This worker can pull from `engine_id`, or push to it, over `lanes`, or cannot, because of `error`."""

    engine_id: str
    lanes: str = ""
    error: str = ""


class PromptProgress(Message, frozen=True):
    """The KV cache of the prompt's first `num_tokens` tokens is there; the rest is still being computed.

    lease: the one that Prefilled will grant. Until then the blocks stay for as long as the request does.
    """

    request_id: str
    attempt: int
    num_tokens: int
    lease: KVLease


class Prefilled(Message, frozen=True):
    """The prompt's KV cache is there, and so is the next token of each answer, in the order of the choices.

    lease: None where all answers ended with this token, or where the KV cache is pushed: then Pushed follows.
    """

    request_id: str
    attempt: int
    tokens: list["TokenUpdate"]
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


class PrefixHit(Message, frozen=True):
    """The KV cache of the prompt's first `cached_tokens` tokens was here already, from another request."""

    request_id: str
    attempt: int
    cached_tokens: int


class CacheUpdate(Message, frozen=True):
    """Which blocks can be found in this worker's prefix cache: what has changed since the last update.

    added, removed: the first PREFIX_TAG_BYTES of the name of each block, one after the other; the removals
    come first. reset: forget all that was added before.
    """

    added: bytes
    removed: bytes
    reset: bool = False


class PromptScored(Message, frozen=True):
    """Log probabilities of the tokens of the prompt from `position` on. The first token, 0, has none.

    All of them come before the first token of the answer, in order; after a preemption none comes again.
    """

    request_id: str
    attempt: int
    position: int
    logprobs: list[TokenLogprobs]


class TokenUpdate(msgspec.Struct, frozen=True, array_like=True):
    """choice: index of the answer. position: of the token, counted from the first token of the answer."""

    request_id: str
    attempt: int
    choice: int
    position: int
    token_id: TokenId
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


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
    """known: False asks the worker to say Hello again."""

    epoch: str
    known: bool


class PeerJoined(Message, frozen=True):
    peer: PeerDescriptor


class PeerLeft(Message, frozen=True):
    engine_id: str


class PushTarget(msgspec.Struct, frozen=True):
    """Blocks of the worker `engine_id` that wait for the KV cache of one prompt."""

    engine_id: str
    block_ids: list[int]


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


class RenewLeases(Message, frozen=True):
    """sequence: returned in the answer, so that the asker knows when it asked."""

    sequence: int
    lease_ids: list[int]


class LeasesRenewed(Message, frozen=True):
    """lost: leases that have expired or never existed."""

    sequence: int
    renewed: list[int]
    lost: list[int]


class ReleaseLeases(Message, frozen=True):
    lease_ids: list[int]


class EndPush(Message, frozen=True):
    """Nobody wants this attempt any more: write nothing more for it, and answer PushEnded."""

    request_id: str
    attempt: int


class PushEnded(Message, frozen=True):
    """Nothing is written for this attempt any more, and nothing will be."""

    request_id: str
    attempt: int


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
PeerRequest = RenewLeases | ReleaseLeases | EndPush
PeerReply = LeasesRenewed | PushEnded | Malformed
