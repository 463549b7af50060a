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
from pdengine.models.rope import inverse_frequencies, rope_cos_sin
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.cpu_kernels import CpuKernels
from pdengine.triton_kernels.cpu_layers import MAX_TOKENS, CpuLayers, Edges, LayerWeights, can_fuse
from pdengine.triton_kernels.kernels import Kernels, kernels_for
from pdengine.triton_kernels.packed_linear import PackedLinear


class Decoder(nn.Module):
    """The whole model: token ids in, logits out.

    `dtype` is that of the projections and embeddings; norm weights are always float32. `kernels` are those of
    the device that the model runs on, by default a CPU. Call it under `torch.inference_mode()`.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None
    ) -> None:
        super().__init__()
        if kernels is None:
            kernels = kernels_for(torch.device("cpu"))
        self.config = config
        self.dtype = dtype
        self.kernels = kernels
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, dtype, kernels) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | None = None  # tied models use embed_tokens instead
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        self.packed_embedding: PackedLinear | None = None  # for the logits of tied models, once packed
        self.fused_layers: CpuLayers | None = None  # for small steps on a CPU, once packed
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
        embedded = self.embed_tokens(token_ids)
        if self.fused_layers is not None and after_layer is None and 0 < len(token_ids) <= MAX_TOKENS:
            hidden = self.fused_layers.run(embedded, cos, sin, kv_pool, batch)
            if hidden is not None:
                return hidden
        residual: Tensor = embedded.to(torch.float32)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            residual, update = layer(residual, update, cos, sin, kv_pool, batch)
            if after_layer is not None:
                after_layer(index)
        return residual if update is None else residual + update

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` `[rows, hidden_size]` as `forward` returned it -> `[rows, vocab_size]` float32."""
        _, normed = self.kernels.add_rms_norm(hidden, None, self.norm.weight, self.norm.eps, self.dtype)
        logits: Tensor
        if self.lm_head is not None:
            logits = self.lm_head(normed)
        elif self.packed_embedding is not None:
            logits = self.packed_embedding(normed)
        else:
            logits = F.linear(normed, self.embed_tokens.weight)
        return logits.to(torch.float32)

    def pack(self) -> None:
        """Bring the weights of the projections into the order of the CPU's kernels; only on a CPU, once.

        They are packed one by one and their plain form is given up, so memory holds them once; but tied
        models keep the embeddings twice, plain to look tokens up, and packed for the logits.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self.lm_head is None:
            self.packed_embedding = PackedLinear(self.embed_tokens.weight, None)
        weights = [layer.packed_weights() for layer in self.layers if isinstance(layer, DecoderLayer)]
        config = self.config
        head = self.packed_embedding if self.lm_head is None else self.lm_head.packed_weight()
        assert head is not None
        has_head = head.own_rows >= MAX_TOKENS
        if (
            has_head
            and isinstance(self.kernels, CpuKernels)
            and can_fuse(weights, config.hidden_size, self.dtype)
        ):
            frequencies = self.inverse_frequencies.contiguous()
            edges = Edges(
                self.embed_tokens.weight, self.norm.weight, head, frequencies, config.rope.attention_factor
            )
            self.fused_layers = CpuLayers(
                weights, edges, config.num_heads, config.head_dim, config.rms_norm_eps, self.dtype
            )


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norm.

    What a part adds to the residual stream is handed on as `update`: the next norm adds it in passing.
    """

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.dtype = dtype
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, index, dtype, kernels)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, dtype, kernels)

    def forward(
        self,
        residual: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        kv_pool: Tensor,
        batch: AttentionBatch,
    ) -> tuple[Tensor, Tensor]:
        # residual: [tokens, hidden_size] float32, changed; update: the same shape, of the projections' dtype
        residual, normed = self._add_norm(residual, update, self.input_norm)
        update = self.attention(normed, cos, sin, kv_pool, batch)
        residual, normed = self._add_norm(residual, update, self.post_attention_norm)
        return residual, self.mlp(normed)

    __call__ = forward  # nobody hooks in here, so nn.Module's own call would only take time

    def packed_weights(self) -> LayerWeights:
        """For `CpuLayers`, once packed."""
        attention, mlp = self.attention, self.mlp
        query_norm, key_norm = attention.query_norm, attention.key_norm
        return LayerWeights(
            input_norm=self.input_norm.weight,
            qkv=attention.qkv_proj.packed_weight(),
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            uses_rope=attention.uses_rope,
            output=attention.output_proj.packed_weight(),
            post_norm=self.post_attention_norm.weight,
            gate_up=mlp.gate_up_proj.packed_weight(),
            down=mlp.down_proj.packed_weight(),
        )

    def _add_norm(self, residual: Tensor, update: Tensor | None, norm: "RMSNorm") -> tuple[Tensor, Tensor]:
        return self.kernels.add_rms_norm(residual, update, norm.weight, norm.eps, self.dtype)


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
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
        self.norm_eps = config.rms_norm_eps
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, normed: Tensor, cos: Tensor, sin: Tensor, kv_pool: Tensor, batch: AttentionBatch
    ) -> Tensor:
        query = self.kernels.rotate_and_store(
            self.qkv_proj(normed).view(normed.shape[0], -1, self.head_dim),
            cos if self.uses_rope else None,
            sin if self.uses_rope else None,
            None if self.query_norm is None else self.query_norm.weight,
            None if self.key_norm is None else self.key_norm.weight,
            self.norm_eps,
            kv_pool,
            self.layer,
            batch,
        )  # [tokens, heads, head_dim]
        attended = self.kernels.paged_attention(query, kv_pool, self.layer, batch, self.scale)
        return self.output_proj(attended.flatten(1))

    __call__ = forward


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up_proj = Linear(
            config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias, dtype=dtype
        )
        self.down_proj = Linear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias, dtype=dtype
        )

    def forward(self, normed: Tensor) -> Tensor:
        return self.down_proj(self.kernels.silu_multiply(self.gate_up_proj(normed)))

    __call__ = forward


class RMSNorm(nn.Module):
    """The parameters of a root-mean-square norm (arXiv 1910.07467); `Kernels` computes it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
        self.eps = eps


class Linear(nn.Linear):
    """Without torch's random initialization: the weights come from a file, and on the meta device drawing
    numbers for nobody would import a second's worth of torch."""

    packed: PackedLinear | None = None

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) if self.packed is None else self.packed(input)

    __call__ = forward

    def pack(self) -> None:
        """See `Decoder.pack`. The weight has no numbers afterwards."""
        self.packed = PackedLinear(self.weight, self.bias)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def packed_weight(self) -> PackedLinear:
        assert self.packed is not None, "pack first"
        return self.packed


class Embedding(nn.Embedding):
    """Without torch's random initialization; see Linear."""

    def reset_parameters(self) -> None:
        pass
