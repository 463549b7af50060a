"""What messages of more than one conversation are made of."""

from typing import Annotated, Literal

import msgspec

# Far above what anybody asks for. Checked before a list is read: a hostile message costs the router little.
MAX_LIST = 2**16
Role = Literal["prefill", "decode", "unified"]
FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages; the class name is the tag on the wire."""


class Malformed(Message, frozen=True):
    """Answer to a message that could not be understood."""

    reason: str


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
