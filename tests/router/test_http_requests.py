"""What HTTP requests become for the router, and what its answers become, with a scripted worker."""

import asyncio
import socket
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_cluster import DEADLINE_SECONDS, on_event_loop, running_cluster
from http_service import TEXT, error_of, events_of, http_config, served

from pdengine.client import RouterUnavailable
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.tokenizer import Tokenizer
from pdengine.router.admission import MAX_TOKENS_OF_CHOICES
from pdengine.router.http import service as service_module
from pdengine.router.http.errors import ApiError
from pdengine.router.http.server import HttpServer
from pdengine.transport.messages import PrefillAndDecode, PrefixHit, SamplingParams, Status, WorkFailed

TOKENIZER = Tokenizer.load(checkpoint_directory())
RED, VIOLIN = TOKENIZER.encode(" red violin", add_special_tokens=False)[:2]
WORDS = [TOKENIZER.decode([RED]), TOKENIZER.decode([VIOLIN])]


@on_event_loop
async def test_a_completion() -> None:
    async with served() as service:
        answer = service.start(
            max_tokens=2, temperature=0.5, top_k=-1, top_p=0.9, min_p=0.1, seed=7, user="me"
        )
        work = await service.work()
        assert work.prompt_ids == TOKENIZER.encode(TEXT)
        assert work.sampling == SamplingParams(
            max_tokens=2, temperature=0.5, top_k=0, top_p=0.9, min_p=0.1, seed=7
        )
        service.worker.send(PrefixHit(work.request_id, work.attempt, 4))
        service.worker.send_tokens(work, RED, VIOLIN, finish_reason="length")
        body = (await answer).json()
    assert body["id"].startswith("cmpl-")
    assert (await answer).headers["x-request-id"] == body["id"]
    assert (body["object"], body["model"]) == ("text_completion", "demo")
    assert body["choices"] == [
        {"index": 0, "text": "".join(WORDS), "finish_reason": "length", "logprobs": None}
    ]
    num_prompt = len(work.prompt_ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 2,
        "total_tokens": num_prompt + 2,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


@on_event_loop
async def test_defaults() -> None:
    """Completions write 16 tokens, chat completions what is left of the context."""
    async with served() as service:
        answer = service.start(stop_token_ids=[9], ignore_eos=True, priority=-3, cache_salt="mine")
        work = await service.work()
        expected = SamplingParams(
            max_tokens=16, seed=work.sampling.seed, stop_token_ids=(9,), ignore_eos=True
        )
        assert (work.sampling, work.priority) == (expected, -3)
        service.worker.send_tokens(work, RED, finish_reason="stop")
        await answer
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
        answer = service.start("/v1/chat/completions", messages=messages)
        work = await service.work()
        assert work.prompt_ids == TOKENIZER.encode_chat([{"role": "user", "content": "a\nb"}])
        assert work.sampling.max_tokens == 2048 - len(work.prompt_ids)
        service.worker.send_tokens(work, RED, VIOLIN, finish_reason="stop")  # the text of a stop is not shown
        body = (await answer).json()
        assert body["object"] == "chat.completion"
        message = {"role": "assistant", "content": WORDS[0], "refusal": None}
        assert body["choices"] == [
            {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        ]
        again = [*messages, message, messages[0]]  # what was answered is part of the next prompt
        answer = service.start("/v1/chat/completions", messages=again, max_tokens=9, max_completion_tokens=3)
        work = await service.work()
        assert work.sampling.max_tokens == 3
        service.worker.send_tokens(work, RED, finish_reason="stop")
        assert (await answer).status_code == 200


@on_event_loop
async def test_a_chat_answer_is_at_most_what_the_kv_cache_holds() -> None:
    """Where that is less than the context."""
    async with served(num_blocks=10) as service:
        answer = service.start("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
        work = await service.work()
        assert work.sampling.max_tokens == 10 * 16 + 1 - len(work.prompt_ids)
        service.worker.send_tokens(work, RED, finish_reason="length")
        assert (await answer).status_code == 200


@on_event_loop
async def test_several_chat_answers_share_what_a_request_may_write() -> None:
    n = 128
    async with served(max_context=16_000) as service:
        messages = [{"role": "user", "content": "a"}]
        answer = service.start("/v1/chat/completions", messages=messages, n=n)
        work = await service.work()
        assert work.sampling.max_tokens == MAX_TOKENS_OF_CHOICES // n
        for choice in range(n):
            service.worker.send_tokens(work, RED, choice=choice, finish_reason="stop")
        assert (await answer).status_code == 200


@pytest.mark.parametrize("is_there", [False, True])
@on_event_loop
async def test_what_the_router_says_is_believed_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """Also that it says nothing: probes do not queue up for it."""
    monkeypatch.setattr(service_module, "STATUS_AGE_SECONDS", DEADLINE_SECONDS)
    num_asked = 0

    async def answer(_address: str | None) -> Status:
        nonlocal num_asked
        num_asked += 1
        if is_there:
            return Status(0, "epoch", [], 0)
        raise RouterUnavailable("silence")

    service = service_module.Service(http_config("tcp://127.0.0.1:1"))
    try:
        monkeypatch.setattr(service.client, "status", answer)
        for _ in range(2):
            with nullcontext() if is_there else pytest.raises(ApiError, match="no router answers"):
                await service.status()
    finally:
        await service.close()
    assert num_asked == 1


@on_event_loop
async def test_a_router_without_workers_leaves_its_requests_to_another() -> None:
    """Alone it says so at once."""
    async with running_cluster() as without, running_cluster() as cluster:
        worker = await cluster.worker("unified")
        addresses = [without.router.client_address, cluster.router.client_address]
        servers = [HttpServer(http_config(*addresses)), HttpServer(http_config(addresses[0]))]
        for server in servers:
            server.start()
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS) as client:

            def post(server: HttpServer) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post(f"{server.url}/v1/completions", json={"prompt": "a"}))

            posts = [post(servers[0]) for _ in range(4)]
            for _ in posts:
                work = (await worker.expect(PrefillAndDecode)).work
                worker.send_tokens(work, RED, finish_reason="stop")
            assert [(await each).status_code for each in posts] == [200] * 4
            assert "no worker" in error_of(await post(servers[1]), 503)["message"]
        for server in servers:
            await asyncio.to_thread(server.close)


@on_event_loop
async def test_of_several_routers_those_with_workers_say_what_a_request_may_have() -> None:
    """The least of it, as any of them may get the request; whichever router came first."""
    async with running_cluster() as without, running_cluster() as large, running_cluster() as small:
        await large.worker("unified", max_context=2000)
        await small.worker("unified", max_context=1000)
        service = service_module.Service(
            http_config(*(each.router.client_address for each in (without, large, small)))
        )
        try:
            for address in service.client.addresses:
                await service.client.status(address)
            assert len((await service.ready_status()).workers) == 1
            assert await service.max_request_tokens() == 1000
        finally:
            await service.close()


@on_event_loop
async def test_several_prompts_with_several_answers() -> None:
    """Choices are numbered through: those of the first prompt, then those of the second."""
    async with served() as service:
        for stream in (False, True):
            answer = service.start(prompt=[[RED], [VIOLIN, VIOLIN]], n=2, max_tokens=1, stream=stream)
            works = {len(work.prompt_ids): work for work in [await service.work(), await service.work()]}
            for num_prompt, tokens in ((2, (VIOLIN, RED)), (1, (RED, VIOLIN))):
                for choice, token_id in enumerate(tokens):
                    service.worker.send_tokens(
                        works[num_prompt], token_id, choice=choice, finish_reason="length"
                    )
            response = await answer
            if stream:
                *chunks, done = events_of(response.text)
                assert done == "[DONE]"
                choices = [choice for chunk in chunks for choice in chunk["choices"]]
            else:
                choices = response.json()["choices"]
                assert response.json()["usage"]["prompt_tokens"] == 3
                assert response.json()["usage"]["completion_tokens"] == 4
            texts = {choice["index"]: choice["text"] for choice in choices}
            assert texts == {0: WORDS[0], 1: WORDS[1], 2: WORDS[1], 3: WORDS[0]}


@pytest.mark.parametrize("includes_usage", [False, True])
@on_event_loop
async def test_a_stream(includes_usage: bool) -> None:
    async with served() as service:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if includes_usage else {}
        answer = service.start(max_tokens=2, stream=True, **options)
        work = await service.work()
        service.worker.send_tokens(work, RED, VIOLIN, finish_reason="length")
        response = await answer
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    if includes_usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 2
        assert [chunk["usage"] for chunk in chunks] == [None, None]
    else:
        assert not any("usage" in chunk for chunk in chunks)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": WORDS[0], "finish_reason": None, "logprobs": None}],
        [{"index": 0, "text": WORDS[1], "finish_reason": "length", "logprobs": None}],
    ]


