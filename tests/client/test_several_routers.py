"""Which router gets a request, and what becomes of it when that router is lost or stops."""

import asyncio
import gc
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fake_cluster import DEADLINE_SECONDS, on_event_loop, running_cluster
from router_thread import HOLD, RouterThread
from scripted_router import ScriptedRouter, routers_and_client

from pdengine.client import (
    AsyncClient,
    AsyncStream,
    Cancelled,
    Client,
    Delta,
    Failed,
    Rejected,
    RouterUnavailable,
    TimedOut,
)
from pdengine.client.connection import Connection
from pdengine.transport import messages
from pdengine.transport.messages import Cancel, Generate, Inquire, PrefillAndDecode
from pdengine.transport.sockets import KEY_REVOKED

T = TypeVar("T")


async def soon(result: Awaitable[T]) -> T:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await result


async def until_down(client: AsyncClient, address: str) -> None:
    """Wait until the client has noticed that the router at `address` is gone."""
    [connection] = [each for each in client._connections if each.address == address]
    async with asyncio.timeout(DEADLINE_SECONDS):
        while connection.connected:
            await client._changed.wait()


async def begin(client: AsyncClient, **options: Any) -> tuple[AsyncStream, asyncio.Task[Delta]]:
    """A stream that has been asked for its first delta, and that wait for it."""
    stream = client.stream([7], **options)
    return stream, asyncio.create_task(stream.__anext__())


# ------------------------------------------------------------------------------------- which router


@on_event_loop
async def test_a_request_goes_where_the_fewest_are_in_flight() -> None:
    async with routers_and_client(3) as (routers, client):
        streams = [await begin(client) for _ in range(6)]
        held = {router.address: [await router.expect(Generate) for _ in range(2)] for router in routers}
        last = routers[1]
        for request in held[last.address]:
            last.write(request.tag, 1)
            last.finish(request.tag)
        done = [pair for pair in streams if pair[0]._tag in [r.tag for r in held[last.address]]]
        for stream, first in done:
            assert await soon(first) == Delta("1 ", [1])
            assert [delta async for delta in stream] == []
        more = [await begin(client) for _ in range(2)]
        for _ in more:
            await last.expect(Generate)
        for stream, first in streams + more:
            await stream.aclose()
            await asyncio.gather(first, return_exceptions=True)
        assert client._connection_of == {}


@on_event_loop
async def test_idle_routers_have_their_turns() -> None:
    async with routers_and_client(2) as (routers, client):
        for _ in range(2):
            for router in routers:
                await asyncio.gather(client.generate([7]), router.answer(1))


@on_event_loop
async def test_a_lost_router_is_left_out_until_it_is_back() -> None:
    async with routers_and_client(2) as (routers, client):
        await routers[0].kill()
        await until_down(client, routers[0].address)
        for _ in range(3):
            await asyncio.gather(client.generate([7]), routers[1].answer(1))
        routers[0] = await routers[0].restart()
        await client.status(routers[0].address)
        routers[0].received.clear()  # a Cancel, if the loss was noticed late
        await asyncio.gather(client.generate([7]), routers[0].answer(1))


@on_event_loop
async def test_the_status_of_each_router() -> None:
    async with routers_and_client(2) as (routers, client):
        for router in routers:
            assert (await client.status(router.address)).epoch == router.address
        await routers[0].kill()
        await until_down(client, routers[0].address)
        assert (await client.status()).epoch == routers[1].address
        with pytest.raises(ValueError, match="tcp://other:1 is not a router of this client"):
            await client.status("tcp://other:1")


@on_event_loop
async def test_addresses_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="needs the address of a router"):
        AsyncClient([])
    with pytest.raises(ValueError, match="retries is -1"):
        AsyncClient(retries=-1)
    with pytest.raises(ValueError, match="nonsense"):
        AsyncClient(["tcp://127.0.0.1:5555", "nonsense"])
    async with AsyncClient(["tcp://127.0.0.1:1"] * 2, connect_timeout=0.01) as client:
        assert client.addresses == ["tcp://127.0.0.1:1"]
        with pytest.raises(RouterUnavailable, match=r"no router answers at tcp://127\.0\.0\.1:1$"):
            await client.generate("The")


# --------------------------------------------------------------------------- sent again, or not


