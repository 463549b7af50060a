"""The blocking and the asyncio client against a real router with scripted workers."""

import asyncio
import math
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_cluster import DEADLINE_SECONDS, MODEL, on_event_loop, running_cluster
from router_thread import HOLD, RouterThread

from pdengine.client import (
    AsyncClient,
    Cancelled,
    Client,
    Delta,
    Failed,
    GenerateError,
    Rejected,
    RouterUnavailable,
    TimedOut,
)
from pdengine.client import Choice as ClientChoice
from pdengine.client.arguments import check_types, to_prompt
from pdengine.models.prefix_hashes import prefix_root
from pdengine.transport.addresses import AddressError
from pdengine.transport.messages import (
    Abort,
    ChatMessage,
    ChatPrompt,
    Choice,
    Generate,
    PrefillAndDecode,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    Usage,
    WorkFailed,
)

THE, RED, VIOLIN = 559, 383, 512
HELD_PROMPT = [THE, RED, HOLD]  # answered with two tokens, and no end


@pytest.fixture
def router() -> Iterator[RouterThread]:
    with RouterThread() as running:
        yield running


@pytest.fixture
def client(router: RouterThread) -> Iterator[Client]:
    with Client(router.address, connect_timeout=DEADLINE_SECONDS) as connected:
        yield connected


def in_thread(function: Any, *arguments: Any) -> Any:
    """A future of `function`, which runs on a thread that ends with it."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


# --------------------------------------------------------------------------------------- answers


def test_generate(client: Client) -> None:
    completion = client.generate("The red violin", max_tokens=3, temperature=0.0, seed=1)
    assert completion.text == "The red"
    assert completion.token_ids == [0, THE, RED]
    assert completion.finish_reason == "length"
    assert completion.usage == Usage(prompt_tokens=4, completion_tokens=3)
    assert (completion.prefill_worker, completion.decode_worker) == ("echo", "echo")
    assert (completion.attempts, completion.transfer) == (1, None)


def test_stream(client: Client) -> None:
    with client.stream([THE, RED, VIOLIN], max_tokens=8) as stream:
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.completion
        deltas = list(stream)
        assert deltas == [Delta("The", [THE]), Delta(" red", [RED]), Delta("", [VIOLIN], 0, "stop")]
        assert stream.completion.text == "The red"
        assert stream.completion.finish_reason == "stop"
        assert list(stream) == []


def test_arguments_arrive(client: Client, router: RouterThread) -> None:
    sampling = SamplingParams(
        max_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.05,
        seed=2**64 - 1,
        stop_token_ids=(1, 2),
        ignore_eos=True,
    )
    client.generate(
        [THE],
        max_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.05,
        seed=2**64 - 1,
        stop_token_ids=iter([1, 2]),
        ignore_eos=True,
        n=2,
        priority=-3,
        cache_salt="tenant",
        timeout=DEADLINE_SECONDS,
    )
    work = router.next_work().work
    assert (work.sampling, work.priority) == (sampling, -3)
    assert work.choices == [Choice(0, []), Choice(1, [])]
    assert work.prefix is not None
    assert work.prefix.root == prefix_root(MODEL, "tenant")


def test_several_answers(client: Client) -> None:
    completion = client.generate([THE, RED, VIOLIN], n=3, max_tokens=2)
    assert completion.choices == [ClientChoice(index, "The red", [THE, RED], "length") for index in range(3)]
    assert completion.usage == Usage(prompt_tokens=3, completion_tokens=6)
    assert (completion.text, completion.finish_reason) == ("The red", "length")
    with client.stream([THE, RED], n=2, max_tokens=8) as stream:
        deltas = list(stream)
    assert [(delta.index, delta.finish_reason) for delta in deltas] == [
        (0, None),
        (1, None),
        (0, "stop"),
        (1, "stop"),
    ]


def test_prompt_kinds(client: Client) -> None:
    assert client.generate("The").token_ids == [0, THE]
    assert client.generate((THE, RED)).token_ids == [THE, RED]
    chat = client.generate([{"role": "user", "content": "The"}], max_tokens=64)
    assert THE in chat.token_ids
    assert chat.usage.prompt_tokens > 1


def test_status(client: Client) -> None:
    (worker,) = client.status().workers
    assert (worker.engine_id, worker.role) == ("echo", "unified")


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        b"bytes",
        3.5,
        {"role": "user", "content": "x"},
        ["text"],
        [1, "text"],
        [True],
        [1.0],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["parts"]}],
        [{"role": "user", "content": "x"}, 1],
    ],
)
def test_wrong_prompts_are_type_errors(prompt: Any) -> None:
    with pytest.raises(TypeError, match="must"):
        to_prompt(prompt)


def test_right_prompts() -> None:
    assert to_prompt("text") == TextPrompt("text")
    assert to_prompt(range(3)) == TokenPrompt([0, 1, 2])
    assert to_prompt([]) == TokenPrompt([])
    turn = {"role": "user", "content": "x", "name": "ignored"}
    assert to_prompt((turn,)) == ChatPrompt([ChatMessage("user", "x")])


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": "5"},
        {"max_tokens": 1.5},
        {"max_tokens": None},
        {"temperature": "hot"},
        {"seed": "x"},
        {"stop_token_ids": ("x",)},
        {"ignore_eos": 1},
        {"timeout": "soon"},
        {"n": "2"},
        {"n": 1.5},
        {"n": True},
        {"priority": None},
        {"cache_salt": b"x"},
        {"cache_salt": None},
    ],
)
def test_an_argument_of_a_wrong_type_hurts_nobody_else(client: Client, arguments: dict[str, Any]) -> None:
    with client.stream(HELD_PROMPT) as stream:
        next(stream)
        with pytest.raises(TypeError, match="wrong type of argument"):
            client.generate("The", **arguments)
        assert client.generate("The").token_ids == [0, THE]
        assert next(stream) == Delta(" red", [RED])


def test_types_that_are_right() -> None:
    sampling = SamplingParams(temperature=1, top_p=1, seed=None)
    check_types(Generate(0, TextPrompt(""), sampling, timeout=5, n=2, priority=-1, cache_salt="x"))


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ("The", {"seed": 2**64}),
        ("The", {"n": 2**64}),
        ("The", {"priority": -(2**63) - 1}),
        ("The", {"cache_salt": "\ud800"}),
        ([2**64], {}),
        ("\ud800", {}),
    ],
    ids=["seed", "n", "priority", "salt", "token id", "lone surrogate"],
)
def test_what_cannot_be_written_to_the_wire_is_a_value_error(
    client: Client, prompt: Any, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"64 bits|surrogate"):
        client.generate(prompt, **arguments)
    assert client.generate("The").token_ids == [0, THE]


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompt", "arguments", "field"),
    [
        ("The", {"temperature": -1.0}, "temperature"),
        ("The", {"timeout": math.nan}, "timeout"),
        ("The", {"timeout": math.inf}, "timeout"),
        ("The", {"max_tokens": 0}, "max_tokens"),
        ("The", {"n": 0}, "n"),
        ("The", {"priority": 2**31}, "priority"),
        ("The", {"cache_salt": "x" * 257}, "cache_salt"),
        ("", {}, "prompt"),
        ([-1], {}, "prompt"),
        ([0] * 2000, {}, "prompt"),
    ],
)
def test_rejected(client: Client, prompt: Any, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(Rejected) as caught:
        client.generate(prompt, **arguments)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_timed_out(client: Client, router: RouterThread) -> None:
    with client.stream(HELD_PROMPT, timeout=0.2) as stream:
        assert [next(stream), next(stream)] == [Delta("The", [THE]), Delta(" red", [RED])]
        with pytest.raises(TimedOut, match=r"within 0\.2 s"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
    assert router.next_aborted()


@on_event_loop
async def test_a_request_that_the_router_dropped_fails_after_a_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a client was stopped for so long that its queue in the router was full."""
    monkeypatch.setattr("pdengine.client.connection.INQUIRE_SECONDS", 0.05)
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        async with AsyncClient(cluster.router.client_address) as client:
            stream = client.stream([THE, RED], max_tokens=8)
            waiting = asyncio.create_task(anext(stream))
            await worker.expect(PrefillAndDecode)
            [request] = cluster.router._ledger
            cluster.router._forget(request)
            with pytest.raises(Failed, match="gave the request up"):
                await asyncio.wait_for(waiting, DEADLINE_SECONDS)


