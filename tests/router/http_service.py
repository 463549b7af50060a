"""An HTTP server in front of the router of a fake cluster."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fake_cluster import DEADLINE_SECONDS, FakeCluster, FakeWorker, running_cluster

from pdengine.models.demo.facts import checkpoint_directory
from pdengine.router.http.config import HttpConfig
from pdengine.router.http.server import HttpServer
from pdengine.transport.messages import Abort, PrefillAndDecode, Work

MODEL = "demo"
TEXT = "What is in the box of Joseph?"


def http_config(*router_addresses: str, **changes: Any) -> HttpConfig:
    options: dict[str, Any] = {
        "model_directory": checkpoint_directory(),
        "drain_seconds": 1,
        "connect_seconds": 0.5,
        **changes,
    }
    return HttpConfig("127.0.0.1:0", router_addresses, served_model_name=MODEL, **options)


class Served:
    """A fake cluster of one worker, an HTTP server before it, and a client of that."""

    def __init__(self, cluster: FakeCluster, worker: FakeWorker, server: HttpServer) -> None:
        self.cluster = cluster
        self.worker = worker
        self.url = server.url
        self.client = httpx.AsyncClient(base_url=server.url, timeout=DEADLINE_SECONDS)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"prompt": TEXT, **fields})

    def start(self, path: str = "/v1/completions", **fields: Any) -> asyncio.Task[httpx.Response]:
        """A request in the background; its answer is read whole."""
        fields = {"prompt": TEXT, **fields} if path == "/v1/completions" else fields
        return asyncio.create_task(self.client.post(path, json=fields))

    async def open_stream(self, token_id: int, **fields: Any) -> tuple[httpx.Response, Work]:
        """A stream whose first token is there, and its work; whoever reads it must close it."""
        request = self.client.build_request(
            "POST", "/v1/completions", json={"prompt": TEXT, "stream": True, **fields}
        )
        opening = asyncio.create_task(self.client.send(request, stream=True))
        work = await self.work()
        self.worker.send_tokens(work, token_id)
        return await opening, work

    async def work(self) -> Work:
        return (await self.worker.expect(PrefillAndDecode)).work

    async def expect_abort(self, work: Work) -> None:
        await self.worker.expect(Abort, request_id=work.request_id)


@asynccontextmanager
async def served(*, max_context: int = 2048, num_blocks: int = 1024, **changes: Any) -> AsyncIterator[Served]:
    """At the end the router must have nothing left of any request."""
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified", max_context=max_context, num_blocks=num_blocks)
        server = HttpServer(http_config(cluster.router.client_address, **changes))
        server.start()
        service = Served(cluster, worker, server)
        try:
            yield service
        finally:
            await service.client.aclose()
            await asyncio.to_thread(server.close)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must have the shape that OpenAI's clients expect."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def events_of(content: str) -> list[Any]:
    """The data of server-sent events; `[DONE]` as it is."""
    events = []
    for line in content.removesuffix("\n\n").split("\n\n"):
        assert line.startswith("data: "), line
        data = line.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events
