"""`pdengine generate`: one request from the command line."""

from contextlib import ExitStack

import click

from pdengine.cli.cluster import Cluster
from pdengine.cli.options import errors_in_one_line, keys_option
from pdengine.client import Choice, Client, Completion
from pdengine.client.async_client import DEFAULT_ADDRESS
from pdengine.client.client import Stream
from pdengine.client.results import PromptLike
from pdengine.models.hub import resolve_model
from pdengine.transport.messages import Usage


@click.command()
@click.argument("prompt")
@click.option("--router", "router_address", metavar="ADDRESS", help=f"A running router.  [{DEFAULT_ADDRESS}]")
@click.option(
    "--model",
    metavar="NAME_OR_DIR",
    help="Instead of a running router: start one with this checkpoint for the one request.",
)
@keys_option
@click.option("--revision", help="With --model: branch, tag or commit of a model on the hub.")
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample among the k likeliest; 0: all.")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample among the likeliest that together have this probability.",
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Sample among those with at least this share of the likeliest one's probability.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End where TEXT comes up; may be given again.")
@click.option(
    "--logprobs",
    type=int,
    metavar="NUMBER",
    help="Print the log probability of each token, and of so many of the likeliest ones.",
)
@click.option("-n", "num_answers", type=int, metavar="NUMBER", default=1, help="Answers to write.  [1]")
@click.option(
    "--priority", type=int, default=0, show_default=True, help="The lower, the earlier it is served."
)
@click.option(
    "--cache-salt",
    default="",
    help="Share the KV cache of the prompt only with requests of the same salt.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the checkpoint's chat template.")
@click.option(
    "--stream/--no-stream",
    default=True,
    show_default=True,
    help="Print tokens as they come; several answers are printed whole, one after the other.",
)
def generate(
    prompt: str,
    router_address: str | None,
    keys: str | None,
    model: str | None,
    revision: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    stop: tuple[str, ...],
    logprobs: int | None,
    num_answers: int,
    priority: int,
    cache_salt: str,
    chat: bool,
    stream: bool,
) -> None:
    """Print the answer to PROMPT, and on stderr how many tokens it took."""
    if router_address is not None and model is not None:
        raise click.UsageError("--router and --model exclude each other")
    question: PromptLike = [{"role": "user", "content": prompt}] if chat else prompt
    with errors_in_one_line(), ExitStack() as stack:
        if model is not None:
            directory = resolve_model(model, revision=revision)
            cluster = stack.enter_context(Cluster(directory, roles=["unified"], quiet=True))
            cluster.wait_ready()
            router_address = cluster.client_address
        client = stack.enter_context(
            Client(router_address or DEFAULT_ADDRESS, keys=None if model else keys or None)
        )
        try:
            answer = client.stream(
                question,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                stop=stop,
                logprobs=logprobs,
                n=num_answers,
                priority=priority,
                cache_salt=cache_salt,
            )
            print_answers(stack.enter_context(answer), as_they_come=stream and num_answers == 1)
        except ValueError as error:  # text that is not Unicode, a number beyond 64 bits
            raise click.ClickException(str(error)) from error


def print_answers(answer: Stream, *, as_they_come: bool) -> None:
    for delta in answer:
        if as_they_come:
            click.echo(delta.text, nl=False)
    if as_they_come:
        click.echo()
        print_logprobs(answer.completion.choices[0])
    else:
        print_choices(answer.completion)
    click.echo(usage_line(answer.completion.usage), err=True)


def print_choices(completion: Completion) -> None:
    """The text of the only answer, or of each under a line with its number."""
    for choice in completion.choices:
        if len(completion.choices) > 1:
            click.echo(f"--- answer {choice.index + 1} of {len(completion.choices)}")
        click.echo(choice.text)
        print_logprobs(choice)


def print_logprobs(choice: Choice) -> None:
    """A line for each token: its id, log probability and rank, and the likeliest tokens there."""
    for token_id, token in zip(choice.token_ids, choice.logprobs or (), strict=False):
        top = ", ".join(f"{other} {logprob:.3f}" for other, logprob in token.top)
        line = f"{token_id:>8} {token.logprob:>9.3f}  rank {token.rank}"
        click.echo(f"{line}  top {top}" if top else line)


def usage_line(usage: Usage) -> str:
    """Tokens read and written, for people."""
    cached = f" ({usage.cached_tokens} of them cached)" if usage.cached_tokens else ""
    return f"{usage.prompt_tokens} prompt tokens{cached}, {usage.completion_tokens} answer tokens"
