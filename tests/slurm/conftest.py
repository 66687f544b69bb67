"""The virtual Slurm that all Slurm tests of a process share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.virtual import Cluster, clone, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm of two virtual nodes; skips where none can run."""
    yield from virtual_cluster()


def virtual_cluster(nodes: int = 2, net: str = "uts") -> Iterator[Cluster]:
    """A separate cluster, which ends with its user."""
    reason = missing(net)
    if reason is not None:
        pytest.skip(reason)
    # Not under pytest's own folder: the path of a socket has at most 108 characters.
    path = Path(tempfile.mkdtemp(prefix="slurm"))
    made = None
    try:
        made = Cluster(path, nodes, net)
        yield made
    finally:
        if made is not None:
            made.down()
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def submit_from(tmp_path: Path) -> Path:
    """A clone to submit from."""
    return clone(tmp_path / "clone")