@on_event_loop
async def test_a_router_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdengine.client.async_stream.GRACE_SECONDS", 0.05)
    async with running_cluster() as cluster:
        monkeypatch.setattr(cluster.router, "_accept", lambda client, message: None)
        with pytest.raises(TimedOut, match=r"no answer within 0\.05 s"):
            await cluster.client.generate("The", timeout=0.05)


@on_event_loop
async def test_failed() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        worker.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=False))
        with pytest.raises(Failed, match="out of luck") as caught:
            await task
        assert isinstance(caught.value, GenerateError)


# -------------------------------------------------------------------------------- ending early


def test_closing_a_stream_cancels_the_request(client: Client, router: RouterThread) -> None:
    with client.stream(HELD_PROMPT) as stream:
        next(stream)
    router.next_aborted()
    stream.close()
    assert list(stream) == []
    assert client.status().requests == 0


def test_a_finished_stream_cancels_nothing(client: Client, router: RouterThread) -> None:
    with client.stream("The") as stream:
        list(stream)
    client.status()
    assert router.aborted.empty()


def test_closing_a_stream_wakes_who_waits_for_it(client: Client, router: RouterThread) -> None:
    stream = client.stream(HELD_PROMPT)
    assert [next(stream), next(stream)]
    waiting = in_thread(next, stream)
    stream.close()
    with pytest.raises((Cancelled, StopIteration)):
        waiting.result(DEADLINE_SECONDS)
    router.next_aborted()


