"""config.json: what is read, against transformers' reading of it, and what is refused."""

import json
from dataclasses import replace

import pytest
import transformers
from checkpoints import FAMILIES

from pdengine.models.config import CheckpointError, RopeConfig, load_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "original_max_position_embeddings": 256}
MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
PHI3 = {"architectures": ["Phi3ForCausalLM"]}
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"]}
REMOVED = object()


def load(directory, changes=None, generation=None):
    fields = {name: value for name, value in {**LLAMA, **(changes or {})}.items() if value is not REMOVED}
    (directory / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return load_config(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(family, checkpoint_of):
    config = load_config(checkpoint_of(family))
    reference = transformers.AutoConfig.from_pretrained(checkpoint_of(family))
    assert config.architecture == reference.architectures[0]
    assert config.num_layers == reference.num_hidden_layers
    assert config.num_heads == reference.num_attention_heads
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == getattr(reference, "head_dim", reference.hidden_size // config.num_heads)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps"):
        assert getattr(config, field) == getattr(reference, field)
    context = 512 if family == "phi3-longrope" else reference.max_position_embeddings
    assert config.max_position_embeddings == context
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.rope.theta == reference.rope_parameters["rope_theta"]
    assert config.rope.kind == reference.rope_parameters["rope_type"]
    assert config.rope.partial_rotary_factor == reference.rope_parameters.get("partial_rotary_factor", 1.0)
    assert list(config.eos_token_ids) == reference.eos_token_id
    assert config.bos_token_id == reference.bos_token_id
    assert config.dtype == "float32"


def test_defaults_of_absent_fields(tmp_path):
    config = load(tmp_path)
    assert config.num_kv_heads == 4
    assert config.head_dim == 16
    assert config.rope == RopeConfig(theta=10000.0)
    assert not config.tie_word_embeddings
    flags = (config.qkv_bias, config.attention_output_bias, config.mlp_bias, config.qk_norm)
    assert flags == (False, False, False, False)
    assert config.dtype == "float32"
    assert config.eos_token_ids == ()
    assert config.bos_token_id is None


def test_null_is_absent_where_a_default_exists(tmp_path):
    optional = (
        "num_key_value_heads head_dim rope_theta rope_scaling rope_parameters tie_word_embeddings "
        "attention_bias mlp_bias torch_dtype dtype eos_token_id bos_token_id quantization_config "
        "use_sliding_window layer_types partial_rotary_factor original_max_position_embeddings "
        "final_logit_softcapping attn_logit_softcapping embedding_multiplier logits_scaling"
    )
    assert load(tmp_path, dict.fromkeys(optional.split())) == load(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", (True, True, True, False)),
        ("Qwen2ForCausalLM", (True, False, False, False)),
        ("Qwen3ForCausalLM", (True, True, False, True)),
        ("MistralForCausalLM", (False, False, False, False)),
        ("Phi3ForCausalLM", (False, False, False, False)),
        ("SmolLM3ForCausalLM", (True, True, True, False)),
    ],
)
def test_biases_and_norms_by_family(tmp_path, architecture, expected):
    biases = {"attention_bias": True, "mlp_bias": True}
    config = load(tmp_path, {"architectures": [architecture], "sliding_window": None, **biases})
    actual = (config.qkv_bias, config.attention_output_bias, config.mlp_bias, config.qk_norm)
    assert actual == expected


def test_qwen2_has_qkv_biases_without_being_told(tmp_path):
    assert load(tmp_path, {"architectures": ["Qwen2ForCausalLM"]}).qkv_bias


def test_qwen3_without_head_dim_has_the_default_of_its_family(tmp_path):
    assert load(tmp_path, {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128


def test_smollm3_has_the_defaults_of_its_family(tmp_path):
    config = load(tmp_path, {**SMOLLM3, "num_hidden_layers": 9})
    assert config.rope.theta == 2e6
    assert config.tie_word_embeddings
    assert config.layers_without_rope == (3, 7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"no_rope_layer_interval": 2}, (1, 3)),
        ({"no_rope_layers": [0, 1, 1, 0]}, (0, 3)),
        ({"no_rope_layers": [1, 0, 1, 1, 0], "no_rope_layer_interval": 1}, (1,)),
    ],
)
def test_layers_without_rope(tmp_path, changes, expected):
    assert load(tmp_path, {**SMOLLM3, "num_hidden_layers": 4, **changes}).layers_without_rope == expected


@pytest.mark.parametrize("window", [None, 512, 4096])
@pytest.mark.parametrize("family", ["Mistral", "Phi3"])
def test_a_sliding_window_beyond_the_context_changes_nothing(tmp_path, family, window):
    with_window = {"architectures": [f"{family}ForCausalLM"], "sliding_window": window}
    assert load(tmp_path, with_window) == load(tmp_path, {**with_window, "sliding_window": None})


def test_a_sliding_window_that_its_family_does_not_use(tmp_path):
    qwen2 = {"architectures": ["Qwen2ForCausalLM"]}
    unused = {**qwen2, "sliding_window": 16, "use_sliding_window": False}
    assert load(tmp_path, unused) == load(tmp_path, qwen2)


def test_scales_that_change_nothing(tmp_path):
    scales = {"logits_scaling": 1.0, "residual_multiplier": 1, "final_logit_softcapping": None}
    assert load(tmp_path, scales) == load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING, "rope_type": REMOVED}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}},
    ],
)
def test_spellings_of_llama3_rope(tmp_path, changes):
    for rope in (changes.get("rope_scaling", {}), changes.get("rope_parameters", {})):
        if rope.get("rope_type") is REMOVED:
            del rope["rope_type"]
    assert load(tmp_path, changes).rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_both_spellings_of_dtype(tmp_path, field, dtype):
    assert load(tmp_path, {field: dtype}).dtype == dtype


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 8, 7], None, (7, 8)),
        (7, {}, (7,)),
        (7, {"eos_token_id": None}, (7,)),
        (7, {"eos_token_id": 9}, (9,)),
        (7, {"eos_token_id": [9, 0]}, (9, 0)),
    ],
)
def test_generation_config_decides_the_end(tmp_path, in_config, in_generation, expected):
    assert load(tmp_path, {"eos_token_id": in_config}, in_generation).eos_token_ids == expected