@on_event_loop
async def test_a_request_whose_router_is_lost_goes_to_another_under_a_new_tag() -> None:
    async with routers_and_client(2) as (routers, client):
        task = asyncio.create_task(client.generate([7], seed=1, prompt_logprobs=0))
        request = await routers[0].expect(Generate)
        routers[0].send(messages.Accepted(request.tag, "first", 1))
        routers[0].send(messages.PromptLogprobs(request.tag, [messages.TokenLogprobs(-9.0, 9, [])]))
        await routers[0].kill()
        again = await routers[1].answer(1, 2)
        completion = await soon(task)
        assert (completion.text, completion.request_id) == ("1 2 ", f"id-{again.tag}")
        assert completion.prompt_logprobs == [messages.TokenLogprobs(-1.0, 2, [])]
        assert again.tag != request.tag
        assert (again.prompt, again.sampling) == (request.prompt, request.sampling)


@on_event_loop
async def test_the_same_router_gets_it_when_it_is_back_and_gets_it_once() -> None:
    async with routers_and_client(1) as (routers, client):
        task = asyncio.create_task(client.generate([7]))
        request = await routers[0].expect(Generate)
        await routers[0].kill()
        routers[0] = await routers[0].restart()
        assert await routers[0].expect(Cancel) == Cancel(request.tag)
        await routers[0].answer(1)
        assert (await soon(task)).token_ids == [1]
        await client.status()
        assert routers[0].received == []


@on_event_loop
async def test_what_reaches_the_next_router_late_is_cancelled_there() -> None:
    async with routers_and_client(1) as (routers, client):
        await routers[0].kill()  # the client's loop has had no turn to notice, and sends
        tasks = [asyncio.create_task(client.generate([7])) for _ in range(3)]
        await until_down(client, routers[0].address)
        routers[0] = await routers[0].restart()
        alive: set[int] = set()
        while len(alive) < 3 or alive != set(client._connection_of):
            message = await routers[0].expect(messages.Message)
            if isinstance(message, Generate):
                alive.add(message.tag)
            elif isinstance(message, Cancel):
                alive.discard(message.tag)
        assert len(alive) == 3
        for tag in alive:
            routers[0].write(tag, 1)
            routers[0].finish(tag)
        assert [completion.token_ids for completion in await soon(asyncio.gather(*tasks))] == [[1]] * 3
        await client.status()
        assert routers[0].received == []


@on_event_loop
async def test_a_router_that_stops_hands_over_and_its_late_words_are_ignored() -> None:
    async with routers_and_client(2) as (routers, client):
        task = asyncio.create_task(client.generate([7]))
        request = await routers[0].expect(Generate)
        routers[0].send(messages.Failed(request.tag, "the router is shutting down", retry=True))
        routers[0].write(request.tag, 1, 2, 3)
        routers[0].finish(request.tag)
        again = await routers[1].expect(Generate)
        await client.status(routers[0].address)  # its late words have been read
        routers[1].write(again.tag, 4)
        routers[1].finish(again.tag)
        assert (await soon(task)).token_ids == [4]
        # It is left out for a while: it may be nearly gone, or have no workers.
        for _ in range(3):
            await asyncio.gather(client.generate([7]), routers[1].answer(1))
        assert await routers[0].expect(Cancel) == Cancel(request.tag)
        assert routers[0].received == []


@on_event_loop
async def test_the_only_router_is_asked_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdengine.client.connection.AVOID_SECONDS", 0.01)
    async with routers_and_client(1) as (routers, client):
        task = asyncio.create_task(client.generate([7]))
        request = await routers[0].expect(Generate)
        routers[0].send(messages.Failed(request.tag, "no worker is there", retry=True))
        assert await routers[0].expect(Cancel) == Cancel(request.tag)
        await routers[0].answer(1)
        assert (await soon(task)).token_ids == [1]


@on_event_loop
async def test_after_a_token_a_lost_router_is_an_error() -> None:
    async with routers_and_client(2) as (routers, client):
        stream, first = await begin(client)
        request = await routers[0].expect(Generate)
        routers[0].write(request.tag, 1)
        assert (await soon(first)).token_ids == [1]
        await routers[0].kill()
        with pytest.raises(RouterUnavailable, match=f"{routers[0].address} was lost"):
            await soon(stream.__anext__())
        await client.status(routers[1].address)
        assert routers[1].received == []


@on_event_loop
async def test_a_router_without_workers_leaves_its_requests_to_another() -> None:
    async with running_cluster() as without, running_cluster() as cluster:
        worker = await cluster.worker("unified")
        addresses = [without.router.client_address, cluster.router.client_address]
        async with AsyncClient(addresses, connect_timeout=DEADLINE_SECONDS) as client:
            for address in addresses:
                await client.status(address)
            tasks = [asyncio.create_task(client.generate("The", max_tokens=1)) for _ in range(4)]
            for _ in tasks:
                work = (await worker.expect(PrefillAndDecode)).work
                worker.send_tokens(work, 7, finish_reason="length")
            for task in tasks:
                assert (await soon(task)).token_ids == [7]


