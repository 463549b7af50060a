"""The tensors of one step: chunks of prompts and decode tokens of all sequences, packed without padding."""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import torch
from torch import Tensor

from pdengine.engine.scheduler import Chunk
from pdengine.engine.sequence import Sequence
from pdengine.triton_kernels.attention import AttentionBatch


@dataclass(frozen=True)
class Batch:
    """Made by `build_batch` from the scheduler's chunks; read by the runner, the model and the kernels."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    attention: AttentionBatch
    sampled: list[Sequence]  # sequences whose known tokens end in this batch: they get a next token
    sampled_rows: Tensor  # [len(sampled)] int64: row of the last token of each


def build_batch(chunks: Sequence_[Chunk], block_size: int, device: torch.device) -> Batch:
    """Pack `chunks`, in order. Reads the sequences' tokens, blocks and num_computed; changes nothing."""
    token_ids: list[int] = []
    positions: list[int] = []
    block_ids: list[int] = []
    query_starts = [0]
    context_lengths: list[int] = []
    sampled: list[Sequence] = []
    sampled_rows: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        start, end = sequence.num_computed, sequence.num_computed + chunk.num_tokens
        token_ids.extend(sequence.token_ids[start:end])
        positions.extend(range(start, end))
        block_ids.extend(sequence.block_ids[position // block_size] for position in range(start, end))
        query_starts.append(len(token_ids))
        context_lengths.append(end)
        if chunk.samples:
            sampled.append(sequence)
            sampled_rows.append(len(token_ids) - 1)

    def to_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    position_tensor = to_device(positions)
    attention = AttentionBatch(
        block_ids=to_device(block_ids),
        block_offsets=position_tensor % block_size,
        block_tables=_block_tables(chunks, context_lengths, block_size).to(device),
        query_starts=to_device(query_starts),
        context_lengths=to_device(context_lengths),
    )
    return Batch(to_device(token_ids), position_tensor, attention, sampled, to_device(sampled_rows))


def _block_tables(chunks: Sequence_[Chunk], context_lengths: list[int], block_size: int) -> Tensor:
    """[sequences, blocks of the longest context] int64, padded with 0."""
    used = [-(-length // block_size) for length in context_lengths]
    tables = torch.zeros(len(chunks), max(used), dtype=torch.int64)
    for row, (chunk, num_blocks) in enumerate(zip(chunks, used, strict=True)):
        tables[row, :num_blocks] = torch.tensor(chunk.sequence.block_ids[:num_blocks])
    return tables
