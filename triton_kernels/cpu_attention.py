"""Paged attention on CPUs: which kernel does which part of a step, planned once per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdengine.triton_kernels import torch_attention
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.cpu_decode_attention import (
    CHUNK_TOKENS,
    MAX_GROUP_ELEMENTS,
    MAX_GROUP_SIZE,
    TILE_TOKENS,
)
from pdengine.triton_kernels.cpu_launch import float_bits
from pdengine.triton_kernels.cpu_native import NativeKernels
from pdengine.triton_kernels.cpu_prefill_attention import TILE_ROWS, memory_bytes
from pdengine.triton_kernels.vector_code import has_bf16_dot_product

# A context is split where its task would be a larger part of a thread's share of the work than one in this.
TASKS_PER_THREAD = 3
PARALLEL_KEY_BYTES = 16384  # of a step, from which on they are worth all threads
BLOCK_ROWS = 256  # queries times heads of a prefill task: their sums stay in a core's second cache
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class KernelPlan:
    """A part of a step. `words` describe it to its kernel, as the kernel's file names them, and refer to
    `arrays`; `address` is theirs."""

    words: npt.NDArray[np.int64]
    address: int
    arrays: Sequence[Any]
    in_parallel: bool


@dataclass(frozen=True)
class AttentionPlan:
    """What the layers of a step share."""

    is_native: bool  # else the shape is left to torch
    layer_bytes: int  # of one KV head in a block of the pool
    decode: KernelPlan | None = None  # None where a step has none
    num_split: int = 0  # decoding sequences, if any of their contexts is split among tasks
    prefill: KernelPlan | None = None


class CpuAttention:
    """`uses_dot_product`: whether bfloat16 may be multiplied as such, where the CPU can."""

    def __init__(self, native: NativeKernels, uses_dot_product: bool = True) -> None:
        self._run = native.launcher.run
        self._decode_attention = native.decode_attention.address
        self._reduce_parts = native.reduce_parts.address
        self._prefill_attention = native.prefill_attention.address
        self._uses_dot_product = uses_dot_product and has_bf16_dot_product()

    def attend(
        self, query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """See `Kernels.paged_attention`."""
        shape = ("paged_attention", query.shape[1])
        plan: AttentionPlan | None = batch.plans.get(shape)
        if plan is None:
            plan = batch.plans[shape] = self.plan(batch, query.shape[1], query.dtype, kv_pool)
        if not plan.is_native:
            return torch_attention.attend(query, kv_pool, layer, batch, scale)
        query = query.contiguous()
        output = torch.empty_like(query)
        pool_layer = kv_pool.data_ptr() + layer * plan.layer_bytes
        if plan.decode is not None:
            self._launch(self._decode_attention, plan.decode, query, output, pool_layer, scale)
            if plan.num_split:
                self._launch(self._reduce_parts, plan.decode, query, output, plan.num_split, scale)
        if plan.prefill is not None:
            self._attend_chunks(query, output, pool_layer, plan.prefill, scale)
        return output

    def _attend_chunks(
        self, query: Tensor, output: Tensor, pool_layer: int, plan: KernelPlan, scale: float
    ) -> None:
        if self._uses_dot_product or query.dtype == torch.float32:
            self._launch(self._prefill_attention, plan, query, output, pool_layer, scale)
            return
        attended = output.to(torch.float32)  # with the rows of the single tokens
        self._launch(self._prefill_attention, plan, query.to(torch.float32), attended, pool_layer, scale)
        output.copy_(attended)

    def _launch(
        self, kernel: int, plan: KernelPlan, query: Tensor, output: Tensor, third: int, scale: float
    ) -> None:
        self._run(
            kernel, plan.in_parallel, query.data_ptr(), output.data_ptr(), third, plan.address,
            float_bits(scale), 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip

    def plan(
        self, batch: AttentionBatch, num_heads: int, dtype: torch.dtype, kv_pool: Tensor
    ) -> AttentionPlan:
        """How the kernels share the work of a step; `dtype` is that of the queries."""
        layer_bytes = kv_pool.stride(2) * kv_pool.element_size()
        if not takes(kv_pool, num_heads, dtype):
            return AttentionPlan(is_native=False, layer_bytes=layer_bytes)
        starts = np.array(batch.query_starts_on_host, np.int64)
        num_new = starts[1:] - starts[:-1]
        (single,) = np.nonzero(num_new == 1)
        (chunks,) = np.nonzero(num_new > 1)
        num_threads = torch.get_num_threads()
        decode, prefill, num_split = None, None, 0
        if len(single) > 0:
            decode, is_split = plan_decodes(batch, single, num_heads, kv_pool, num_threads)
            num_split = len(single) if is_split else 0
        if len(chunks) > 0:
            multiplies_bfloat16 = self._uses_dot_product and dtype == torch.bfloat16
            prefill = plan_prefills(batch, chunks, num_heads, kv_pool, num_threads, multiplies_bfloat16)
        return AttentionPlan(True, layer_bytes, decode, num_split, prefill)


def takes(kv_pool: Tensor, num_heads: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take this KV cache and queries of `dtype`."""
    _, num_kv_heads, _, _, block_size, head_dim = kv_pool.shape
    group_size = num_heads // num_kv_heads
    fits = group_size <= MAX_GROUP_SIZE and group_size * head_dim <= MAX_GROUP_ELEMENTS
    aligned = head_dim % 32 == 0 and block_size % TILE_TOKENS == 0
    return fits and aligned and dtype == kv_pool.dtype and dtype in DTYPES


