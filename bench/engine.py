"""`pdengine bench engine`: how fast one engine computes, without sockets, beside what the device can do.

A decode step must read every weight and the KV cache of every sequence once, and do two operations per weight
and sequence; whichever of the two takes longer at the rates of the device is its floor. A prefill is bound by
its operations. Steps run as in a worker: the same loading, runner, kernels and number of threads; the blocks
of a sequence are scattered over the pool.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from pdengine.bench.engine_ceilings import Ceilings
from pdengine.bench.engine_costs import decode_flop, kv_bytes_per_step, prefill_flop, weight_bytes_per_step
from pdengine.bench.engine_requests import RequestsFigure, measure_requests
from pdengine.bench.load import Spread, spread
from pdengine.engine.devices import open_device
from pdengine.engine.kv_cache import KVCache, dtype_name
from pdengine.engine.memory import kv_block_bytes
from pdengine.engine.runner import Runner
from pdengine.engine.sequence import Mode, Sequence, blocks_for
from pdengine.engine.start_worker import DTYPES, check_room, load_model, scheduler_config
from pdengine.engine.step import Chunk
from pdengine.engine.worker_config import ITEM_BYTES, StartupError, WorkerConfig
from pdengine.models.config import ModelConfig, load_config
from pdengine.transport.messages import SamplingParams

BLOCK_SIZE = 16
WARM_UP_STEPS = 2
STEPS_BETWEEN_CEILINGS = 5
PREFILLS = 5  # measured; fewer if there are fewer steps
GREEDY = SamplingParams(max_tokens=1, temperature=0)


@dataclass(frozen=True)
class EnginePlan:
    """What to measure. contexts: tokens of each sequence in a decode step, the new one among them. steps:
    timed at each batch size and context. output_tokens: of whole requests, which have prompt_tokens tokens;
    0: there are none. threads: None is torch's default. Raises StartupError."""

    model_directory: Path
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (128, 512, 2048)
    prompt_tokens: int = 512
    output_tokens: int = 64
    steps: int = 20
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.batch_sizes or not self.contexts:
            raise StartupError("there must be at least one batch size and one context")
        for name, value in (
            *(("batch size", batch_size) for batch_size in self.batch_sizes),
            *(("context", context) for context in self.contexts),
            ("prompt tokens", self.prompt_tokens),
            ("steps", self.steps),
            ("threads", 1 if self.threads is None else self.threads),
        ):
            if value < 1:
                raise StartupError(f"{name} must be at least 1, got {value}")
        if self.output_tokens == 1 or self.output_tokens < 0:
            raise StartupError(f"output tokens must be 0 or at least 2, got {self.output_tokens}")

    @property
    def num_figures(self) -> int:
        requests = len(self.batch_sizes) if self.output_tokens else 0
        return 1 + len(self.batch_sizes) * len(self.contexts) + requests

    def worker_config(self, model: ModelConfig) -> WorkerConfig:
        """Of a worker with a KV cache for the largest step. Raises StartupError if the model is too short."""
        whole = self.prompt_tokens + self.output_tokens
        for name, length in [("context", max(self.contexts)), ("prompt and output of", whole)]:
            if length > model.max_position_embeddings:
                limit = model.max_position_embeddings
                raise StartupError(f"{name} {length} is more than the model's context of {limit} tokens")
        # A block more for each request: the scheduler keeps one free for everybody who grows.
        num_blocks = max(self.batch_sizes) * max(
            blocks_for(max(self.contexts), BLOCK_SIZE), blocks_for(whole, BLOCK_SIZE) + 1
        )
        config = WorkerConfig(
            role="unified",
            model_directory=self.model_directory,
            router_address="",
            device=self.device,
            dtype=self.dtype,
            block_size=BLOCK_SIZE,
            max_batch_tokens=max(WorkerConfig.max_batch_tokens, self.prompt_tokens, *self.batch_sizes),
            max_requests=max(self.batch_sizes),
        )
        item_bytes = ITEM_BYTES[config.dtype or model.dtype]
        block_bytes = kv_block_bytes(model, block_size=BLOCK_SIZE, item_bytes=item_bytes)
        return replace(config, kv_memory=num_blocks * block_bytes)


