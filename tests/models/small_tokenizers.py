"""Small tokenizers of the kinds that checkpoints have: bytes, words with byte fallback, whole words."""

import tokenizers
from checkpoints import BOS, EOS, small_bpe_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

TEXTS = [
    "the cat sat on the mat",
    "  two  spaces\nand a new line ",
    "naïve café, 東京は大きな都市です",
    "👋🏽 emoji 👨‍👩‍👧 and combining e\u0301",
    "a \ufffd replacement character \ufffd\ufffd",
    "",
]


def metaspace() -> tokenizers.Tokenizer:
    """Like Llama 2: BPE over words with a leading ▁, bytes for other characters, a leading space dropped."""
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyz,"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("a", "t"), ("c", "at"), ("▁", "cat")]
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", BOS, EOS])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer


def metaspace_decoder() -> tokenizers.Tokenizer:
    """The same vocabulary with the Metaspace decoder instead of a sequence; it has no byte fallback."""
    tokenizer = metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _unigram(prepend_scheme: str, decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    scores = [("<unk>", 0.0), (BOS, 0.0), (EOS, 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    scores += [(character, -8.0) for character in "▁abcdefghijklmnopqrstuvwxyz,"]
    scores += [(token, -4.0) for token in ("▁the", "▁cat", "the", "cat", "▁▁", "at", "東京", "▁東")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", BOS, EOS])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False), AddedToken("a b")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 2)])
    return tokenizer


def unigram_always() -> tokenizers.Tokenizer:
    """Like T5 and other SentencePiece models; this decoder shows the names of byte tokens."""
    return _unigram("always", decoders.Metaspace(prepend_scheme="always"))


def unigram_first() -> tokenizers.Tokenizer:
    """A space is put before the text, but not after special tokens; bytes are put together again."""
    return _unigram(
        "first",
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]),
    )


def unigram_never() -> tokenizers.Tokenizer:
    return _unigram(
        "never",
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]),
    )


def gemma() -> tokenizers.Tokenizer:
    """Like Gemma: spaces are replaced, none is put before the text, and none is stripped."""
    tokenizer = metaspace()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def stripping_added_tokens() -> tokenizers.Tokenizer:
    """Like Phi-3: Llama 2's tokens, with added ones that swallow the spaces beside them."""
    tokenizer = metaspace()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False)])
    tokenizer.add_tokens(
        [
            AddedToken("<left>", lstrip=True, special=False, normalized=False),
            AddedToken("<right>", rstrip=True, special=False, normalized=False),
            AddedToken(" spaced out ", special=False, normalized=False),
            AddedToken("whole", single_word=True, special=False, normalized=True),
        ]
    )
    return tokenizer


def stripping_each_token() -> tokenizers.Tokenizer:
    """A decoder that strips without fusing first, so from every token."""
    tokenizer = metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", "  "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_ends() -> tokenizers.Tokenizer:
    """Like the first GPT: BPE that marks the ends of words, which become spaces, but not the last one."""
    tokens = ["<unk>", BOS, EOS, *"thecas,", "t</w>", "e</w>", ",</w>", "th", "the</w>", "at</w>", "cat</w>"]
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>"), ("c", "at</w>")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.add_special_tokens(["<unk>", BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def byte_level_sequence() -> tokenizers.Tokenizer:
    """Like Qwen and DeepSeek: a regular expression splits first; the decoder is a sequence of one."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return tokenizer


def words() -> tokenizers.Tokenizer:
    """A token per word, joined by spaces because there is no decoder at all."""
    tokens = ["<unk>", BOS, EOS, *["the", "cat", "sat", "on", "a", "mat", ",", ".", "\ufffd", "東京", "é"]]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    """Like BERT: continuations are marked with ##, punctuation is pulled to the word before."""
    tokens = ["<unk>", BOS, EOS, *["the", "cat", "##s", "##at", "on", ",", ".", "!", "do", "n't"]]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def word_pieces_as_they_are() -> tokenizers.Tokenizer:
    """Without the cleaning up of punctuation."""
    tokenizer = word_pieces()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """Like Llama 3 and Qwen, with added tokens that are not special and not spelled in bytes."""
    tokenizer = tokenizers.Tokenizer.from_str(small_bpe_tokenizer().to_str())
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<tool>", "東京都", "a b")]
    )
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "metaspace-decoder": metaspace_decoder,
    "byte-level-sequence": byte_level_sequence,
    "unigram-always": unigram_always,
    "unigram-first": unigram_first,
    "unigram-never": unigram_never,
    "gemma": gemma,
    "stripping-added-tokens": stripping_added_tokens,
    "stripping-each-token": stripping_each_token,
    "words": words,
    "word-ends": word_ends,
    "word-pieces": word_pieces,
    "word-pieces-as-they-are": word_pieces_as_they_are,
}
