"""`config.json` of a Hugging Face checkpoint -> ModelConfig.

Supported are dense decoders: SUPPORTED_ARCHITECTURES. Whatever would change the mathematics and is not
implemented is refused by name. Defaults of absent fields are those of transformers.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pdengine.models.checkpoint import CheckpointError, JsonFields, read_json, shown

LLAMA, MISTRAL, PHI3 = "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM"
QWEN2, QWEN3, SMOLLM3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"
SUPPORTED_ARCHITECTURES = (LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, SMOLLM3)
SUPPORTED_ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
SUPPORTED_PHI3_ROPES = ("default", "longrope")  # transformers has no others, and reads its "yarn" as longrope
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
# Far beyond every model; they keep a damaged file from asking for shapes that overflow.
LARGEST_COUNT = 2**14  # of heads, dimensions of a head
LARGEST_DEPTH = (
    2**10
)  # layers; the objects of 16 000 would take 12 s and 400 MB before the first look at a file
LARGEST_SIZE = 2**24  # of everything else
QWEN3_DEFAULT_HEAD_DIM = 128  # Qwen3's configuration class does not derive it from hidden_size
MISTRAL_DEFAULT_SLIDING_WINDOW = 4096  # of an absent field; null means full attention
PHI3_DEFAULT_ORIGINAL_LENGTH = 4096
SMOLLM3_DEFAULT_THETA = 2e6
# Granite's: they scale embeddings, scores, residuals and logits.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how it is stretched beyond the original context.

    "llama3" is of arXiv 2407.21783, "yarn" of arXiv 2309.00071, "longrope" of arXiv 2402.13753. Frequencies
    of "dynamic" and "longrope" would change once a sequence outgrows the original context, and keys in the
    cache would not; so the context ends there, and up to there "dynamic" is the same as "default".
    """

    theta: float
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    factor: float = 1.0  # of linear, yarn and llama3
    low_freq_factor: float = 1.0  # of llama3
    high_freq_factor: float = 4.0  # of llama3
    original_max_position_embeddings: int = 8192  # tokens; of yarn, llama3 and longrope
    partial_rotary_factor: float = 1.0  # the share of head_dim, from its start, that is rotated
    attention_factor: float = 1.0  # scales cos and sin; of yarn and longrope
    beta_fast: float = 32.0  # of yarn
    beta_slow: float = 1.0  # of yarn
    truncate: bool = True  # of yarn: round its ramp to whole pairs of dimensions
    short_factors: tuple[float, ...] = ()  # of longrope: divisor of the frequency of each pair


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the options of one decoder; the MLP's activation is always silu."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int  # the context limit, in tokens
    tie_word_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim of each query and key head, before rope
    dtype: str  # of the weights in the checkpoint: float32, bfloat16 or float16
    eos_token_ids: tuple[int, ...]  # any of them ends a generation; empty: none does
    bos_token_id: int | None
    layers_without_rope: tuple[int, ...] = ()  # "NoPE" layers (arXiv 2501.18795)


def load_config(directory: Path) -> ModelConfig:
    """Read `config.json`, and the end-of-sequence ids from `generation_config.json` where that names them.

    Raises CheckpointError, naming file and field, for whatever is missing, mistyped or unsupported.
    """
    directory = Path(directory)
    fields = read_json(directory / "config.json")
    architecture = _architecture(fields)
    _refuse_unsupported(fields)

    num_heads = fields.integer("num_attention_heads", maximum=LARGEST_COUNT)
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads, maximum=LARGEST_COUNT)
    if num_heads % num_kv_heads != 0:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    hidden_size = fields.integer("hidden_size", maximum=LARGEST_SIZE)
    vocab_size = fields.integer("vocab_size", maximum=LARGEST_SIZE)
    num_layers = fields.integer("num_hidden_layers", maximum=LARGEST_DEPTH)
    head_dim = _head_dim(fields, architecture, hidden_size, num_heads)
    max_position_embeddings = fields.integer("max_position_embeddings", maximum=LARGEST_SIZE)
    rope = _rope(fields, architecture, head_dim, max_position_embeddings)
    context_limit = _context_limit(rope, max_position_embeddings)
    _refuse_sliding_window(fields, architecture, context_limit)
    # The others have no such option. Qwen2's q, k and v projections always have a bias, its output never.
    attention_bias = architecture in (LLAMA, QWEN3, SMOLLM3) and fields.boolean("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", maximum=LARGEST_SIZE),
        rms_norm_eps=fields.positive_number("rms_norm_eps"),
        rope=rope,
        max_position_embeddings=context_limit,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=architecture == SMOLLM3),
        qkv_bias=architecture == QWEN2 or attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=architecture in (LLAMA, SMOLLM3) and fields.boolean("mlp_bias", default=False),
        qk_norm=architecture == QWEN3,
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(directory, fields, vocab_size),
        bos_token_id=_bos_token_id(fields, vocab_size),
        layers_without_rope=_layers_without_rope(fields, num_layers) if architecture == SMOLLM3 else (),
    )


