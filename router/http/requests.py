"""What the server is asked: the bodies of requests, as pydantic checks them and OpenAPI shows them.

Fields that are not here are looked at by `fields.check_unknown`. Types are strict, as in OpenAI's API: "5" is
no number. Null is the default of every field that has one. Lists are checked to the first entry that is
wrong: an error for each of a million entries would take gigabytes.
"""

from typing import Annotated, Any, Literal, Self, TypeAlias

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
    model_validator,
)

from pdengine.models.chat_template import OWN_VARIABLES
from pdengine.models.generation_config import SamplingDefaults
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


AddSpecialTokens: TypeAlias = Annotated[
    bool | None,
    Field(description="By default those of a prompt are added; those of messages are in the template."),
]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


OF_CHECKPOINT: Any = Field(None, description="By default what the checkpoint asks for.")


class StreamOptions(Body):
    """include_usage: one more chunk at the end, with the usage of the whole request. continuous_usage_stats:
    with include_usage, in every other chunk that of its choice so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """What completions and chat completions have in common."""

    model: Text | None = None
    n: Annotated[int, Ge(1), Le(MAX_CHOICES)] | None = 1
    temperature: Annotated[Number, Ge(0)] | None = OF_CHECKPOINT
    top_p: Annotated[Number, Gt(0), Le(1)] | None = OF_CHECKPOINT
    top_k: Annotated[int, Ge(-1), Lt(2**31)] | None = Field(
        None, description="0 or -1: all tokens. By default what the checkpoint asks for."
    )
    min_p: Annotated[Number, Ge(0), Le(1)] | None = OF_CHECKPOINT
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    stop_token_ids: Annotated[list[TokenId], FAIL_FAST, Len(0, MAX_STOP_TOKENS)] | None = None
    stop: (
        Annotated[Text, Len(0, MAX_STOP_CHARACTERS)]
        | Annotated[list[StopString], FAIL_FAST, Len(0, MAX_STOP_STRINGS)]
        | None
    ) = Field(None, description=f"{MAX_STOP_CHARACTERS} characters at most, in all.")
    include_stop_str_in_output: bool | None = Field(
        False, description="The text has the stop string, or the stop token, that ended it."
    )
    min_tokens: Annotated[int, Ge(0), Lt(2**31)] | None = 0
    ignore_eos: bool | None = False
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    repetition_penalty: Annotated[Number, Ge(REPETITION_PENALTY[0]), Le(REPETITION_PENALTY[1])] | None = (
        OF_CHECKPOINT
    )
    logit_bias: LogitBias | None = Field(None, description="Token ids to what is added to their logits.")
    add_special_tokens: AddSpecialTokens = None
    return_token_ids: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="Ignored.")
    priority: Annotated[int, Ge(-(2**31)), Lt(2**31)] | None = Field(0, description="Lower is more urgent.")
    cache_salt: Annotated[Text, Len(1, MAX_SALT_CHARACTERS)] | None = Field(
        None, description="The KV cache of the prompt is shared with requests of the same salt only."
    )

    def sampling(self, max_tokens: int, defaults: SamplingDefaults) -> SamplingParams:
        """As the router takes it."""
        top_k = defaults.top_k if self.top_k is None else self.top_k
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            top_k=max(top_k, 0),
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
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

    @property
    def counts_usage(self) -> bool:
        """In every chunk, not only at the end."""
        options = self.stream_options
        return self.includes_usage and options is not None and bool(options.continuous_usage_stats)


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


class FunctionCall(Body):
    """arguments: a JSON object, as text."""

    name: Text
    arguments: Text


class ToolCall(Body):
    type: Literal["function"] = "function"
    function: FunctionCall
    id: Text | None = None


class ChatMessageBody(Body):
    """content: several parts are joined by line ends. Only the assistant's may be null."""

    role: Text
    content: Text | Annotated[list[TextPart], FAIL_FAST] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], FAIL_FAST] | None = None
    tool_call_id: Text | None = Field(None, description="Of a tool's message: which call it answers.")
    reasoning: Text | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required: only that of the assistant may be null")
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


def _no_own_variables(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in OWN_VARIABLES:
            raise ValueError(f"{name!r} is not for clients to set here")
    return variables


class TemplateBody(Body):
    """How the chat template shows the messages."""

    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's answer at the end; by default, unless a message is continued."
    )
    continue_final_message: bool | None = Field(
        False, description="The prompt ends within the last message, which the answer continues."
    )
    add_special_tokens: AddSpecialTokens = None
    chat_template_kwargs: Annotated[dict[Text, Any], AfterValidator(_no_own_variables)] | None = Field(
        None, description="Variables of the template."
    )
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="A variable of the template; it sets enable_thinking, too."
    )

    @property
    def opens_answer(self) -> bool:
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def template_variables(self) -> dict[str, Any]:
        effort = self.reasoning_effort
        of_effort = (
            {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        )
        return {**of_effort, **(self.chat_template_kwargs or {})}


class ChatBody(SamplingBody, TemplateBody):
    messages: Annotated[list[ChatMessageBody], FAIL_FAST, Len(1)]
    max_tokens: MaxTokens | None = Field(None, description="By default what is left of the context.")
    max_completion_tokens: MaxTokens | None = Field(
        None, description="The newer name of max_tokens, which it precedes."
    )
    tool_choice: Literal["none", "auto"] | None = Field(None, description="With tools: only none.")
    logprobs: bool | None = False
    top_logprobs: NumLogprobs | None = Field(None, description="Only with logprobs.")

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(TemplateBody):
    """Either a prompt or messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessageBody], FAIL_FAST, Len(1)] | None = None
    return_token_strs: bool | None = Field(False, description="Also how the vocabulary spells the tokens.")


class DetokenizeBody(Body):
    model: Text | None = None
    tokens: Annotated[list[TokenId], FAIL_FAST]


def extras(body: Body) -> dict[str, Any]:
    """The fields of a body that are not declared."""
    return body.model_extra or {}