@dataclass(frozen=True)
class Timed:
    """seconds: of a step. read_rate, matmul_rate: medians of what the device gave between the steps, in bytes
    and in operations per second."""

    seconds: Spread
    read_rate: float
    matmul_rate: float


@dataclass(frozen=True)
class DecodeFigure:
    """Steps of `batch_size` sequences with `context` tokens each; the rest as in Timed."""

    batch_size: int
    context: int
    seconds: Spread
    weight_bytes: int
    kv_bytes: int
    flop: int
    read_rate: float
    matmul_rate: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size / self.seconds.p50

    @property
    def bytes_per_second(self) -> float:
        return (self.weight_bytes + self.kv_bytes) / self.seconds.p50

    @property
    def share_of_read_rate(self) -> float:
        return self.bytes_per_second / self.read_rate

    @property
    def floor_seconds(self) -> float:
        """No step can be faster than its bytes are read, or its operations done, whichever takes longer."""
        return max((self.weight_bytes + self.kv_bytes) / self.read_rate, self.flop / self.matmul_rate)

    @property
    def share_of_floor(self) -> float:
        return self.floor_seconds / self.seconds.p50


@dataclass(frozen=True)
class PrefillFigure:
    """One prompt of `num_tokens` in one step; the rest as in Timed."""

    num_tokens: int
    seconds: Spread
    flop: int
    matmul_rate: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds.p50

    @property
    def flop_per_second(self) -> float:
        return self.flop / self.seconds.p50

    @property
    def share_of_matmul_rate(self) -> float:
        return self.flop_per_second / self.matmul_rate


@dataclass(frozen=True)
class EngineResult:
    """steps: behind each figure of a decode step. requests: by their number in flight; may be empty."""

    architecture: str
    num_layers: int
    hidden_size: int
    dtype: str
    device: str
    threads: int
    torch: str
    steps: int
    prefill: PrefillFigure
    decode: list[DecodeFigure]
    requests: list[RequestsFigure]


