"""Text to token ids and back, as the checkpoint's own `tokenizer.json` says; no torch, no transformers."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pdengine.models.chat_template import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    ChatTemplateError,
    load_chat_templates,
)
from pdengine.models.checkpoint import CheckpointError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
WORD_BOUNDARY = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's spelling of a space
# Tokens that may be held back because their text ends in U+FFFD: a character has at most four bytes.
MAX_HELD_TOKENS = 4


class Tokenizer:
    """Use `Tokenizer.load(directory)`. Safe to share between threads."""

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_templates: Mapping[str, ChatTemplate], name: str
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_templates = chat_templates
        self._name = name
        added = backend.get_added_tokens_decoder()
        self._added_ids = set(added)
        self._special_ids = {i for i, t in added.items() if t.special}
        self._decoder_types = _decoder_types(backend)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json, and the chat templates where there are some.

        Raises CheckpointError for a missing or broken file, ChatTemplateError for a template that does not
        compile.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file (other tokenizer formats are not supported)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise CheckpointError(f"{path}: not a valid tokenizer ({error})") from error
        return cls(backend, load_chat_templates(directory), str(directory))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's own vocab_size is often padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the checkpoint's post-processor adds.

        Raises ValueError for text that is not valid Unicode (lone surrogates).
        """
        return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str = DEFAULT_TEMPLATE,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of the prompt that asks for the assistant's next message.

        Only the template adds special tokens, so there is never a second BOS. Raises ChatTemplateError when
        there is no such template or it fails, ValueError for text that is not valid Unicode.
        """
        prompt = self.chat_template(template).render(messages, add_generation_prompt=add_generation_prompt)
        return self._encode(prompt, add_special_tokens=False)

    def chat_template(self, name: str = DEFAULT_TEMPLATE) -> ChatTemplate:
        """Raises ChatTemplateError when there is none of this name."""
        if not self._chat_templates:
            raise ChatTemplateError(
                f"{self._name}: the model has no chat template, so it only takes plain prompts"
            )
        if name not in self._chat_templates:
            names = ", ".join(sorted(self._chat_templates))
            raise ChatTemplateError(f"{self._name}: no chat template is named {name!r}, there are {names}")
        return self._chat_templates[name]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids that no token has, as in a padded vocabulary, have no text."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has a lone surrogate at character {error.start}") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def spelling(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for an id without a token."""
        return self._backend.id_to_token(token_id)

    def visible_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for special tokens and ids without a token."""
        return None if token_id in self._special_ids else self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, in UTF-8, and may be part of a character; of a special token its
        name, of an id without a token nothing.
        """
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_ids:
            return token.encode()
        if self.is_byte_level:
            return bytes_of(token)
        if self.has_byte_fallback and BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], base=16)])
        return token.replace(WORD_BOUNDARY, " ").encode()

    @property
    def is_byte_level(self) -> bool:
        """Every token is a string of bytes (GPT-2, Llama 3, Qwen), and nothing else happens in decoding."""
        return self._decoder_types == ["ByteLevel"]

    @property
    def has_byte_fallback(self) -> bool:
        """Tokens like <0x0A> are single bytes of characters outside the vocabulary (Llama 2)."""
        return "ByteFallback" in self._decoder_types


class IncrementalDetokenizer:
    """Token ids in, text out as soon as it is certain; one per generated sequence.

    The concatenated pieces are what `Tokenizer.decode` makes of all the ids, special tokens skipped, in the
    context of the prompt: a word's leading space, which decoding drops at the start of a text, is kept after
    `prompt_ids`. No piece ends inside a character. The cost of a token does not grow with the output.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._stream: _ByteLevelStream | _WindowStream
        if tokenizer.is_byte_level:
            self._stream = _ByteLevelStream()
        else:
            self._stream = _WindowStream(tokenizer, prompt_ids)
        self._tokenizer = tokenizer

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        pieces = []
        for token_id in ids:
            token = self._tokenizer.visible_token(token_id)
            if token is not None:
                pieces.append(self._stream.push(token_id, token))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest, when no more tokens come: unfinished characters become U+FFFD."""
        return self._stream.finish()


class _ByteLevelStream:
    """Tokens are bytes in disguise, so a streaming UTF-8 decoder is all it takes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, token: str) -> str:
        return self._decoder.decode(bytes_of(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For all other decoders: decode the new tokens after one token of context, and take what that adds.

    The context only has to show the decoder that this is not the start of the text, so it is the last token
    that stands for itself (not for a byte).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []
        visible = ((token_id, tokenizer.visible_token(token_id)) for token_id in reversed(prompt_ids))
        self._context = next(
            ([token_id] for token_id, token in visible if token is not None and not self._is_byte(token)), []
        )

    def push(self, token_id: int, token: str) -> str:
        self._held.append(token_id)
        # The decoder judges a run of byte tokens as a whole: one that is not UTF-8 spoils it to the start.
        if self._is_byte(token):
            return ""
        text = self._held_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < MAX_HELD_TOKENS:
            return ""
        self._context = [token_id]
        self._held = []
        return text

    def finish(self) -> str:
        text = self._held_text()
        self._held = []
        return text

    def _held_text(self) -> str:
        context_text = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(context_text) :]

    def _is_byte(self, token: str) -> bool:
        return self._tokenizer.has_byte_fallback and BYTE_TOKEN.fullmatch(token) is not None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters are themselves, the rest start at U+0100."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    mapping = {chr(byte): byte for byte in printable}
    mapping.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return mapping


BYTE_OF_CHARACTER: Mapping[str, int] = _byte_of_character()


def bytes_of(token: str) -> bytes:
    """Of a token of a vocabulary that spells bytes as characters."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:  # an added token, spelled in plain text
        return token.encode()


def _decoder_types(backend: tokenizers.Tokenizer) -> list[str]:
    """The kinds of decoding steps, in order, as tokenizer.json names them."""
    if backend.decoder is None:
        return []
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]
