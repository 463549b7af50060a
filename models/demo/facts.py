"""Facts in plain English, and questions about them, for the demo checkpoint.

The prompts of one call share the whole list of facts as a prefix, so they also exercise a prefix cache.
"""

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pdengine.models.demo.words import COLOURS, NAMES, OBJECTS, PLACES

MAX_FACTS = 160
"""So many facts and a question fit into the context of 2 048 tokens, whatever their wording."""

FACT_WORDINGS = (
    "The {place} of {name} holds {thing}.",
    "In the {place} of {name} there is {thing}.",
    "Inside {name}'s {place} is {thing}.",
)

QUESTION_WORDINGS = (
    "What does the {place} of {name} hold?",
    "What is in the {place} of {name}?",
    "What is inside {name}'s {place}?",
)


@dataclass(frozen=True)
class Fact:
    """Who keeps what where: the locker (place) of Amber (name) holds a red violin (thing)."""

    name: str
    place: str
    thing: str


@dataclass(frozen=True)
class DemoQuestion:
    """A prompt for the demo checkpoint and its only right answer.

    The greedy completion is a space, the answer, and the end-of-text token.
    """

    prompt: str
    answer: str
    name: str


def checkpoint_directory() -> Path:
    """The directory of the demo checkpoint that is installed with the package."""
    return Path(__file__).resolve().parent / "checkpoint"


def make_facts(seed: int, num_facts: int) -> list[Fact]:
    """Draws facts; no two share both name and place, and no two have the same thing.

    Raises:
        ValueError: if `num_facts` is not from 1 to `MAX_FACTS`.
    """
    if not 1 <= num_facts <= MAX_FACTS:
        raise ValueError(f"num_facts must be from 1 to {MAX_FACTS}, not {num_facts}")
    rng = random.Random(seed)
    owners = rng.sample(list(product(NAMES, PLACES)), num_facts)
    things = rng.sample(list(product(COLOURS, OBJECTS)), num_facts)
    return [
        Fact(name, place, f"{indefinite_article(colour)} {colour} {item}")
        for (name, place), (colour, item) in zip(owners, things, strict=True)
    ]


def demo_questions(seed: int, num_facts: int) -> list[DemoQuestion]:
    """The same list of facts, followed by a question about each one of them: one prompt per fact.

    Raises:
        ValueError: if `num_facts` is not from 1 to `MAX_FACTS`.
    """
    facts = make_facts(seed, num_facts)
    rng = random.Random(seed)
    told_facts = "\n".join(
        rng.choice(FACT_WORDINGS).format(name=fact.name, place=fact.place, thing=fact.thing) for fact in facts
    )
    questions = [rng.choice(QUESTION_WORDINGS).format(name=fact.name, place=fact.place) for fact in facts]
    return [
        DemoQuestion(f"{told_facts}\nQuestion: {question}\nAnswer:", fact.thing, fact.name)
        for fact, question in zip(facts, questions, strict=True)
    ]


def indefinite_article(word: str) -> str:
    """`an` before a vowel letter, else `a`; right for every colour of the demo."""
    return "an" if word[0] in "aeiou" else "a"
