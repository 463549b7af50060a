"""Rotary frequencies and context limits, against transformers' reading of the same config.json."""

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdengine.models.config import load_config
from pdengine.models.rope import inverse_frequencies, rope_cos_sin
from pdengine.triton_kernels.torch_kernels import apply_rope

SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
NUM_PAIRS = 32
FACTORS = {
    "short_factor": [1.0 + 0.05 * pair for pair in range(NUM_PAIRS)],
    "long_factor": [1.0 + 2.0 * pair for pair in range(NUM_PAIRS)],
}
LONGROPE = {"rope_type": "longrope", **FACTORS}
HALF_LONGROPE = {"type": "longrope", **{name: values[: NUM_PAIRS // 2] for name, values in FACTORS.items()}}


def read_both(directory, family, changes):
    """Our config, and the rotary embedding that transformers builds, from one config.json."""
    fields = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), **SHAPE, **changes}
    (directory / "config.json").write_text(json.dumps(fields))
    module = getattr(transformers.models, family.lower())
    modeling = getattr(module, f"modeling_{family.lower()}")
    reference = getattr(modeling, f"{family}RotaryEmbedding")(
        transformers.AutoConfig.from_pretrained(directory)
    )
    return load_config(directory), reference


def assert_same_rope(config, reference):
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(frequencies, reference.inv_freq, rtol=2e-7, atol=0)
    assert config.rope.attention_factor == pytest.approx(reference.attention_scaling, rel=1e-12)
    # What it comes to, cos and sin, also where the angles are large.
    positions = torch.tensor([0, 1, 17, 500, 4095])
    cos, sin = rope_cos_sin(positions, frequencies, config.rope.attention_factor)
    expected = reference(torch.zeros(1), positions.unsqueeze(0))
    for actual, both_halves in zip((cos, sin), expected, strict=True):
        assert both_halves.shape[-1] == 2 * actual.shape[-1]
        torch.testing.assert_close(actual.squeeze(1), both_halves[0].chunk(2, dim=-1)[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"rope_theta": 5e5}),
        ("Llama", {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.5}}),
        ("Llama", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8}}),
        ("Mistral", {"rope_scaling": {"type": "dynamic", "factor": 3.0}}),
        ("Llama", {"rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 1e6}}),
        ("Qwen2", {"rope_scaling": {**YARN, "original_max_position_embeddings": 8192}}),
        ("Qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6}),
        ("Qwen3", {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}, "head_dim": 64}),
        ("Llama", {"rope_parameters": {**YARN, "attention_factor": 0.7}}),
        ("Llama", {"rope_parameters": {**YARN, "factor": None, "original_max_position_embeddings": 4096}}),
        ("Llama", {"rope_parameters": {**YARN, "factor": 0.5}}),
        ("Llama", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3}}),
        ("Llama", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.0}}),
        ("Llama", {"rope_parameters": {**YARN, "mscale": 0.707}}),
        ("Llama", {"rope_parameters": {**YARN, "truncate": False}}),
        ("Llama", {"rope_parameters": {**YARN, "beta_fast": 4, "beta_slow": 4, "truncate": False}}),
        ("Llama", {"rope_parameters": YARN, "original_max_position_embeddings": 1024}),
        (
            "Llama",
            {
                "rope_parameters": {**YARN, "original_max_position_embeddings": 2048},
                "original_max_position_embeddings": 1024,
            },
        ),
        ("SmolLM3", {"tie_word_embeddings": True}),
        ("SmolLM3", {"rope_scaling": YARN}),
        ("Llama", {"rope_parameters": LONGROPE}),
        ("Mistral", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 8192}}),
        ("Mistral", {"rope_parameters": {**LONGROPE, "factor": 6.0}}),
        ("Phi3", {}),
        ("Phi3", {"partial_rotary_factor": 0.75}),
        ("Phi3", {"rope_parameters": {"partial_rotary_factor": 0.75}, "partial_rotary_factor": 0.5}),
        ("Phi3", {"rope_scaling": LONGROPE}),
        ("Phi3", {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 8192}}),
        ("Phi3", {"rope_scaling": {**LONGROPE, "attention_factor": 1.5}}),
        (
            "Phi3",
            {
                "rope_scaling": HALF_LONGROPE,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=str,
)
def test_rope_is_read_and_computed_as_by_transformers(tmp_path, family, changes):
    assert_same_rope(*read_both(tmp_path, family, changes))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    theta=st.floats(2.0, 1e8),
    factor=st.floats(1.0, 64.0),
    original=st.integers(16, 65536),
    beta_slow=st.floats(0.1, 8.0),
    beta_range=st.floats(1.0, 64.0),
    truncate=st.booleans(),
    head_dim=st.sampled_from([2, 16, 64, 128, 256]),
)
def test_yarn_for_any_parameters(
    tmp_path, theta, factor, original, beta_slow, beta_range, truncate, head_dim
):
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_slow": beta_slow,
        "beta_fast": beta_slow * beta_range,
        "truncate": truncate,
    }
    config, reference = read_both(tmp_path, "Llama", {"rope_parameters": rope, "head_dim": head_dim})
    # The ramp divides by its own width, which may be small: the float32 rounding there is transformers' too.
    torch.testing.assert_close(
        inverse_frequencies(config.rope, head_dim), reference.inv_freq, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("family", "rope", "limit"),
    [
        ("Llama", {"rope_type": "linear", "factor": 4.0}, 32768),
        ("Llama", {"rope_type": "dynamic", "factor": 4.0}, 32768),
        ("Llama", {**YARN, "original_max_position_embeddings": 8192}, 32768),
        ("Llama", {**YARN, "original_max_position_embeddings": 32768}, 131072),
        ("Llama", {**YARN, "original_max_position_embeddings": 4096}, 32768),
        ("Llama", {**YARN, "factor": 1e308, "original_max_position_embeddings": 32768}, 2**24),
        ("Phi3", LONGROPE, 4096),
        ("Llama", LONGROPE, 32768),
        ("Llama", {**LONGROPE, "original_max_position_embeddings": 65536}, 32768),
    ],
    ids=str,
)
def test_where_the_context_ends(tmp_path, family, rope, limit):
    config, _ = read_both(tmp_path, family, {"rope_parameters": rope})
    assert config.max_position_embeddings == limit


def test_dynamic_rope_is_the_default_up_to_its_limit_and_no_further(tmp_path):
    """Why the context ends there: transformers changes the frequencies with the next token."""
    changes = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}
    config, reference = read_both(tmp_path, "Llama", changes)
    ours = inverse_frequencies(config.rope, config.head_dim)
    last = config.max_position_embeddings - 1
    reference(torch.zeros(1), torch.arange(last + 1).unsqueeze(0))
    assert torch.equal(reference.inv_freq, ours)
    reference(torch.zeros(1), torch.arange(last + 2).unsqueeze(0))
    assert not torch.equal(reference.inv_freq, ours)


def test_dimensions_beyond_the_rotary_part_are_kept():
    heads = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_cos_sin(torch.arange(5), torch.rand(4))
    rotated = apply_rope(heads, cos, sin)
    assert torch.equal(rotated[..., 8:], heads[..., 8:])
    torch.testing.assert_close(rotated[..., :8], apply_rope(heads[..., :8], cos, sin))
