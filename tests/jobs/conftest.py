"""Fixtures of the virtual Slurm of tests/slurm."""

from tests.slurm.conftest import cluster

__all__ = ["cluster"]
