"""Random small checkpoints of every supported family, written by transformers, with a tokenizer trained here.

The weights are scaled so that greedy text wanders instead of repeating its last token. Norms and biases are
random too, so that a forgotten one shows.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ATTENTION_GAIN = 2.5  # sharp attention: averages of many random values would all look alike
VOCAB_SIZE = 384  # a few more than the tokenizer has, as in real checkpoints
BOS, EOS, END_OF_TURN = "<|begin|>", "<|end|>", "<|end_of_turn|>"
CHAT_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end_of_turn|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_theta": 1e6,
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}
_LONGROPE = {  # its context ends at 512 tokens
    "rope_theta": 1e4,
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-gqa": ("Llama", {"num_attention_heads": 8, "rope_parameters": {"rope_theta": 5e5}}),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama3-tied": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "qwen2": ("Qwen2", {"num_attention_heads": 6, "hidden_size": 96, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": _YARN_ROPE}),
    "mistral-linear": (
        "Mistral",
        {
            "sliding_window": None,
            "head_dim": 32,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0},
        },
    ),
    "phi3-longrope": ("Phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 512}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "rope_parameters": {"rope_theta": 5e6}}),
}
# These keep the spelling of rope that checkpoints had before transformers 5.
_OLD_ROPE_SPELLING = {"llama-gqa", "llama3-rope", "qwen2", "mistral-linear", "phi3-longrope"}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def write_checkpoint(
    family: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Write config, weights, generation config and tokenizer of one of FAMILIES into `directory`.

    `overrides` are fields of the transformers configuration, for example `{"num_hidden_layers": 1}`.
    """
    architecture, options = _FAMILIES[family]
    tokenizer = small_bpe_tokenizer()
    token_ids = {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(EOS), tokenizer.token_to_id(END_OF_TURN)],
        "pad_token_id": None,  # some families have a default beyond our vocabulary
    }
    config_class = getattr(transformers, f"{architecture}Config")
    # transformers completes rope_parameters in place
    fields = json.loads(json.dumps({**_SHAPE, **token_ids, **options, **(overrides or {})}))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config_class(**fields))
    _randomize(model, seed)
    if architecture == "Phi3":
        _sharpen_fused_attention(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if family in _OLD_ROPE_SPELLING:
        _spell_rope_as_before(directory / "config.json")
    write_tokenizer(directory, tokenizer)


def write_tokenizer(directory: Path, tokenizer: Tokenizer, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


@cache
def small_bpe_tokenizer() -> Tokenizer:
    """A byte-level BPE of about 350 tokens that puts BOS before every text, like Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 30,
        special_tokens=[BOS, EOS, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = "the cat sat on the mat and the dog ran after it; 東京は大きな都市です, naïve café, hi 👋🏽 "
    tokenizer.train_from_iterator([corpus * 20], trainer)
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(role, special=True, normalized=False) for role in roles])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.2
        elif "norm" in name:
            noise = (1.0 + 0.2 * noise) * (ATTENTION_GAIN if "q_norm" in name or "k_norm" in name else 1.0)
        elif "q_proj" in name or "k_proj" in name:
            noise *= ATTENTION_GAIN * parameter.shape[-1] ** -0.5
        elif "embed_tokens" in name:
            noise *= 0.1
        else:
            noise *= 1.2 * parameter.shape[-1] ** -0.5
        parameter.data.copy_(noise)


def _sharpen_fused_attention(model: torch.nn.Module) -> None:
    """What `_randomize` does to q_proj and k_proj, for the rows of them in qkv_proj."""
    for layer in model.model.layers:
        attention = layer.self_attn
        value_size = attention.num_key_value_heads * attention.head_dim
        attention.qkv_proj.weight.data[:-value_size] *= ATTENTION_GAIN / 1.2


def _spell_rope_as_before(config_path: Path) -> None:
    config = json.loads(config_path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] == "linear":  # of the days when the field was called type
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config_path.write_text(json.dumps(config, indent=2))