def _architecture(fields: JsonFields) -> str:
    architectures = fields.values.get("architectures")
    if isinstance(architectures, list) and len(architectures) == 1:
        architecture = architectures[0]
        if isinstance(architecture, str) and architecture in SUPPORTED_ARCHITECTURES:
            return architecture
    raise fields.error("architectures", f"must name one of {', '.join(SUPPORTED_ARCHITECTURES)}")


def _refuse_unsupported(fields: JsonFields) -> None:
    if fields.values.get("quantization_config") is not None:
        quantization = fields.values["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        supported = ", ".join(SUPPORTED_DTYPES)
        raise CheckpointError(
            f"{fields.path}: quantization_config is not supported (its quant_method is {shown(method)}, but "
            f"weights must be {supported})"
        )
    if fields.boolean("use_sliding_window", default=False):
        raise fields.error("use_sliding_window", "is not supported (only full attention is)")
    layer_types = fields.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise fields.error("layer_types", 'must be a list of "full_attention", the only supported kind')
    fields.choice("hidden_act", ("silu",), default="silu")
    for name, value in fields.values.items():
        if "softcap" in name and value is not None:
            raise fields.error(name, "is not supported (only null is)")
        if name in MULTIPLIERS and value not in (None, 1):
            raise fields.error(name, "is not supported (only 1 is)")


def _refuse_sliding_window(fields: JsonFields, architecture: str, context_limit: int) -> None:
    """Llama, Qwen and SmolLM3 use the field only together with `use_sliding_window` or `layer_types`."""
    if architecture not in (MISTRAL, PHI3):
        return
    if architecture == MISTRAL and "sliding_window" not in fields.values:
        window = MISTRAL_DEFAULT_SLIDING_WINDOW
    else:
        window = fields.integer("sliding_window", default=context_limit, maximum=LARGEST_SIZE)
    if window < context_limit:
        requirement = f"must be null or at least the context of {context_limit} tokens"
        raise fields.error("sliding_window", f"{requirement} (only full attention is supported)")


def _head_dim(fields: JsonFields, architecture: str, hidden_size: int, num_heads: int) -> int:
    if fields.values.get("head_dim") is not None:
        head_dim = fields.integer("head_dim", maximum=LARGEST_COUNT)
    elif architecture == QWEN3:
        head_dim = QWEN3_DEFAULT_HEAD_DIM
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise fields.error("hidden_size", f"must be a multiple of num_attention_heads ({num_heads})")
    if head_dim % 2 != 0:
        raise fields.error("head_dim", f"must be even for rotary embeddings (it is {head_dim})")
    return head_dim


def _layers_without_rope(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """In spite of its name, `no_rope_layers` holds a 1 for each layer with rope and a 0 for the others."""
    uses_rope = fields.values.get("no_rope_layers")
    if uses_rope is None:
        interval = fields.integer("no_rope_layer_interval", default=4, maximum=LARGEST_COUNT)
        return tuple(range(interval - 1, num_layers, interval))
    is_list = isinstance(uses_rope, list) and len(uses_rope) >= num_layers
    if not is_list or any(value not in (0, 1) for value in uses_rope):
        raise fields.error("no_rope_layers", f"must be a list of 0 and 1 for {num_layers} layers")
    return tuple(index for index in range(num_layers) if not uses_rope[index])


def _rope(fields: JsonFields, architecture: str, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """Both spellings: `rope_theta` beside `rope_scaling`, and `rope_parameters` that holds everything.

    Where several are present, the precedence is that of transformers: `rope_scaling` before
    `rope_parameters`, and what is inside before what is beside. Only `original_max_position_embeddings`
    counts first where it is beside.
    """
    scopes = (fields.nested("rope_scaling"), fields.nested("rope_parameters"))
    scope = next((scope for scope in scopes if scope and scope.values), JsonFields(fields.path, {}))
    for name, value in scope.values.items():
        if isinstance(value, dict):
            raise scope.error(name, "is not supported (only one rope for all layers is)")
    theta = fields.positive_number("rope_theta", SMOLLM3_DEFAULT_THETA if architecture == SMOLLM3 else 1e4)
    rope = RopeConfig(
        theta=scope.positive_number("rope_theta", default=theta),
        partial_rotary_factor=_partial_rotary_factor(fields, scope, architecture, head_dim),
    )
    type_field = "rope_type" if scope.values.get("rope_type") is not None else "type"
    supported = SUPPORTED_PHI3_ROPES if architecture == PHI3 else SUPPORTED_ROPES
    kind = scope.choice(type_field, supported, default="default")
    if kind == "default":
        return rope
    if kind == "dynamic":
        return replace(rope, kind="dynamic")
    if kind == "linear":
        return replace(rope, kind="linear", factor=scope.positive_number("factor"))

    original_length = _original_length(fields, scope, architecture, max_position_embeddings)
    rope = replace(rope, original_max_position_embeddings=original_length)
    if kind == "llama3":
        return _llama3_rope(scope, rope)
    # The factor of these two may be left to the ratio of the contexts.
    factor = scope.positive_number("factor", default=max_position_embeddings / original_length)
    rope = replace(rope, factor=factor)
    if kind == "yarn":
        return _yarn_rope(scope, rope)
    return _longrope(scope, rope, head_dim)


def _original_length(
    fields: JsonFields, scope: JsonFields, architecture: str, max_position_embeddings: int
) -> int:
    name, default = "original_max_position_embeddings", max_position_embeddings
    if architecture == PHI3:  # it only ever looks beside
        scope, default = fields, PHI3_DEFAULT_ORIGINAL_LENGTH
    elif fields.values.get(name) is not None:
        scope = fields
    return scope.integer(name, default=default, maximum=LARGEST_SIZE)


def _partial_rotary_factor(fields: JsonFields, scope: JsonFields, architecture: str, head_dim: int) -> float:
    where = scope if scope.values.get("partial_rotary_factor") is not None else fields
    partial = where.positive_number("partial_rotary_factor", default=1.0)
    if partial != 1.0 and architecture != PHI3:
        # transformers ignores it there, or fails, depending on the type of rope.
        raise where.error("partial_rotary_factor", f"is not supported for {architecture} (only 1.0 is)")
    if partial > 1.0 or int(head_dim * partial) not in range(2, head_dim + 1, 2):
        raise where.error("partial_rotary_factor", f"must give an even part of head_dim ({head_dim})")
    return partial


def _llama3_rope(scope: JsonFields, rope: RopeConfig) -> RopeConfig:
    low_freq_factor = scope.positive_number("low_freq_factor")
    high_freq_factor = scope.positive_number("high_freq_factor")
    if high_freq_factor <= low_freq_factor:
        raise scope.error("high_freq_factor", f"must be greater than low_freq_factor ({low_freq_factor})")
    return replace(
        rope,
        kind="llama3",
        factor=scope.positive_number("factor"),
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
    )


def _yarn_rope(scope: JsonFields, rope: RopeConfig) -> RopeConfig:
    if rope.theta <= 1.0:
        raise scope.error("rope_theta", f"must be greater than 1 for yarn (it is {rope.theta})")
    beta_slow = scope.positive_number("beta_slow", default=rope.beta_slow)
    beta_fast = scope.positive_number("beta_fast", default=rope.beta_fast)
    if beta_fast < beta_slow:
        raise scope.error("beta_fast", f"must be at least beta_slow ({beta_slow})")
    attention_factor = _yarn_attention_factor(rope.factor, 1.0)
    if scope.values.get("mscale") and scope.values.get("mscale_all_dim"):  # only both together count
        attention_factor = _yarn_attention_factor(rope.factor, scope.positive_number("mscale"))
        attention_factor /= _yarn_attention_factor(rope.factor, scope.positive_number("mscale_all_dim"))
    return replace(
        rope,
        kind="yarn",
        attention_factor=scope.positive_number("attention_factor", default=attention_factor),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=scope.boolean("truncate", default=True),
    )


def _yarn_attention_factor(factor: float, mscale: float) -> float:
    """Equation 22 of arXiv 2309.00071; `mscale` is DeepSeek's addition."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(scope: JsonFields, rope: RopeConfig, head_dim: int) -> RopeConfig:
    """Only the short factors are needed, since the context ends where the long ones would begin."""
    num_pairs = int(head_dim * rope.partial_rotary_factor) // 2
    factors = scope.values.get("short_factor")
    if not isinstance(factors, list) or len(factors) != num_pairs:
        raise scope.error("short_factor", f"must be a list of {num_pairs} numbers")
    named = replace(scope, values={f"short_factor[{i}]": value for i, value in enumerate(factors)})
    attention_factor = 1.0
    if rope.factor > 1.0:
        length = rope.original_max_position_embeddings
        if length == 1:
            raise scope.error("original_max_position_embeddings", "must be at least 2")
        attention_factor = math.sqrt(1.0 + math.log(rope.factor) / math.log(length))
    return replace(
        rope,
        kind="longrope",
        attention_factor=scope.positive_number("attention_factor", default=attention_factor),
        short_factors=tuple(named.positive_number(name) for name in named.values),
    )


def _context_limit(rope: RopeConfig, max_position_embeddings: int) -> int:
    """In tokens: `max_position_embeddings`, unless rope says more (yarn) or ends earlier (longrope)."""
    original_length = rope.original_max_position_embeddings
    if rope.kind == "yarn":  # users add it to a config.json and leave the rest as it was
        return max(max_position_embeddings, int(min(rope.factor * original_length, LARGEST_SIZE)))
    if rope.kind == "longrope":
        return min(max_position_embeddings, original_length)
    return max_position_embeddings


def _dtype(fields: JsonFields) -> str:
    field = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    return fields.choice(field, SUPPORTED_DTYPES, default="float32")


def _eos_token_ids(directory: Path, fields: JsonFields, vocab_size: int) -> tuple[int, ...]:
    generation_path = directory / "generation_config.json"
    if os.path.lexists(generation_path):
        generation_fields = read_json(generation_path)
        if generation_fields.values.get("eos_token_id") is not None:
            return _token_ids(generation_fields, "eos_token_id", vocab_size)
    return _token_ids(fields, "eos_token_id", vocab_size)


def _bos_token_id(fields: JsonFields, vocab_size: int) -> int | None:
    token_ids = _token_ids(fields, "bos_token_id", vocab_size)
    return token_ids[0] if token_ids else None


def _token_ids(fields: JsonFields, name: str, vocab_size: int) -> tuple[int, ...]:
    value = fields.values.get(name)
    if value is None:
        return ()
    token_ids = value if isinstance(value, list) else [value]
    for token_id in token_ids:
        is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_integer or not 0 <= token_id < vocab_size:
            raise fields.error(name, f"must be one or several token ids below vocab_size ({vocab_size})")
    return tuple(dict.fromkeys(token_ids))


__all__ = ["CheckpointError", "ModelConfig", "RopeConfig", "load_config"]