REFUSED = [
    # fields of config.json, and what the sentence must say
    ({"architectures": ["MixtralForCausalLM"]}, "architectures .*LlamaForCausalLM, Mistral.*found .*Mixtral"),
    ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8}, "architectures .*found .*Qwen3Moe"),
    ({"architectures": REMOVED}, "architectures .* found nothing"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
    ({"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "architectures"),
    ({"hidden_act": "gelu"}, "hidden_act must be one of silu, found 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is not supported .*bfloat16"),
    ({"use_sliding_window": True}, "use_sliding_window is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*full_attention"),
    ({"layer_types": 3}, "layer_types"),
    ({"dtype": "float8_e4m3fn"}, "dtype must be one of float32, bfloat16, float16, found 'float8_e4m3fn'"),
    ({"torch_dtype": 16}, "torch_dtype must be one of"),
    ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.type must be one of default, .*found 'mrope'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor must be .* found nothing"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor .*found nothing"),
    ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "high_freq_factor must be greater"),
    ({"rope_scaling": {**LLAMA3_SCALING, "factor": -1}}, "rope_scaling.factor must be a finite number"),
    ({"rope_theta": 0}, "rope_theta must be a finite number greater than 0, found 0"),
    ({"rope_theta": "10000"}, "rope_theta must be a finite number"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for LlamaForCausalLM"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is not"),
    ({**PHI3, "partial_rotary_factor": 0.2}, "partial_rotary_factor must give an even part of head_dim"),
    ({**PHI3, "partial_rotary_factor": 0.05}, "partial_rotary_factor must give an even part of head_dim"),
    ({**PHI3, "partial_rotary_factor": 1e300}, "partial_rotary_factor must give an even part of head_dim"),
    ({**PHI3, "rope_scaling": {"type": "yarn"}}, "rope_scaling.type must be one of default, longrope"),
    ({"rope_scaling": {**YARN, "rope_theta": 1.0}}, "rope_theta must be greater than 1 for yarn"),
    ({"rope_theta": 0.5, "rope_scaling": YARN}, "rope_theta must be greater than 1 for yarn"),
    ({"rope_scaling": {**YARN, "beta_fast": 2, "beta_slow": 3}}, "rope_scaling.beta_fast must be at least"),
    ({"rope_scaling": {**YARN, "truncate": "no"}}, "rope_scaling.truncate must be true or false"),
    ({"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1}}, "rope_scaling.mscale must be a finite"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    ({"rope_scaling": LONGROPE, "head_dim": 8}, "rope_scaling.short_factor must be a list of 4 numbers"),
    ({"rope_scaling": {**LONGROPE, "short_factor": 1.0}}, "rope_scaling.short_factor must be a list of 8"),
    (
        {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7 + [0.0]}},
        r"rope_scaling.short_factor\[7\] must be a finite number greater than 0, found 0.0",
    ),
    (
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}},
        "original_max_position_embeddings must be at least 2",
    ),
    ({**MISTRAL, "sliding_window": 511}, "sliding_window must be null or at least .* 512 .*found 511"),
    ({**MISTRAL, "sliding_window": 0}, "sliding_window must be an integer from 1"),
    (
        {**MISTRAL, "sliding_window": REMOVED, "max_position_embeddings": 8192},
        "sliding_window must be null or at least the context of 8192 tokens .* found nothing",
    ),
    (
        {**MISTRAL, "sliding_window": 512, "rope_scaling": YARN},
        "sliding_window must be null or at least the context of 2048 tokens",
    ),
    ({**PHI3, "sliding_window": 500}, "sliding_window must be null or at least"),
    ({**SMOLLM3, "no_rope_layers": [1]}, "no_rope_layers must be a list of 0 and 1 for 2 layers"),
    ({**SMOLLM3, "no_rope_layers": [1, 2]}, "no_rope_layers must be a list of 0 and 1"),
    ({**SMOLLM3, "no_rope_layers": 1}, "no_rope_layers must be a list of 0 and 1"),
    ({**SMOLLM3, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be an integer from 1"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
    ({"attn_logit_softcap": 50}, "attn_logit_softcap is not supported"),
    ({"attention_multiplier": 0.0156}, "attention_multiplier is not supported"),
    ({"logits_scaling": 8.0}, "logits_scaling is not supported"),
    ({"residual_multiplier": 0.22}, "residual_multiplier is not supported"),
    ({"embedding_multiplier": "12"}, "embedding_multiplier is not supported .* found '12'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads \\(4\\), found 3"),
    ({"hidden_size": 66}, "hidden_size must be a multiple of num_attention_heads"),
    ({"head_dim": 15}, "head_dim must be even"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number"),
    ({"rms_norm_eps": True}, "rms_norm_eps must be a finite number"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers must be an integer from 1 to"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, found 'yes'"),
    ({"attention_bias": 1}, "attention_bias must be true or false"),
    ({"eos_token_id": 1000}, "eos_token_id .*below vocab_size \\(1000\\), found 1000"),
    ({"eos_token_id": [1, -1]}, "eos_token_id"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"bos_token_id": 1.5}, "bos_token_id"),
]
REQUIRED = [name for name in LLAMA if name not in ("architectures", "rms_norm_eps")]
REFUSED += [
    ({name: bad}, f"{name} must be") for name in REQUIRED for bad in (REMOVED, None, -1, 0, 1.5, "8", True)
]
REFUSED += [({"rms_norm_eps": bad}, "rms_norm_eps must be") for bad in (REMOVED, None, -1e-6, 0, "1e-5")]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=str)
def test_refused_by_field_and_file(tmp_path, changes, sentence):
    with pytest.raises(CheckpointError, match=sentence) as raised:
        load(tmp_path, changes)
    assert str(tmp_path / "config.json") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000], ids=lambda content: repr(content[:5])
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_files(tmp_path, name, content):
    load(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_config(tmp_path)


def test_a_bad_end_in_the_generation_config_names_that_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        load(tmp_path, generation={"eos_token_id": -5})


def test_old_and_new_spelling_are_the_same_config(tmp_path):
    new = load(
        tmp_path, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
    )
    old = load(tmp_path, {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"})
    assert new == old
    assert new == replace(load(tmp_path), rope=RopeConfig(1e6), dtype="bfloat16")
