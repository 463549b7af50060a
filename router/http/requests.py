"""What the server is asked: the bodies of requests, as pydantic checks them and OpenAPI shows them.

Fields that are not here are looked at by `fields.check_unknown`. Types are strict, as in OpenAI's API: "5" is
no number. Null is the default of every field that has one. Lists are checked to the first entry that is
wrong: an error for each of a million entries would take gigabytes.
"""

from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
)

from pdengine.router.admission import (
    MAX_BIASED_TOKENS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_SALT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    REPETITION_PENALTY,
)
from pdengine.transport.messages import SamplingParams


def _valid_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}") from error
    return text


FAIL_FAST = Field(fail_fast=True)  # pydantic.FailFast() has no hash, which unions need in Python 3.11
Text: TypeAlias = Annotated[str, AfterValidator(_valid_unicode)]
TokenId: TypeAlias = Annotated[int, Ge(0), Lt(2**31)]
TokenIds: TypeAlias = Annotated[list[TokenId], FAIL_FAST, Len(1)]


def _kind_of_prompt(prompt: object) -> str | None:
    """By its first entry, so that a long list is not checked to its end for being one of each kind."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    match prompt, first:
        case str(), _:
            return "text"
        case list(), str():
            return "texts"
        case list(), int():
            return "tokens"
        case list(), list():
            return "lists of tokens"
    return None


Prompt: TypeAlias = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], FAIL_FAST, Len(1), Tag("texts")]
    | Annotated[list[TokenId], FAIL_FAST, Len(1), Tag("tokens")]
    | Annotated[list[TokenIds], FAIL_FAST, Len(1), Tag("lists of tokens")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of such "
        "lists, and not empty",
    ),
]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Penalty: TypeAlias = Annotated[Number, Ge(-2), Le(2)]
NumLogprobs: TypeAlias = Annotated[int, Ge(0), Le(MAX_LOGPROBS)]


def _not_too_many(value: object) -> object:
    """Before the entries are looked at: each that is wrong is an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_BIASED_TOKENS:
        raise ValueError(f"{len(value)} entries, the limit is {MAX_BIASED_TOKENS}")
    return value


LogitBias: TypeAlias = Annotated[
    dict[Annotated[str, StringConstraints(pattern="^[0-9]{1,10}$")], Annotated[Number, Ge(-100), Le(100)]],
    BeforeValidator(_not_too_many),
]
StopString: TypeAlias = Annotated[Text, Len(1, MAX_STOP_CHARACTERS)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Body):
    """include_usage: one more chunk at the end, with the usage of the whole request."""

    include_usage: bool | None = None


class SamplingBody(Body):
    """What completions and chat completions have in common."""

    model: Text | None = None
    n: Annotated[int, Ge(1), Le(MAX_CHOICES)] | None = 1
    temperature: Annotated[Number, Ge(0)] | None = 1.0
    top_p: Annotated[Number, Gt(0), Le(1)] | None = 1.0
    top_k: Annotated[int, Ge(-1), Lt(2**31)] | None = Field(0, description="0 or -1: all tokens.")
    min_p: Annotated[Number, Ge(0), Le(1)] | None = 0.0
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    stop_token_ids: Annotated[list[TokenId], FAIL_FAST, Len(0, MAX_STOP_TOKENS)] | None = None
    stop: (
        Annotated[Text, Len(0, MAX_STOP_CHARACTERS)]
        | Annotated[list[StopString], FAIL_FAST, Len(0, MAX_STOP_STRINGS)]
        | None
    ) = Field(None, description=f"{MAX_STOP_CHARACTERS} characters at most, in all.")
    min_tokens: Annotated[int, Ge(0), Lt(2**31)] | None = 0
    ignore_eos: bool | None = False
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    repetition_penalty: Annotated[Number, Ge(REPETITION_PENALTY[0]), Le(REPETITION_PENALTY[1])] | None = 1.0
    logit_bias: LogitBias | None = Field(None, description="Token ids to what is added to their logits.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="Ignored.")
    priority: Annotated[int, Ge(-(2**31)), Lt(2**31)] | None = Field(0, description="Lower is more urgent.")
    cache_salt: Annotated[Text, Len(1, MAX_SALT_CHARACTERS)] | None = Field(
        None, description="The KV cache of the prompt is shared with requests of the same salt only."
    )

    def sampling(self, max_tokens: int) -> SamplingParams:
        """As the router takes it."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            min_p=self.min_p or 0.0,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_logprobs if self.echoes else None,
        )

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told of beside each token; None for not even that one."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the answer."""
        return False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(string for string in stop if string)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


MaxTokens: TypeAlias = Annotated[int, Ge(1), Lt(2**31)]


class CompletionBody(SamplingBody):
    prompt: Prompt
    max_tokens: Annotated[int, Ge(0), Lt(2**31)] | None = Field(16, description="0: only with echo.")
    logprobs: NumLogprobs | None = None
    echo: bool | None = Field(False, description="The prompt comes before its answers.")

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessageBody(Body):
    """content: several parts are joined by line ends."""

    role: Text
    content: Text | Annotated[list[TextPart], FAIL_FAST]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatBody(SamplingBody):
    messages: Annotated[list[ChatMessageBody], FAIL_FAST, Len(1)]
    max_tokens: MaxTokens | None = Field(None, description="By default what is left of the context.")
    max_completion_tokens: MaxTokens | None = Field(
        None, description="The newer name of max_tokens, which it precedes."
    )
    logprobs: bool | None = False
    top_logprobs: NumLogprobs | None = Field(None, description="Only with logprobs.")

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(Body):
    """Either a prompt or messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessageBody], FAIL_FAST, Len(1)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="By default those of a prompt are added; those of messages are in the template."
    )
    add_generation_prompt: bool | None = Field(
        True, description="Of messages: open the assistant's answer at the end."
    )
    return_token_strs: bool | None = Field(False, description="Also how the vocabulary spells the tokens.")


class DetokenizeBody(Body):
    model: Text | None = None
    tokens: Annotated[list[TokenId], FAIL_FAST]


def extras(body: Body) -> dict[str, Any]:
    """The fields of a body that are not declared."""
    return body.model_extra or {}
