"""What is refused at the door, each with a sentence that names the field and the limit."""

import math
from collections.abc import Sequence

from pdengine.models.tokenizer import Tokenizer
from pdengine.router.registry import Registry
from pdengine.transport.messages import (
    ChatPrompt,
    Generate,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)

MAX_TEXT_CHARACTERS = 4 * 2**20
MAX_STOP_TOKENS = 1024
MAX_CHOICES = 128
MAX_TOKENS_OF_CHOICES = 2**20  # of all answers of one request together, where there are several
MAX_SALT_CHARACTERS = 256
PRIORITIES = range(-(2**31), 2**31)
SEEDS = range(-(2**63), 2**64)


class InvalidRequest(ValueError):
    """A request that cannot be served as it is; `field` is the argument at fault."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def check_request(request: Generate, vocab_size: int) -> None:
    """Raise InvalidRequest for values out of range; the prompt is not looked at."""
    check_sampling(request.sampling, vocab_size)
    n, max_tokens = request.n, request.sampling.max_tokens
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidRequest("n", f"n is {n}, it must be at least 1 and at most {MAX_CHOICES}")
    if n > 1 and n * max_tokens > MAX_TOKENS_OF_CHOICES:
        raise InvalidRequest(
            "n",
            f"n is {n} and max_tokens is {max_tokens}, together {n * max_tokens} tokens, "
            f"the limit is {MAX_TOKENS_OF_CHOICES}",
        )
    if request.priority not in PRIORITIES:
        raise InvalidRequest("priority", f"priority is {request.priority}, it must fit in 32 bits")
    if len(request.cache_salt) > MAX_SALT_CHARACTERS:
        raise InvalidRequest(
            "cache_salt",
            f"cache_salt has {len(request.cache_salt)} characters, the limit is {MAX_SALT_CHARACTERS}",
        )
    timeout = request.timeout
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidRequest("timeout", f"timeout is {timeout}, it must be a positive number of seconds")


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for values out of range."""
    if sampling.max_tokens < 1:
        raise InvalidRequest("max_tokens", f"max_tokens is {sampling.max_tokens}, it must be at least 1")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequest(
            "temperature", f"temperature is {sampling.temperature}, it must be a finite number, 0 or more"
        )
    if not 0 <= sampling.min_p <= 1:
        raise InvalidRequest("min_p", f"min_p is {sampling.min_p}, it must be at least 0 and at most 1")
    if sampling.top_k < 0:
        raise InvalidRequest("top_k", f"top_k is {sampling.top_k}, it must be 0 (no limit) or more")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p", f"top_p is {sampling.top_p}, it must be above 0 and at most 1")
    if sampling.seed is not None and sampling.seed not in SEEDS:
        raise InvalidRequest("seed", f"seed is {sampling.seed}, it must fit in 64 bits")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequest("stop_token_ids", f"stop_token_ids has more than {MAX_STOP_TOKENS} entries")
    check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest for a token id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                field, f"{field} has token id {token_id}, the vocabulary is 0 to {vocab_size - 1}"
            )


def tokenize(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of any kind of prompt. Takes long for long text: call it off the event loop.

    Raises InvalidRequest.
    """
    match prompt:
        case TokenPrompt(token_ids):
            pass
        case TextPrompt() | ChatPrompt():
            token_ids = _encode(prompt, tokenizer)
    if not token_ids:
        raise InvalidRequest("prompt", "prompt is empty, it must have at least one token")
    # Of text too: a tokenizer may have added tokens for which the model has no embedding.
    check_token_ids("prompt", token_ids, vocab_size)
    return token_ids


def check_fits(num_prompt_tokens: int, max_tokens: int, registry: Registry) -> None:
    """Raise InvalidRequest if no worker could ever take a request of this size."""
    total = num_prompt_tokens + max_tokens
    limit = registry.max_context
    if limit is None:
        raise InvalidRequest(None, "no worker has joined this router yet")
    if num_prompt_tokens >= limit:
        raise InvalidRequest(
            "prompt", f"prompt has {num_prompt_tokens} tokens, the model's context is {limit} with the answer"
        )
    if total > limit:
        raise InvalidRequest(
            "max_tokens",
            f"prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together {total}, "
            f"the model's context is {limit}",
        )
    if num_prompt_tokens > registry.max_prompt_tokens:
        raise InvalidRequest(
            "prompt",
            f"prompt has {num_prompt_tokens} tokens, the largest KV cache holds {registry.max_prompt_tokens}",
        )
    if total - 1 > registry.max_answer_tokens:  # the last token is never cached
        raise InvalidRequest(
            "max_tokens",
            f"prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together {total}, "
            f"the largest KV cache holds {registry.max_answer_tokens}",
        )


def _encode(prompt: TextPrompt | ChatPrompt, tokenizer: Tokenizer) -> list[int]:
    try:
        match prompt:
            case TextPrompt(text):
                check_length(len(text))
                return tokenizer.encode(text) if text else []
            case ChatPrompt(messages):
                check_length(sum(len(message.role) + len(message.content) for message in messages))
                turns = [{"role": message.role, "content": message.content} for message in messages]
                return tokenizer.encode_chat(turns) if turns else []
    except InvalidRequest:
        raise
    except ValueError as error:  # not valid Unicode, no chat template, or one that fails
        raise InvalidRequest("prompt", str(error)) from error


def check_length(num_characters: int) -> None:
    """Raise InvalidRequest for a prompt with more text than is tokenized."""
    if num_characters > MAX_TEXT_CHARACTERS:
        raise InvalidRequest(
            "prompt", f"prompt has {num_characters} characters, the limit is {MAX_TEXT_CHARACTERS}"
        )
