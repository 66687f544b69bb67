"""The virtual Slurm of tests/slurm, for these tests as well."""

from tests.slurm.conftest import cluster

__all__ = ["cluster"]
