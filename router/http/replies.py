"""What the server answers, as OpenAI's API has it. Structs of msgspec: a chunk is encoded once per token."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from pdengine.transport.messages import FinishReason
from pdengine.transport.messages import Usage as RouterUsage


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """cached_tokens: of the prompt, those that were in a prefix cache and were not computed."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """prompt_tokens_details: not before the request has finished."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Of each token, in parallel lists. The first token of a prompt has no log probability.

    text_offset: characters of the choice's text before the token. top_logprobs: by token; the likeliest ones,
    and the token itself.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """Of a whole completion, or of a chunk, where `finish_reason` comes with the last one and
    `prompt_token_ids` with the first. Token ids only if they were asked for, here and below."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """usage: unset in the chunks of a stream for which no usage was asked."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class ChatMessage(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """bytes: of the token's text in UTF-8; the text of a token may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, frozen=True):
    """role: with the first one of each answer."""

    content: str
    role: Literal["assistant"] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Model(msgspec.Struct, frozen=True):
    """max_model_len: tokens of prompt and answer together."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "pdengine"


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct, frozen=True):
    """token_strs: how the vocabulary spells them, if that was asked for; null for ids that no token has."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class Text(msgspec.Struct, frozen=True):
    prompt: str


class Version(msgspec.Struct, frozen=True):
    version: str


class State(msgspec.Struct, frozen=True):
    """What a probe hears. workers: that have joined the router."""

    status: str
    workers: int | UnsetType = UNSET


class ErrorBody(msgspec.Struct, frozen=True):
    """param: the field at fault. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    error: ErrorBody


DOCUMENTED = (
    Completion,
    ChatCompletion,
    Model,
    ModelList,
    Tokens,
    Text,
    Version,
    State,
    ErrorReply,
)


def total_usage(usages: list[RouterUsage], *, shows_answers: bool = True) -> Usage:
    """Of all prompts of a request together. shows_answers: or only the prompts."""
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    completion_tokens = sum(usage.completion_tokens for usage in usages) if shows_answers else 0
    cached_tokens = sum(usage.cached_tokens for usage in usages)
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens, completion_tokens, total, PromptTokensDetails(cached_tokens))
