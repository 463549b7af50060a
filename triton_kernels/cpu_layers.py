"""All layers of a small step on a CPU as one program, so that no Python runs between their kernels.

A layer of a small model takes tens of microseconds, and as long again if each of its operations is called
from Python. The program is a table of launches, made once; a step changes a few of its words. What the
layers hand each other lies in memory that is allocated once, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.cpu_attention import AttentionPlan, CpuAttention, takes
from pdengine.triton_kernels.cpu_kernels import DTYPES, plan_rotation
from pdengine.triton_kernels.cpu_launch import THREAD_COUNTER, float_bits
from pdengine.triton_kernels.cpu_native import native_kernels
from pdengine.triton_kernels.cpu_program import KERNEL_WORD, LAUNCH_WORDS
from pdengine.triton_kernels.cpu_single_tokens import SingleTokens
from pdengine.triton_kernels.openmp import gomp_barrier_address
from pdengine.triton_kernels.packed_linear import OWN_ROWS, PackedLinear

MAX_TOKENS = OWN_ROWS

# The launches of a layer, in order, and the words of them that steps set, by what they hold.
INPUT_NORM, QKV, ROTATE, DECODE, REDUCE, PREFILL, OUTPUT, POST_NORM, GATE_UP, SILU, DOWN = range(11)
NUM_LAUNCHES = 11
# Those of the whole step: one before the layers, and three behind them.
START, FINAL_NORM, HEAD, CHOOSE = 0, -3, -2, -1
START_IDS, START_POSITIONS, START_ROWS, CHOOSE_ROWS = 1, 2, 6, 3
NORM_ROWS, LINEAR_ROWS, SILU_ROWS, ROTATE_ROWS = 5, 3, 3, 11
ROTATE_COS, ROTATE_SIN, ROTATE_POOL, ROTATE_BLOCKS, ROTATE_OFFSETS, ROTATE_SIZES = 3, 4, 8, 9, 10, 12
ATTENTION_POOL, ATTENTION_PLAN = 3, 4
REDUCE_SEQUENCES = 3


@dataclass(frozen=True)
class LayerWeights:
    """Norms are `[size]` float32."""

    input_norm: Tensor
    qkv: PackedLinear
    query_norm: Tensor | None
    key_norm: Tensor | None
    uses_rope: bool
    output: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class Edges:
    """What a step computes before and behind its layers. embeddings: `[vocabulary, hidden]`, contiguous.
    norm: `[hidden]` float32. head: to logits. frequencies, rope_scale: see `rope_cos_sin`."""

    embeddings: Tensor
    norm: Tensor
    head: PackedLinear
    frequencies: Tensor
    rope_scale: float


def can_fuse(weights: Sequence[LayerWeights], hidden: int, dtype: torch.dtype) -> bool:
    """Whether the own kernels take these layers; of the KV cache and the batch each step sees for itself.

    bfloat16 has an own linear kernel only where the CPU multiplies it, so that attention does so, too.
    """
    has_kernels = all(linear.own_rows >= MAX_TOKENS for layer in weights for linear in layer.linears)
    sizes = [hidden, *(layer.down.in_features for layer in weights)]
    return has_kernels and dtype in DTYPES and all(size % 16 == 0 for size in sizes)


class CpuLayers:
    """The layers of a decoder that `can_fuse`. Belongs to one thread: each step uses the same memory."""

    def __init__(
        self,
        weights: Sequence[LayerWeights],
        edges: Edges,
        num_heads: int,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        self._native = native_kernels()
        self._attention = CpuAttention(self._native)
        self._barrier = gomp_barrier_address()
        self._weights, self._edges = weights, edges  # the table has their addresses
        self._num_heads, self._dtype = num_heads, dtype
        first = weights[0]
        hidden, qkv_size, intermediate = first.qkv.in_features, first.qkv.out_features, first.down.in_features
        self._num_qkv_heads = qkv_size // head_dim
        new = partial(torch.zeros, dtype=dtype)
        self._residual = torch.zeros(MAX_TOKENS, hidden)
        self._update, self._normed = new(MAX_TOKENS, hidden), new(MAX_TOKENS, hidden)
        self._qkv = new(MAX_TOKENS, qkv_size)
        self._query, self._attended = (new(MAX_TOKENS, num_heads * head_dim) for _ in range(2))
        self._gate_up, self._product = new(MAX_TOKENS, 2 * intermediate), new(MAX_TOKENS, intermediate)
        self._cos, self._sin = (torch.zeros(MAX_TOKENS, len(edges.frequencies)) for _ in range(2))
        self._logits = new(MAX_TOKENS * edges.head.out_features + 16)
        self._chosen = np.zeros(MAX_TOKENS, np.int64)
        count = 1 + len(weights) * NUM_LAUNCHES + 3
        self._launches = torch.zeros(count, LAUNCH_WORDS, dtype=torch.int64)
        self._program = self._launches.numpy()  # the same memory: numpy sets single words faster
        self._table = self._program[1:-3].reshape(len(weights), NUM_LAUNCHES, LAUNCH_WORDS)  # a view
        self._write_edges(float_bits(eps))
        for layer, layer_weights in enumerate(weights):
            self._write_layer(layer, layer_weights, float_bits(eps), float_bits(head_dim**-0.5))
        self._uses_rope = np.array([layer.uses_rope for layer in weights], np.int64)
        self._num_tokens = 0
        self._pool: Tensor | None = None
        self._single: SingleTokens | None = None
        self._single_split: int | None = None  # what the table says of `_single`; None: it is set otherwise

    def run(
        self, embedded: Tensor, cos: Tensor, sin: Tensor, kv_pool: Tensor, batch: AttentionBatch
    ) -> Tensor | None:
        """The residual stream behind the last layer, `[tokens, hidden_size]` float32, for `embedded` of the
        same shape in any dtype and at most MAX_TOKENS; None, and nothing done, where a kernel does not take
        the shape of the KV cache. Others: see `Kernels.rotate_and_store`."""
        plan = self._attention.plan(batch, self._num_heads, self._dtype, kv_pool)
        if not plan.is_native or cos.shape[-1] % 16 != 0:
            return None
        num_tokens, table = len(embedded), self._table
        residual = self._residual[:num_tokens]
        residual.copy_(embedded)
        if num_tokens != self._num_tokens:
            self._set_num_tokens(num_tokens)
        if kv_pool is not self._pool:
            self._set_pool(kv_pool, cos.shape[-1], plan.layer_bytes)
        table[:, :, THREAD_COUNTER // 8] = 0
        self._set_rotation(cos, sin, batch.block_ids.data_ptr(), batch.block_offsets.data_ptr())
        self._set_attention(plan)
        self._single_split = None
        self._run(1, len(self._weights) * NUM_LAUNCHES)
        return residual + self._update[:num_tokens]

    def decode(
        self,
        kv_pool: Tensor,
        token_ids: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
    ) -> list[int] | None:
        """The likeliest token after each of `token_ids`, of equals the first; `logits` has what they were
        chosen from. There are at most MAX_TOKENS; a context counts its token, whose K and V are stored. None,
        and nothing done, where a kernel does not take the shape of the KV cache."""
        pairs = self._cos.shape[1]
        if kv_pool is not self._pool:
            if not takes(kv_pool, self._num_heads, self._dtype) or pairs % 16 != 0:
                return None
            self._set_pool(kv_pool, pairs, kv_pool.stride(2) * kv_pool.element_size())
        if self._single is None:
            self._single = SingleTokens(MAX_TOKENS, self._num_heads, kv_pool)
        single, num_tokens = self._single, len(token_ids)
        num_split = num_tokens if single.write(token_ids, context_lengths, block_tables) else 0
        if num_tokens != self._num_tokens:
            self._set_num_tokens(num_tokens)
        if num_split != self._single_split:
            self._program[START, (START_IDS, START_POSITIONS)] = single.token_ids, single.positions
            self._set_rotation(self._cos, self._sin, single.block_ids, single.block_offsets)
            self._set_attention(AttentionPlan(True, 0, single.plan, num_split))
            self._single_split = num_split
        self._run(0, len(self._program))
        chosen: list[int] = self._chosen[:num_tokens].tolist()
        return chosen

    def logits(self, num_tokens: int) -> Tensor:
        """Of the last `decode`, `[num_tokens, vocabulary]`; the next step overwrites them."""
        vocabulary = self._edges.head.out_features
        return self._logits[: num_tokens * vocabulary].view(num_tokens, vocabulary)

    def _run(self, first: int, count: int) -> None:
        self._program[:, 0] = 0
        launches = self._launches.data_ptr() + 8 * LAUNCH_WORDS * first
        self._native.launcher.run(
            self._native.run_program.address, True, launches, count, self._barrier, 0, 0, 0, 0, 0, 0, 0, 0, 0
        )

    def _write_edges(self, eps: int) -> None:
        native, edges = self._native, self._edges
        residual, update, normed = (x.data_ptr() for x in (self._residual, self._update, self._normed))
        hidden, is_bfloat16 = self._residual.shape[1], self._dtype == torch.bfloat16
        angles = (self._cos.data_ptr(), self._sin.data_ptr(), edges.frequencies.data_ptr())
        rope = (*angles, len(edges.frequencies), float_bits(edges.rope_scale))
        logits = self._logits.data_ptr()
        launches = {
            START: (
                native.start_tokens.address,
                (0, 0, edges.embeddings.data_ptr(), residual, hidden, 0, *rope, is_bfloat16),
            ),
            FINAL_NORM: (
                native.add_rms_norm.address,
                (residual, update, edges.norm.data_ptr(), normed, 0, hidden, eps, is_bfloat16, is_bfloat16),
            ),
            HEAD: (edges.head.kernel, edges.head.words(normed, 0, logits)),
            CHOOSE: (
                native.choose_largest.address,
                (logits, self._chosen.ctypes.data, 0, edges.head.out_features, is_bfloat16),
            ),
        }
        for index, (kernel, words) in launches.items():
            self._program[index, KERNEL_WORD] = kernel
            self._program[index, 1 : 1 + len(words)] = words

    def _write_layer(self, layer: int, weights: LayerWeights, eps: int, scale: int) -> None:
        native = self._native
        residual, update, normed = (x.data_ptr() for x in (self._residual, self._update, self._normed))
        qkv, query, attended = (x.data_ptr() for x in (self._qkv, self._query, self._attended))
        gate_up, product = self._gate_up.data_ptr(), self._product.data_ptr()
        is_bfloat16 = self._dtype == torch.bfloat16
        rest_of_norm = (normed, 0, self._residual.shape[1], eps, is_bfloat16, is_bfloat16)
        head_norms = (0 if x is None else x.data_ptr() for x in (weights.query_norm, weights.key_norm))
        input_norm, post_norm = weights.input_norm.data_ptr(), weights.post_norm.data_ptr()
        before = update if layer > 0 else 0
        size = weights.down.in_features
        attention = (query, attended, 0, 0, scale)
        launches = {
            INPUT_NORM: (
                native.add_rms_norm.address,
                (residual, before, input_norm, *rest_of_norm),
            ),
            QKV: (weights.qkv.kernel, weights.qkv.words(normed, 0, qkv)),
            ROTATE: (native.rotate_and_store.address, (qkv, query, 0, 0, *head_norms, eps)),
            DECODE: (0, attention),
            REDUCE: (0, attention),
            PREFILL: (0, attention),
            OUTPUT: (weights.output.kernel, weights.output.words(attended, 0, update)),
            POST_NORM: (native.add_rms_norm.address, (residual, update, post_norm, *rest_of_norm)),
            GATE_UP: (weights.gate_up.kernel, weights.gate_up.words(normed, 0, gate_up)),
            SILU: (native.silu_multiply.address, (gate_up, product, 0, size, is_bfloat16)),
            DOWN: (weights.down.kernel, weights.down.words(product, 0, update)),
        }
        for index, (kernel, words) in launches.items():
            self._table[layer, index, KERNEL_WORD] = kernel
            self._table[layer, index, 1 : 1 + len(words)] = words

    def _set_num_tokens(self, num_tokens: int) -> None:
        table, program = self._table, self._program
        program[START, START_ROWS] = program[CHOOSE, CHOOSE_ROWS] = num_tokens
        program[FINAL_NORM, NORM_ROWS] = program[HEAD, LINEAR_ROWS] = num_tokens
        table[:, (INPUT_NORM, POST_NORM), NORM_ROWS] = num_tokens
        table[:, (QKV, OUTPUT, GATE_UP, DOWN), LINEAR_ROWS] = num_tokens
        table[:, SILU, SILU_ROWS] = num_tokens
        table[:, ROTATE, ROTATE_ROWS] = num_tokens
        self._num_tokens = num_tokens

    def _set_pool(self, kv_pool: Tensor, pairs: int, layer_bytes: int) -> None:
        table = self._table
        layers = kv_pool.data_ptr() + layer_bytes * np.arange(len(self._weights))
        table[:, ROTATE, ROTATE_POOL] = layers
        table[:, DECODE, ATTENTION_POOL] = layers
        table[:, PREFILL, ATTENTION_POOL] = layers
        self._rotation = plan_rotation(kv_pool, self._num_qkv_heads, pairs)
        table[:, ROTATE, ROTATE_SIZES] = self._rotation.address
        self._pool, self._single, self._single_split = kv_pool, None, None

    def _set_rotation(self, cos: Tensor, sin: Tensor, block_ids: int, block_offsets: int) -> None:
        rotate = self._table[:, ROTATE]
        rotate[:, ROTATE_COS] = self._uses_rope * cos.data_ptr()
        rotate[:, ROTATE_SIN] = self._uses_rope * sin.data_ptr()
        rotate[:, ROTATE_BLOCKS] = block_ids
        rotate[:, ROTATE_OFFSETS] = block_offsets

    def _set_attention(self, plan: AttentionPlan) -> None:
        table, native = self._table, self._native
        table[:, DECODE, KERNEL_WORD] = native.decode_attention.address if plan.decode else 0
        table[:, REDUCE, KERNEL_WORD] = native.reduce_parts.address if plan.num_split else 0
        table[:, REDUCE, REDUCE_SEQUENCES] = plan.num_split
        if plan.decode is not None:
            table[:, DECODE, ATTENTION_PLAN] = table[:, REDUCE, ATTENTION_PLAN] = plan.decode.address
        table[:, PREFILL, KERNEL_WORD] = native.prefill_attention.address if plan.prefill else 0
        if plan.prefill is not None:
            table[:, PREFILL, ATTENTION_PLAN] = plan.prefill.address