@on_event_loop
async def test_a_router_that_stands_still_keeps_only_what_it_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has closed the connection, and it may go on."""
    monkeypatch.setattr("pdengine.client.connection.PROBE_SECONDS", 0.01)
    async with routers_and_client(2) as (routers, client):
        stream, first = await begin(client)
        begun = await routers[0].expect(Generate)
        routers[0].write(begun.tag, 1)
        assert (await soon(first)).token_ids == [1]
        connection = client._connection_of[begun.tag]
        others = [asyncio.create_task(client.generate([7])) for _ in range(2)]
        await routers[1].answer(2)
        await routers[0].expect(Generate)
        routers[0].stalled = True
        await routers[1].answer(3)
        assert sorted([(await soon(task)).token_ids for task in others]) == [[2], [3]]
        for _ in range(3):
            await asyncio.gather(client.generate([7]), routers[1].answer(4))
        assert not connection.usable
        routers[0].stalled = False
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not connection.usable:
                await client._changed.wait()
        routers[0].write(begun.tag, 5)
        routers[0].finish(begun.tag)
        assert [delta.token_ids async for delta in stream] == [[5]]
        await routers[0].expect(Cancel)
        tasks = [asyncio.create_task(client.generate([7])) for _ in range(2)]
        await asyncio.gather(routers[0].answer(6), routers[1].answer(6), *tasks)


@pytest.mark.parametrize(("number", "retries"), [(1, 3), (2, 0)])
@on_event_loop
async def test_who_cannot_go_elsewhere_waits_for_a_router_that_stands_still(
    number: int, retries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdengine.client.connection.PROBE_SECONDS", 0.01)
    async with routers_and_client(number, retries=retries) as (routers, client):
        task = asyncio.create_task(client.generate([7]))
        request = await routers[0].expect(Generate)
        connection = client._connection_of[request.tag]
        routers[0].stalled = True
        async with asyncio.timeout(DEADLINE_SECONDS):
            while connection.usable:
                await asyncio.sleep(0.001)
        routers[0].write(request.tag, 1)
        routers[0].finish(request.tag)
        assert (await soon(task)).token_ids == [1]
        assert all(router.received == [] for router in routers)


@on_event_loop
async def test_a_request_leaves_a_router_that_stands_still_when_another_one_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdengine.client.connection.PROBE_SECONDS", 0.01)
    async with routers_and_client(2) as (routers, client):
        await routers[1].kill()
        await until_down(client, routers[1].address)
        task = asyncio.create_task(client.generate([7]))
        request = await routers[0].expect(Generate)
        connection = client._connection_of[request.tag]
        routers[0].stalled = True
        async with asyncio.timeout(DEADLINE_SECONDS):
            while connection.usable:
                await asyncio.sleep(0.001)
        routers[1] = await routers[1].restart()
        await routers[1].answer(1)
        assert (await soon(task)).token_ids == [1]


@pytest.mark.parametrize("retries", [0, 2])
@on_event_loop
async def test_retries_have_a_bound(monkeypatch: pytest.MonkeyPatch, retries: int) -> None:
    monkeypatch.setattr("pdengine.client.connection.AVOID_SECONDS", 0.01)
    async with routers_and_client(1, retries=retries) as (routers, client):
        task = asyncio.create_task(client.generate([7]))
        for attempt in range(retries + 1):
            request = await routers[0].expect(Generate)
            routers[0].send(messages.Failed(request.tag, f"no worker, {attempt}", retry=True))
            await routers[0].expect(Cancel)
        with pytest.raises(Failed, match=f"no worker, {retries}"):
            await soon(task)
        assert client._connection_of == {}


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (messages.Rejected(1, "too long", "prompt"), Rejected),
        (messages.Failed(1, "the worker ran out of luck"), Failed),
        (messages.Aborted(1, "cancelled"), Cancelled),
        (messages.Malformed("what?"), RouterUnavailable),
    ],
)
@on_event_loop
async def test_what_has_its_own_reason_is_not_tried_again(
    outcome: messages.Message, error: type[Exception]
) -> None:
    async with routers_and_client(2) as (routers, client):
        client._last_tag = 0
        task = asyncio.create_task(client.generate([7]))
        await routers[0].expect(Generate)
        routers[0].send(outcome)
        with pytest.raises(error):
            await soon(task)
        await client.status(routers[1].address)
        assert routers[1].received == []


@on_event_loop
async def test_a_router_that_does_not_admit_the_client_any_more_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It refuses at once, and so has always the fewest requests."""
    monkeypatch.setattr("pdengine.client.connection.AVOID_SECONDS", 1000.0)
    async with routers_and_client(2) as (routers, client):
        tasks = [asyncio.create_task(client.generate([7])) for _ in range(4)]
        for _ in range(2):
            await routers[0].expect(Generate)
        routers[0].send(messages.Malformed(KEY_REVOKED))
        for token in range(4):
            await routers[1].answer(token)
        assert sorted([(await soon(task)).token_ids for task in tasks]) == [[token] for token in range(4)]
        await asyncio.gather(client.generate([7]), routers[1].answer(1))
        routers[0].received.clear()  # a Cancel of each
        stream, first = await begin(client)
        await routers[1].expect(Generate)
        routers[1].send(messages.Malformed(KEY_REVOKED))
        while client.has_usable_router:
            await asyncio.sleep(0.001)
        await stream.aclose()
        await asyncio.gather(first, return_exceptions=True)


