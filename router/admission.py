"""What is refused at the door, each with a sentence that names the field and the limit."""

import math
from collections.abc import Iterable, Sequence

from pdengine.models.tokenizer import Tokenizer
from pdengine.router.registry import Limits
from pdengine.transport.messages import (
    ChatPrompt,
    Generate,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)

CONTEXT_LIMIT = "maximum context length"  # clients look for these words to shorten a conversation
MAX_TEXT_CHARACTERS = 4 * 2**20
MAX_STOP_TOKENS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024  # of all stop strings together
MAX_BIASED_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 2**18  # of all tokens of a prompt together: they are one message
REPETITION_PENALTY = (0.01, 100.0)  # logits stay finite in float32
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
    check_stop(request.stop)
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
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise InvalidRequest(
            "min_tokens",
            f"min_tokens is {sampling.min_tokens}, it must be at least 0 and at most max_tokens, which is "
            f"{sampling.max_tokens}",
        )
    _check_logits(sampling, vocab_size)
    for field, value in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if value is not None and not 0 <= value <= MAX_LOGPROBS:
            raise InvalidRequest(
                field, f"{field} is {value}, it must be at least 0 and at most {MAX_LOGPROBS}"
            )


def check_stop(stop: Sequence[str]) -> None:
    """Raise InvalidRequest for stop strings that are too many, too long, or empty."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop", f"stop has {len(stop)} strings, the limit is {MAX_STOP_STRINGS}")
    num_characters = sum(len(string) for string in stop)
    if num_characters > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            "stop", f"stop has {num_characters} characters in all, the limit is {MAX_STOP_CHARACTERS}"
        )
    if "" in stop:
        raise InvalidRequest("stop", "stop has an empty string in it, each must have at least one character")


def _check_logits(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for penalties and biases out of range."""
    for field in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(sampling, field)
        if not -2 <= penalty <= 2:
            raise InvalidRequest(field, f"{field} is {penalty}, it must be at least -2 and at most 2")
    low, high = REPETITION_PENALTY
    if not low <= sampling.repetition_penalty <= high:
        raise InvalidRequest(
            "repetition_penalty",
            f"repetition_penalty is {sampling.repetition_penalty}, it must be at least {low} and at most "
            f"{high}",
        )
    if len(sampling.logit_bias) > MAX_BIASED_TOKENS:
        raise InvalidRequest(
            "logit_bias",
            f"logit_bias has {len(sampling.logit_bias)} entries, the limit is {MAX_BIASED_TOKENS}",
        )
    check_token_ids("logit_bias", sampling.logit_bias, vocab_size)
    for token_id, bias in sampling.logit_bias.items():
        if not -100 <= bias <= 100:
            raise InvalidRequest(
                "logit_bias",
                f"logit_bias of token {token_id} is {bias}, it must be at least -100 and at most 100",
            )


def check_token_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise InvalidRequest for a token id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                field, f"{field} has token id {token_id}, the vocabulary is 0 to {vocab_size - 1}"
            )


def tokenize(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Token ids of any kind of prompt. Takes long for long text: call it off the event loop.

    Raises InvalidRequest; `check_prompt_ids` is still to be called.
    """
    match prompt:
        case TokenPrompt(token_ids):
            pass
        case TextPrompt() | ChatPrompt():
            token_ids = _encode(prompt, tokenizer)
    check_not_empty(token_ids)
    return token_ids


def check_not_empty(token_ids: Sequence[int]) -> None:
    """Raise InvalidRequest for a prompt without a token."""
    if not token_ids:
        raise InvalidRequest("prompt", "prompt is empty, it must have at least one token")


def check_prompt_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest for a token without an embedding, which a tokenizer may have added, too."""
    check_token_ids("prompt", token_ids, vocab_size)


def check_prompt_length(num_tokens: int, max_context: int) -> None:
    """Raise InvalidRequest for a prompt that leaves no room for an answer."""
    if num_tokens >= max_context:
        raise InvalidRequest(
            "prompt",
            f"prompt has {num_tokens} tokens, this model's {CONTEXT_LIMIT} is {max_context} tokens",
        )


def check_fits(num_prompt_tokens: int, sampling: SamplingParams, limits: Limits) -> None:
    """Raise InvalidRequest if no worker could ever take a request of this size."""
    max_tokens = sampling.max_tokens
    total = num_prompt_tokens + max_tokens
    limit = limits.max_context
    if limit is None:
        raise InvalidRequest(None, "no worker has joined this router yet")
    check_prompt_length(num_prompt_tokens, limit)
    if total > limit:
        raise InvalidRequest(
            "max_tokens",
            f"prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together {total}, "
            f"this model's {CONTEXT_LIMIT} is {limit} tokens",
        )
    if num_prompt_tokens > limits.max_prompt_tokens:
        raise InvalidRequest(
            "prompt",
            f"prompt has {num_prompt_tokens} tokens, the {CONTEXT_LIMIT} here is what the largest KV cache "
            f"holds: {limits.max_prompt_tokens} tokens",
        )
    if total - 1 > limits.max_answer_tokens:  # the last token is never cached
        raise InvalidRequest(
            "max_tokens",
            f"prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together {total}, "
            f"the {CONTEXT_LIMIT} here is what the largest KV cache holds: {limits.max_answer_tokens} tokens",
        )
    if sampling.prompt_logprobs is None:
        return
    num_logprobs = num_prompt_tokens * (1 + sampling.prompt_logprobs)
    if num_logprobs > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            "prompt_logprobs",
            f"prompt has {num_prompt_tokens} tokens and prompt_logprobs is {sampling.prompt_logprobs}, "
            f"together {num_logprobs} log probabilities, the limit is {MAX_PROMPT_LOGPROBS}",
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
