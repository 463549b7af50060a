"""The decoder against transformers, in float32: logits, and greedy tokens whatever the batch."""

import random

import pytest
import torch
from checkpoints import FAMILIES, VOCAB_SIZE
from paged_model import PagedModel

PROMPT_LENGTHS = (1, 2, 15, 16, 17, 64, 131, 300)
# Of logits up to 6, with the same weights in float64, both are up to 3e-4 off: qwen3-yarn at 1024 tokens.
TOLERANCE = 4e-4


def random_tokens(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(VOCAB_SIZE) for _ in range(length)]


@torch.inference_mode()
def reference_logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


@torch.inference_mode()
def reference_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_prompts_run_alone(family, checkpoint_of, reference_of):
    reference, model = reference_of(checkpoint_of(family)), PagedModel(checkpoint_of(family))
    for length in PROMPT_LENGTHS:
        tokens = random_tokens(length)
        torch.testing.assert_close(
            model.prompt_logits(tokens), reference_logits(reference, tokens), atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_chunks_in_mixed_batches(family, block_size, checkpoint_of, reference_of):
    """Prompts advance by chunks of 1 to 90 tokens, three in one batch, new ones after finished ones."""
    reference = reference_of(checkpoint_of(family))
    model = PagedModel(checkpoint_of(family), block_size=block_size)
    generator = random.Random(block_size)
    waiting = {f"p{length}": random_tokens(length) for length in PROMPT_LENGTHS}
    expected = {name: reference_logits(reference, tokens) for name, tokens in waiting.items()}
    running: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < 3:
            running[waiting.popitem()[0]] = 0
        chunks = {}
        for name, done in running.items():
            size = generator.choice([1, 1, 5, 16, 40, 90])
            chunks[name] = random_tokens(len(expected[name]))[done : done + size]
        for name, logits in model.step(chunks).items():
            done = running[name]
            running[name] = done + len(logits)
            torch.testing.assert_close(logits, expected[name][done : running[name]], atol=TOLERANCE, rtol=0)
        for name in [name for name, done in running.items() if done == len(expected[name])]:
            model.free(name)
            del running[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_do_not_depend_on_the_batch(family, checkpoint_of, reference_of):
    """Ten sequences that start one step after another, so that chunks and decodes share every batch."""
    reference, model = reference_of(checkpoint_of(family)), PagedModel(checkpoint_of(family))
    prompts = {f"s{seed}": random_tokens(3 + 11 * seed, seed) for seed in range(10)}
    expected = {name: reference_greedy(reference, prompt, 12) for name, prompt in prompts.items()}
    distinct = len({token for tokens in expected.values() for token in tokens})
    assert distinct > 30, "the checkpoint repeats itself, so this test would prove little"

    generated: dict[str, list[int]] = {}
    starting = list(prompts)
    while starting or any(len(tokens) < 12 for tokens in generated.values()):
        inputs = {name: tokens[-1:] for name, tokens in generated.items() if len(tokens) < 12}
        if starting:
            name = starting.pop(0)
            generated[name], inputs[name] = [], prompts[name]
        for name, logits in model.step(inputs).items():
            generated[name].append(int(logits[-1].argmax()))
    assert generated == expected


@pytest.mark.parametrize(
    "family", ["llama3-rope", "llama-dynamic", "qwen3-yarn", "mistral-linear", "phi3-longrope", "smollm3"]
)
def test_logits_up_to_the_context_limit(family, checkpoint_of, reference_of):
    model, reference = PagedModel(checkpoint_of(family)), reference_of(checkpoint_of(family))
    tokens = random_tokens(model.config.max_position_embeddings)
    torch.testing.assert_close(
        model.prompt_logits(tokens), reference_logits(reference, tokens), atol=TOLERANCE, rtol=0
    )


def test_a_sequence_full_of_nan_does_not_touch_its_neighbours(checkpoint_of):
    """Blocks that a broken request leaves behind are reused while they still hold its NaN."""
    model = PagedModel(checkpoint_of("llama-gqa"))
    tokens = random_tokens(20)
    alone = model.prompt_logits(tokens)
    model.pool.fill_(torch.nan)
    model.step({"a": tokens[:19], "b": tokens[:3]})
    together = model.step({"a": tokens[19:], "b": tokens[3:4]})
    torch.testing.assert_close(together["a"][0], alone[19], atol=1e-4, rtol=0)
    torch.testing.assert_close(together["b"][0], alone[3], atol=1e-4, rtol=0)
