"""`python -m pdengine.bench.prefix_cache`: what prefix caches save, and who should compute a next turn.

A prompt that is sent twice: the time to first token (TTFT) of both, when the second one is computed by a
unified worker, by the prefill worker that had the first one, or by the decode worker that answered it.

The next turn of a conversation, which the decode worker has in its KV cache, with more and more new tokens:
the decode worker computes them by itself; or the prefill worker does, which lacks the last answer too, or
which has nothing of the conversation (then it is the same as a new prompt of that length). What counts
besides TTFT is what becomes of the other answers that the decode worker writes at the time: the wait of all
is the TTFT and the longest gap of each of them. The default of `--local-prefill-tokens` is taken from that.

Each worker has a core of its own. The clusters that are compared are up at once and take turns, so that
whatever else the machine does disturbs them alike.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Literal

import click
from rich.console import Console
from rich.progress import Progress

from pdengine.bench.cluster import pin_workers, up
from pdengine.bench.load import LoadFailed, Request, Timing, random_requests
from pdengine.bench.machine import RESULTS, write_result
from pdengine.bench.prefix_cache_report import (
    NEXT_TURN_WAYS,
    Answer,
    NextTurnWay,
    Repeat,
    Turn,
    crossovers_of,
    merged,
    next_turn_figures,
    next_turn_table,
    others_during,
    repeat_figures,
    repeat_table,
)
from pdengine.bench.random_checkpoint import write_small_checkpoint
from pdengine.client import AsyncClient, GenerateError

ClusterName = Literal["unified", "prefill worker", "decode worker"]
CLUSTERS: dict[ClusterName, tuple[str, ...]] = {
    "unified": ("--prefill", "0", "--decode", "0", "--unified", "2"),
    "prefill worker": ("--prefill", "1", "--decode", "1", "--local-prefill-tokens", "0"),
    "decode worker": ("--prefill", "1", "--decode", "1", "--local-prefill-tokens", "100000"),
}
REPEATED = {"prompt_tokens": 2000, "output_tokens": 8}
CONVERSATION = {"prompt_tokens": 936, "output_tokens": 64}  # its last turn, 1000 tokens together
TURN_OUTPUT_TOKENS = 16
OTHER = {"prompt_tokens": 64, "output_tokens": 1500}
BLOCK_SIZE = 16  # the workers' default
CACHED_TOKENS: dict[NextTurnWay, int] = {  # of a next turn, in whole blocks
    "decode worker": 992,
    "prefill worker": 928,
    "prefill worker, anew": 0,
}
SETTLED_TOKENS = 16  # of each other answer, before a turn is sent
ALONE_TOKENS = 16  # of each other answer, when nothing is sent
STALLED_SECONDS = 60.0
POLL_SECONDS = 0.005
ANNOUNCE_SECONDS = 0.5  # until the router surely knows what a worker has just cached

Advance = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """What one run measures. turns: of each kind."""

    vocab_size: int
    repeated: tuple[ClusterName, ...]
    pairs: int
    ways: tuple[NextTurnWay, ...]
    turns: int
    new_tokens: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        turns = len(self.ways) * self.turns * len(self.new_tokens) * len(self.others)
        return len(self.repeated) * self.pairs + turns

    @property
    def disaggregated(self) -> list[ClusterName]:
        """The clusters that are needed besides the unified one."""
        needed = {*self.repeated, *(cluster_of(way) for way in self.ways)}
        return [name for name in CLUSTERS if name in needed and name != "unified"]


@click.command()
@click.option(
    "--model", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A small Llama by default."
)
@click.option(
    "--repeated",
    type=click.Choice(tuple(CLUSTERS)),
    multiple=True,
    default=tuple(CLUSTERS),
    help="Who gets a prompt again.",
)
@click.option("--pairs", type=click.IntRange(0), default=7, show_default=True, help="Of the same prompt.")
@click.option(
    "--way",
    "ways",
    type=click.Choice(NEXT_TURN_WAYS),
    multiple=True,
    default=NEXT_TURN_WAYS,
    help="Who computes a next turn.",
)
@click.option("--turns", type=click.IntRange(0), default=5, show_default=True, help="Of each kind.")
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    multiple=True,
    default=(16, 64, 128, 256, 512, 1024),
    show_default=True,
)
@click.option(
    "--others",
    type=click.IntRange(0),
    multiple=True,
    default=(0, 4),
    show_default=True,
    help="Being answered.",
)
@click.option("--dtype", help="Of the workers; by default the checkpoint's.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="JSON; what it has and is not measured now, is kept."
)
def main(
    model: Path | None,
    repeated: tuple[ClusterName, ...],
    pairs: int,
    ways: tuple[NextTurnWay, ...],
    turns: int,
    new_tokens: tuple[int, ...],
    others: tuple[int, ...],
    dtype: str | None,
    output: Path | None,
) -> None:
    """Measure prefix caches."""
    console = Console()
    output = output or RESULTS / "prefix_cache.json"
    with ExitStack() as stack:
        name = model.name if model else "small Llama"
        model = model or write_small_checkpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        plan = Plan(
            vocab_size,
            repeated if pairs else (),
            pairs,
            ways if turns else (),
            turns,
            tuple(sorted(new_tokens)),
            others,
        )
        options = ("--model", str(model), *(("--dtype", dtype) if dtype else ()))
        try:
            repeats, next_turns = _measure(plan, options, console)
        except (LoadFailed, GenerateError) as error:
            raise click.ClickException(str(error)) from error
    about = {
        "model": name,
        "dtype": dtype or "the checkpoint's",
        "repeated": REPEATED,
        "conversation": CONVERSATION,
        "turn_output_tokens": TURN_OUTPUT_TOKENS,
        "other": OTHER,
    }
    old = json.loads(output.read_text()) if output.exists() else {}
    if any(old.get(key) != value for key, value in about.items()):
        old = {}
    repeat_results = merged(old.get("repeats", []), repeat_figures(repeats), ("computed_by",))
    turn_results = merged(
        old.get("next_turns", []), next_turn_figures(next_turns), ("others", "new_tokens", "computed_by")
    )
    crossovers = crossovers_of(turn_results)
    if repeat_results:
        console.print(repeat_table(repeat_results))
    if turn_results:
        console.print(next_turn_table(turn_results, crossovers))
    figures = {**about, "repeats": repeat_results, "next_turns": turn_results, "crossovers": crossovers}
    console.print(f"written to {write_result('prefix_cache', figures, output)}", highlight=False)


def cluster_of(way: NextTurnWay) -> ClusterName:
    return "decode worker" if way == "decode worker" else "prefill worker"


def _measure(plan: Plan, options: Sequence[str], console: Console) -> tuple[list[Repeat], list[Turn]]:
    repeats, turns = list[Repeat](), list[Turn]()
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=plan.num_steps)

        def step(description: str) -> Advance:
            progress.update(bar, description=description)
            return lambda: progress.advance(bar)

        if "unified" in plan.repeated:
            with ExitStack() as stack:
                advance = step("unified, the same prompt again")
                addresses = _start(stack, ["unified"], plan, options, console)
                repeats += asyncio.run(_measure_repeats(addresses, plan, advance))
        with ExitStack() as stack:
            advance = step("disaggregated, the same prompt again" if plan.repeated else "starting")
            addresses = _start(stack, plan.disaggregated, plan, options, console)
            again = {name: address for name, address in addresses.items() if name in plan.repeated}
            repeats += asyncio.run(_measure_repeats(again, plan, advance))
            for count in plan.others if plan.ways else ():
                for new_tokens in plan.new_tokens:
                    advance = step(f"{new_tokens} new tokens beside {count}")
                    for way in plan.ways:
                        address = addresses[cluster_of(way)]
                        turns += asyncio.run(_measure_turns(address, plan, way, count, new_tokens, advance))
    return repeats, turns


def _start(
    stack: ExitStack, names: Sequence[ClusterName], plan: Plan, options: Sequence[str], console: Console
) -> dict[ClusterName, str]:
    """The addresses of clusters that are ready and warm, until `stack` ends."""
    addresses: dict[ClusterName, str] = {}
    for name in names:
        process, seconds, address = stack.enter_context(up("--kv-memory", "1GiB", *options, *CLUSTERS[name]))
        pin_workers(process.pid)
        console.print(f"{name}: ready after {seconds:.0f} s", highlight=False)
        asyncio.run(_warm_up(address, plan.vocab_size))
        addresses[name] = address
    return addresses


async def _warm_up(address: str, vocab_size: int) -> None:
    prompts = random_requests("warm-up", vocab_size=vocab_size, prompt_tokens=256, output_tokens=8)
    async with AsyncClient(address) as client:
        for request in islice(prompts, 2):
            for _ in range(2):
                await ask(client, request)
                await asyncio.sleep(ANNOUNCE_SECONDS)
        await asyncio.gather(*(ask(client, request) for request in islice(prompts, 4)))


async def _measure_repeats(addresses: dict[ClusterName, str], plan: Plan, advance: Advance) -> list[Repeat]:
    """Each prompt twice to each of the clusters, which take turns; the same prompts to all."""
    prompts = random_requests("repeated", vocab_size=plan.vocab_size, **REPEATED)
    repeats = []
    for request in islice(prompts, plan.pairs):
        for name, address in addresses.items():
            async with AsyncClient(address) as client:
                first = await ask(client, request)
                await asyncio.sleep(ANNOUNCE_SECONDS)
                again = await ask(client, request)
            _check_way(first, 0, is_local=name == "unified")
            _check_way(again, REPEATED["prompt_tokens"] - BLOCK_SIZE, is_local=name != "prefill worker")
            repeats.append(Repeat(name, first, again))
            advance()
    return repeats


async def _measure_turns(
    address: str, plan: Plan, way: NextTurnWay, others: int, new_tokens: int, advance: Advance
) -> list[Turn]:
    """The next turns of `plan.turns` conversations one by one, while `others` answers are written."""
    seed = f"{way} {others} {new_tokens}"
    tails = random_requests(
        f"turn {seed}", vocab_size=plan.vocab_size, prompt_tokens=new_tokens, output_tokens=TURN_OUTPUT_TOKENS
    )
    turns = []
    async with AsyncClient(address) as client:
        histories = await _histories(client, plan, way, seed)
        async with _decoding(client, plan.vocab_size, others, seed) as arrivals:
            begin = monotonic()
            await _more_tokens(arrivals, ALONE_TOKENS)
            alone = others_during(arrivals, begin, monotonic())
            for history, tail in zip(histories, tails, strict=False):
                answer = await ask(client, Request(history + tail.prompt, tail.output_tokens))
                _check_way(answer, CACHED_TOKENS[way], is_local=way == "decode worker")
                await _more_tokens(arrivals, SETTLED_TOKENS)  # these also end the gaps that the turn has made
                window = answer.timing.sent_at, answer.timing.arrivals[-1]
                turns.append(Turn(way, others, new_tokens, answer, others_during(arrivals, *window), alone))
                advance()
    return turns


async def _histories(client: AsyncClient, plan: Plan, way: NextTurnWay, seed: str) -> list[list[int]]:
    """What the next turns begin with: conversations that this cluster has had, or tokens new to it."""
    kind = CONVERSATION
    if way == "prefill worker, anew":
        kind = {"prompt_tokens": sum(CONVERSATION.values()), "output_tokens": 0}
    previous = random_requests(f"conversation {seed}", vocab_size=plan.vocab_size, **kind)
    requests = list(islice(previous, plan.turns))
    if way == "prefill worker, anew":
        return [request.prompt for request in requests]
    answers = await asyncio.gather(*(ask(client, request) for request in requests))
    await asyncio.sleep(ANNOUNCE_SECONDS)
    return [[*r.prompt, *answer.token_ids] for r, answer in zip(requests, answers, strict=True)]


@asynccontextmanager
async def _decoding(
    client: AsyncClient, vocab_size: int, count: int, seed: str
) -> AsyncIterator[list[list[float]]]:
    """`count` answers that are written meanwhile: when each of their tokens has come.

    Raises LoadFailed if one comes to its end.
    """
    arrivals: list[list[float]] = [[] for _ in range(count)]

    async def write(request: Request, times: list[float]) -> None:
        await ask(client, request, times)
        raise LoadFailed(f"all {request.output_tokens} tokens of another answer were written too early")

    requests = random_requests(f"other {seed}", vocab_size=vocab_size, **OTHER)
    tasks = [asyncio.create_task(write(next(requests), times)) for times in arrivals]
    try:
        await _more_tokens(arrivals, SETTLED_TOKENS)
        yield arrivals
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ends:
        if not isinstance(error, asyncio.CancelledError):
            assert isinstance(error, BaseException), "they never return"
            raise error


async def _more_tokens(arrivals: Sequence[Sequence[float]], count: int) -> None:
    """Until each of these answers has `count` tokens more. Raises LoadFailed if they stop coming."""
    wanted = [len(times) + count for times in arrivals]
    deadline = monotonic() + STALLED_SECONDS
    while any(len(times) < number for times, number in zip(arrivals, wanted, strict=True)):
        if monotonic() > deadline:
            raise LoadFailed(f"other answers got no {count} tokens in {STALLED_SECONDS:g} s")
        await asyncio.sleep(POLL_SECONDS)


async def ask(client: AsyncClient, request: Request, arrivals: list[float] | None = None) -> Answer:
    """One request, greedy, to its last token; the arrivals of its tokens are also appended to `arrivals`."""
    arrivals = [] if arrivals is None else arrivals
    sent_at = monotonic()
    stream = client.stream(request.prompt, max_tokens=request.output_tokens, temperature=0, ignore_eos=True)
    async with stream:
        async for delta in stream:
            arrivals += [monotonic()] * len(delta.token_ids)
    completion = stream.completion
    return Answer(
        Timing(sent_at, tuple(arrivals)),
        tuple(completion.token_ids),
        completion.usage.cached_tokens,
        is_local=completion.prefill_worker == completion.decode_worker,
    )


def _check_way(answer: Answer, cached_tokens: int, *, is_local: bool) -> None:
    """Raises LoadFailed unless the request went the way that is measured, with so much of it in a cache."""
    if answer.is_local != is_local:
        raise LoadFailed(
            f"a prompt was computed by {'the' if answer.is_local else 'no'} worker that answered it"
        )
    if not cached_tokens <= answer.cached_tokens < cached_tokens + 2 * BLOCK_SIZE:
        raise LoadFailed(f"{answer.cached_tokens} tokens of a prompt were cached, not about {cached_tokens}")


if __name__ == "__main__":
    main()
