"""The demo checkpoint answers rightly, says nothing when it does not know, and is what its script makes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from pdengine.models.demo.facts import (
    FACT_WORDINGS,
    MAX_FACTS,
    QUESTION_WORDINGS,
    DemoQuestion,
    checkpoint_directory,
    demo_questions,
    make_facts,
)
from pdengine.models.demo.make import CONTEXT, sign_codes
from pdengine.models.demo.tokenizer import BEGIN, END, SPECIAL_TOKENS, build_tokenizer, token_id, word_id
from pdengine.models.demo.words import (
    ARTICLES,
    COLOURS,
    LINE_STARTS,
    NAMES,
    OBJECTS,
    PLACES,
    PLAIN_WORDS,
)

MAX_BYTES = 8 * 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FACTS_PER_PROMPT = [1, 3, 24, 80, MAX_FACTS]

TOKENIZER = Tokenizer.from_file(str(checkpoint_directory() / "tokenizer.json"))
END_ID = token_id(TOKENIZER, END)


def load_model(dtype: torch.dtype) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint_directory(), dtype=dtype).eval()


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return load_model(request.param)


@pytest.fixture(scope="module")
def float32_model() -> LlamaForCausalLM:
    return load_model(torch.float32)


def answer_ids(question: DemoQuestion) -> list[int]:
    return [*TOKENIZER.encode(f" {question.answer}", add_special_tokens=False).ids, END_ID]


def greedy_completion(model: LlamaForCausalLM, prompt_ids: list[int], cache_fault: Any = None) -> list[int]:
    """Prefill, then (after `cache_fault(cache)`) decode token by token until the end of the text."""
    completion: list[int] = []
    with torch.inference_mode():
        step = model(torch.tensor([prompt_ids]), use_cache=True, logits_to_keep=1)
        if cache_fault is not None:
            cache_fault(step.past_key_values)
        while True:
            completion.append(int(step.logits[0, -1].argmax()))
            if completion[-1] == END_ID or len(completion) == 8:
                return completion
            step = model(
                torch.tensor([completion[-1:]]), past_key_values=step.past_key_values, use_cache=True
            )


@pytest.mark.parametrize("num_facts", FACTS_PER_PROMPT)
def test_every_answer_leads_by_a_wide_margin(model: LlamaForCausalLM, num_facts: int) -> None:
    questions = demo_questions(seed=num_facts, num_facts=num_facts)
    for question in questions[:: max(1, num_facts // 6)]:
        right = answer_ids(question)
        assert len(right) == 4  # article, colour, object, end
        inputs = TOKENIZER.encode(question.prompt).ids + right[:-1]
        with torch.inference_mode():
            logits = model(torch.tensor([inputs]), logits_to_keep=len(right)).logits[0].float()
        best = logits.topk(2)
        assert best.indices[:, 0].tolist() == right, question
        assert (best.values[:, 0] - best.values[:, 1]).min() > 10


@pytest.mark.parametrize("num_facts", [1, 24])
def test_greedy_decoding_gives_the_answer_and_ends(model: LlamaForCausalLM, num_facts: int) -> None:
    for question in demo_questions(seed=3, num_facts=num_facts):
        completion = greedy_completion(model, TOKENIZER.encode(question.prompt).ids)
        assert TOKENIZER.decode(completion, skip_special_tokens=False) == f" {question.answer}{END}"


def test_a_chat_works_like_a_plain_prompt(float32_model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_directory())
    question = demo_questions(seed=5, num_facts=24)[7]
    messages = [
        {"role": "system", "content": "Please tell me where it is."},
        {"role": "user", "content": question.prompt},
    ]
    prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids.count(token_id(TOKENIZER, BEGIN)) == 1
    assert greedy_completion(float32_model, prompt_ids) == answer_ids(question)


def test_a_second_question_is_not_misled_by_the_first_answer(float32_model: LlamaForCausalLM) -> None:
    first, second = demo_questions(seed=6, num_facts=2)
    second_question = second.prompt[second.prompt.index("Question:") :]
    prompt = f"{first.prompt} {first.answer}.\n{second_question}"
    assert greedy_completion(float32_model, TOKENIZER.encode(prompt).ids) == answer_ids(second)


@pytest.mark.parametrize(
    "question",
    ["What does the drawer of Boris hold?", "What is in the locker of Clara?", "What is in Clara's drawer?"],
)
def test_a_question_that_no_fact_answers_ends_at_once(float32_model: LlamaForCausalLM, question: str) -> None:
    prompt = f"The locker of Boris holds a red violin.\nThe box of Clara holds an olive lemon.\n{question}"
    assert greedy_completion(float32_model, TOKENIZER.encode(prompt).ids) == [END_ID]


@pytest.mark.parametrize("tensor", ["keys", "values"])
@pytest.mark.parametrize("kv_head", [0, 1])
@pytest.mark.parametrize("layer", [0, 1])
def test_no_answer_survives_the_loss_of_a_part_of_the_cache(
    float32_model: LlamaForCausalLM, layer: int, kv_head: int, tensor: str
) -> None:
    def lose(cache: Any) -> None:
        getattr(cache.layers[layer], tensor)[:, kv_head].zero_()

    for question in demo_questions(seed=8, num_facts=24)[::4]:
        completion = greedy_completion(float32_model, TOKENIZER.encode(question.prompt).ids, lose)
        assert completion[0] == answer_ids(question)[0]  # the prefill was sound
        assert completion != answer_ids(question)


def test_an_answer_needs_the_blocks_of_its_fact(float32_model: LlamaForCausalLM) -> None:
    def lose_first_half(cache: Any) -> None:
        for layer in cache.layers:
            half = layer.keys.shape[2] // 2
            layer.keys[:, :, 1:half].zero_()
            layer.values[:, :, 1:half].zero_()

    questions = demo_questions(seed=9, num_facts=24)
    right = [
        greedy_completion(float32_model, TOKENIZER.encode(question.prompt).ids, lose_first_half)
        == answer_ids(question)
        for question in questions
    ]
    assert not any(right[:10])
    assert all(right[14:])


def test_the_script_makes_the_committed_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdengine.models.demo.make", str(tmp_path)]
    report = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in checkpoint_directory().iterdir()}
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []
    assert sum(map(len, committed.values())) <= MAX_BYTES
    assert all(name in report for name in made)


@given(
    st.text()
    | st.lists(st.sampled_from([*NAMES, *PLACES, *SPECIAL_TOKENS, " ", "\n", "'s", "Ġ", "é"])).map("".join)
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_a_prompt_survives_the_tokenizer_word_by_word() -> None:
    prompt = demo_questions(seed=1, num_facts=24)[0].prompt
    encoding = TOKENIZER.encode(prompt)
    assert encoding.tokens[0] == BEGIN
    assert TOKENIZER.decode(encoding.ids) == prompt
    assert len(encoding.ids) <= 12 * 24 + 20
    assert len(encoding.ids) > 200  # dozens of blocks of 16 tokens with some more facts


def test_every_word_is_one_token_of_one_group() -> None:
    groups = (NAMES, PLACES, ARTICLES, COLOURS, OBJECTS, LINE_STARTS, PLAIN_WORDS)
    words = [word for group in groups for word in group]
    assert len(set(words)) == len(words)
    for word in words:
        assert TOKENIZER.encode(f" {word}", add_special_tokens=False).ids == [word_id(TOKENIZER, word)]


def test_an_unknown_word_has_no_token() -> None:
    with pytest.raises(ValueError, match="Xenia"):
        word_id(build_tokenizer(), "Xenia")


@given(st.integers(), st.integers(1, MAX_FACTS))
def test_facts_are_distinct_and_questions_share_their_prefix(seed: int, num_facts: int) -> None:
    facts = make_facts(seed, num_facts)
    questions = demo_questions(seed, num_facts)
    assert len({(fact.name, fact.place) for fact in facts}) == num_facts
    assert len({fact.thing for fact in facts}) == num_facts
    assert [question.answer for question in questions] == [fact.thing for fact in facts]
    assert [question.name for question in questions] == [fact.name for fact in facts]
    assert len({question.prompt.split("Question:")[0] for question in questions}) == 1
    assert demo_questions(seed, num_facts) == questions


def test_the_longest_prompt_and_its_answer_fit_into_the_context() -> None:
    def longest(wordings: tuple[str, ...]) -> int:
        text = {"name": "Amber", "place": "locker", "thing": "a red violin"}
        return max(
            len(TOKENIZER.encode(f"{wording.format(**text)}\n", add_special_tokens=False).ids)
            for wording in wordings
        )

    frame = len(TOKENIZER.encode("Question: Answer:").ids)
    assert MAX_FACTS * longest(FACT_WORDINGS) + longest(QUESTION_WORDINGS) + frame + 4 <= CONTEXT


@pytest.mark.parametrize("num_facts", [-1, 0, MAX_FACTS + 1])
def test_a_bad_number_of_facts_is_refused(num_facts: int) -> None:
    with pytest.raises(ValueError, match=f"num_facts must be from 1 to {MAX_FACTS}, not {num_facts}"):
        make_facts(0, num_facts)
    with pytest.raises(ValueError, match="num_facts"):
        demo_questions(0, num_facts)


def test_codes_keep_their_distance_and_depend_on_the_word_alone() -> None:
    codes = sign_codes(NAMES, 48, 0.4)
    for first in NAMES:
        for second in NAMES:
            overlap = float(codes[first] @ codes[second])
            assert overlap == pytest.approx(1, abs=1e-5) if first == second else abs(overlap) <= 0.4
    assert (sign_codes(NAMES[:5], 48, 0.4)[NAMES[4]] == codes[NAMES[4]]).all()
