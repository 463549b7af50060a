"""What a caller gives, as it travels to the router."""

from collections.abc import Iterable, Mapping
from typing import cast

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


def to_request(
    prompt: PromptLike,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    stop_token_ids: Iterable[int],
    ignore_eos: bool,
    n: int,
    priority: int,
    cache_salt: str,
    timeout: float | None,
) -> Generate:
    """The request, without the tag that it gets when it is sent. Raises TypeError."""
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=ignore_eos,
    )
    request = Generate(0, to_prompt(prompt), sampling, timeout, n, priority, cache_salt)
    check_types(request)
    return request


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
    """Raise TypeError for an argument of the wrong type: the router would not even know whose it was."""
    try:
        msgspec.convert(msgspec.structs.asdict(request.sampling), SamplingParams)
        msgspec.convert({"timeout": request.timeout}, dict[str, float | None])
        msgspec.convert({"n": request.n, "priority": request.priority}, dict[str, int])
        msgspec.convert({"cache_salt": request.cache_salt}, dict[str, str])
    except msgspec.ValidationError as error:
        raise TypeError(f"wrong type of argument: {error}") from None
