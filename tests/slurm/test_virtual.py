"""The virtual Slurm that other tests use."""

from pathlib import Path

import pytest

from tests.slurm.virtual import Cluster

pytestmark = pytest.mark.e2e


def test_two_nodes_of_eight_gpus_each(cluster: Cluster, tmp_path: Path):
    message = cluster.run(
        "srun", "-N2", "--gpus-per-node=2", "bash", "-c", "echo $(hostname) $SLURM_GPUS_ON_NODE"
    )
    assert sorted(message.split("\n")) == [f"{cluster.node(1)} 2", f"{cluster.node(2)} 2"]


def test_a_job_that_does_not_fit_is_refused(cluster: Cluster):
    assert cluster.tried("sbatch", "--test-only", "-N2", "--gpus-per-node=8", "--wrap=true").returncode == 0
    for too_much in ("-N3", "--gpus-per-node=16"):
        assert cluster.tried("sbatch", "--test-only", too_much, "--wrap=true").returncode != 0
