"""The requests that the router has in flight. Each ends in exactly one outcome."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import msgspec

from pdengine.models.tokenizer import IncrementalDetokenizer
from pdengine.router.prefixes import PromptPrefix
from pdengine.router.registry import Demand
from pdengine.router.stop_strings import StopSearch
from pdengine.transport.messages import (
    Choice,
    FinishReason,
    KVLease,
    PrefixNames,
    SamplingParams,
    TokenLogprobs,
    TransferStats,
    Usage,
    Work,
)

EXPECTED_ANSWER_TOKENS = 512  # of an answer that may be longer


@dataclass(eq=False)
class Answer:
    """One of the answers to a prompt, as far as it is written.

    min_tokens: no stop string counts that comes up within so many. detokenizer: set when the prompt is
    tokenized. search: None without stop strings. include_stop: the text has the token that stops the answer.
    """

    index: int
    min_tokens: int = 0
    output_ids: list[int] = field(default_factory=list)
    detokenizer: IncrementalDetokenizer | None = None
    search: StopSearch | None = None
    include_stop: bool = False
    finish_reason: FinishReason | None = None

    def append(self, token_id: int, finish_reason: FinishReason | None) -> str:
        """Take the next token; the text that is certain with it.

        The token that stops an answer is no part of its text, unless it shows that. A stop string ends the
        answer, too.
        """
        assert self.detokenizer is not None
        self.output_ids.append(token_id)
        self.finish_reason = finish_reason
        is_hidden = finish_reason == "stop" and not self.include_stop
        text = "" if is_hidden else self.detokenizer.push([token_id])
        if finish_reason is not None:
            text += self.detokenizer.finish()
        if self.search is None:
            return text
        text, has_stopped = self.search.push(text, may_stop=len(self.output_ids) > self.min_tokens)
        if has_stopped:
            self.finish_reason = "stop"
        return text if finish_reason is None or has_stopped else text + self.search.finish()


@dataclass(eq=False)
class Request:
    """client, tag: who asked, and its name for the request. worker: engine id of the one that has it now.

    choices: one per answer that was asked for. prefix: names of the prompt's blocks. cached_tokens: what the
    attempt that wrote the first token did not have to compute of the prompt. early_worker: engine id of a
    decode worker that pulls the prompt while it is computed, or holds the blocks that it is pushed into.
    prompt_logprobs: of the prompt's tokens but the first, as far as they were told; None if nobody waits for
    them. refused_by: workers that had no room for this attempt. lease: held for this request and not yet
    taken over by a decode worker (`lease_accepted`) or read.
    """

    request_id: str
    client: bytes
    tag: int
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    choices: list[Answer] = field(init=False)
    prefix: PromptPrefix | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int | None = None
    began_at: float = field(default_factory=monotonic)
    attempt: int = 0
    worker: str | None = None
    early_worker: str | None = None
    refused_by: set[str] = field(default_factory=set)
    prefill_worker: str = ""
    decode_worker: str = ""
    lease: KVLease | None = None
    lease_accepted: bool = False
    transfer: TransferStats | None = None
    deadline: asyncio.TimerHandle | None = None
    task: asyncio.Task[Any] | None = None  # while it is being tokenized

    def __post_init__(self) -> None:
        self.choices = [Answer(index, self.sampling.min_tokens) for index in range(self.n)]
        if self.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = []

    @property
    def unfinished(self) -> list[Answer]:
        return [choice for choice in self.choices if choice.finish_reason is None]

    @property
    def has_output(self) -> bool:
        """Whether any token has been written."""
        return any(choice.output_ids for choice in self.choices)

    @property
    def has_diverged(self) -> bool:
        """Whether answers are to be continued that differ, so that one prefill cannot serve them all."""
        unfinished = self.unfinished
        return len(unfinished) > 1 and any(choice.output_ids for choice in unfinished)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether there are tokens of the prompt whose log probabilities were asked for and not told yet."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_ids) - 1

    @property
    def prefix_names(self) -> PrefixNames | None:
        return None if self.prefix is None else self.prefix.names

    def find_choice(self, index: int) -> Answer | None:
        """The answer of this index, if it is still being written."""
        if not 0 <= index < len(self.choices) or self.choices[index].finish_reason is not None:
            return None
        return self.choices[index]

    def note_cached(self, worker: str, num_tokens: int) -> None:
        """A worker has found so much of the prompt in its prefix cache.

        The first word of who computes the prompt counts. After a failure in the middle of an answer more is
        found, some of it computed for this very request, and a decode worker saves a part of the pull with
        what it finds, no computation.
        """
        if worker == self.prefill_worker and self.cached_tokens is None and not self.has_output:
            self.cached_tokens = min(num_tokens, len(self.prompt_ids))

    def demand(self) -> Demand:
        """What the answers that are still to be written need of a worker."""
        prompt, written = len(self.prompt_ids), [len(choice.output_ids) for choice in self.unfinished]
        longest = self.sampling.max_tokens - 1
        return Demand(
            num_tokens=prompt + sum(written),
            longest=prompt + longest,
            expected=prompt + sum(min(longest, count + EXPECTED_ANSWER_TOKENS) for count in written),
            prefix=self.prefix,
        )

    def work(self) -> Work:
        sampling = self.sampling
        if sampling.prompt_logprobs is not None and not self.lacks_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return Work(
            self.request_id,
            self.attempt,
            self.prompt_ids,
            [Choice(choice.index, list(choice.output_ids)) for choice in self.unfinished],
            sampling=sampling,
            priority=self.priority,
            prefix=self.prefix_names,
        )

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=sum(len(choice.output_ids) for choice in self.choices),
            cached_tokens=self.cached_tokens or 0,
        )


class Ledger:
    """Requests by id and by (client, tag)."""

    def __init__(self) -> None:
        self._by_id: dict[str, Request] = {}
        self._by_tag: dict[tuple[bytes, int], Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._by_id

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._by_id.values()))

    def add(self, request: Request) -> None:
        self._by_id[request.request_id] = request
        self._by_tag[request.client, request.tag] = request

    def remove(self, request: Request) -> None:
        del self._by_id[request.request_id]
        del self._by_tag[request.client, request.tag]

    def find(self, client: bytes, tag: int) -> Request | None:
        return self._by_tag.get((client, tag))

    def current(self, request_id: str, attempt: int) -> Request | None:
        """The request, if it is in flight and `attempt` is its latest: older ones have been given up."""
        request = self._by_id.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    def of_client(self, client: bytes) -> list[Request]:
        return [request for request in self._by_id.values() if request.client == client]

    def of_worker(self, engine_id: str) -> list[Request]:
        return [request for request in self._by_id.values() if request.worker == engine_id]

    def of_reserver(self, engine_id: str) -> list[Request]:
        """Requests whose KV cache is to come to this worker, and is not there yet."""
        return [request for request in self._by_id.values() if request.early_worker == engine_id]

    def of_holder(self, engine_id: str) -> list[Request]:
        """Requests whose KV cache this worker holds for another one that has not pulled it yet."""
        return [r for r in self._by_id.values() if r.lease is not None and r.lease.engine_id == engine_id]
