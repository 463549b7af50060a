"""Each bad input is refused with the field at fault and the limit."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import BLOCK_SIZE, MODEL, hello
from hypothesis import given
from hypothesis import strategies as st

from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.tokenizer import Tokenizer
from pdengine.router.admission import (
    MAX_CHOICES,
    MAX_SALT_CHARACTERS,
    MAX_STOP_TOKENS,
    MAX_TEXT_CHARACTERS,
    MAX_TOKENS_OF_CHOICES,
    InvalidRequest,
    check_fits,
    check_prompt_ids,
    check_request,
    check_sampling,
    tokenize,
)
from pdengine.router.registry import Registry
from pdengine.transport.messages import (
    ChatMessage,
    ChatPrompt,
    Generate,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)

VOCAB_SIZE = 569
TOKENIZER = Tokenizer.load(checkpoint_directory())


def generate(**fields: Any) -> Generate:
    return Generate(1, TextPrompt(""), **fields)


def refusal(prompt: Prompt, tokenizer: Tokenizer = TOKENIZER) -> str:
    with pytest.raises(InvalidRequest) as caught:
        check_prompt_ids(tokenize(prompt, tokenizer), VOCAB_SIZE)
    assert caught.value.field == "prompt"
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -5, "at least 1"),
        ("temperature", -0.1, "a finite number, 0 or more"),
        ("temperature", math.nan, "a finite number, 0 or more"),
        ("temperature", math.inf, "a finite number, 0 or more"),
        ("min_p", -0.1, "at least 0 and at most 1"),
        ("min_p", 1.01, "at least 0 and at most 1"),
        ("min_p", math.nan, "at least 0 and at most 1"),
        ("top_k", -1, "0 (no limit) or more"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", -1.0, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("min_tokens", -1, "at least 0 and at most max_tokens, which is 16"),
        ("min_tokens", 17, "at least 0 and at most max_tokens, which is 16"),
        ("presence_penalty", -2.1, "at least -2 and at most 2"),
        ("presence_penalty", math.nan, "at least -2 and at most 2"),
        ("frequency_penalty", 2.1, "at least -2 and at most 2"),
        ("repetition_penalty", 0.0, "at least 0.01 and at most 100"),
        ("repetition_penalty", math.inf, "at least 0.01 and at most 100"),
        ("repetition_penalty", math.nan, "at least 0.01 and at most 100"),
        ("logprobs", -1, "at least 0 and at most 20"),
        ("logprobs", 21, "at least 0 and at most 20"),
        ("prompt_logprobs", 21, "at least 0 and at most 20"),
        ("seed", 2**64, "fit in 64 bits"),
        ("seed", -(2**63) - 1, "fit in 64 bits"),
    ],
)
def test_sampling_out_of_range(field: str, value: Any, limit: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(SamplingParams(**{field: value}), VOCAB_SIZE)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} is {value}, it must ")
    assert limit in str(caught.value)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**63])
def test_stop_tokens_outside_the_vocabulary(token_id: int) -> None:
    with pytest.raises(InvalidRequest, match=f"token id {token_id}, the vocabulary is 0 to 568") as caught:
        check_sampling(SamplingParams(stop_token_ids=(3, token_id)), VOCAB_SIZE)
    assert caught.value.field == "stop_token_ids"


def test_too_many_stop_tokens() -> None:
    check_sampling(SamplingParams(stop_token_ids=(1,) * MAX_STOP_TOKENS), VOCAB_SIZE)
    with pytest.raises(InvalidRequest, match=f"more than {MAX_STOP_TOKENS}") as caught:
        check_sampling(SamplingParams(stop_token_ids=(1,) * (MAX_STOP_TOKENS + 1)), VOCAB_SIZE)
    assert caught.value.field == "stop_token_ids"


@pytest.mark.parametrize(
    ("bias", "sentence"),
    [
        ({VOCAB_SIZE: 1.0}, "logit_bias has token id 569, the vocabulary is 0 to 568"),
        ({-1: 1.0}, "logit_bias has token id -1, the vocabulary is 0 to 568"),
        ({5: 100.5}, "logit_bias of token 5 is 100.5, it must be at least -100 and at most 100"),
        ({5: math.nan}, "logit_bias of token 5 is nan, it must be at least -100 and at most 100"),
        (dict.fromkeys(range(1025), 1.0), "logit_bias has 1025 entries, the limit is 1024"),
    ],
)
def test_biases_out_of_range(bias: dict[int, float], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(SamplingParams(logit_bias=bias), VOCAB_SIZE)
    assert (caught.value.field, str(caught.value)) == ("logit_bias", sentence)


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.nan, math.inf])
def test_timeouts_that_are_none(timeout: float) -> None:
    with pytest.raises(InvalidRequest, match="positive number of seconds") as caught:
        check_request(generate(timeout=timeout), VOCAB_SIZE)
    assert caught.value.field == "timeout"


@given(
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 2**62),
        temperature=st.floats(0, allow_infinity=False),
        min_p=st.floats(0, 1),
        top_k=st.integers(0, 2**62),
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.none() | st.integers(-(2**63), 2**64 - 1),
        stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5).map(tuple),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 1),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.01, 100),
        logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-100, 100), max_size=5),
        logprobs=st.none() | st.integers(0, 20),
        prompt_logprobs=st.none() | st.integers(0, 20),
    ),
    st.none() | st.floats(0, exclude_min=True, allow_infinity=False),
    st.integers(-(2**31), 2**31 - 1),
    st.text(max_size=MAX_SALT_CHARACTERS),
    st.lists(st.text(min_size=1, max_size=64), max_size=16).map(tuple),
)
def test_everything_in_range_is_taken(
    sampling: SamplingParams, timeout: float | None, priority: int, cache_salt: str, stop: tuple[str, ...]
) -> None:
    request = Generate(
        1, TextPrompt(""), sampling, timeout, priority=priority, cache_salt=cache_salt, stop=stop
    )
    check_request(request, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("n", 0, "n is 0, it must be at least 1 and at most 128"),
        ("n", -1, "n is -1, it must be at least 1 and at most 128"),
        ("n", 129, "n is 129, it must be at least 1 and at most 128"),
        ("priority", 2**31, "priority is 2147483648, it must fit in 32 bits"),
        ("priority", -(2**31) - 1, "priority is -2147483649, it must fit in 32 bits"),
        ("cache_salt", "x" * 257, "cache_salt has 257 characters, the limit is 256"),
        ("stop", ("x",) * 17, "stop has 17 strings, the limit is 16"),
        ("stop", ("x" * 1000, "y" * 25), "stop has 1025 characters in all, the limit is 1024"),
        ("stop", ("x", ""), "stop has an empty string in it, each must have at least one character"),
    ],
)
def test_requests_out_of_range(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(generate(**{field: value}), VOCAB_SIZE)
    assert (caught.value.field, str(caught.value)) == (field, sentence)


def test_requests_at_the_limits() -> None:
    check_request(generate(n=MAX_CHOICES, cache_salt="x" * 256, priority=2**31 - 1), VOCAB_SIZE)


def test_the_tokens_of_several_answers_are_limited_together() -> None:
    most = SamplingParams(max_tokens=MAX_TOKENS_OF_CHOICES // 4)
    check_request(generate(n=4, sampling=most), VOCAB_SIZE)
    with pytest.raises(InvalidRequest, match="together 1310720 tokens, the limit is 1048576") as caught:
        check_request(generate(n=5, sampling=most), VOCAB_SIZE)
    assert caught.value.field == "n"
    check_request(generate(sampling=SamplingParams(max_tokens=2 * MAX_TOKENS_OF_CHOICES)), VOCAB_SIZE)


# ------------------------------------------------------------------------------------------ prompts


def test_prompts_become_tokens() -> None:
    assert tokenize(TextPrompt("The red violin"), TOKENIZER) == [0, 559, 383, 512]
    assert tokenize(TokenPrompt([0, 559, VOCAB_SIZE - 1]), TOKENIZER) == [0, 559, VOCAB_SIZE - 1]
    turn = ChatMessage("user", "The red violin")
    chat = TOKENIZER.encode_chat([{"role": "user", "content": "The red violin"}])
    assert tokenize(ChatPrompt([turn]), TOKENIZER) == chat


@pytest.mark.parametrize(
    "prompt", [TextPrompt(""), TokenPrompt([]), ChatPrompt([])], ids=["text", "ids", "chat"]
)
def test_empty_prompts(prompt: Prompt) -> None:
    assert refusal(prompt) == "prompt is empty, it must have at least one token"


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**64 - 1])
def test_prompt_ids_outside_the_vocabulary(token_id: int) -> None:
    expected = f"prompt has token id {token_id}, the vocabulary is 0 to 568"
    assert refusal(TokenPrompt([0, token_id])) == expected


def test_text_with_a_token_that_the_model_has_no_embedding_for() -> None:
    [*_, largest] = sorted(TOKENIZER.encode("The red violin"))
    with pytest.raises(InvalidRequest, match=f"token id {largest}, the vocabulary is 0 to {largest - 1}"):
        check_prompt_ids(tokenize(TextPrompt("The red violin"), TOKENIZER), largest)


HUGE = "x" * (MAX_TEXT_CHARACTERS + 1)


@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt(HUGE),
        ChatPrompt([ChatMessage("user", HUGE)]),
        ChatPrompt([ChatMessage(HUGE, "x")]),
        ChatPrompt([ChatMessage("", HUGE[: MAX_TEXT_CHARACTERS // 2 + 1])] * 2),
    ],
    ids=["text", "content", "role", "two turns"],
)
def test_huge_text(prompt: Prompt) -> None:
    assert f"characters, the limit is {MAX_TEXT_CHARACTERS}" in refusal(prompt)


@pytest.mark.parametrize(
    "prompt", [TextPrompt("a\ud800b"), ChatPrompt([ChatMessage("user", "\udfff")])], ids=["text", "chat"]
)
def test_lone_surrogates(prompt: Prompt) -> None:
    assert "lone surrogate" in refusal(prompt)


@pytest.fixture
def plain_model(tmp_path: Path) -> Path:
    """The demo's tokenizer without its chat template."""
    shutil.copy(checkpoint_directory() / "tokenizer.json", tmp_path)
    return tmp_path


