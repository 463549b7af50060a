"""The requests that the router has in flight. Each ends in exactly one outcome."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pdengine.models.tokenizer import IncrementalDetokenizer
from pdengine.transport.messages import KVLease, SamplingParams, TransferStats, Usage, Work


@dataclass(eq=False)
class Request:
    """client, tag: who asked, and its name for the request. worker: engine id of the one that has it now.

    early_worker: engine id of a decode worker that pulls the prompt while it is computed, or holds the blocks
    that it is pushed into. refused_by: workers that had no room for this attempt. lease: held for this
    request and not yet taken over by a decode worker (`lease_accepted`) or read.
    """

    request_id: str
    client: bytes
    tag: int
    sampling: SamplingParams
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    detokenizer: IncrementalDetokenizer | None = None
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

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_total_tokens(self) -> int:
        """Tokens of prompt and longest answer."""
        return len(self.prompt_ids) + self.sampling.max_tokens

    def work(self) -> Work:
        return Work(
            self.request_id, self.attempt, self.prompt_ids, list(self.output_ids), sampling=self.sampling
        )

    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.prompt_ids), completion_tokens=len(self.output_ids))


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
