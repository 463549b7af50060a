"""The tokenizer of the demo checkpoint: whole words, and bytes for everything else.

It is a byte-level BPE (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019) without a
single merge. `ignore_merges` makes a known word one token; any other text falls to the 256 byte tokens. So
`decode(encode(text)) == text` holds for every text. A word's token includes the space before it, as in GPT-2:
" violin" is one token, and "violin" without the space is six bytes.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pdengine.models.demo.words import (
    ARTICLES,
    COLOURS,
    LINE_STARTS,
    NAMES,
    OBJECTS,
    PLACES,
    PLAIN_WORDS,
)

BEGIN = "<|begin|>"
END = "<|end|>"
SPECIAL_TOKENS = (BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """Builds the tokenizer; token ids run over special tokens, bytes, then words, in the order of `words`."""
    spaced_words = (*NAMES, *PLACES, *ARTICLES, *COLOURS, *OBJECTS, *LINE_STARTS, *PLAIN_WORDS)
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*SPECIAL_TOKENS, *byte_tokens, *(f"Ġ{word}" for word in spaced_words), *LINE_STARTS, "'s")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens), "a word stands in two groups"

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, vocabulary[BEGIN])],
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token.

    Raises:
        ValueError: if the vocabulary has no such token.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the demo checkpoint's vocabulary has no token {token!r}")
    return found


def word_id(tokenizer: Tokenizer, word: str) -> int:
    """The id of a word with the space before it; raises as `token_id` does."""
    return token_id(tokenizer, f"Ġ{word}")
