"""Batches over a paged KV cache whose unowned memory is NaN, and dense attention in float64."""

from dataclasses import dataclass, fields, replace
from itertools import accumulate, takewhile

import torch
from hypothesis import strategies as st
from torch import Tensor

from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.torch_attention import store_kv


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    num_layers: int = 2


def make_batch(lengths, block_size, num_blocks, device="cpu"):
    """`lengths` are (cached, new) tokens by sequence; their blocks are drawn at random from the pool."""
    free_blocks = torch.randperm(num_blocks).tolist()
    tables, block_ids, block_offsets = [], [], []
    for cached, new in lengths:
        table = torch.tensor([free_blocks.pop() for _ in range(-(-(cached + new) // block_size))])
        positions = torch.arange(cached, cached + new)
        tables.append(table)
        block_ids.append(table[positions // block_size])
        block_offsets.append(positions % block_size)
    query_starts = [0, *accumulate(new for _, new in lengths)]
    context_lengths = [cached + new for cached, new in lengths]
    return AttentionBatch(
        block_ids=torch.cat(block_ids).to(device),
        block_offsets=torch.cat(block_offsets).to(device),
        block_tables=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(device),
        query_starts=torch.tensor(query_starts, device=device),
        context_lengths=torch.tensor(context_lengths, device=device),
        query_starts_on_host=query_starts,
        context_lengths_on_host=context_lengths,
        num_decodes=len(list(takewhile(lambda length: length[1] == 1, lengths))),
    )


def select(batch, sequence):
    """The batch of one of its sequences alone."""
    start, end = batch.query_starts_on_host[sequence : sequence + 2]
    return replace(
        batch,
        block_ids=batch.block_ids[start:end],
        block_offsets=batch.block_offsets[start:end],
        block_tables=batch.block_tables[sequence : sequence + 1],
        query_starts=batch.query_starts[sequence : sequence + 2] - start,
        context_lengths=batch.context_lengths[sequence : sequence + 1],
        query_starts_on_host=[0, end - start],
        context_lengths_on_host=batch.context_lengths_on_host[sequence : sequence + 1],
        num_decodes=int(end - start == 1),
        plans={},
    )


def dense_attention(query, key, value, scale, window=None):
    """`query` `[new, heads, dim]`, `key` and `value` `[context, kv_heads, dim]`, all in float64."""
    new, context = len(query), len(key)
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    distances = torch.arange(context - new, context).unsqueeze(1) - torch.arange(context)
    hidden = (distances < 0) | (distances >= (window or context))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@dataclass(frozen=True)
class Case:
    """A step to attend in, on CPU, with the result it should have."""

    query: Tensor
    pool: Tensor
    layer: int
    batch: AttentionBatch
    scale: float
    window: int | None
    expected: Tensor  # float64
    magnitude: Tensor  # float64: the same mean of absolute values, to which rounding errors are relative


def make_case(shape, lengths, dtype, window=None, pool=None):
    """Prefixes and new tokens of all sequences are stored; the rest of the pool is NaN."""
    torch.manual_seed(0)
    num_blocks = sum(-(-(cached + new) // shape.block_size) for cached, new in lengths) + 3
    if pool is None:
        pool_shape = (num_blocks, shape.num_kv_heads, shape.num_layers, 2, shape.block_size, shape.head_dim)
        pool = torch.full(pool_shape, torch.nan, dtype=dtype)
    batch = make_batch(lengths, shape.block_size, len(pool))
    layer, scale = shape.num_layers - 1, shape.head_dim**-0.5
    queries, expected, magnitudes = [], [], []
    for table, (cached, new) in zip(batch.block_tables, lengths, strict=True):
        key, value = torch.randn(2, cached + new, shape.num_kv_heads, shape.head_dim).to(dtype)
        positions = torch.arange(cached + new)
        store_kv(pool, layer, key, value, table[positions // shape.block_size], positions % shape.block_size)
        query = torch.randn(new, shape.num_kv_heads * shape.group_size, shape.head_dim).to(dtype)
        queries.append(query)
        for results, values in ((expected, value.double()), (magnitudes, value.double().abs())):
            results.append(dense_attention(query.double(), key.double(), values, scale, window))
    return Case(
        torch.cat(queries), pool, layer, batch, scale, window, torch.cat(expected), torch.cat(magnitudes)
    )


def to_device(batch, device):
    tensors = {
        field.name: getattr(batch, field.name).to(device)
        for field in fields(batch)
        if isinstance(getattr(batch, field.name), Tensor)
    }
    return replace(batch, plans={}, **tensors)


@st.composite
def shapes_and_lengths(draw, block_sizes=(16, 32, 64), max_sequences=8):
    """Sequences with and without a prefix, at and beside the borders of blocks."""
    shape = Shape(
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 256])),
        block_size=draw(st.sampled_from(block_sizes)),
    )
    edges = [shape.block_size - 1, shape.block_size, shape.block_size + 1]
    cached = st.sampled_from([0, 1, *edges]) | st.integers(0, 200)
    new = st.sampled_from([1, 1, 1, 2, *(edge for edge in edges if edge < 100)])
    lengths = draw(st.lists(st.tuples(cached, new), min_size=1, max_size=max_sequences))
    if draw(st.booleans()):
        lengths.sort(key=lambda length: length[1] > 1)  # decodes in front, as a scheduler has them
    return shape, lengths
