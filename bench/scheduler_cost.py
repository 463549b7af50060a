"""`python -m pdengine.bench.scheduler_cost`: what the scheduler costs per step, without a model.

Decoding sequences with the prefix cache on, in pools of several sizes, all of whose blocks are in use: by
the sequences, and by idle prefixes, which must be forgotten one by one. Reports schedule and postprocess
together, per step, over enough steps for every sequence to fill several blocks; and an admission, from the
queue into a full batch.
"""

import gc
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean, median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from pdengine.bench.machine import write_result
from pdengine.engine.block_pool import BlockPool
from pdengine.engine.scheduler import Scheduler, SchedulerConfig
from pdengine.engine.sequence import Mode, Sequence
from pdengine.models.prefix_hashes import PrefixHashes, prefix_root
from pdengine.transport.messages import SamplingParams

BLOCK_SIZE = 16
BATCHES = (1, 64, 256)
POOLS = (100, 10_000, 100_000)
NUM_WARM_UP = 8  # steps after the one that computes the prompts
NUM_STEPS = 8 * BLOCK_SIZE
NUM_ADMISSIONS = 50
GROWTH = (
    2 + (NUM_WARM_UP + NUM_STEPS + 2 * NUM_ADMISSIONS) // BLOCK_SIZE
)  # blocks that a sequence begins meanwhile
GOAL_MICROSECONDS = 500.0  # per step of the largest batch


@dataclass(frozen=True)
class Cost:
    """Microseconds. slowest_step: some fill a block for many sequences at once, and name it."""

    num_sequences: int
    num_blocks: int
    context_blocks: int
    step_mean: float
    step_median: float
    slowest_step: float
    admission: float


def main() -> None:
    console = Console()
    costs = []
    columns = ("sequences", "blocks", "context", "step, mean", "median", "slowest", "admission")
    table = Table(*columns, title="Microseconds")
    for num_sequences in BATCHES:
        for num_blocks in POOLS:
            context_blocks = num_blocks // num_sequences - GROWTH
            if context_blocks < 1:
                continue  # the batch does not fit
            cost = measure(num_sequences, num_blocks, min(context_blocks, 1000))
            costs.append(cost)
            row = (cost.step_mean, cost.step_median, cost.slowest_step, cost.admission)
            table.add_row(
                f"{num_sequences}",
                f"{num_blocks:,}",
                f"{cost.context_blocks * BLOCK_SIZE:,}",
                *(f"{figure:,.0f}" for figure in row),
            )
    console.print(table)
    largest = [cost.step_mean for cost in costs if cost.num_sequences == max(BATCHES)]
    reached = max(largest) < GOAL_MICROSECONDS
    console.print(
        f"{max(BATCHES)} sequences: {max(largest):,.0f} µs per step; goal {GOAL_MICROSECONDS:,.0f} µs "
        f"{'reached' if reached else 'missed'}"
    )
    figures = {"block_size": BLOCK_SIZE, "steps": NUM_STEPS, "goal_us": GOAL_MICROSECONDS}
    path = write_result("scheduler_cost", {**figures, "microseconds": [asdict(cost) for cost in costs]})
    console.print(f"written to {path}")


def measure(num_sequences: int, num_blocks: int, context_blocks: int) -> Cost:
    """context_blocks: of each sequence when the measurement begins; random tokens, so that none is shared."""
    noise = random.Random(num_sequences)
    config = SchedulerConfig(BLOCK_SIZE, 2**20, num_sequences, num_blocks)
    scheduler = Scheduler(config, BlockPool(num_blocks))
    _leave_idle_blocks(scheduler, noise)
    for index in range(num_sequences):
        # Of different lengths, so that they do not all fill a block in the same step.
        scheduler.add(_sequence(f"{index}", context_blocks * BLOCK_SIZE - index % BLOCK_SIZE, noise))
    scheduler.admit()
    for _ in range(1 + NUM_WARM_UP):
        _step(scheduler)
    assert len(scheduler.running) == num_sequences
    gc.collect()
    gc.freeze()
    steps = [_microseconds(lambda: _step(scheduler)) for _ in range(NUM_STEPS)]
    assert len(scheduler.running) == num_sequences
    assert not scheduler.num_preemptions
    admissions = []
    for index in range(NUM_ADMISSIONS):
        scheduler.remove(scheduler.running[0])
        scheduler.add(_sequence(f"new {index}", context_blocks * BLOCK_SIZE, noise))
        admissions.append(_microseconds(scheduler.admit))
        assert not scheduler.waiting
        for _ in range(2):
            _step(scheduler)
    gc.unfreeze()
    return Cost(
        num_sequences, num_blocks, context_blocks, mean(steps), median(steps), max(steps), median(admissions)
    )


def _sequence(request_id: str, num_tokens: int, noise: random.Random) -> Sequence:
    token_ids = [noise.randrange(2**17) for _ in range(num_tokens)]
    prefix = PrefixHashes(prefix_root("model"), BLOCK_SIZE)
    prefix.extend(token_ids)  # by the router, as a rule
    return Sequence(
        request_id=request_id,
        attempt=1,
        mode=Mode.WHOLE,
        sampling=SamplingParams(max_tokens=GROWTH * BLOCK_SIZE),
        num_prompt_tokens=num_tokens,
        token_ids=token_ids,
        prefix=prefix,
    )


def _leave_idle_blocks(scheduler: Scheduler, noise: random.Random) -> None:
    """Let every block hold a prefix that nobody uses."""
    pool = scheduler.pool
    block_ids = pool.allocate(pool.num_blocks)
    assert block_ids is not None
    for block_id in block_ids:
        pool.name(block_id, noise.randbytes(16))
    pool.free(block_ids)


def _step(scheduler: Scheduler) -> None:
    step = scheduler.schedule()
    scheduler.postprocess(step, [7] * len(step.chunks), frozenset({0}))


def _microseconds(run: Callable[[], object]) -> float:
    begin = perf_counter()
    run()
    return (perf_counter() - begin) * 1e6


if __name__ == "__main__":
    main()
