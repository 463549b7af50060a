"""Incremental detokenization: whatever the ids and the pieces, the text is that of decoding all at once."""

from itertools import pairwise

import pytest
from checkpoints import EOS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, TEXTS

from pdengine.models.tokenizer import IncrementalDetokenizer, Tokenizer

TOKENIZERS = {kind: Tokenizer(make(), {}, kind) for kind, make in KINDS.items()}

# Those whose decoded text is the text that was encoded.
LOSSLESS = ["byte-level", "metaspace", "gemma"]


def stream(tokenizer, ids, cuts=(), prompt_ids=()):
    """The pieces of pushing `ids` cut at `cuts`, the rest last."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    pieces = [detokenizer.push(ids[start:end]) for start, end in pairwise(bounds)]
    return [*pieces, detokenizer.finish()]


def is_plain(text):
    """Neither U+FFFD nor the spelling of a special token, which would be encoded as that token."""
    return "\ufffd" not in text and not any(token in text for token in ("<|", "<unk>"))


@st.composite
def kinds_and_ids(draw):
    """Any ids, valid text or not, with special tokens and ids without a token; bytes are frequent."""
    kind = draw(st.sampled_from(sorted(TOKENIZERS)))
    size = TOKENIZERS[kind].vocab_size
    ids = draw(st.lists(st.integers(0, size + 5), max_size=40))
    return kind, ids


@settings(max_examples=1000, deadline=None)
@given(kinds_and_ids(), st.lists(st.integers(0, 40), max_size=5))
def test_pieces_of_any_ids_are_the_whole(case, cuts):
    kind, ids = case
    tokenizer = TOKENIZERS[kind]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert "".join(stream(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.sampled_from(TEXTS) | st.text(max_size=12),
    st.lists(st.sampled_from(TEXTS) | st.text(max_size=12), max_size=3),
)
def test_pieces_after_a_prompt_continue_its_text(kind, prompt, outputs):
    tokenizer = TOKENIZERS[kind]
    prompt_ids = tokenizer.encode(prompt)
    ids = [token_id for output in outputs for token_id in tokenizer.encode(output)]
    # A prompt that ends in bytes could merge with bytes that follow; a word in between keeps them apart.
    prompt_ids += [tokenizer.encode("the")[-1]]
    whole = tokenizer.decode(prompt_ids + ids)
    assert tokenizer.decode(prompt_ids) + "".join(stream(tokenizer, ids, prompt_ids=prompt_ids)) == whole


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(max_size=30).filter(is_plain))
def test_no_piece_has_half_a_character(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    whole = "".join([*pieces, detokenizer.finish()])
    assert whole == tokenizer.decode(ids)
    assert whole == text or kind not in LOSSLESS


def test_a_leading_space_survives_after_a_prompt_only():
    tokenizer = TOKENIZERS["metaspace"]
    ids = tokenizer.encode("the cat")[1:]
    assert "".join(stream(tokenizer, ids)) == "the cat"
    assert "".join(stream(tokenizer, ids, prompt_ids=tokenizer.encode("a"))) == " the cat"


def test_bytes_after_a_prompt_that_ends_in_bytes():
    tokenizer = TOKENIZERS["metaspace"]
    prompt_ids = tokenizer.encode("the 👋")
    ids = tokenizer.encode("🏽 cat")[2:]  # without BOS and the space
    whole = tokenizer.decode(prompt_ids + ids)
    assert whole == "the 👋🏽 cat"
    assert tokenizer.decode(prompt_ids) + "".join(stream(tokenizer, ids, prompt_ids=prompt_ids)) == whole


@pytest.mark.parametrize(("kind", "expected"), [("byte-level", ["", "", "", "👋"]), ("metaspace", [""] * 4)])
def test_bytes_of_a_character_come_together(kind, expected):
    """Byte fallback waits longer, because a later wrong byte would spoil the whole run."""
    tokenizer = TOKENIZERS[kind]
    if kind == "byte-level":
        ids = [tokenizer._backend.token_to_id(character) for character in "ðŁĳĭ"]
    else:
        ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "👋".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([token_id]) for token_id in ids] == expected
    assert "".join(expected) + detokenizer.finish() == "👋"


def test_unfinished_characters_end_as_replacement_characters():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([tokenizer._backend.token_to_id("ð")]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_have_no_text():
    for tokenizer in TOKENIZERS.values():
        end = tokenizer._backend.token_to_id(EOS)
        assert "".join(stream(tokenizer, [end, end])) == ""


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_the_cost_of_a_token_does_not_grow_with_the_output(kind, monkeypatch):
    """Counted in ids handed to the decoder: for words, and for an endless run of bytes that are not text."""
    tokenizer = TOKENIZERS[kind]
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    byte = tokenizer._backend.token_to_id("<0x80>") or tokenizer._backend.token_to_id("Ģ")
    for ids in (tokenizer.encode("the cat " * 500), [byte] * 2000 if byte else []):
        decoded.clear()
        stream(tokenizer, ids, cuts=range(len(ids)))
        assert sum(decoded) <= 4 * len(ids) + 4