@on_event_loop
async def test_what_a_revoked_key_is_told() -> None:
    async with routers_and_client(1, retries=0) as (routers, client):
        task = asyncio.create_task(client.generate([7]))
        await routers[0].expect(Generate)
        routers[0].send(messages.Malformed(KEY_REVOKED))
        with pytest.raises(RouterUnavailable) as raised:
            await soon(task)
        assert str(raised.value) == f"the router at {routers[0].address} refused it: {KEY_REVOKED}"


# --------------------------------------------------------------------------- cancel and deadline


@on_event_loop
async def test_cancel_goes_to_the_router_that_has_the_request() -> None:
    async with routers_and_client(2) as (routers, client):
        stream, first = await begin(client)
        await routers[0].expect(Generate)
        await routers[0].kill()
        again = await routers[1].expect(Generate)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await routers[1].expect(Cancel) == Cancel(again.tag)
        assert [delta async for delta in stream] == []


@pytest.mark.parametrize("what", ["stream", "client", "task"])
@on_event_loop
async def test_closing_while_a_request_waits_to_be_sent_again(what: str) -> None:
    async with routers_and_client(1) as (routers, client):
        stream, first = await begin(client)
        await routers[0].expect(Generate)
        await routers[0].kill()
        await until_down(client, routers[0].address)
        if what == "task":
            first.cancel()
        elif what == "client":
            await client.close()
        else:
            await stream.aclose()
        with pytest.raises(asyncio.CancelledError if what == "task" else Cancelled):
            await soon(first)
        assert client._connection_of == {}


@on_event_loop
async def test_a_stream_that_is_closed_after_its_client_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with routers_and_client(1) as (routers, client):
        stream, first = await begin(client)
        request = await routers[0].expect(Generate)
        routers[0].write(request.tag, 1)
        await soon(first)
        await client.close()
        assert await routers[0].expect(Cancel) == Cancel(request.tag)
        late: list[messages.Message] = []
        monkeypatch.setattr(Connection, "send", lambda _, message: late.append(message))
        with pytest.raises(Cancelled, match="the client was closed"):
            client.send(Inquire(request.tag))
        await stream.aclose()
        assert late == []


@on_event_loop
async def test_the_deadline_counts_over_all_attempts() -> None:
    async with routers_and_client(2) as (routers, client):
        task = asyncio.create_task(client.generate([7], timeout=100.0))
        request = await routers[0].expect(Generate)
        await routers[0].kill()
        again = await routers[1].expect(Generate)
        assert request.timeout is not None
        assert again.timeout is not None
        assert 0 < again.timeout < request.timeout <= 100.0
        routers[1].send(messages.Aborted(again.tag, "timeout"))
        with pytest.raises(TimedOut, match="within 100 s"):
            await soon(task)


@on_event_loop
async def test_the_deadline_ends_the_wait_for_a_router() -> None:
    async with routers_and_client(1) as (routers, client):
        await routers[0].kill()
        await until_down(client, routers[0].address)
        with pytest.raises(TimedOut, match=r"no answer within 0\.05 s: no router answers"):
            await soon(client.generate([7], timeout=0.05))


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.inf])
@on_event_loop
async def test_a_deadline_that_is_none_is_left_to_the_router(timeout: float) -> None:
    async with routers_and_client(1) as (routers, client):
        task = asyncio.create_task(client.generate([7], timeout=timeout))
        assert (await routers[0].answer(1)).timeout == timeout
        await soon(task)


@on_event_loop
async def test_both_errors_are_told_if_the_router_does_not_come_back() -> None:
    async with routers_and_client(1) as (routers, client):
        task = asyncio.create_task(client.generate([7]))
        await routers[0].expect(Generate)
        client._connect_timeout = 0.05
        await routers[0].kill()
        with pytest.raises(RouterUnavailable, match="was lost; no router answers at"):
            await soon(task)


