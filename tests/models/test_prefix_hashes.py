"""Names of prefixes: equal exactly for equal tokens, models and salts, however they were computed."""

from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdengine.models.prefix_hashes import HASH_BYTES, PrefixHashes, prefix_root, unpack_hashes

tokens = st.lists(st.integers(0, 3), max_size=30)
block_sizes = st.integers(1, 5)
ROOT = prefix_root("model")


def names(token_ids: list[int], block_size: int = 2, root: bytes = ROOT) -> list[bytes]:
    hashes = PrefixHashes(root, block_size)
    hashes.extend(token_ids)
    return hashes.blocks


@given(tokens, tokens, block_sizes)
def test_names_are_equal_as_far_as_the_tokens_are(first: list[int], second: list[int], size: int) -> None:
    for index, (one, other) in enumerate(zip(names(first, size), names(second, size), strict=False), start=1):
        assert (one == other) == (first[: index * size] == second[: index * size])


@given(tokens, block_sizes)
def test_only_full_blocks_have_names(token_ids: list[int], size: int) -> None:
    result = names(token_ids, size)
    assert len(result) == len(set(result)) == len(token_ids) // size
    assert all(len(name) == HASH_BYTES for name in result)


@given(tokens, block_sizes, st.lists(st.integers(0, 30)))
def test_growing_gives_the_same_names(token_ids: list[int], size: int, lengths: list[int]) -> None:
    hashes = PrefixHashes(ROOT, size)
    for length in [*sorted(lengths), len(token_ids)]:
        hashes.extend(token_ids[:length])
    assert hashes.blocks == names(token_ids, size)


@given(tokens, block_sizes, st.integers(0, 30))
def test_a_chain_goes_on_from_names_that_were_given(token_ids: list[int], size: int, known: int) -> None:
    whole = names(token_ids, size)
    packed = PrefixHashes(ROOT, size, whole[:known]).packed()
    hashes = PrefixHashes(ROOT, size, unpack_hashes(packed))
    hashes.extend(token_ids)
    assert hashes.blocks == whole


def test_names_that_were_given_are_not_changed_by_the_chain_that_goes_on() -> None:
    given_names = names([1, 2])
    hashes = PrefixHashes(ROOT, 2, given_names)
    hashes.extend([1, 2, 3, 4])
    assert len(given_names) == 1


def test_the_name_of_a_block() -> None:
    """Routers and workers must agree, whatever their versions and byte orders of nowadays."""
    token_bytes = (2**31 - 1).to_bytes(8, "little") + (5).to_bytes(8, "little")
    assert names([2**31 - 1, 5]) == [blake2b(ROOT + token_bytes, digest_size=HASH_BYTES).digest()]


@pytest.mark.parametrize("other", [("model", "s"), ("mode", "l"), ("model2", ""), ("", "model")])
def test_models_and_salts_share_no_name(other: tuple[str, str]) -> None:
    assert not set(names([1, 2, 3, 4])) & set(names([1, 2, 3, 4], root=prefix_root(*other)))
    assert len(prefix_root(*other)) == HASH_BYTES


def test_the_border_between_model_and_salt_counts() -> None:
    assert prefix_root("a", "bc") != prefix_root("ab", "c")
