"""`pdengine demo`: prefill and decode in two processes, with answers that only a pulled KV cache can give."""

from dataclasses import dataclass
from statistics import median
from time import monotonic

import click
from rich.console import Console
from rich.table import Table

from pdengine.cli.cluster import Cluster
from pdengine.cli.options import errors_in_one_line
from pdengine.client import Client, Completion
from pdengine.models.demo.facts import DemoQuestion, checkpoint_directory, demo_questions
from pdengine.transport.messages import Role

SEED = 7
NUM_FACTS = 32
MAX_TOKENS = 8
KV_MEMORY = "64MiB"  # plenty, so that it runs on any machine
NANOSECONDS = 1e9


@dataclass(frozen=True)
class Answer:
    """first_at, last_at: seconds after the question was sent, of the first and the last token."""

    is_right: bool
    completion: Completion
    first_at: float
    last_at: float


@click.command()
def demo() -> None:
    """Start a small cluster on this machine and ask it about every fact of one long prompt."""
    console = Console(highlight=False)
    questions = demo_questions(SEED, NUM_FACTS)
    memory: dict[Role, list[str]] = {role: ["--kv-memory", KV_MEMORY] for role in ("prefill", "decode")}
    with errors_in_one_line():
        console.print("Starting a router, a prefill worker and a decode worker ...")
        with Cluster(
            checkpoint_directory(),
            roles=list(memory),
            quiet=True,
            worker_arguments=memory,
        ) as cluster:
            cluster.wait_ready()
            console.print(
                f"Each prompt is {NUM_FACTS} facts and a question about one of them. The facts are the same, "
                "but each has a cache salt of its own, so that every KV cache is computed and pulled:\n"
            )
            console.print(f"[dim]{_excerpt(questions[0].prompt)}[/dim]\n")
            with Client(cluster.client_address) as client:
                answers = [_ask(console, client, question) for question in questions]
    num_right = sum(answer.is_right for answer in answers)
    console.print()
    console.print(_summary(answers))
    console.print(f"{num_right} of {len(answers)} answers are right.")
    if num_right < len(answers):
        raise SystemExit(1)


def _ask(console: Console, client: Client, question: DemoQuestion) -> Answer:
    """Stream one answer and compare it with the known one."""
    console.print(f"{_question_line(question):<50} ", end="", markup=False)
    sent_at = monotonic()
    arrivals: list[float] = []
    salt = _question_line(question)
    with client.stream(question.prompt, max_tokens=MAX_TOKENS, temperature=0, cache_salt=salt) as stream:
        for delta in stream:
            arrivals.append(monotonic() - sent_at)
            console.print(delta.text.strip(), end=" ", markup=False)
    is_right = stream.completion.text.strip() == question.answer
    console.print("[green]✓[/green]" if is_right else f"[red]✗ it is {question.answer}[/red]")
    return Answer(is_right, stream.completion, arrivals[0], arrivals[-1])


def _question_line(question: DemoQuestion) -> str:
    return question.prompt.rstrip().splitlines()[-2].removeprefix("Question: ")


def _excerpt(prompt: str) -> str:
    return f"{prompt[:150]} ... {prompt[-60:]}" if len(prompt) > 220 else prompt


def _summary(answers: list[Answer]) -> Table:
    completions = [answer.completion for answer in answers]
    transfers = [completion.transfer for completion in completions if completion.transfer is not None]
    num_bytes = sum(transfer.num_bytes for transfer in transfers)
    seconds = sum(transfer.seconds for transfer in transfers)
    lanes = ", ".join(sorted({transfer.lanes for transfer in transfers}))
    between = [
        (answer.last_at - answer.first_at) / (len(answer.completion.token_ids) - 1)
        for answer in answers
        if len(answer.completion.token_ids) > 1
    ]
    table = Table(show_header=True, header_style="bold")
    table.add_column("")
    table.add_column("per request", justify="right")
    table.add_column("all", justify="right")

    def counts(name: str, values: list[int]) -> None:
        table.add_row(name, f"{median(values):,.0f}", f"{sum(values):,}")

    counts("prompt tokens", [completion.usage.prompt_tokens for completion in completions])
    counts("blocks pulled", [transfer.num_blocks for transfer in transfers])
    counts("bytes pulled", [transfer.num_bytes for transfer in transfers])
    counts("GETs", [transfer.num_gets for transfer in transfers])
    pull_ms = median(transfer.seconds for transfer in transfers) * 1e3
    table.add_row("pull time", f"{pull_ms:.2f} ms", f"{seconds * 1e3:.2f} ms")
    table.add_row("pull bandwidth", "", f"{num_bytes / seconds / NANOSECONDS:.2f} GB/s")
    table.add_row("transport", "", lanes)
    table.add_row("TTFT", f"{median(answer.first_at for answer in answers) * 1e3:.1f} ms", "")
    table.add_row("TPOT", f"{median(between) * 1e3:.1f} ms", "")
    return table
