"""The tensors of one step: chunks of prompts and decode tokens of all sequences, packed without padding."""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pdengine.engine.sampler import sampling_arrays
from pdengine.engine.sequence import Sequence, blocks_for
from pdengine.engine.step import Chunk
from pdengine.engine.step_extras import NO_EXTRAS, ExtrasPlan, StepExtras
from pdengine.engine.step_upload import Array, Upload
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.kernels import SamplingBatch


@dataclass(frozen=True)
class Batch:
    """Made by `build_batch` from the scheduler's chunks; read by the runner, the model and the kernels."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    attention: AttentionBatch
    sampled: list[Sequence]  # answers whose known tokens end in this batch: they get a next token
    sampled_rows: Tensor  # [len(sampled)] int64: row of the last token of each; siblings share one
    sampling: SamplingBatch  # how each of them is drawn
    extras: StepExtras


def build_batch(
    chunks: Sequence_[Chunk],
    block_size: int,
    upload: Upload,
    *,
    eos_token_ids: Sequence_[int] = (),
    vocab_size: int = 0,
) -> Batch:
    """Pack `chunks`, in order. Reads the sequences' tokens, blocks and num_computed; changes nothing but
    their logit tables.

    eos_token_ids, vocab_size: of the model, for sequences that ask for more than tokens.
    """
    starts = np.array([chunk.sequence.num_computed for chunk in chunks], np.int64)
    new_tokens = np.array([chunk.num_tokens for chunk in chunks], np.int64)
    context_lengths = starts + new_tokens
    query_starts = np.concatenate(([0], np.cumsum(new_tokens)))
    rows = np.repeat(np.arange(len(chunks)), new_tokens)  # the sequence of each token
    positions = np.arange(len(rows)) + (starts - query_starts[:-1])[rows]
    block_tables = _block_tables(chunks, context_lengths.tolist(), block_size)
    sampled = [answer for chunk in chunks if chunk.samples for answer in chunk.sequence.answers]
    num_sampled = [chunk.sequence.num_slots if chunk.samples else 0 for chunk in chunks]
    arrays: list[Array] = [
        _token_ids(chunks, len(rows)),
        positions,
        block_tables[rows, positions // block_size],
        positions % block_size,
        block_tables,
        query_starts,
        context_lengths,
        np.repeat(query_starts[1:] - 1, num_sampled),
        *sampling_arrays(sampled),
    ]
    plan, num_plain = None, len(arrays)
    if not all(chunk.sequence.is_plain for chunk in chunks):
        plan = ExtrasPlan(chunks, query_starts.tolist(), eos_token_ids=eos_token_ids, vocab_size=vocab_size)
        arrays += plan.arrays
    tensors = upload(arrays)
    (
        token_ids,
        position_tensor,
        block_ids,
        block_offsets,
        block_table_tensor,
        query_start_tensor,
        context_length_tensor,
        sampled_rows,
        *sampling,
    ) = tensors[:num_plain]
    attention = AttentionBatch(
        block_ids=block_ids,
        block_offsets=block_offsets,
        block_tables=block_table_tensor,
        query_starts=query_start_tensor,
        context_lengths=context_length_tensor,
        query_starts_on_host=query_starts.tolist(),
        context_lengths_on_host=context_lengths.tolist(),
        num_decodes=_leading_single_tokens(chunks),
    )
    extras = NO_EXTRAS if plan is None else plan.on_device(tensors[num_plain:])
    return Batch(
        token_ids, position_tensor, attention, sampled, sampled_rows, SamplingBatch(*sampling), extras
    )


def _token_ids(chunks: Sequence_[Chunk], num_tokens: int) -> npt.NDArray[np.int64]:
    pieces = (
        sequence.token_ids[sequence.num_computed : sequence.num_computed + count]
        for sequence, count in chunks
    )
    return np.fromiter(chain.from_iterable(pieces), np.int64, count=num_tokens)


def _leading_single_tokens(chunks: Sequence_[Chunk]) -> int:
    """How many chunks of one token stand in front: the scheduler puts decoding sequences there."""
    return next((index for index, chunk in enumerate(chunks) if chunk.num_tokens != 1), len(chunks))


def _block_tables(
    chunks: Sequence_[Chunk], context_lengths: list[int], block_size: int
) -> npt.NDArray[np.int64]:
    """[sequences, blocks of the longest context], padded with 0."""
    used = [blocks_for(length, block_size) for length in context_lengths]
    tables = np.zeros((len(chunks), max(used)), np.int64)
    for row, (chunk, num_blocks) in enumerate(zip(chunks, used, strict=True)):
        tables[row, :num_blocks] = chunk.sequence.block_ids[:num_blocks]
    return tables