def test_chat_with_a_model_that_has_no_template(plain_model: Path) -> None:
    prompt = ChatPrompt([ChatMessage("user", "Hello")])
    assert "no chat template" in refusal(prompt, Tokenizer.load(plain_model))


def test_a_template_that_refuses_the_messages(plain_model: Path) -> None:
    template = "{{ raise_exception('the first turn must be a question') }}"
    (plain_model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    prompt = ChatPrompt([ChatMessage("user", "Hello")])
    assert "the first turn must be a question" in refusal(prompt, Tokenizer.load(plain_model))


@given(st.text())
def test_any_text_is_taken(text: str) -> None:
    if text:
        token_ids = tokenize(TextPrompt(text), TOKENIZER)
        assert TOKENIZER.decode(token_ids) == text


# ------------------------------------------------------------------------------------------- limits


def registry_of(*sizes: tuple[str, int, int]) -> Registry:
    """Workers of (role, KV blocks, max_context)."""
    registry = Registry(MODEL)
    for number, (role, num_blocks, max_context) in enumerate(sizes):
        greeting = hello(str(number), role, num_blocks=num_blocks, max_context=max_context)  # type: ignore[arg-type]
        registry.add(b"%d" % number, greeting, now=0.0)
    return registry


def check(num_prompt_tokens: int, max_tokens: int, registry: Registry) -> None:
    check_fits(num_prompt_tokens, SamplingParams(max_tokens=max_tokens), registry.limits)


def test_the_context_is_the_smallest_of_all_workers() -> None:
    registry = registry_of(("unified", 100, 50), ("unified", 100, 40))
    check(30, 10, registry)
    with pytest.raises(
        InvalidRequest, match="together 41, this model's maximum context length is 40"
    ) as caught:
        check(30, 11, registry)
    assert caught.value.field == "max_tokens"
    with pytest.raises(
        InvalidRequest, match="prompt has 40 tokens, this model's maximum context length is 40"
    ) as caught:
        check(40, 1, registry)
    assert caught.value.field == "prompt"


def test_the_kv_cache_must_hold_all_but_the_last_token() -> None:
    capacity = 3 * BLOCK_SIZE
    registry = registry_of(("unified", 3, 1000))
    check(capacity, 1, registry)
    check(1, capacity, registry)
    with pytest.raises(InvalidRequest, match=f"the largest KV cache holds: {capacity}") as caught:
        check(capacity, 2, registry)
    assert caught.value.field == "max_tokens"
    with pytest.raises(InvalidRequest, match=f"the largest KV cache holds: {capacity}") as caught:
        check(capacity + 1, 1, registry)
    assert caught.value.field == "prompt"


def test_prompts_are_held_where_they_are_computed_and_answers_where_they_are_written() -> None:
    registry = registry_of(("prefill", 2, 1000), ("decode", 4, 1000))
    check(2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1, registry)
    with pytest.raises(InvalidRequest) as caught:
        check(2 * BLOCK_SIZE + 1, 1, registry)
    assert caught.value.field == "prompt"
    with pytest.raises(InvalidRequest) as caught:
        check(2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 2, registry)
    assert caught.value.field == "max_tokens"


def test_the_log_probabilities_of_a_prompt_are_limited_together() -> None:
    limits = registry_of(("unified", 10**6, 10**6)).limits
    check_fits(2**17, SamplingParams(prompt_logprobs=1), limits)
    with pytest.raises(InvalidRequest, match="together 393216 log probabilities") as caught:
        check_fits(2**17, SamplingParams(prompt_logprobs=2), limits)
    assert caught.value.field == "prompt_logprobs"


def test_nothing_fits_without_workers() -> None:
    with pytest.raises(InvalidRequest, match="no worker has joined this router yet") as caught:
        check(1, 1, Registry(MODEL))
    assert caught.value.field is None
