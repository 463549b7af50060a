"""One decoder-only transformer for all supported families; they differ by flags in ModelConfig.

The tokens of all sequences of a step are packed into one dimension, without padding. Projections run in the
dtype of the weights; the residual stream, the norms, rope and the gate of the MLP stay in float32, which
costs little and keeps most of bfloat16's rounding out of the result.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdengine.models.config import ModelConfig
from pdengine.models.rope import apply_rope, inverse_frequencies, rope_cos_sin
from pdengine.triton_kernels.attention import AttentionBatch, paged_attention, store_kv


class Decoder(nn.Module):
    """The whole model: token ids in, logits out.

    `dtype` is that of the projections and embeddings; norm weights are always float32. Call it under
    `torch.inference_mode()`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, index, dtype) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | None = None  # tied models use embed_tokens instead
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        # A plain attribute: as a buffer it would follow `.to(dtype)` and lose its precision.
        self.inverse_frequencies = inverse_frequencies(config.rope, config.head_dim)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_pool: Tensor,
        batch: AttentionBatch,
        after_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run one step and store its K and V in `kv_pool`.

        `token_ids` and `positions` are `[tokens]` int64, in the order that `batch` describes. `after_layer`
        is called with the index of each layer that is done. Returns the residual stream
        `[tokens, hidden_size]` float32, for `logits`.
        """
        cos, sin = rope_cos_sin(positions, self.inverse_frequencies, self.config.rope.attention_factor)
        hidden: Tensor = self.embed_tokens(token_ids).to(torch.float32)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, sin, kv_pool, batch)
            if after_layer is not None:
                after_layer(index)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` `[rows, hidden_size]` as `forward` returned it -> `[rows, vocab_size]` float32."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits: Tensor = F.linear(self.norm(hidden).to(weight.dtype), weight).to(torch.float32)
        return logits


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, index, dtype)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, dtype)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, kv_pool: Tensor, batch: AttentionBatch
    ) -> Tensor:
        # hidden: [tokens, hidden_size] float32
        hidden = hidden + self.attention(self.input_norm(hidden), cos, sin, kv_pool, batch)
        hidden = hidden + self.mlp(self.post_attention_norm(hidden))
        return hidden


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.head_counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)  # q, k, v
        self.scale = config.head_dim**-0.5
        self.uses_rope = layer not in config.layers_without_rope
        qkv_size = sum(self.head_counts) * config.head_dim
        attention_size = config.num_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, qkv_size, bias=config.qkv_bias, dtype=dtype)
        self.output_proj = Linear(
            attention_size, config.hidden_size, bias=config.attention_output_bias, dtype=dtype
        )
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, normed: Tensor, cos: Tensor, sin: Tensor, kv_pool: Tensor, batch: AttentionBatch
    ) -> Tensor:
        dtype = self.qkv_proj.weight.dtype
        qkv = self.qkv_proj(normed.to(dtype)).view(normed.shape[0], -1, self.head_dim)
        query, key, value = qkv.split(self.head_counts, dim=1)  # each [tokens, its heads, head_dim]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.uses_rope:
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        store_kv(kv_pool, self.layer, key.to(dtype), value, batch)
        attended = paged_attention(query.to(dtype), kv_pool, self.layer, batch, self.scale)
        output: Tensor = self.output_proj(attended.flatten(1))
        return output


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias, dtype=dtype
        )
        self.down_proj = Linear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias, dtype=dtype
        )

    def forward(self, normed: Tensor) -> Tensor:
        dtype = self.gate_up_proj.weight.dtype
        gate, up = self.gate_up_proj(normed.to(dtype)).chunk(2, dim=-1)
        output: Tensor = self.down_proj((F.silu(gate.to(torch.float32)) * up).to(dtype))
        return output


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, float32 in and out."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(torch.float32), self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """Without torch's random initialization: the weights come from a file, and on the meta device drawing
    numbers for nobody would import a second's worth of torch."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Without torch's random initialization; see Linear."""

    def reset_parameters(self) -> None:
        pass
