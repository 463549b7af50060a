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
    "words": words,
    "word-pieces": word_pieces,
}
