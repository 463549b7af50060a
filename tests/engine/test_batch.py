"""The tensors of a step: which token goes where, and who gets a next one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import make_sequence

from pdengine.engine.batch import build_batch
from pdengine.engine.sequence import Mode, Sequence, blocks_for
from pdengine.engine.step import Chunk
from pdengine.engine.step_upload import upload_for

UPLOAD = upload_for(torch.device("cpu"))


def running(name: str, token_ids: list[int], block_ids: list[int], num_computed: int = 0) -> Sequence:
    sequence = make_sequence(name, Mode.WHOLE, token_ids)
    sequence.block_ids, sequence.num_computed = block_ids, num_computed
    return sequence


def test_a_mixed_step() -> None:
    decoding = running("decoding", [10, 11, 12, 13, 14], [7, 3], num_computed=4)
    part = running("part of a prompt", [20, 21, 22, 23, 24, 25], [5, 1, 9], num_computed=1)
    whole = running("whole prompt", [30, 31], [2])
    batch = build_batch([Chunk(decoding, 1), Chunk(part, 4), Chunk(whole, 2)], 4, UPLOAD)

    assert batch.token_ids.tolist() == [14, 21, 22, 23, 24, 30, 31]
    assert batch.positions.tolist() == [4, 1, 2, 3, 4, 0, 1]
    assert batch.attention.block_ids.tolist() == [3, 5, 5, 5, 1, 2, 2]
    assert batch.attention.block_offsets.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert batch.attention.query_starts.tolist() == [0, 1, 5, 7]
    assert batch.attention.context_lengths.tolist() == [5, 5, 2]
    assert batch.attention.block_tables.tolist() == [[7, 3], [5, 1], [2, 0]]
    assert batch.attention.query_starts_on_host == [0, 1, 5, 7]
    assert batch.attention.context_lengths_on_host == [5, 5, 2]
    assert batch.attention.num_decodes == 1
    assert batch.sampled == [decoding, whole]
    assert batch.sampled_rows.tolist() == [0, 6]


def test_a_chunk_of_one_token_behind_longer_ones_is_not_counted_as_decoding() -> None:
    chunks = [
        Chunk(running("decoding", [1, 2], [0], num_computed=1), 1),
        Chunk(running("prompt", [1, 2, 3], [1]), 3),
        Chunk(running("what the budget left", [1, 2, 3], [2]), 1),
    ]
    assert build_batch(chunks, 4, UPLOAD).attention.num_decodes == 1
    assert build_batch(chunks[1:], 4, UPLOAD).attention.num_decodes == 0


def test_a_step_that_samples_nothing() -> None:
    batch = build_batch([Chunk(running("prompt", [1, 2, 3], [0]), 2)], 4, UPLOAD)
    assert batch.sampled == []
    assert batch.sampled_rows.shape == (0,)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Chunk], int]:
    block_size = draw(st.integers(1, 6))
    free = draw(st.permutations(range(60)))
    chunks: list[Chunk] = []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 12))
        needed = blocks_for(length, block_size)
        block_ids, free = free[:needed], free[needed:]
        num_computed = draw(st.integers(0, length - 1))
        token_ids = [100 * number + position for position in range(length)]
        sequence = running(f"request-{number}", token_ids, block_ids, num_computed)
        chunks.append(Chunk(sequence, draw(st.integers(1, length - num_computed))))
    return chunks, block_size


@given(steps())
@settings(max_examples=60, deadline=None)
def test_every_token_stands_where_its_block_table_says(step: tuple[list[Chunk], int]) -> None:
    chunks, block_size = step
    batch = build_batch(chunks, block_size, UPLOAD)
    attention = batch.attention
    # A pool that holds token ids instead of keys and values: earlier steps first, then this one.
    pool = torch.full((60, block_size), -1)
    for sequence, _ in chunks:
        for position in range(sequence.num_computed):
            block_id = sequence.block_ids[position // block_size]
            pool[block_id, position % block_size] = sequence.token_ids[position]
    pool[attention.block_ids, attention.block_offsets] = batch.token_ids

    for row, chunk in enumerate(chunks):
        length = int(attention.context_lengths[row])
        assert length == chunk.sequence.num_computed + chunk.num_tokens
        assert (
            pool[attention.block_tables[row]].flatten()[:length].tolist() == chunk.sequence.token_ids[:length]
        )
        start, end = attention.query_starts[row : row + 2].tolist()
        assert batch.positions[start:end].tolist() == list(range(length - chunk.num_tokens, length))
    assert attention.query_starts[-1] == len(batch.token_ids)
    assert batch.sampled == [chunk.sequence for chunk in chunks if chunk.samples]
    last_tokens = [sequence.token_ids[-1] for sequence in batch.sampled]
    assert batch.token_ids[batch.sampled_rows].tolist() == last_tokens
    tensors = [
        batch.token_ids,
        batch.positions,
        batch.sampled_rows,
        attention.block_ids,
        attention.block_tables,
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
