"""Between a client and the router: prompts go in, text and tokens out; each request ends with one Outcome."""

from typing import Annotated, Literal

import msgspec

from pdengine.transport.messages.shared import (
    MAX_LIST,
    FinishReason,
    Load,
    Malformed,
    Message,
    Role,
    SamplingParams,
    TokenLogprobs,
    TransferStats,
)

MAX_PROMPT_TOKENS = 2**22


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


# ------------------------------------------------------------------------------------------- client -> router


class Generate(Message, frozen=True):
    """tag: the client's own number for this request, unique among its requests in flight.

    timeout: seconds until the router aborts the request; None is no deadline.
    n: answers to write.
    priority: lower is more urgent. Requests of one priority are served in the order of their arrival.
    cache_salt: the KV cache of a prompt is shared among requests of one salt only, so that nobody else can
        tell by the time of an answer what was asked before.
    stop: end an answer where any of these comes up in its text, which ends before it.
    include_stop: the text ends after it, and has that of a stop token, too.
    """

    tag: int
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    timeout: float | None = None
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LIST)] = ()
    include_stop: bool = False


class Cancel(Message, frozen=True):
    tag: int


class Inquire(Message, frozen=True):
    """Is this request still in flight? If it is not, the answer is Failed; otherwise there is none."""

    tag: int


class GetStatus(Message, frozen=True):
    tag: int


# ------------------------------------------------------------------------------------------- router -> client


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


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


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


class WorkerStatus(msgspec.Struct, frozen=True):
    engine_id: str
    role: Role
    load: Load
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