def measure_engine(
    plan: EnginePlan,
    *,
    report: Callable[[str], None],
    loading: Callable[[int, int], None] | None = None,
) -> EngineResult:
    """Load the model as a worker does and measure its steps.

    `report` is told what comes next, before each figure; `loading(done, total)` counts bytes of weights.
    Raises StartupError or CheckpointError. Sets torch's number of threads for the process.
    """
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    model_config = load_config(plan.model_directory)
    config = plan.worker_config(model_config)
    device = open_device(config.device)
    check_room(config, model_config, device)
    model, kv_cache = load_model(config, model_config, device, progress=loading)
    fill(kv_cache)
    runner = Runner(model, kv_cache, device)
    measurement = Measurement(plan, model_config, kv_cache, runner, device)
    report(f"prefill of {plan.prompt_tokens} tokens")
    prefill = measurement.prefill(plan.prompt_tokens)
    decode: list[DecodeFigure] = []
    for context in plan.contexts:
        for batch_size in plan.batch_sizes:
            report(f"decode of {batch_size} x {context} tokens")
            decode.append(measurement.decode(batch_size, context))
    requests: list[RequestsFigure] = []
    for concurrency in plan.batch_sizes if plan.output_tokens else ():
        report(f"requests, {concurrency} at a time")
        num_blocks = len(kv_cache.pool)
        figure = measure_requests(
            scheduler_config(config, num_blocks),
            num_blocks,
            runner,
            concurrency=concurrency,
            vocab_size=model_config.vocab_size,
            prompt_tokens=plan.prompt_tokens,
            output_tokens=plan.output_tokens,
        )
        requests.append(figure)
    return EngineResult(
        architecture=model_config.architecture,
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        dtype=dtype_name(kv_cache.pool.dtype),
        device=str(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        steps=plan.steps,
        prefill=prefill,
        decode=decode,
        requests=requests,
    )


class Measurement:
    """Runs steps of sequences that are not there: only their lengths and blocks count."""

    def __init__(
        self,
        plan: EnginePlan,
        config: ModelConfig,
        kv_cache: KVCache,
        runner: Runner,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._config = config
        self._runner = runner
        self._device = device
        self._dtype = DTYPES[dtype_name(kv_cache.pool.dtype)]
        self._ceilings = Ceilings(config, self._dtype, device)
        num_blocks = len(kv_cache.pool)
        self._scattered = random.Random(0).sample(range(num_blocks), num_blocks)

    def decode(self, batch_size: int, context: int) -> DecodeFigure:
        """The same step again and again."""
        num_blocks = blocks_for(context, BLOCK_SIZE)
        chunks = [
            Chunk(self._sequence(context, 1, self._scattered[row * num_blocks : (row + 1) * num_blocks]), 1)
            for row in range(batch_size)
        ]
        timed = self._time(chunks, self._plan.steps, at_a_time=STEPS_BETWEEN_CEILINGS)
        item_bytes = self._dtype.itemsize
        return DecodeFigure(
            batch_size=batch_size,
            context=context,
            seconds=timed.seconds,
            weight_bytes=weight_bytes_per_step(self._config, item_bytes),
            kv_bytes=kv_bytes_per_step(self._config, item_bytes, batch_size=batch_size, context=context),
            flop=decode_flop(self._config, batch_size=batch_size, context=context),
            read_rate=timed.read_rate,
            matmul_rate=timed.matmul_rate,
        )

    def prefill(self, num_tokens: int) -> PrefillFigure:
        """A prompt in one step, again and again."""
        block_ids = self._scattered[: blocks_for(num_tokens, BLOCK_SIZE)]
        chunks = [Chunk(self._sequence(num_tokens, num_tokens, block_ids), num_tokens)]
        timed = self._time(chunks, min(self._plan.steps, PREFILLS), at_a_time=1)
        flop = prefill_flop(self._config, num_tokens)
        return PrefillFigure(num_tokens, timed.seconds, flop, timed.matmul_rate)

    def _sequence(self, length: int, new_tokens: int, block_ids: list[int]) -> Sequence:
        """All of its tokens but the last `new_tokens` are in the cache."""
        return Sequence(
            request_id="",
            attempt=0,
            mode=Mode.WHOLE,
            sampling=GREEDY,
            num_prompt_tokens=length,
            token_ids=[position % self._config.vocab_size for position in range(length)],
            block_ids=block_ids,
            num_computed=length - new_tokens,
        )

    def _time(self, chunks: list[Chunk], steps: int, *, at_a_time: int) -> Timed:
        """Steps as the engine sees them: tensors built, kernels run, next tokens read. The ceilings are
        measured before each `at_a_time` of them."""
        seconds, read_rates, matmul_rates = [], [], []
        for _ in range(WARM_UP_STEPS):
            self._runner.run(chunks)
        for first in range(0, steps, at_a_time):
            matmul_rates.append(self._ceilings.matmul_rate())
            read_rates.append(self._ceilings.read_rate())
            if at_a_time > 1:
                self._runner.run(chunks)  # the caches hold again what they hold between steps
            for _ in range(min(at_a_time, steps - first)):
                begin = perf_counter()
                self._runner.run(chunks)
                seconds.append(perf_counter() - begin)
        return Timed(spread(seconds), median(read_rates), median(matmul_rates))


def fill(kv_cache: KVCache) -> None:
    """Numbers of the order of one in every block: no denormals, no page that is touched for the first time
    while the clock runs."""
    kv_cache.pool[0].normal_()
    kv_cache.pool[1:] = kv_cache.pool[0]
