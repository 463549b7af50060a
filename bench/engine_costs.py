"""What a step of a model must read and compute, from its shape alone: the floors of `pdengine bench engine`.

Only matrices, attention and the KV cache are counted; norms, biases, rope and activations are a thousandth.
"""

from dataclasses import dataclass

from pdengine.engine.memory import kv_block_bytes
from pdengine.models.config import ModelConfig


@dataclass(frozen=True)
class Projection:
    """A matrix `[outputs, inputs]` that every token of a step is multiplied with."""

    name: str
    inputs: int
    outputs: int

    @property
    def num_weights(self) -> int:
        return self.inputs * self.outputs


def layer_projections(config: ModelConfig) -> list[Projection]:
    """Of one layer, as the decoder has them: queries, keys and values are one matrix, gate and up, too."""
    attention_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    return [
        Projection("qkv", config.hidden_size, attention_size + 2 * kv_size),
        Projection("output", attention_size, config.hidden_size),
        Projection("gate_up", config.hidden_size, 2 * config.intermediate_size),
        Projection("down", config.intermediate_size, config.hidden_size),
    ]


def weight_bytes_per_step(config: ModelConfig, item_bytes: int) -> int:
    """Bytes of the layers and of the matrix of the logits, which a step reads once whatever its batch is.

    Of the embeddings a step reads a row per token; where they are tied they are the matrix of the logits.
    """
    layers = config.num_layers * sum(projection.num_weights for projection in layer_projections(config))
    return (layers + config.hidden_size * config.vocab_size) * item_bytes


def kv_bytes_per_step(config: ModelConfig, item_bytes: int, *, batch_size: int, context: int) -> int:
    """Bytes of keys and values that a decode step reads: those of `context` tokens of each sequence."""
    return batch_size * context * kv_block_bytes(config, block_size=1, item_bytes=item_bytes)


def decode_flop(config: ModelConfig, *, batch_size: int, context: int) -> int:
    """Of one decode step with `context` tokens in each sequence, the new one among them."""
    return batch_size * (_projection_flop(config) + _logits_flop(config) + _attention_flop(config) * context)


def prefill_flop(config: ModelConfig, num_tokens: int) -> int:
    """Of one prompt without a cached prefix: causal attention, and the logits of its last token."""
    num_pairs = num_tokens * (num_tokens + 1) // 2
    return num_tokens * _projection_flop(config) + _logits_flop(config) + num_pairs * _attention_flop(config)


def _projection_flop(config: ModelConfig) -> int:
    """Of all layers' projections for a token: a product and a sum for each weight."""
    return 2 * config.num_layers * sum(projection.num_weights for projection in layer_projections(config))


def _logits_flop(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.vocab_size


def _attention_flop(config: ModelConfig) -> int:
    """Of all layers, for a token and one token that it attends to: its score, and its share of the values."""
    return 4 * config.num_layers * config.num_heads * config.head_dim
