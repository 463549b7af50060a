"""Log probabilities as OpenAI's two kinds of completions tell them."""

from collections.abc import Callable, Sequence
from functools import lru_cache

from pdengine.models.tokenizer import IncrementalDetokenizer, Tokenizer
from pdengine.router.http.replies import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from pdengine.transport.messages import TokenLogprobs

LOWEST = -9999.0  # OpenAI's for what cannot be; JSON has no infinity
KNOWN_TOKENS = 2**15


class TokenNames:
    """What tokens are called. A part of a character is spelled in hexadecimal, since a JSON string cannot
    have it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.completion: Callable[[int], str] = lru_cache(KNOWN_TOKENS)(
            lambda token_id: _name(tokenizer.token_bytes(token_id), "bytes:")
        )
        self.chat: Callable[[int], tuple[str, list[int]]] = lru_cache(KNOWN_TOKENS)(self._chat)

    def _chat(self, token_id: int) -> tuple[str, list[int]]:
        content = self._tokenizer.token_bytes(token_id)
        return _name(content, ""), list(content)

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self._tokenizer, prompt_ids)


class CompletionScribe:
    """Writes the log probabilities of one choice, which may come in pieces."""

    def __init__(self, names: TokenNames, prompt_ids: Sequence[int]) -> None:
        self._names = names
        self._prompt_ids = prompt_ids
        self._detokenizer = names.detokenizer(prompt_ids)
        self._num_characters = 0

    def of_prompt(self, text: str, logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Of the echoed prompt, which is `text`. To be called first."""
        detokenizer, self._detokenizer = self._detokenizer, self._names.detokenizer()
        written = self._write(self._prompt_ids, [None, *logprobs])
        self._detokenizer, self._num_characters = detokenizer, len(text)
        return written

    def of_answer(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        return self._write(token_ids, logprobs)

    def _write(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> CompletionLogprobs:
        name, offsets = self._names.completion, []
        for token_id in token_ids:
            offsets.append(self._num_characters)
            self._num_characters += len(self._detokenizer.push([token_id]))
        scored = list(zip(token_ids, logprobs, strict=True))
        return CompletionLogprobs(
            [name(token_id) for token_id in token_ids],
            [None if score is None else _finite(score.logprob) for _, score in scored],
            [
                None
                if score is None
                else {name(top): _finite(logprob) for top, logprob in score.top}
                | {name(token_id): _finite(score.logprob)}
                for token_id, score in scored
            ],
            offsets,
        )


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> ChatLogprobs:
    """Of a part of an answer."""
    content = []
    for token_id, score in zip(token_ids, logprobs, strict=True):
        name, content_bytes = names.chat(token_id)
        top = [TopLogprob(*_chat_entry(names, top_id, logprob)) for top_id, logprob in score.top]
        content.append(ChatTokenLogprob(name, _finite(score.logprob), content_bytes, top))
    return ChatLogprobs(content)


def _chat_entry(names: TokenNames, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    name, content = names.chat(token_id)
    return name, _finite(logprob), content


def _name(content: bytes, prefix: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST  # of what is no number, too
