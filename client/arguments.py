"""What a caller gives, as it travels to the router."""

from collections.abc import Iterable, Mapping
from typing import TypedDict, cast

import msgspec

from pdengine.client.results import PromptLike
from pdengine.transport.messages import (
    ChatMessage,
    ChatPrompt,
    Generate,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`, in both clients. All may be left out.

    max_tokens: tokens to write at most; 16.
    temperature: 1.0; 0 is greedy.
    top_k: sample among the k likeliest tokens; 0 is all.
    top_p: sample among the likeliest tokens that together have this probability; 1.0 is all.
    min_p: sample among the tokens at least so many times as likely as the likeliest one; 0.0 is all.
    seed: the same seed, prompt and arguments give the same answer. None draws one.
    stop: a text, or several: an answer ends where one of them comes up, and its text ends before it.
    stop_token_ids: end an answer after any of these, besides the model's own end.
    include_stop: the text of an answer has what ended it, a stop text or the text of a stop token, too.
    ignore_eos: do not end at the model's end-of-sequence tokens.
    min_tokens: tokens to write before anything but max_tokens may end an answer.
    presence_penalty: taken off the logit of each token that the answer has already.
    frequency_penalty: the same, for each time that the answer has it.
    repetition_penalty: divides the logit of a token that prompt or answer have, or multiplies it where it
        is negative; 1.0 is none.
    logit_bias: token id to what is added to its logit.
    logprobs: k: tell the log probability of each token of the answer, and the k likeliest tokens there. 0
        tells the token's own only, None nothing.
    prompt_logprobs: the same, of the prompt's tokens.
    n: answers to write to the prompt; 1.
    priority: the lower, the earlier it is served; 0.
    cache_salt: the KV cache of the prompt is shared only with requests of the same salt; "" is everybody's.
    timeout: seconds for all of it, retries included; None is no deadline.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    include_stop: bool
    ignore_eos: bool
    min_tokens: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    priority: int
    cache_salt: str
    timeout: float | None


def to_request(prompt: PromptLike, options: GenerateOptions) -> Generate:
    """The request, without the tag that it gets when it is sent. Raises TypeError or ValueError."""
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown argument: {', '.join(sorted(unknown))}")
    given = dict(options)
    stop = given.get("stop", ())
    given["stop"] = (stop,) if isinstance(stop, str) else _tuple_of("stop", stop)
    given["stop_token_ids"] = _tuple_of("stop_token_ids", given.get("stop_token_ids", ()))
    if isinstance(given.get("logit_bias"), Mapping):
        given["logit_bias"] = dict(options["logit_bias"])
    sampling = {name: given.pop(name) for name in SamplingParams.__struct_fields__ if name in given}
    request = Generate(0, to_prompt(prompt), SamplingParams(**sampling), **given)  # type: ignore[arg-type]
    check_types(request)
    return request


def _tuple_of(name: str, items: object) -> tuple[object, ...]:
    if not isinstance(items, Iterable):
        raise TypeError(f"wrong type of argument: {name} is {type(items).__name__}, it must be several")
    return tuple(items)


def to_prompt(prompt: PromptLike) -> Prompt:
    """Text, token ids or chat messages as they travel. Raises TypeError for anything else."""
    match prompt:
        case str():
            return TextPrompt(prompt)
        case [Mapping(), *_]:
            return ChatPrompt([to_chat_message(turn) for turn in prompt])
        case [*token_ids] if all(type(token_id) is int for token_id in token_ids):
            return TokenPrompt(cast(list[int], token_ids))
    raise TypeError("prompt must be a string, a list of token ids or a list of chat messages")


def to_chat_message(turn: object) -> ChatMessage:
    """Raises TypeError unless `turn` has a role and a content, and both are strings."""
    match turn:
        case {"role": str(role), "content": str(content)}:
            return ChatMessage(role, content)
    raise TypeError("a chat message must have a role and a content, both strings")


def check_types(request: Generate) -> None:
    """Raise TypeError for what the router could not decode: it would not even know whose it was. Raise
    ValueError for what cannot be encoded."""
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Generate)
    except msgspec.ValidationError as error:
        raise TypeError(f"wrong type of argument: {error}") from None
    except OverflowError as error:
        raise ValueError(f"a number does not fit in 64 bits: {error}") from error
