"""Checkpoints of any size with random weights: for benchmarks, where only shapes matter."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from pdengine.models.demo.facts import checkpoint_directory


def write_random_checkpoint(
    directory: Path,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.bfloat16,
    max_tokens: int = 8192,
) -> None:
    """Write a Llama of this shape into `directory`, with the tokenizer of the demo model."""
    source = checkpoint_directory()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory / name)
    vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_tokens,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        return weight.to(dtype)

    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, hidden_size),
        "model.norm.weight": torch.ones(hidden_size, dtype=dtype),
    }
    for layer in range(num_layers):
        shapes = {
            "self_attn.q_proj": (num_heads * head_dim, hidden_size),
            "self_attn.k_proj": (num_kv_heads * head_dim, hidden_size),
            "self_attn.v_proj": (num_kv_heads * head_dim, hidden_size),
            "self_attn.o_proj": (hidden_size, num_heads * head_dim),
            "mlp.gate_proj": (intermediate_size, hidden_size),
            "mlp.up_proj": (intermediate_size, hidden_size),
            "mlp.down_proj": (hidden_size, intermediate_size),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden_size, dtype=dtype)
    save_file(weights, directory / "model.safetensors")


def write_small_checkpoint(directory: Path) -> Path:
    """Write a Llama of 26 million parameters into `directory`; the directory."""
    write_random_checkpoint(
        directory,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=1408,
    )
    return directory