def part_size(num_tokens: int, num_kv_heads: int, num_threads: int) -> int:
    """Into how many tokens each context is split where all of them have `num_tokens` together."""
    largest = num_tokens * num_kv_heads // (TASKS_PER_THREAD * num_threads) if num_threads > 1 else num_tokens
    return max(1, -(-largest // CHUNK_TOKENS)) * CHUNK_TOKENS


def plan_decodes(
    batch: AttentionBatch,
    sequences: npt.NDArray[np.int64],
    num_heads: int,
    kv_pool: Tensor,
    num_threads: int,
) -> tuple[KernelPlan, bool]:
    """Parts of the contexts of `sequences` that keep all threads busy to the end; whether any is split."""
    _, num_kv_heads, _, _, block_size, head_dim = kv_pool.shape
    lengths = [batch.context_lengths_on_host[sequence] for sequence in sequences.tolist()]
    num_tokens = sum(lengths)
    part_tokens = part_size(num_tokens, num_kv_heads, num_threads)
    rows = [batch.query_starts_on_host[sequence] for sequence in sequences.tolist()]
    parts = [
        (sequence, first, row)
        for sequence, row, length in zip(sequences.tolist(), rows, lengths, strict=True)
        for first in range(0, length, part_tokens)
    ]
    num_parts = [-(-length // part_tokens) for length in lengths]
    is_split = len(parts) > len(lengths)
    num_rows = len(parts) * num_heads if is_split else 0
    partial_sums, partial_scales = torch.empty(num_rows, head_dim), torch.empty(num_rows, 2)
    parts_table = np.array(parts, np.int64)
    first_parts = np.array([0, *accumulate(num_parts)], np.int64)
    block_bytes, head_bytes = pool_strides(kv_pool)
    words = np.array(
        (
            len(parts) * num_kv_heads,
            parts_table.ctypes.data,
            part_tokens,
            first_parts.ctypes.data,
            partial_sums.data_ptr(),
            partial_scales.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.stride(0),
            batch.context_lengths.data_ptr(),
            num_heads,
            num_kv_heads,
            head_dim,
            kv_pool.dtype == torch.bfloat16,
            block_size,
            block_bytes,
            head_bytes,
        ),
        np.int64,
    )
    in_parallel = num_tokens * num_kv_heads * head_dim * kv_pool.element_size() >= PARALLEL_KEY_BYTES
    arrays = (parts_table, first_parts, partial_sums, partial_scales, batch)
    return KernelPlan(words, words.ctypes.data, arrays, in_parallel), is_split


def plan_prefills(
    batch: AttentionBatch,
    sequences: npt.NDArray[np.int64],
    num_heads: int,
    kv_pool: Tensor,
    num_threads: int,
    multiplies_bfloat16: bool,
) -> KernelPlan:
    """Blocks of the chunks of `sequences`; those that see the most tokens come first."""
    _, num_kv_heads, _, _, block_size, head_dim = kv_pool.shape
    group_size = num_heads // num_kv_heads
    max_queries = max(1, BLOCK_ROWS // group_size // TILE_ROWS) * TILE_ROWS
    tasks = []
    for sequence in sequences.tolist():
        start, end = batch.query_starts_on_host[sequence : sequence + 2]
        first_position = batch.context_lengths_on_host[sequence] - (end - start)
        tasks += [
            (sequence, row, first_position + row - start, min(max_queries, end - row))
            for row in range(start, end, max_queries)
        ]
    tasks.sort(key=lambda task: task[2] * task[3], reverse=True)
    tasks_table = np.array(tasks, np.int64)
    thread_bytes = -(-memory_bytes(head_dim, group_size, max_queries) // 64) * 64
    memory = torch.empty(num_threads * thread_bytes + 64, dtype=torch.uint8)
    block_bytes, head_bytes = pool_strides(kv_pool)
    words = np.array(
        (
            len(tasks),
            tasks_table.ctypes.data,
            batch.block_tables.data_ptr(),
            batch.block_tables.stride(0),
            batch.context_lengths.data_ptr(),
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            block_bytes,
            head_bytes,
            kv_pool.dtype == torch.bfloat16,
            multiplies_bfloat16,
            -(-memory.data_ptr() // 64) * 64,
            thread_bytes,
            max_queries,
        ),
        np.int64,
    )
    arrays = (tasks_table, memory, batch)
    return KernelPlan(words, words.ctypes.data, arrays, in_parallel=True)


def pool_strides(kv_pool: Tensor) -> tuple[int, int]:
    """Bytes of a block, and of one KV head in it."""
    block_elements, head_elements = kv_pool.stride()[:2]
    return block_elements * kv_pool.element_size(), head_elements * kv_pool.element_size()
