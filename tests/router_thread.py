"""A router and a scripted worker on a thread of their own, for clients that block."""

import asyncio
import queue
import threading

from fake_cluster import DEADLINE_SECONDS, FakeCluster, FakeWorker, running_cluster

from pdengine.transport.messages import Abort, FinishReason, PrefillAndDecode, PrefixHit

HOLD = 5
"""A token after which the worker writes no more, so that its request stays open."""


class RouterThread:
    """`with RouterThread() as router`. Each answer of its worker repeats the prompt, up to max_tokens
    ("length") or to the prompt's end ("stop").

    cached_tokens: what it says that it has found of each prompt. work: what it got, aborted: ids of the
    requests that it was told to abort; both in order.
    """

    def __init__(self) -> None:
        self.address = ""
        self.cached_tokens = 0
        self.work: queue.Queue[PrefillAndDecode] = queue.Queue()
        self.aborted: queue.Queue[str] = queue.Queue()
        self._started: queue.Queue[BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="router")
        self._error: BaseException | None = None

    def __enter__(self) -> "RouterThread":
        self._thread.start()
        error = self._started.get(timeout=DEADLINE_SECONDS)
        if error is not None:
            raise error
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.stop()
        if self._error is not None and error is None:
            raise self._error

    def stop(self) -> None:
        """End the router; idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()

    def next_aborted(self) -> str:
        return self.aborted.get(timeout=DEADLINE_SECONDS)

    def next_work(self) -> PrefillAndDecode:
        return self.work.get(timeout=DEADLINE_SECONDS)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with running_cluster() as cluster:
                await self._serve(cluster)
        except BaseException as error:
            self._error = error
            self._started.put(error)

    async def _serve(self, cluster: FakeCluster) -> None:
        worker = await cluster.worker("unified", "echo")
        loops = [self._echo(worker), self._note_aborts(worker)]
        tasks = [asyncio.create_task(loop) for loop in loops]
        self.address = cluster.router.client_address
        self._started.put(None)
        await self._stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await cluster.stop()

    async def _echo(self, worker: FakeWorker) -> None:
        while True:
            message = await worker.wait_for(PrefillAndDecode)
            self.work.put(message)
            work = message.work
            if self.cached_tokens:
                worker.send(PrefixHit(work.request_id, work.attempt, self.cached_tokens))
            if work.sampling.prompt_logprobs is not None:
                worker.send_scored(work)
            token_ids = work.prompt_ids[: work.sampling.max_tokens]
            reason: FinishReason = "length" if len(token_ids) == work.sampling.max_tokens else "stop"
            for position, token_id in enumerate(token_ids):
                if token_id == HOLD:
                    break
                last = position == len(token_ids) - 1
                for choice in work.choices:
                    worker.send_tokens(
                        work,
                        token_id,
                        skip=position,
                        choice=choice.index,
                        finish_reason=reason if last else None,
                    )

    async def _note_aborts(self, worker: FakeWorker) -> None:
        while True:
            self.aborted.put((await worker.wait_for(Abort)).request_id)
