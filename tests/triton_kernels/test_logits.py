"""Log probabilities, ranks and the likeliest tokens of rows of logits."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdengine.triton_kernels import logits as module
from pdengine.triton_kernels.logits import LogitAdjustment, join, score, slice_rows


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(0, 8),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_equally_likely_tokens_come_in_the_order_of_their_ids(
    rows: list[list[int]], num_top: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)))
    scores = score(torch.tensor(rows, dtype=torch.float32), torch.tensor(chosen), num_top)
    for row, logits in enumerate(rows):
        order = sorted(range(6), key=lambda token, x=logits: (-x[token], token))  # type: ignore[misc]
        total = math.log(sum(math.exp(x) for x in logits))
        assert scores.top_ids[row].tolist() == order[:num_top]
        assert scores.ranks[row] == 1 + sum(x > logits[chosen[row]] for x in logits)
        expected = torch.tensor([logits[token] - total for token in [chosen[row], *order[:num_top]]])
        found = torch.cat([scores.logprobs[row : row + 1], scores.top_logprobs[row]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_large_vocabulary_is_ordered_like_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = (8 * torch.randn(3, 50_000, generator=generator)).round() / 4  # hundreds share a number
    scores = score(rows, torch.zeros(3, dtype=torch.int64), 20)
    expected = rows.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores.top_ids, expected.indices[:, :20])
    assert torch.equal(scores.top_logprobs, expected.values[:, :20])


def test_extreme_logits_are_ordered_too() -> None:
    row = torch.tensor([[-math.inf, 3e38, -3e38, 0.0, -0.0, 1e-45]])
    scores = score(row, torch.tensor([0]), 6)
    assert scores.top_ids.tolist() == [[1, 3, 4, 5, 0, 2]]  # to float32 all but the first are impossible
    assert scores.ranks.tolist() == [5]


def test_slices_are_what_one_piece_is() -> None:
    rows, ids = torch.randn(7, 11), torch.arange(7)
    whole = score(rows, ids, 3)
    parts = [score(rows[part], ids[part], 3) for part in torch.split(torch.arange(7), 3)]
    for one, other in zip(whole, join(parts), strict=True):
        torch.testing.assert_close(one, other)
    assert slice_rows(module.SLICE_LOGITS * 2) == 1


def test_nothing_waits_for_the_device() -> None:
    """Tensors without numbers raise where somebody wants to know one."""
    meta = torch.device("meta")
    logits = torch.empty(4, 100, device=meta)
    rows, ids = (torch.empty(9, dtype=torch.int64, device=meta) for _ in range(2))
    numbers = [torch.empty(9, device=meta) for _ in range(3)]
    adjustment = LogitAdjustment(rows, ids, *numbers)
    adjustment.restore(logits, adjustment.apply(logits))
    asked = torch.empty(3, dtype=torch.int64, device=meta)
    scores = join([score(logits[part], asked[part], 5) for part in torch.split(asked, 2)])
    assert scores.top_logprobs.shape == (3, 5)
