"""Fields of OpenAI's API, and of its relatives, that the server does not act on.

One that cannot change the answer is ignored. Any other one is refused, unless it has a value with which it
changes nothing: clients send those along. docs/api.md lists both kinds.
"""

from collections.abc import Mapping
from http import HTTPStatus

from pdengine.router.http.errors import ApiError

IGNORED = frozenset(
    {
        "early_stopping",  # of beam search
        "length_penalty",  # of beam search
        "media_io_kwargs",  # without images and sounds
        "metadata",
        "mm_processor_kwargs",  # without images and sounds
        "parallel_tool_calls",  # without tools there are none
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "spaces_between_special_tokens",
        "store",
        "stream_interval",
        "user",
    }
)

# Fields and the values with which they ask for what is done anyway. Null is one for every field.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "bad_words": ([],),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "detokenize": (True,),
    "functions": ([],),
    "include_reasoning": (True,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
NEUTRAL_IN_CHAT: Mapping[str, tuple[object, ...]] = {
    **NEUTRAL,
    "echo": (False,),
}
# Of a message, so that what the server answered can be sent back as part of the next prompt.
NEUTRAL_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {"annotations": ([],)}
# Only null asks for what is done anyway.
UNSUPPORTED = frozenset(
    {
        "allowed_token_ids",
        "audio",
        "chat_template",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "kv_transfer_params",
        "logprob_token_ids",
        "prompt_logprobs",
        "repetition_detection",
        "structured_outputs",
        "thinking_token_budget",
        "top_logprobs",
        "truncate_prompt_tokens",
        "web_search_options",
    }
)


def check_unknown(
    fields: Mapping[str, object] | None, neutral: Mapping[str, tuple[object, ...]], *, where: str = ""
) -> None:
    """Raise ApiError for a field that would change the answer, or that nobody here has heard of.

    where: before the field's name in the message and in `param`.
    """
    for name, value in (fields or {}).items():
        if value is None or (not where and name in IGNORED):
            continue
        if any(_equal(value, harmless) for harmless in neutral.get(name, ())):
            continue
        known = name in neutral or name in UNSUPPORTED
        reason = "this value is not supported" if known else "there is no such field"
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"{where}{name}: {reason}",
            param=f"{where}{name}",
            code="unsupported_value" if known else "unknown_parameter",
        )


def _equal(value: object, harmless: object) -> bool:
    """Unlike ==, False is not 0: `logprobs: 0` asks for something."""
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
