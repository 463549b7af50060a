"""What the control thread takes, what it refuses at once, and when a request has ended at this worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from sequences import make_work
from worker_bench import Bench

from pdengine.engine.commands import AbortAll, AbortRequest, AddRequest, Event
from pdengine.engine.sequence import Mode
from pdengine.transport.messages import (
    Abort,
    Choice,
    Decode,
    Heartbeat,
    HeartbeatReply,
    KVLease,
    Leaving,
    PeerLink,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    Pushed,
    Reserve,
    RouterToWorker,
    StepTokens,
    TokenUpdate,
    TransferStats,
    Work,
    WorkFailed,
    WorkRefused,
)


def choices(n: int) -> list[Choice]:
    return [Choice(index, []) for index in range(n)]


def on_loop(check: Callable[[Bench], None]) -> None:
    async def run() -> None:
        bench = Bench()
        bench.join()
        check(bench)
        bench.context.destroy(linger=0)

    asyncio.run(run())


def take(bench: Bench, work: Work, mode: Mode = Mode.WHOLE) -> None:
    orders = {
        Mode.PREFILL: Prefill(work),
        Mode.DECODE: Reserve(work, "writer"),
        Mode.WHOLE: PrefillAndDecode(work),
    }
    bench.worker._intake.take(orders[mode])


def test_what_can_never_fit_is_refused_for_good() -> None:
    """The pool has four blocks of one token; the last token of an answer needs none."""

    def check(bench: Bench) -> None:
        take(bench, make_work("fits", [1, 2, 3], max_tokens=2))
        take(bench, make_work("a prompt for somebody else", [1, 2, 3, 4], max_tokens=50), Mode.PREFILL)
        assert [type(command) for command in bench.posted] == [AbortAll, AddRequest, AddRequest]
        take(bench, make_work("too long", [1, 2, 3], max_tokens=3))
        take(bench, make_work("too many", [1], choices(5), max_tokens=1))
        assert len(bench.posted) == 3
        assert [(f.request_id, f.reason, f.retry) for f in bench.sent if isinstance(f, WorkFailed)] == [
            ("too long", "the request needs 5 KV blocks, the pool has 4", False),
            ("too many", "n is 5, this worker writes 4 answers at once at most", False),
        ]

    on_loop(check)


def test_work_that_was_sent_before_the_router_knew_that_the_worker_leaves_is_done() -> None:
    def check(bench: Bench) -> None:
        bench.worker.stop()
        take(bench, make_work("request", [1], choices(1), max_tokens=2))
        assert isinstance(bench.posted[-1], AddRequest)
        assert bench.sent == []
        assert not bench.worker._is_idle(), "the worker waits for it"

    on_loop(check)


def test_an_idle_worker_leaves_when_the_router_knows_that_it_does() -> None:
    async def run() -> None:
        bench = Bench(drain_seconds=60)
        bench.join()
        words: asyncio.Queue[RouterToWorker] = asyncio.Queue()
        bench.worker._router.receive = words.get  # type: ignore[method-assign]
        hearing = asyncio.create_task(bench.worker._receive_from_router())
        draining = asyncio.create_task(bench.worker._drain_when_asked())

        async def hear(*said: RouterToWorker) -> None:
            for word in said:
                words.put_nowait(word)
            while not words.empty():
                await asyncio.sleep(0)
            await asyncio.sleep(0)

        bench.worker.stop()
        await hear(HeartbeatReply("epoch", known=True))  # the answer to a heartbeat before
        assert not draining.done()
        assert [type(message) for message in bench.sent] == [Leaving, Heartbeat]
        crossed = make_work("crossed", [1], choices(1), max_tokens=2)
        await hear(PrefillAndDecode(crossed), HeartbeatReply("epoch", known=True, leaving=True))
        assert isinstance(bench.posted[-1], AddRequest)
        assert not draining.done(), "it waits for what has crossed"
        bench.worker._open.clear()
        async with asyncio.timeout(20):
            await draining
        hearing.cancel()
        bench.context.destroy(linger=0)

    asyncio.run(run())


def test_answers_that_differ_already_need_not_all_be_written_at_once() -> None:
    def check(bench: Bench) -> None:
        take(
            bench, make_work("request", [1, 2], [Choice(index, [index]) for index in range(5)], max_tokens=2)
        )
        command = bench.posted[-1]
        assert isinstance(command, AddRequest)
        assert [sequence.choice for sequence in command.sequences] == [0, 1, 2, 3, 4]
        assert bench.sent == []

    on_loop(check)


def test_a_lease_must_cover_every_answer() -> None:
    def check(bench: Bench) -> None:
        bench.join(bench.writer_descriptor)
        lease = KVLease(1, "writer", [0, 1], 2, 30.0)
        work = make_work("request", [1, 2], [Choice(0, [5]), Choice(1, [5, 6])], max_tokens=3)
        bench.worker._intake.take(Decode(work, lease))
        [failed] = bench.sent
        assert isinstance(failed, WorkFailed)
        assert failed.reason == "lease 1 does not cover the tokens of the request"
        bench.worker._forget_peer("writer")

    on_loop(check)


STATS = TransferStats(1, 1, 1, 0.0, "")


@pytest.mark.parametrize(
    ("event", "ends"),
    [
        (
            StepTokens([TokenUpdate("request", 1, 0, 0, 5, None), TokenUpdate("request", 1, 1, 0, 5, None)]),
            False,
        ),
        (StepTokens([TokenUpdate("request", 1, 1, 0, 5, "stop")]), False),
        (StepTokens([TokenUpdate("request", 1, i, 0, 5, "stop") for i in (0, 1)]), True),
        (StepTokens([TokenUpdate("another", 1, i, 0, 5, "stop") for i in (0, 1)]), False),
        (Prefilled("request", 1, [TokenUpdate("request", 1, i, 0, 5, None) for i in (0, 1)], None), True),
        (Prefilled("request", 1, [], None, pushed=True), False),
        (Pushed("request", 1, STATS), True),
        (WorkFailed("request", 1, "", retry=True), True),
        (WorkRefused("request", 1, ""), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_request_has_ended_when_all_its_answers_have(event: Event, ends: bool) -> None:
    """While any has not, the worker does not leave."""

    def check(bench: Bench) -> None:
        assert bench.worker._is_idle()
        take(bench, make_work("request", [1], choices(2), max_tokens=2))
        assert not bench.worker._is_idle()
        bench.worker._handle_events([event])
        assert bench.worker._is_idle() == ends
        assert bench.sent == [event]

    on_loop(check)


def test_only_the_answers_that_go_on_are_waited_for_after_a_push() -> None:
    def check(bench: Bench) -> None:
        bench.join(bench.writer_descriptor)
        take(bench, make_work("request", [1], choices(3), max_tokens=2), Mode.DECODE)
        bench.worker._intake.take(Decode(make_work("request", [1], [Choice(2, [7])], max_tokens=2), None))
        bench.worker._handle_events([StepTokens([TokenUpdate("request", 1, 2, 1, 5, "length")])])
        assert bench.worker._is_idle()
        bench.worker._forget_peer("writer")

    on_loop(check)


def test_no_blocks_are_reserved_for_a_writer_that_is_not_known_here() -> None:
    """It could never be asked whether it still writes to them. The router hears of the pair first."""

    def check(bench: Bench) -> None:
        take(bench, make_work("request", [1], choices(1), max_tokens=2), Mode.DECODE)
        assert [type(command) for command in bench.posted] == [AbortAll]
        link, failed = bench.sent
        assert isinstance(link, PeerLink)
        assert (link.engine_id, bool(link.error)) == ("writer", True)
        assert isinstance(failed, WorkFailed)
        assert failed.retry

    on_loop(check)


def test_one_answer_that_is_given_up_leaves_the_others_to_be_waited_for() -> None:
    def check(bench: Bench) -> None:
        take(bench, make_work("request", [1], choices(3), max_tokens=2))
        bench.worker._intake.take(Abort("request", [0, 2]))
        assert bench.posted[-1] == AbortRequest("request", frozenset({0, 2}))
        assert not bench.worker._is_idle()
        bench.worker._handle_events([StepTokens([TokenUpdate("request", 1, 1, 0, 5, "stop")])])
        assert bench.worker._is_idle()

    on_loop(check)


def test_what_is_left_of_an_older_attempt_ends_nothing_of_a_newer_one() -> None:
    def check(bench: Bench) -> None:
        for attempt in (1, 2):
            take(bench, make_work("request", [1], choices(1), max_tokens=2, attempt=attempt))
        bench.worker._handle_events([StepTokens([TokenUpdate("request", 1, 0, 0, 5, "stop")])])
        assert not bench.worker._is_idle()
        bench.worker._handle_events([StepTokens([TokenUpdate("request", 2, 0, 0, 5, "stop")])])
        assert bench.worker._is_idle()

    on_loop(check)
