"""Paged attention in plain torch: the reference for our kernels, and what a CPU runs for other shapes.

The context of a sequence is gathered into a contiguous tensor and handed to torch's
`scaled_dot_product_attention`. Decode tokens are gathered and computed for many sequences at once.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pdengine.triton_kernels.attention import AttentionBatch

# Gathered K and V of one decode call: few enough bytes to stay in a core's cache between the gather and the
# attention, and for malloc to reuse the pages instead of faulting in new ones.
DECODE_GATHER_BYTES = 8 << 20
# Query rows per call for a chunk: bounds the mask, and skips the keys that lie in a row's future.
CHUNK_QUERY_ROWS = 256


def store_kv(
    kv_pool: Tensor, layer: int, key: Tensor, value: Tensor, block_ids: Tensor, block_offsets: Tensor
) -> None:
    """Write one layer's new `key` and `value`, `[tokens, num_kv_heads, head_dim]`, into the cache.

    `block_ids` and `block_offsets` are those of an `AttentionBatch`.
    """
    kv_pool[:, :, layer, 0][block_ids, :, block_offsets] = key
    kv_pool[:, :, layer, 1][block_ids, :, block_offsets] = value


def paged_attention(
    query: Tensor,
    kv_pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: list[int],
    context_lengths: list[int],
    scale: float,
) -> Tensor:
    """See `Kernels.paged_attention`; the tables and lists are those of an `AttentionBatch`."""
    output = torch.empty_like(query)
    decodes = []
    for sequence, context_length in enumerate(context_lengths):
        start, end = query_starts[sequence], query_starts[sequence + 1]
        if end - start == 1:
            decodes.append(sequence)
            continue
        kv = _gather(kv_pool, layer, block_tables[sequence : sequence + 1], [context_length])
        output[start:end] = _attend_chunk(query[start:end], kv[:, 0], scale)

    bytes_per_token = 2 * kv_pool.shape[1] * kv_pool.shape[5] * _compute_dtype(kv_pool).itemsize
    for group in _decode_groups(decodes, context_lengths, DECODE_GATHER_BYTES // bytes_per_token):
        rows = torch.tensor([query_starts[sequence] for sequence in group], device=query.device)
        sequences = torch.tensor(group, device=query.device)
        lengths = [context_lengths[sequence] for sequence in group]
        kv = _gather(kv_pool, layer, block_tables[sequences], lengths)
        output[rows] = _attend_decodes(query[rows], kv, lengths, scale)
    return output


def attend(query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float) -> Tensor:
    """See `Kernels.paged_attention`."""
    return paged_attention(
        query,
        kv_pool,
        layer,
        batch.block_tables,
        batch.query_starts_on_host,
        batch.context_lengths_on_host,
        scale,
    )


def _decode_groups(
    sequences: list[int], context_lengths: list[int], max_gathered_tokens: int
) -> list[list[int]]:
    """Split decodes into groups of similar context length: padding at most doubles what a group gathers."""
    groups: list[list[int]] = []
    for sequence in sorted(sequences, key=lambda sequence: context_lengths[sequence], reverse=True):
        if groups:
            longest = context_lengths[groups[-1][0]]
            fits = (len(groups[-1]) + 1) * longest <= max_gathered_tokens
            if fits and 2 * context_lengths[sequence] >= longest:
                groups[-1].append(sequence)
                continue
        groups.append([sequence])
    return groups


def _compute_dtype(kv_pool: Tensor) -> torch.dtype:
    """CPUs compute in float32: more exact than bfloat16, and torch's kernel is also up to twice as fast."""
    return torch.float32 if kv_pool.device.type == "cpu" else kv_pool.dtype


def _gather(kv_pool: Tensor, layer: int, block_tables: Tensor, context_lengths: list[int]) -> Tensor:
    """Copy whole contexts out of the cache: `[2, sequences, num_kv_heads, max(context_lengths), head_dim]`.

    Places past a sequence's end repeat its own last token. They are masked later, but a stale NaN or infinity
    of another request would survive the mask as 0 * NaN.
    """
    _, num_kv_heads, num_layers, _, block_size, head_dim = kv_pool.shape
    device = kv_pool.device
    last_token = torch.tensor(context_lengths, device=device).unsqueeze(1) - 1
    tokens = torch.arange(max(context_lengths), device=device).minimum(last_token)  # [sequences, max_length]
    blocks = block_tables.gather(1, tokens // block_size)
    # Row numbers of the pool seen as [rows, head_dim], in int64: see the strides of the pool's dimensions.
    token_rows = blocks * (num_kv_heads * num_layers * 2 * block_size) + tokens % block_size
    head_rows = (torch.arange(num_kv_heads, device=device) * num_layers + layer) * (2 * block_size)
    key_rows = token_rows.unsqueeze(1) + head_rows.unsqueeze(1)  # [sequences, num_kv_heads, max_length]
    rows = torch.stack((key_rows, key_rows + block_size))
    gathered = kv_pool.view(-1, head_dim).index_select(0, rows.view(-1))
    return gathered.view(*rows.shape, head_dim).to(_compute_dtype(kv_pool))


def _attend_decodes(query: Tensor, kv: Tensor, context_lengths: list[int], scale: float) -> Tensor:
    """`query` `[sequences, num_heads, head_dim]`, `kv` as gathered -> the shape and dtype of `query`."""
    _, sequences, num_kv_heads, max_length, head_dim = kv.shape
    lengths = torch.tensor(context_lengths, device=query.device)
    mask = torch.arange(max_length, device=query.device) < lengths.view(-1, 1, 1, 1)
    # The heads that share a KV head become its query rows, so that K and V are not repeated.
    grouped = query.to(kv.dtype).view(sequences, num_kv_heads, -1, head_dim)
    attended = scaled_dot_product_attention(grouped, kv[0], kv[1], attn_mask=mask, scale=scale)
    return attended.reshape(query.shape).to(query.dtype)


def _attend_chunk(query: Tensor, kv: Tensor, scale: float) -> Tensor:
    """`query` `[tokens, num_heads, head_dim]`, `kv` `[2, num_kv_heads, context, head_dim]` of one sequence.

    Token i of the chunk sits at position `context - tokens + i` and sees everything up to that.
    """
    num_tokens, num_heads, head_dim = query.shape
    _, num_kv_heads, context_length, _ = kv.shape
    num_cached = context_length - num_tokens
    group_size = num_heads // num_kv_heads
    grouped = query.to(kv.dtype).view(num_tokens, num_kv_heads, group_size, head_dim).permute(1, 2, 0, 3)
    # K and V are shared by the heads of a group through a stride of 0.
    key, value = kv.unsqueeze(2).expand(-1, -1, group_size, -1, -1)
    output = torch.empty_like(query)
    for start in range(0, num_tokens, CHUNK_QUERY_ROWS):
        end = min(start + CHUNK_QUERY_ROWS, num_tokens)
        visible = num_cached + end
        positions = torch.arange(num_cached + start, visible, device=query.device).unsqueeze(1)
        mask = torch.arange(visible, device=query.device) <= positions
        attended = scaled_dot_product_attention(
            grouped[:, :, start:end], key[:, :, :visible], value[:, :, :visible], attn_mask=mask, scale=scale
        )
        output[start:end] = attended.permute(2, 0, 1, 3).reshape(end - start, num_heads, head_dim)
    return output