def test_closing_the_client_ends_what_other_threads_wait_for(router: RouterThread) -> None:
    client = Client(router.address)
    streams = [client.stream(HELD_PROMPT) for _ in range(3)]
    for stream in streams:
        assert [next(stream), next(stream)]
    waiting = [in_thread(next, stream) for stream in streams]
    client.close()
    for future in waiting:
        with pytest.raises((Cancelled, RuntimeError)):
            future.result(DEADLINE_SECONDS)
    for _ in waiting:
        router.next_aborted()


def test_closing_the_client_ends_who_waits_for_a_connection() -> None:
    client = Client(unused_address(), connect_timeout=10 * DEADLINE_SECONDS)
    reached = threading.Event()

    def generate() -> None:
        client._loop.call_soon_threadsafe(reached.set)
        client.generate("The")

    waiting = in_thread(generate)
    assert reached.wait(DEADLINE_SECONDS)
    client.close()
    with pytest.raises((Cancelled, RuntimeError)):
        waiting.result(DEADLINE_SECONDS)


def test_close_is_idempotent_and_leaves_no_thread(router: RouterThread) -> None:
    before = set(threading.enumerate())
    client = Client(router.address)
    assert client.generate("The").token_ids == [0, THE]
    stream = client.stream(HELD_PROMPT)
    next(stream)
    assert not client.closed
    closers = [in_thread(client.close) for _ in range(3)]
    client.close()
    for closer in closers:
        closer.result(DEADLINE_SECONDS)
    client._thread.join(DEADLINE_SECONDS)
    assert client.closed
    assert {
        thread for thread in set(threading.enumerate()) - before if thread.name == "pdengine-client"
    } == set()
    stream.close()
    for call in (lambda: client.generate("The"), client.status, lambda: next(stream)):
        with pytest.raises(RuntimeError, match="the client is closed"):
            call()
    router.next_aborted()


@on_event_loop
async def test_the_asyncio_client_closes_once_and_wakes_its_tasks() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        async with AsyncClient(cluster.router.client_address) as client:
            task = asyncio.create_task(client.generate("The"))
            await worker.expect(PrefillAndDecode)
            await client.close()
            with pytest.raises(Cancelled, match="the client was closed"):
                await task
            await worker.expect(Abort)
            with pytest.raises(RuntimeError, match="the client is closed"):
                await client.generate("The")


@on_event_loop
async def test_a_cancelled_task_cancels_its_request() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await worker.expect(Abort, request_id=work.request_id)
        assert cluster.client._connection_of == {}


def test_an_interrupt_cancels_the_request(
    client: Client, router: RouterThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does it: the exception comes up while the thread waits for the loop's answer."""
    schedule = asyncio.run_coroutine_threadsafe

    def interrupted(coroutine: Any, loop: Any) -> Any:
        future = schedule(coroutine, loop)

        def result() -> None:
            while router.next_work().work.prompt_ids != HELD_PROMPT:
                pass
            raise KeyboardInterrupt

        monkeypatch.setattr(future, "result", result)
        return future

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.generate(HELD_PROMPT)
    router.next_aborted()
    assert client.generate("The").token_ids == [0, THE]


# ---------------------------------------------------------------------------------- connection


def unused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        return f"tcp://127.0.0.1:{nobody.getsockname()[1]}"


def test_no_router() -> None:
    address = unused_address()
    with Client(address, connect_timeout=0.05) as client:
        for call in (lambda: client.generate("The"), client.status):
            with pytest.raises(RouterUnavailable, match=f"no router answers at {address}"):
                call()


@pytest.mark.parametrize("address", ["127.0.0.1:5555", "tcp://127.0.0.1:0"])
def test_a_bad_address_leaves_no_thread(address: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(AddressError, match=address):
        Client(address)
    assert set(threading.enumerate()) <= before


def test_a_router_that_stops_says_so_before_it_goes() -> None:
    with RouterThread() as router, Client(router.address, connect_timeout=0.05) as client:
        streams = [client.stream(HELD_PROMPT) for _ in range(3)]
        for stream in streams:
            assert [next(stream), next(stream)]
        router.stop()
        for stream in streams:
            with pytest.raises(Failed, match="shutting down"):
                next(stream)
        with pytest.raises(RouterUnavailable):
            client.generate("The")


@on_event_loop
async def test_a_lost_connection() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, _ = await cluster.start_request(worker)
        cluster.running.cancel()
        cluster.router._ledger.__init__()  # type: ignore[misc]  # as if killed: no word to anybody
        with pytest.raises(RouterUnavailable, match="was lost"):
            await task
        assert cluster.client._connection_of == {}


def test_many_threads_share_one_client(client: Client) -> None:
    prompts = [[THE, RED, VIOLIN][: 1 + number % 3] for number in range(60)]
    with ThreadPoolExecutor(12) as pool:
        completions = list(pool.map(client.generate, prompts))
    assert [completion.token_ids for completion in completions] == prompts
    assert client.status().requests == 0
