"""`config.json` of a Hugging Face checkpoint -> ModelConfig.

Supported are the dense decoders LlamaForCausalLM (Llama 2 and 3), Qwen2ForCausalLM (2 and 2.5) and
Qwen3ForCausalLM. Whatever would change the mathematics and is not implemented is refused by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdengine.models.checkpoint import CheckpointError, JsonFields, read_json

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
# Far beyond every model; they keep a damaged file from asking for shapes that overflow.
LARGEST_COUNT = 2**14  # of layers, heads, dimensions of a head
LARGEST_SIZE = 2**24  # of everything else
QWEN3_DEFAULT_HEAD_DIM = 128  # Qwen3's configuration class does not derive it from hidden_size


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864); "llama3" stretches long wavelengths (arXiv 2407.21783).

    The last four fields are read only for "llama3".
    """

    theta: float
    kind: Literal["default", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # tokens


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


def load_config(directory: Path) -> ModelConfig:
    """Read `config.json`, and the end-of-sequence ids from `generation_config.json` where that names them.

    Raises CheckpointError, naming file and field, for whatever is missing, mistyped or unsupported.
    """
    directory = Path(directory)
    fields = read_json(directory / "config.json")
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    is_llama = architecture == "LlamaForCausalLM"
    is_qwen2 = architecture == "Qwen2ForCausalLM"

    num_heads = fields.integer("num_attention_heads", maximum=LARGEST_COUNT)
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads, maximum=LARGEST_COUNT)
    if num_heads % num_kv_heads != 0:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    hidden_size = fields.integer("hidden_size", maximum=LARGEST_SIZE)
    vocab_size = fields.integer("vocab_size", maximum=LARGEST_SIZE)
    max_position_embeddings = fields.integer("max_position_embeddings", maximum=LARGEST_SIZE)
    # Qwen2 has no such option: its q, k and v projections always have a bias, its output projection never.
    attention_bias = not is_qwen2 and fields.boolean("attention_bias", default=False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=fields.integer("num_hidden_layers", maximum=LARGEST_COUNT),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
        intermediate_size=fields.integer("intermediate_size", maximum=LARGEST_SIZE),
        rms_norm_eps=fields.positive_number("rms_norm_eps"),
        rope=_rope(fields),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        qkv_bias=is_qwen2 or attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=is_llama and fields.boolean("mlp_bias", default=False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(directory, fields, vocab_size),
        bos_token_id=_bos_token_id(fields, vocab_size),
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
        supported = ", ".join(SUPPORTED_DTYPES)
        raise fields.error("quantization_config", f"is not supported (weights must be {supported})")
    if fields.boolean("use_sliding_window", default=False):
        raise fields.error("use_sliding_window", "is not supported (only full attention is)")
    layer_types = fields.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise fields.error("layer_types", 'must be a list of "full_attention", the only supported kind')
    fields.choice("hidden_act", ("silu",), default="silu")


def _head_dim(fields: JsonFields, architecture: str, hidden_size: int, num_heads: int) -> int:
    if fields.values.get("head_dim") is not None:
        head_dim = fields.integer("head_dim", maximum=LARGEST_COUNT)
    elif architecture == "Qwen3ForCausalLM":
        head_dim = QWEN3_DEFAULT_HEAD_DIM
    elif hidden_size % num_heads == 0:
        head_dim = hidden_size // num_heads
    else:
        raise fields.error("hidden_size", f"must be a multiple of num_attention_heads ({num_heads})")
    if head_dim % 2 != 0:
        raise fields.error("head_dim", f"must be even for rotary embeddings (it is {head_dim})")
    return head_dim


def _rope(fields: JsonFields) -> RopeConfig:
    """Both spellings: `rope_theta` beside `rope_scaling`, and `rope_parameters` that holds everything.

    Where several are present, the precedence is that of transformers: `rope_scaling` before
    `rope_parameters`, and a theta inside before the one beside.
    """
    theta = fields.positive_number("rope_theta", default=10000.0)
    rope = fields.nested("rope_scaling") or fields.nested("rope_parameters")
    for scope in (fields, rope):
        if scope is not None and scope.positive_number("partial_rotary_factor", default=1.0) != 1.0:
            raise scope.error("partial_rotary_factor", "is not supported (only 1.0 is)")
    if rope is None:
        return RopeConfig(theta=theta)
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.error(name, "is not supported (only one rope for all layers is)")
    theta = rope.positive_number("rope_theta", default=theta)
    type_field = "rope_type" if rope.values.get("rope_type") is not None else "type"
    kind = rope.choice(type_field, ("default", "llama3"), default="default")
    if kind == "default":
        return RopeConfig(theta=theta)
    low_freq_factor = rope.positive_number("low_freq_factor")
    high_freq_factor = rope.positive_number("high_freq_factor")
    if high_freq_factor <= low_freq_factor:
        raise rope.error("high_freq_factor", f"must be greater than low_freq_factor ({low_freq_factor})")
    original_length = rope.integer("original_max_position_embeddings", maximum=LARGEST_SIZE)
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=rope.positive_number("factor"),
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_max_position_embeddings=original_length,
    )


def _dtype(fields: JsonFields) -> str:
    field = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    return fields.choice(field, SUPPORTED_DTYPES, default="float32")


def _eos_token_ids(directory: Path, fields: JsonFields, vocab_size: int) -> tuple[int, ...]:
    generation_path = directory / "generation_config.json"
    if generation_path.exists():
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
