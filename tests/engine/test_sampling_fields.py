"""All sampling fields on a real model: one worker or two, preempted or not, the same tokens and scores."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from engine_cluster import Cluster
from engine_worker import LEASE_SECONDS, EngineWorker, unfinished
from msgspec.structs import replace
from sequences import make_work
from torch import Tensor
from transformers import AutoModelForCausalLM

from pdengine.engine.commands import FreeLease
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.leases import BorrowedLease
from pdengine.engine.runner import Runner
from pdengine.engine.sequence import Mode, Sequence, sequences_of
from pdengine.models.config import load_config
from pdengine.models.decoder import Decoder
from pdengine.models.weights import load_decoder
from pdengine.transport.messages import (
    Choice,
    FinishReason,
    Prefilled,
    PromptScored,
    Pulled,
    SamplingParams,
    StepTokens,
    TokenLogprobs,
    TokenUpdate,
)
from pdengine.triton_kernels import logits as logits_module

BLOCK_SIZE = 8
MAX_TOKENS = 12
NEAR = 2e-4
FIELDS = {
    "plain": SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
    "logprobs": SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=3, prompt_logprobs=2),
    "penalties": SamplingParams(
        max_tokens=MAX_TOKENS,
        seed=5,
        temperature=0.9,
        presence_penalty=0.7,
        frequency_penalty=1.1,
        logprobs=0,
    ),
    "repetition": SamplingParams(
        max_tokens=MAX_TOKENS, seed=6, temperature=0.7, top_p=0.9, repetition_penalty=1.8, prompt_logprobs=0
    ),
    "bias": SamplingParams(
        max_tokens=MAX_TOKENS, seed=7, top_k=30, logit_bias={5: 6.0, 9: -50.0, 300: 5.0}, logprobs=20
    ),
    "all": SamplingParams(
        max_tokens=MAX_TOKENS,
        seed=8,
        min_p=0.01,
        min_tokens=6,
        presence_penalty=-0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias={17: 4.0},
        logprobs=5,
        prompt_logprobs=1,
    ),
}


@dataclass
class Answers:
    """What was told of one request: by choice, and of its prompt."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs | None]] = field(default_factory=dict)
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    prompt: list[TokenLogprobs] = field(default_factory=list)

    def add(self, update: TokenUpdate) -> None:
        tokens = self.tokens.setdefault(update.choice, [])
        assert update.position == len(tokens)
        tokens.append(update.token_id)
        self.logprobs.setdefault(update.choice, []).append(update.logprobs)
        if update.finish_reason is not None:
            self.finish_reasons[update.choice] = update.finish_reason

    def add_prompt(self, scored: PromptScored) -> None:
        assert not self.tokens, "the prompt comes before the first token"
        assert scored.position == 1 + len(self.prompt), "in order, and none twice"
        self.prompt += scored.logprobs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("qwen3")
    write_checkpoint("qwen3", directory)
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> Decoder:
    return load_decoder(directory, load_config(directory), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> Callable[[list[int]], Tensor]:
    """[tokens, vocabulary]: log probabilities of the token after each, by transformers."""
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(token_ids: list[int]) -> Tensor:
        logits: Tensor = plain(torch.tensor([token_ids])).logits[0]
        return logits.log_softmax(dim=-1)

    return logprobs


def start(
    cluster: Cluster, model: Decoder, name: str, *, max_batch_tokens: int = 64, num_blocks: int = 200
) -> EngineWorker:
    kv_cache = KVCache(model.config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32)
    kv_cache.pool.fill_(torch.nan)
    return cluster.add(
        EngineWorker(
            cluster.fabric,
            name,
            runner=Runner(model, kv_cache, torch.device("cpu")),
            region=kv_cache.describe(),
            block_size=BLOCK_SIZE,
            max_batch_tokens=max_batch_tokens,
            max_requests=16,
            eos_token_ids=frozenset(model.config.eos_token_ids),
        )
    )


def prompt_of(model: Decoder, length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(1, model.config.vocab_size), k=length)


def sequence_of(
    name: str,
    mode: Mode,
    prompt_ids: list[int],
    sampling: SamplingParams,
    choices: list[Choice],
    salt: str | None = None,
) -> Sequence:
    work = make_work(name, prompt_ids, choices, sampling=sampling, salt=salt, block_size=BLOCK_SIZE)
    return sequences_of(work, mode, block_size=BLOCK_SIZE)[0]


def fresh(n: int) -> list[Choice]:
    return [Choice(index, []) for index in range(n)]


def take(worker: EngineWorker, answers: dict[str, Answers], num_finished: int) -> None:
    while num_finished:
        event = worker.expect(object)
        assert isinstance(event, StepTokens | PromptScored | Pulled), event
        if isinstance(event, PromptScored):
            answers[event.request_id].add_prompt(event)
        for update in event.updates if isinstance(event, StepTokens) else []:
            answers[update.request_id].add(update)
            num_finished -= update.finish_reason is not None


def run_whole(
    worker: EngineWorker, requests: dict[str, tuple[list[int], SamplingParams]], n: int
) -> dict[str, Answers]:
    answers = {name: Answers() for name in requests}
    for name, (prompt_ids, sampling) in requests.items():
        worker.add(sequence_of(name, Mode.WHOLE, prompt_ids, sampling, fresh(n)))
    take(worker, answers, n * len(requests))
    return answers


def run_disaggregated(
    prefill: EngineWorker,
    decode: EngineWorker,
    requests: dict[str, tuple[list[int], SamplingParams]],
    n: int,
) -> dict[str, Answers]:
    answers = {name: Answers() for name in requests}
    for name, (prompt_ids, sampling) in requests.items():
        prefill.add(sequence_of(name, Mode.PREFILL, prompt_ids, sampling, fresh(n)))
    prefilled: list[Prefilled] = []
    while len(prefilled) < len(requests):
        event = prefill.expect(object)
        assert isinstance(event, Prefilled | PromptScored), event
        if isinstance(event, PromptScored):
            answers[event.request_id].add_prompt(event)
            continue
        prefilled.append(event)
        for update in event.tokens:
            answers[event.request_id].add(update)
    num_left = 0
    for event in prefilled:
        if event.lease is None:
            continue
        prompt_ids, sampling = requests[event.request_id]
        going_on = unfinished(event)
        num_left += len(going_on)
        sequence = sequence_of(event.request_id, Mode.DECODE, prompt_ids, sampling, going_on)
        sequence.lease = BorrowedLease(event.lease, event.request_id, covered_until=1e12 + LEASE_SECONDS)
        decode.borrowed.append(sequence.lease)
        decode.add(sequence)
    take(decode, answers, num_left)
    for event in prefilled:
        if event.lease is not None:
            prefill.engine.post(FreeLease(event.lease.lease_id))
    return answers


def check_same(ours: dict[str, Answers], theirs: dict[str, Answers]) -> None:
    for name, one in ours.items():
        other = theirs[name]
        assert one.tokens == other.tokens, name
        assert one.finish_reasons == other.finish_reasons
        check_close(one.prompt, other.prompt)
        for choice, logprobs in one.logprobs.items():
            check_close(logprobs, other.logprobs[choice])


def check_close(ours: Sequence_[TokenLogprobs | None], theirs: Sequence_[TokenLogprobs | None]) -> None:
    """The rounding of float32 depends on the batch, and decides between tokens that are all but equal."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.logprob == pytest.approx(other.logprob, abs=NEAR)
        assert abs(one.rank - other.rank) <= 2
        assert [x for _, x in one.top] == pytest.approx([x for _, x in other.top], abs=NEAR)
        pairs = zip(one.top, other.top, strict=True)
        assert sum(mine != yours for (mine, _), (yours, _) in pairs) <= 2


def check_scores(expected: Tensor, token_id: int, scored: TokenLogprobs | None, num_top: int) -> None:
    """expected: `[vocabulary]`, the log probabilities of `token_id` and all others."""
    assert scored is not None
    assert scored.logprob == pytest.approx(float(expected[token_id]), abs=NEAR)
    assert int((expected > scored.logprob + NEAR).sum()) < scored.rank
    assert scored.rank <= 1 + int((expected > scored.logprob - NEAR).sum())
    assert [x for _, x in scored.top] == pytest.approx(expected.topk(num_top).values.tolist(), abs=NEAR)
    assert [x for _, x in scored.top] == pytest.approx([float(expected[t]) for t, _ in scored.top], abs=NEAR)
    assert len({token for token, _ in scored.top}) == num_top


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.PREFILL])
@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64])
def test_the_prompt_is_scored_as_transformers_does(
    cluster: Cluster,
    model: Decoder,
    reference: Callable[[list[int]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    max_batch_tokens: int,
    mode: Mode,
) -> None:
    """In chunks, in slices of chunks, beside another prompt, for one answer or several."""
    monkeypatch.setattr(logits_module, "SLICE_LOGITS", 5 * model.config.vocab_size)
    worker = start(cluster, model, "worker", max_batch_tokens=max_batch_tokens)
    asked = {"one": (31, 4, 1), "two": (17, 0, 3), "short": (1, 2, 1)}
    answers = {name: Answers() for name in asked}
    prompts = {name: prompt_of(model, length, seed=length) for name, (length, _, _) in asked.items()}
    for name, (_, num_top, n) in asked.items():
        sampling = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=num_top, ignore_eos=True)
        worker.add(sequence_of(name, mode, prompts[name], sampling, fresh(n)))
    if mode is Mode.WHOLE:
        take(worker, answers, 5)
    num_prefilled = 0
    while mode is Mode.PREFILL and num_prefilled < len(asked):
        event = worker.expect(object)
        if isinstance(event, PromptScored):
            answers[event.request_id].add_prompt(event)
            continue
        assert isinstance(event, Prefilled)
        assert event.lease is not None
        worker.engine.post(FreeLease(event.lease.lease_id))
        answers[event.request_id].tokens[0] = [event.tokens[0].token_id]
        num_prefilled += 1
    for name, prompt_ids in prompts.items():
        expected, scored = reference(prompt_ids), answers[name].prompt
        assert len(scored) == len(prompt_ids) - 1
        for position, scores in enumerate(scored):
            check_scores(expected[position], prompt_ids[position + 1], scores, asked[name][1])


def test_answers_are_scored_as_transformers_does(
    cluster: Cluster, model: Decoder, reference: Callable[[list[int]], Tensor]
) -> None:
    """By the model's own logits, whatever bias, penalties and temperature made of them."""
    worker = start(cluster, model, "worker")
    requests = {name: (prompt_of(model, 20, seed=3), sampling) for name, sampling in FIELDS.items()}
    answers = run_whole(worker, requests, n=2)
    for name, (prompt_ids, sampling) in requests.items():
        for choice, token_ids in answers[name].tokens.items():
            expected = reference(prompt_ids + token_ids)[len(prompt_ids) - 1 :]
            for row, token_id in enumerate(token_ids):
                scored = answers[name].logprobs[choice][row]
                if sampling.logprobs is None:
                    assert scored is None
                else:
                    check_scores(expected[row], token_id, scored, sampling.logprobs)
    assert len(answers["logprobs"].prompt) == 19
    assert answers["plain"].tokens[0] == answers["logprobs"].tokens[0]
    assert 9 not in answers["bias"].tokens[0]


@pytest.mark.parametrize("n", [1, 3])
def test_two_workers_write_and_score_what_one_does(cluster: Cluster, model: Decoder, n: int) -> None:
    requests = {name: (prompt_of(model, 27, seed=4), sampling) for name, sampling in FIELDS.items()}
    whole = run_whole(start(cluster, model, "whole"), requests, n)
    prefill = start(cluster, model, "prefill", max_batch_tokens=10)
    decode = start(cluster, model, "decode", max_batch_tokens=16)
    decode.connect(prefill)
    check_same(run_disaggregated(prefill, decode, requests, n), whole)
    assert len({str(answers.tokens) for answers in whole.values()}) == len(FIELDS) - 1  # two are greedy


def test_preempted_answers_are_those_that_nothing_disturbed(cluster: Cluster, model: Decoder) -> None:
    requests = {
        f"{name} {seed}": (prompt_of(model, 20 + seed, seed=seed), replace(sampling, max_tokens=40))
        for name, sampling in FIELDS.items()
        for seed in (1, 2)
    }
    calm = run_whole(start(cluster, model, "calm"), requests, n=2)
    tiny = start(cluster, model, "tiny", num_blocks=12, max_batch_tokens=16)
    check_same(run_whole(tiny, requests, n=2), calm)
    assert tiny.scheduler.num_preemptions > 5


def test_a_prompt_that_is_preempted_half_way_is_scored_once(
    cluster: Cluster, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(cluster, model, "worker", num_blocks=12, max_batch_tokens=2)
    preempted: list[tuple[str, int]] = []
    preempt = worker.scheduler._preempt

    def note(sequence: Sequence) -> None:
        preempted.append((sequence.request_id, sequence.num_scored))
        preempt(sequence)

    monkeypatch.setattr(worker.scheduler, "_preempt", note)
    answers = {"old": Answers(), "new": Answers()}
    old = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    new = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
    prompts = {"old": prompt_of(model, 20), "new": prompt_of(model, 45, seed=2)}
    worker.add(sequence_of("old", Mode.WHOLE, prompts["old"], old, fresh(1)))
    worker.add(sequence_of("new", Mode.WHOLE, prompts["new"], new, fresh(1)))
    take(worker, answers, 2)
    assert any(name == "new" and 1 < num_scored < 45 for name, num_scored in preempted)
    [alone] = run_whole(start(cluster, model, "alone"), {"new": (prompts["new"], new)}, 1).values()
    check_same({"new": answers["new"]}, {"new": alone})


def test_a_scored_prompt_does_not_use_the_prefix_cache(cluster: Cluster, model: Decoder) -> None:
    """Where nothing is computed, nothing is scored. What it computes others may find."""
    worker, prompt_ids = start(cluster, model, "worker"), prompt_of(model, 40)
    for number in range(2):
        scores = Answers()
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
        worker.add(sequence_of(f"scored {number}", Mode.WHOLE, prompt_ids, sampling, fresh(1), salt=""))
        take(worker, {f"scored {number}": scores}, 1)
        assert len(scores.prompt) == 39
    worker.add(sequence_of("plain", Mode.WHOLE, prompt_ids, FIELDS["plain"], fresh(1), salt=""))
    take(worker, {"plain": Answers()}, 1)
    assert [(hit.request_id, hit.cached_tokens) for hit in worker.hits] == [("plain", 39)]


def test_min_tokens_keeps_the_end_away(cluster: Cluster, model: Decoder) -> None:
    """The model's end of sequence is made all but certain; so is a token that the request stops at."""
    worker, eos = start(cluster, model, "worker"), model.config.eos_token_ids[0]
    for token in (eos, 33):
        for min_tokens in (0, 4):
            sampling = SamplingParams(
                max_tokens=9,
                seed=1,
                logit_bias={token: 100.0},
                stop_token_ids=(33,),
                min_tokens=min_tokens,
            )
            request = {f"{token} {min_tokens}": (prompt_of(model, 9), sampling)}
            [answers] = run_whole(worker, request, 1).values()
            assert len(answers.tokens[0]) == min_tokens + 1
            assert answers.tokens[0][-1] == token
            assert answers.finish_reasons == {0: "stop"}
            assert not {eos, 33} & set(answers.tokens[0][:-1])
