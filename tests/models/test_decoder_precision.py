"""16-bit weights: our error against float32, compared with the error that transformers makes."""

import random

import pytest
import torch
from checkpoints import VOCAB_SIZE, write_checkpoint
from paged_model import PagedModel

SEEDS = range(4)
PROMPTS_PER_SEED = 6
PROMPT_LENGTH = 48
LIMIT = 1.0


def errors(logits: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Maximum and mean over one prompt."""
    difference = (logits.float() - exact).abs()
    return float(difference.max()), float(difference.mean())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "family",
    [
        "llama-mha",
        "llama3-tied",
        "qwen2",
        "qwen3",
        "mistral-linear",
        "phi3-longrope",
        "qwen3-yarn",
        "smollm3",
    ],
)
def test_error_against_float32(family, dtype, tmp_path, reference_of, record_property):
    """The maxima are averaged over 24 prompts, so that no single coin decides."""
    sums = {"ours": [0.0, 0.0], "theirs": [0.0, 0.0]}
    for seed in SEEDS:
        directory = tmp_path / str(seed)
        write_checkpoint(family, directory, seed=seed, dtype=dtype)  # so float32 starts from the same weights
        exact_model = reference_of(directory, torch.float32)
        reference, model = reference_of(directory, dtype), PagedModel(directory, dtype)
        generator = random.Random(seed)
        for _ in range(PROMPTS_PER_SEED):
            tokens = [generator.randrange(VOCAB_SIZE) for _ in range(PROMPT_LENGTH)]
            exact = exact_model(torch.tensor([tokens])).logits[0]
            measured = {
                "ours": errors(model.prompt_logits(tokens), exact),
                "theirs": errors(reference(torch.tensor([tokens])).logits[0], exact),
            }
            for who, (largest, mean) in measured.items():
                sums[who][0] += largest
                sums[who][1] += mean
    ratio_of_maxima = sums["ours"][0] / sums["theirs"][0]
    ratio_of_means = sums["ours"][1] / sums["theirs"][1]
    record_property("ratios", f"maximum {ratio_of_maxima:.3f}, mean {ratio_of_means:.3f}")
    print(
        f"{family} {dtype}: ours / transformers' = {ratio_of_maxima:.3f} maximum, {ratio_of_means:.3f} mean"
    )
    assert ratio_of_maxima <= LIMIT
    assert ratio_of_means <= LIMIT