@on_event_loop
async def test_a_router_that_stands_still_is_asked_and_its_silence_ends_with_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdengine.client.connection.INQUIRE_SECONDS", 0.01)
    monkeypatch.setattr("pdengine.client.async_stream.GRACE_SECONDS", 0.0)
    async with routers_and_client(1) as (routers, client):
        task = asyncio.create_task(client.generate([7], timeout=0.2))
        request = await routers[0].expect(Generate)
        assert await routers[0].expect(Inquire) == Inquire(request.tag)
        with pytest.raises(TimedOut):
            await soon(task)


ROUTER_PROCESS = """
import asyncio, sys
sys.path[:0] = {paths!r}
from scripted_router import ScriptedRouter
async def main():
    router = ScriptedRouter()
    print(router.address, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@on_event_loop
async def test_the_requests_of_a_router_process_that_is_stopped_go_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdengine.transport.sockets.HEARTBEAT_INTERVAL_MS", 100)
    monkeypatch.setattr("pdengine.transport.sockets.HEARTBEAT_TIMEOUT_MS", 500)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", ROUTER_PROCESS.format(paths=paths)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    router = ScriptedRouter()
    try:
        address = await asyncio.to_thread(process.stdout.readline)
        async with AsyncClient([address.strip(), router.address]) as client:
            for each in client.addresses:
                await client.status(each)
            os.kill(process.pid, signal.SIGSTOP)
            task = asyncio.create_task(client.generate([7]))
            await router.answer(1)
            assert (await soon(task)).token_ids == [1]
            await asyncio.gather(client.generate([7]), router.answer(1))
            os.kill(process.pid, signal.SIGCONT)
            assert (await client.status(address.strip())).epoch == address.strip()
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
        process.stdout.close()
        await router.kill()


# ------------------------------------------------------------------------------ many, and forgotten


@on_event_loop
async def test_a_stream_that_is_dropped_is_cancelled() -> None:
    async with routers_and_client(1) as (routers, client):
        stream, first = await begin(client)
        request = await routers[0].expect(Generate)
        routers[0].write(request.tag, 1)
        await soon(first)
        del stream, first
        gc.collect()
        assert await routers[0].expect(Cancel) == Cancel(request.tag)
        assert client._connection_of == {}


@on_event_loop
async def test_a_stream_has_one_reader() -> None:
    async with routers_and_client(1) as (routers, client):
        stream, first = await begin(client)
        request = await routers[0].expect(Generate)
        with pytest.raises(RuntimeError, match="being waited for already"):
            await stream.__anext__()
        routers[0].write(request.tag, 1)
        assert await soon(first) == Delta("1 ", [1])
        await stream.aclose()


async def answer_for_ever(router: ScriptedRouter) -> None:
    while True:
        await router.answer(1, 2)


@on_event_loop
async def test_requests_one_after_the_other_leave_nothing() -> None:
    async with routers_and_client(2) as (routers, client):
        answering = [asyncio.create_task(answer_for_ever(router)) for router in routers]

        async def objects_after(number: int) -> int:
            for _ in range(number):
                await client.generate([7])
            gc.collect()
            return len(gc.get_objects())

        before = await objects_after(100)
        assert (
            await objects_after(1_000) < before + 500
        )  # they vary by some hundred; a leak has at least one per request
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)


def test_threads_of_one_client_do_not_notice_that_a_router_stops() -> None:
    """Real routers, of which one is stopped while it has requests without a token."""
    prompts = [[559, 383][: 1 + number % 2] for number in range(100)]
    with RouterThread() as first, RouterThread() as second:
        addresses = [first.address, second.address]
        with Client(addresses, connect_timeout=DEADLINE_SECONDS) as client, ThreadPoolExecutor(12) as pool:
            for address in addresses:
                client.status(address)
            waiting = [pool.submit(client.generate, [HOLD, number]) for number in range(2)]
            held = {first.next_work().work.prompt_ids[1], second.next_work().work.prompt_ids[1]}
            answers = [pool.submit(client.generate, prompt) for prompt in prompts]
            first.stop()
            assert [answer.result(DEADLINE_SECONDS).token_ids for answer in answers] == prompts
            handed_over = [second.next_work().work.prompt_ids for _ in range(second.work.qsize())]
            assert [prompt[1] in held for prompt in handed_over if prompt[0] == HOLD] == [True]
            client.close()
            for future in waiting:
                with pytest.raises(Cancelled):
                    future.result(DEADLINE_SECONDS)
