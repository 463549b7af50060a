"""The tokens of real processes are those of transformers, for every family."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import FAMILIES, VOCAB_SIZE, write_checkpoint
from deployment import Deployment

from pdengine.client import Client, Completion

PROMPT_LENGTHS = (1, 2, 15, 16, 17, 100, 201, 300)
NUM_TOKENS = 64
# Small steps, so that long prompts are computed in chunks beside the decoding of short ones.
OPTIONS = ("--max-batch-tokens", "64", "--dtype", "float32")


# One of each architecture. The others differ in what the tests of the models look at, and take as long.
ARCHITECTURES = ("llama-gqa", "qwen2-tied", "qwen3", "mistral-linear", "phi3-longrope", "smollm3")


def always_or_long(family: str) -> Any:
    return pytest.param(family, marks=[] if family in ARCHITECTURES else [pytest.mark.long])


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, VOCAB_SIZE - 40, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def reference_tokens(directory: Path) -> list[list[int]]:
    """What transformers writes greedily after each prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for prompt in prompts():
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def answers_of(deployment: Deployment) -> list[Completion]:
    """All prompts at once."""
    with Client(deployment.client_address) as client, ThreadPoolExecutor(len(PROMPT_LENGTHS)) as threads:

        def ask(prompt: list[int]) -> Completion:
            return client.generate(prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, timeout=120)

        return list(threads.map(ask, prompts()))


@pytest.mark.parametrize("family", [*map(always_or_long, FAMILIES)])
def test_unified_and_disaggregated_write_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_checkpoint(family, model)
    expected = reference_tokens(model)
    assert all(len(set(tokens)) > 8 for tokens in expected), "the model must not parrot"

    with Deployment(model, tmp_path) as deployment:
        deployment.start_router()
        deployment.start_worker("prefill", *OPTIONS)
        deployment.start_worker("decode", *OPTIONS)
        deployment.wait_workers("prefill", "decode")
        disaggregated = answers_of(deployment)
        deployment.wait_baseline()
        assert [answer.token_ids for answer in disaggregated] == expected
        for answer in disaggregated:
            assert answer.prefill_worker != answer.decode_worker
            assert answer.transfer is not None
            assert answer.transfer.num_blocks == -(-answer.usage.prompt_tokens // 16)
            assert answer.transfer.lanes == "mapping"
        longest = disaggregated[-1].transfer
        assert longest is not None
        assert longest.num_early_blocks > 0, "its first chunks were pulled while the last was computed"

        unified = deployment.start_worker("unified", *OPTIONS)
        for process in deployment.processes[1:3]:
            deployment.stop(process)
        deployment.wait_workers("unified")
        together = answers_of(deployment)
        assert [answer.token_ids for answer in together] == expected
        assert all(answer.transfer is None for answer in together)
        deployment.wait_baseline()
        assert unified.poll() is None


def test_ucx_on_one_host_writes_the_same_tokens(tmp_path: Path) -> None:
    """One worker that asks for it is enough."""
    model = tmp_path / "model"
    write_checkpoint("llama-gqa", model)
    with Deployment(model, tmp_path) as deployment:
        deployment.start_router()
        deployment.start_worker("prefill", *OPTIONS)
        deployment.start_worker("decode", *OPTIONS, "--same-host", "ucx")
        deployment.wait_workers("prefill", "decode")
        answers = answers_of(deployment)
        deployment.wait_baseline()
    assert [answer.token_ids for answer in answers] == reference_tokens(model)
    for answer in answers:
        assert answer.transfer is not None
        assert {"sysv", "posix"} & set(answer.transfer.lanes.split(", "))


def test_a_zeroed_block_is_seen(tmp_path: Path) -> None:
    """The comparison above can fail: a decode worker that loses one pulled block writes other tokens."""
    model = tmp_path / "model"
    write_checkpoint("llama-gqa", model)
    expected = reference_tokens(model)
    with Deployment(model, tmp_path) as deployment:
        deployment.start_router()
        deployment.start_worker("prefill", *OPTIONS)
        deployment.start_worker(
            "decode",
            *OPTIONS,
            module="zeroing_worker",
            environment={"PYTHONPATH": str(Path(__file__).parent)},
        )
        deployment.wait_workers("prefill", "decode")
        answers = answers_of(deployment)
        deployment.wait_baseline()
    different = [a.token_ids != tokens for a, tokens in zip(answers, expected, strict=True)]
    assert all(different)
    assert [a.token_ids[0] for a in answers] == [tokens[0] for tokens in expected], "prefill wrote these"
