"""Whole requests through one engine, in this process and on this thread: no router, no transfer."""

from dataclasses import dataclass
from itertools import islice
from time import monotonic

from pdengine.bench.load import Request, Spread, Timing, random_requests, spread
from pdengine.engine.block_pool import BlockPool
from pdengine.engine.commands import AddRequest, Event, Stop
from pdengine.engine.engine import Engine
from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.pulls import Pulls
from pdengine.engine.pushes import Pushes
from pdengine.engine.runner import Runner
from pdengine.engine.scheduler import Scheduler, SchedulerConfig
from pdengine.engine.sequence import Mode, Sequence
from pdengine.transport.memory_transfer import Fabric, MemoryTransfer
from pdengine.transport.messages import SamplingParams, StepTokens, WorkFailed, WorkRefused

MIN_REQUESTS = 4


@dataclass(frozen=True)
class RequestsFigure:
    """Requests of random tokens, `concurrency` of them at any time. ttft, tpot: seconds."""

    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    ttft: Spread
    tpot: Spread

    @property
    def output_tokens_per_second(self) -> float:
        return self.num_requests * self.output_tokens / self.seconds


class OfflineEngine:
    """An engine that is fed by what it reports. `run` once."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, runner: Runner) -> None:
        pool, metrics = BlockPool(num_blocks), WorkerMetrics()
        scheduler = Scheduler(config, pool)
        transfer = MemoryTransfer(Fabric(), deliver=lambda event: self._engine.post(event))
        self._engine = Engine(
            engine_id="offline",
            scheduler=scheduler,
            runner=runner,
            pulls=Pulls(transfer, pool, block_size=config.block_size, timeout=1.0),
            pushes=Pushes(transfer, scheduler, metrics),
            eos_token_ids=frozenset(),
            lease_duration=1.0,
            metrics=metrics,
            emit=self._take,
        )
        self._waiting: list[Request] = []
        self._sent_at: dict[str, float] = {}
        self._arrivals: dict[str, list[float]] = {}
        self._num_running = 0

    def run(self, requests: list[Request], concurrency: int) -> list[Timing]:
        """Answer all `requests`, `concurrency` of them at any time. In the order in which they were sent."""
        self._waiting = requests[::-1]
        for _ in range(min(concurrency, len(requests))):
            self._send_next()
        self._engine.run()
        return [Timing(self._sent_at[name], tuple(arrivals)) for name, arrivals in self._arrivals.items()]

    def _send_next(self) -> None:
        request, name = self._waiting.pop(), f"request {len(self._sent_at)}"
        sequence = Sequence(
            request_id=name,
            attempt=1,
            mode=Mode.WHOLE,
            sampling=SamplingParams(max_tokens=request.output_tokens, temperature=0, ignore_eos=True),
            num_prompt_tokens=len(request.prompt),
            token_ids=list(request.prompt),
        )
        self._num_running += 1
        self._sent_at[name], self._arrivals[name] = monotonic(), []
        self._engine.post(AddRequest([sequence]))

    def _take(self, events: list[Event]) -> None:
        """On the engine's thread, which is the caller's: what is posted here is handled in the next turn."""
        now = monotonic()
        for event in events:
            if isinstance(event, WorkFailed | WorkRefused):
                raise AssertionError(f"the engine was made for these requests: {event.reason}")
            for update in event.updates if isinstance(event, StepTokens) else ():
                self._arrivals[update.request_id].append(now)
                if update.finish_reason is not None:
                    self._end_one()

    def _end_one(self) -> None:
        self._num_running -= 1
        if self._waiting:
            self._send_next()
        elif not self._num_running:
            self._engine.post(Stop())


def measure_requests(
    config: SchedulerConfig,
    num_blocks: int,
    runner: Runner,
    *,
    concurrency: int,
    vocab_size: int,
    prompt_tokens: int,
    output_tokens: int,
) -> RequestsFigure:
    """As many requests as run at a time, but at least 4."""
    shape = {"vocab_size": vocab_size, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    num_requests = max(MIN_REQUESTS, concurrency)
    requests = list(islice(random_requests(f"offline {concurrency}", **shape), num_requests))
    begin = monotonic()
    timings = OfflineEngine(config, num_blocks, runner).run(requests, concurrency)
    return RequestsFigure(
        concurrency=concurrency,
        num_requests=num_requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seconds=monotonic() - begin,
        ttft=spread([timing.ttft for timing in timings]),
        tpot=spread([timing.tpot for timing in timings]),
    )