@on_event_loop
async def test_chunks_tell_the_usage_of_their_choice_so_far() -> None:
    """And a completion has no chunk before its first token."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with served() as service:
        answer = service.start(prompt=[[5, 6], [7]], max_tokens=2, stream=True, stream_options=options)
        for _ in range(2):
            work = await service.work()
            service.worker.send_tokens(work, RED, VIOLIN, finish_reason="length")
        *chunks, last, _ = events_of((await answer).text)
        usages = {
            index: [c["usage"] for c in chunks if c["choices"][0]["index"] == index] for index in (0, 1)
        }
        assert usages == {0: [usage_of(2, 1), usage_of(2, 2)], 1: [usage_of(1, 1), usage_of(1, 2)]}
        assert last["usage"] == {**usage_of(3, 4), "prompt_tokens_details": {"cached_tokens": 0}}
        messages = [{"role": "user", "content": "hi"}]
        answer = service.start("/v1/chat/completions", messages=messages, stream=True, stream_options=options)
        work = await service.work()
        service.worker.send_tokens(work, RED, finish_reason="length")
        *chunks, last, _ = events_of((await answer).text)
    num_prompt_tokens = len(work.prompt_ids)
    assert [c["usage"] for c in chunks] == [usage_of(num_prompt_tokens, n) for n in (0, 1)]
    assert last["usage"]["completion_tokens"] == 1


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@on_event_loop
async def test_a_chat_stream_opens_every_answer_with_its_role() -> None:
    async with served() as service:
        answer = service.start(
            "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], n=2, stream=True
        )
        work = await service.work()
        for choice in (0, 1):
            service.worker.send_tokens(work, RED, choice=choice, finish_reason="length")
        *chunks, done = events_of((await answer).text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    openings, tokens = chunks[:2], chunks[2:]
    assert [chunk["choices"][0]["delta"] for chunk in openings] == [{"role": "assistant", "content": ""}] * 2
    assert [chunk["choices"][0]["index"] for chunk in openings] == [0, 1]
    assert [chunk["choices"][0]["delta"] for chunk in tokens] == [{"content": WORDS[0]}] * 2
    assert [chunk["choices"][0]["finish_reason"] for chunk in tokens] == ["length"] * 2


@pytest.mark.parametrize("stream", [False, True])
@on_event_loop
async def test_a_failure_before_the_first_token_has_a_status(stream: bool) -> None:
    async with served() as service:
        answer = service.start(stream=stream)
        work = await service.work()
        service.worker.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=False))
        error = error_of(await answer, 503)
        assert error["message"] == "out of luck"
        assert (await answer).headers["retry-after"] == "1"


@on_event_loop
async def test_a_failure_in_the_middle_of_a_stream_is_its_last_event() -> None:
    async with served() as service:
        answer = service.start(stream=True)
        work = await service.work()
        service.worker.send_tokens(work, RED)
        service.worker.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=False))
        response = await answer
    assert response.status_code == 200
    token, error = events_of(response.text)
    assert token["choices"][0]["text"] == WORDS[0]
    assert error["error"]["message"] == "out of luck"
    assert error["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_prompts", [1, 2])
@on_event_loop
async def test_a_client_that_goes_away_ends_its_requests(stream: bool, num_prompts: int) -> None:
    async with served() as service:
        answer = service.start(prompt=[TEXT] * num_prompts, stream=stream)
        works = [await service.work() for _ in range(num_prompts)]
        answer.cancel()  # httpx closes the connection
        for work in works:
            await service.expect_abort(work)


@on_event_loop
async def test_a_client_that_goes_away_in_the_middle_of_a_stream_ends_its_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as service:
        response, work = await service.open_stream(RED)
        await response.aclose()
        await service.expect_abort(work)
    assert "Exception" not in caplog.text, "it is nobody's fault"


@on_event_loop
async def test_tokens_arrive_while_the_answer_is_written() -> None:
    async with served() as service:
        response, work = await service.open_stream(RED)
        lines = response.aiter_lines()
        assert WORDS[0] in await anext(lines)
        service.worker.send_tokens(work, VIOLIN, skip=1)
        assert await anext(lines) == ""
        assert WORDS[1] in await anext(lines)
        service.worker.send_tokens(work, RED, skip=2, finish_reason="stop")
        assert [line async for line in lines if line][-1] == "data: [DONE]"


@on_event_loop
async def test_a_client_that_does_not_read_is_disconnected() -> None:
    """Its window stays closed, so that the kernel gives the connection up, and the others go on."""
    async with served(write_seconds=0.3) as service:
        host, port = urlsplit(service.url).hostname, urlsplit(service.url).port
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            silent.connect((host, port))
            body = f'{{"prompt": "{TEXT}", "stream": true, "max_tokens": 1500, "user": "x"}}'
            silent.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            work = await service.work()
            for first in range(0, 1400, 100):
                service.worker.send_tokens(work, *[RED] * 100, skip=first)
            answer = service.start(max_tokens=1)
            other = await service.work()
            service.worker.send_tokens(other, RED, finish_reason="length")
            assert (await answer).status_code == 200
            await service.expect_abort(work)


@on_event_loop
async def test_a_cluster_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker, and then no router; each says which, and that it may pass."""
    monkeypatch.setattr("pdengine.client.connection.AVOID_SECONDS", 0.01)
    async with running_cluster() as cluster:
        server = HttpServer(http_config(cluster.router.client_address))
        server.start()
        try:
            async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE_SECONDS) as client:
                response = await client.post("/v1/completions", json={"prompt": TEXT})
                assert "no worker has joined" in error_of(response, 503)["message"]
                assert response.headers["retry-after"] == "1"
                assert (await client.get("/health")).json() == {"status": "healthy", "workers": 0}
                assert "no worker has joined" in error_of(await client.get("/ready"), 503)["message"]
                await cluster.worker("unified")
                while (await client.get("/ready")).status_code != 200:
                    pass  # what the router said is believed for a moment
                await cluster.stop()
                while (await client.get("/ready")).status_code != 503:
                    pass
                response = await client.post("/v1/completions", json={"prompt": TEXT})
                assert error_of(response, 503)["type"] == "server_error"
                error_of(await client.get("/health"), 503)
                assert (await client.get("/live")).json() == {"status": "live"}
        finally:
            await asyncio.to_thread(server.close)
